"""Turns records into immutable segments, and segments into one file.

A segment is built in memory, written, fsynced and renamed, then listed in the manifest: from
then on its steps are *committed* and no later accident can touch them. Small segments are merged
into larger ones, as a log-structured store does, so that a week's run has hundreds of files.
"""

from __future__ import annotations

import dataclasses
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from normuon_lens.errors import RunError
from normuon_lens.runfile.claim import LOCK, lock, owner_of, survey
from normuon_lens.runfile.flaws import flaws_of
from normuon_lens.runfile.guard import MAX_LINKS, open_guarded
from normuon_lens.runfile.manifest import FINISHED, NAME, Entry, Manifest, write_durably
from normuon_lens.runfile.pack import await_ranks, pack_in_place
from normuon_lens.runfile.schema import LIBVER, Event, Matrices, Shard, parts_of, to_json
from normuon_lens.runfile.segment import Segment, read_segment, write_segment

COMMIT_SECONDS = 2.0
COMMIT_BYTES = 16 << 20
MERGE_FAN_IN = 16
"""As many neighbouring segments of one level become one of the next."""
MERGE_LIMIT = 64 << 20
"""Fewer are merged as soon as they exceed this many bytes; beyond half of it a segment is left as
it is. So no recording has more files than its bytes over half of this, and some."""
RESERVE, RESERVE_BYTES = "reserve", 64 << 10
"""A file given up when recording fails: a full disk then has room to say that it is full."""


class Closed(NamedTuple):
    """What a closed recording left behind: its path, size in bytes, steps, and a remark."""

    path: Path
    bytes: int
    steps: int
    remark: str


class Writer:
    """Writes one recording; the only code that writes run files.

    Parameters
    ----------
    path : Path
        Where the finished recording shall lie, such as ``runs/x.h5``.
    metadata : mapping
        What describes the run, at least ``optimizer`` (class name). JSON-serialisable. With
        ``job``, of ``id`` and ``restart``, what an earlier start of the same job recorded is
        resumed unasked.
    matrices : Matrices
        The table of matrices.
    shard : Shard, optional
        Record as one of several ranks, each with a writer of its own, what this one has of the
        matrices. The lead opens first, without an attempt, the others with that of the lead.
    resume : bool
        Append to the recording at `path`, finished or interrupted, instead of refusing.
    store : {"float32", "float16"}
        How full matrices are kept; float16 with one float32 scale a matrix and step.
    compress : bool
        Shuffle and gzip the packed file.
    commit_seconds, commit_bytes : float, int
        A commit happens when either is reached.
    apart : bool
        Pack in a forked process: a disk that refuses may make HDF5 crash there. Only where this
        process has no threads.

    Attributes
    ----------
    last_step : int
        The last step that was added; after opening, that of the recording resumed, or 0. Of
        several ranks only the lead looks what is resumed.
    committed : int
        The last step that is committed; 0 if there is none.
    attempt : int or None
        The how many-th start of a recording of several ranks this is; None for one process.

    Raises
    ------
    RunError
        If `path` exists already, another trainer records there, the folder cannot be written,
        or the recording to resume is of other matrices. Everything is then as it was before.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Any],
        matrices: Matrices,
        *,
        shard: Shard | None = None,
        resume: bool = False,
        store: str = "float32",
        compress: bool = False,
        commit_seconds: float = COMMIT_SECONDS,
        commit_bytes: int = COMMIT_BYTES,
        apart: bool = False,
    ) -> None:
        self.path = path
        self._parts = parts_of(path)
        self._folder = self._parts
        self._run = to_json(metadata)
        self._job = metadata.get("job")
        self._matrices = matrices
        self._shard = shard
        self._resumed = resume
        self._store = store
        self._compress = compress
        self._commit_seconds = commit_seconds
        self._commit_bytes = commit_bytes
        self._apart = apart
        self._token = uuid.uuid4().hex[:8]
        self._count = 0
        self.last_step = 0
        self._era, self._newest = 0, 0
        self._kept: dict[str, tuple[int, int]] = {}
        self._dropped_before = 0
        self._locked = False
        self._found: Manifest | None = None
        self._clear()
        if len(matrices) > MAX_LINKS // 4:
            raise RunError(
                f"{path}: {len(matrices)} matrices are more than one recording can hold "
                f"({MAX_LINKS // 4}); choose some with include= or exclude="
            )
        try:
            self._manifest = self._claim()
            self.committed = self.last_step
            # A first segment without steps: readers know the run and its matrices from the start.
            self._commit()
        except RunError:  # it is somebody else's: nothing of ours is there yet
            raise
        except Exception as error:
            self.discard()
            if not isinstance(error, OSError):
                raise
            raise RunError(
                f"{path}: cannot record there ({error.strerror or error}); "
                "choose a folder that can be written"
            ) from None

    @property
    def attempt(self) -> int | None:
        """The how many-th start of a recording of several ranks this is; None for one process."""
        return self._shard.attempt if self._shard else None

    # -- records -----------------------------------------------------------------------------

    def step(
        self,
        step: int,
        time: float,
        *,
        scalars: Mapping[str, float],
        norms: Mapping[str, np.ndarray],
        void: bool = False,
    ) -> None:
        """Add one step.

        Parameters
        ----------
        step : int
            Optimizer step, counted from 1.
        time : float
            Unix time in seconds when the step ended.
        scalars : mapping of str to float
            Loss, learning rate and whatever else was logged.
        norms : mapping of str to ndarray of shape (Σm,)
            Row norms of all matrices by stage; a stage left out is NaN in this step. Of a rank:
            of its own neurons, (shard.total(stage),).
        void : bool
            Whether the step moved nothing.

        Raises
        ------
        ValueError
            If there are more or fewer norms than neurons.
        """
        rows = {stage: np.asarray(row, np.float32) for stage, row in norms.items()}
        for stage, row in rows.items():
            if row.shape != (self._width(stage),):
                raise ValueError(
                    f"{row.size} norms of stage {stage} for {self._width(stage)} neurons"
                )
        if self._newest and step <= self._newest:
            self._era += 1
        self._newest = step
        self._steps.append((step, time, void, self._era))
        self.last_step = step
        self._scalars.append(dict(scalars))
        self._norms.append(rows)
        self._bytes += 64 + sum(row.nbytes for row in self._norms[-1].values())

    def spectra(
        self,
        stage: str,
        step: int,
        sigma: np.ndarray,
        floor: np.ndarray,
        *,
        weight_norm: np.ndarray | None = None,
        decay: np.ndarray | None = None,
        of: Sequence[int] | None = None,
    ) -> None:
        """Add the singular values of all matrices at one step, after the step itself.

        Parameters
        ----------
        sigma : ndarray of shape (Σk,)
            Descending within each matrix; NaN where none could be taken.
        floor : ndarray of shape (M,)
            Below which a singular value of this matrix is noise, in the unit of sigma.
        weight_norm : ndarray of shape (M,), optional
            Frobenius norms of the weights before the step.
        decay : ndarray of shape (M,), optional
            lr·wd of the step, taken out of the update where the decay is decoupled.
        of : sequence of int, optional
            Of a rank: the matrices that are given, all others being other ranks'. The arrays
            have entries for these only, in this order.
        """
        count = len(self._matrices) if of is None else len(of)
        unknown = np.full(count, np.nan)
        record = {
            "sigma": np.asarray(sigma, np.float64),
            "floor": np.asarray(floor, np.float64),
            "weight_norm": unknown if weight_norm is None else np.asarray(weight_norm, float),
            "decay": unknown if decay is None else np.asarray(decay, float),
        }
        if self._shard:
            record["matrix"] = np.arange(count) if of is None else np.asarray(of, np.int64)
            record["step"] = np.full(count, step, np.int64)
            record["era"] = np.full(count, self._era, np.int64)
        else:
            record["step"] = np.asarray(step, np.int64)
        for name, value in record.items():
            self._append(f"{'samples' if self._shard else 'spectra'}/{stage}/{name}", value)

    def matrix(self, stage: str, index: int, step: int, values: np.ndarray) -> None:
        """Add one full matrix of shape (m, n): the `index`-th of the table at one step."""
        path = f"updates/{stage}/{index:03d}"
        stored = np.asarray(values, np.float32)
        if self._store == "float16":
            # Without a scale of its own a small update would vanish below float16's range.
            largest = float(np.abs(stored).max(initial=0.0))
            scale = largest if np.isfinite(largest) and largest > 0 else 1.0
            stored = (stored / np.float32(scale)).astype(np.float16)
            self._append(f"{path}_scale", np.float32(scale))
        self._append(path, stored)
        self._append(f"{path}_step", np.int64(step))
        if self._shard:
            self._append(f"{path}_era", np.int64(self._era_of(path, step)))

    def event(self, step: int, kind: str, text: str) -> None:
        """Add something that happened to the recording."""
        self._events.append(Event(step, kind, text))

    @property
    def untouched(self) -> bool:
        """Whether nothing was added since the opening."""
        return self._count == 1 and not (self._bytes or self._events)

    def dropped(self, samples: int) -> None:
        """Set how many samples were lost since this writer began: recording could not keep up."""
        self._manifest.dropped = self._dropped_before + samples

    # -- commits -----------------------------------------------------------------------------

    def tick(self) -> None:
        """Commit if it is time; call it often."""
        due = time.monotonic() - self._committed >= self._commit_seconds
        if self._bytes >= self._commit_bytes or (due and (self._bytes or self._events)):
            self.commit()

    def commit(self) -> None:
        """Make all records so far durable and visible; OSError when the disk refuses."""
        if self._bytes or self._events:
            self._commit()
            self._merge()

    def close(self, status: str = FINISHED, *, pack: bool = True) -> Closed:
        """Commit, then pack the parts into the file at :attr:`path`; a rank's own stay as they are.

        Parameters
        ----------
        status : str
            ``"finished"``, or why the recording ends.
        pack : bool
            Leave the parts as they are if False.

        Returns
        -------
        Closed
            A rank's bytes and steps are its own.
        """
        self.commit()
        self._manifest.status = status
        # From now on somebody else may pack: the list of segments stays as it is.
        self._manifest.save(self._folder)
        remark = self._pack(status) if pack and not self._shard else ""
        self._unlock()
        steps = sum(entry.rows for entry in self._manifest.segments)
        return Closed(self.path, self._size(), steps, remark)

    def merge(self, seconds: float) -> Closed:
        """Pack what all ranks recorded; for the lead to call once it is closed.

        Parameters
        ----------
        seconds : float
            How long to wait for ranks that are still recording.

        Returns
        -------
        Closed
            Of the packed file; with a remark, and of this rank, if the parts are kept.
        """
        own = Closed(
            self.path, self._size(), sum(entry.rows for entry in self._manifest.segments), ""
        )
        shard = self._shard
        if shard is None:
            raise RunError(f"{self.path}: not recorded by several ranks")
        if reason := await_ranks(self.path, shard, seconds):
            return own._replace(remark=f"{reason}; later: normuon-lens pack {self.path}")
        if not lock(self._parts):
            return own._replace(remark="kept in parts: another process is there just now")
        try:
            if remark := pack_in_place(self.path, compress=self._compress, apart=self._apart):
                return own._replace(remark=remark)
        finally:
            (self._parts / LOCK).unlink(missing_ok=True)
        with open_guarded(self.path) as file:
            steps = len(np.unique(file["steps/step"]))  # an attempt may repeat those of another
            return Closed(self.path, self.path.stat().st_size, steps, "")

    def abandon(self, reason: str) -> None:
        """Stop recording after a failure; what is committed stays readable.

        Parameters
        ----------
        reason : str
            For the run's status, which also says how far it came and what is lost.
        """
        lost = len(self._steps)
        text = f"; {lost} step{'s' * (lost > 1)} after it {'are' if lost > 1 else 'is'} lost"
        self._manifest.status = f"stopped at step {self.committed}: {reason}{text if lost else ''}"
        # The disk that refused a segment may refuse this too; readers then see "interrupted".
        with suppress(OSError):
            (self._folder / RESERVE).unlink(missing_ok=True)
            self._manifest.save(self._folder)
        if not (self._folder / NAME).exists():  # somebody removed the recording
            self.committed = 0
        self._unlock()

    def discard(self) -> None:
        """Undo the opening: a new recording leaves nothing, a resumed one is as it was found."""
        with suppress(OSError):
            if self._found:
                self._found.save(self._folder)
            elif self._locked:
                (self._folder / NAME).unlink(missing_ok=True)
            for mine in self._folder.glob(f"segment-{self._token}-*"):
                mine.unlink()
        self._unlock()

    # -- how ---------------------------------------------------------------------------------

    def _commit(self) -> None:
        segment = self._take()
        steps = [row[0] for row in self._steps]
        entry = self._add(self._image([segment]), segment.rows, steps, level=0)
        self._manifest.segments.append(entry)
        self._manifest.save(self._folder)
        self.committed = entry.last if steps else self.committed
        self._clear()

    def _unlock(self) -> None:
        with suppress(OSError):
            if self._locked:
                (self._folder / RESERVE).unlink(missing_ok=True)
                (self._folder / LOCK).unlink(missing_ok=True)
            self._folder.rmdir()  # only if nothing was recorded
            self._parts.rmdir()

    def _claim(self) -> Manifest:
        """Create or take over the folder to write to; never an existing recording by accident."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        manifest = None
        if self._shard is None or self._shard.attempt is None:
            manifest = self._take_place()
        if self._shard:
            self._folder = self._parts / self._shard.folder
            self._parts.mkdir(exist_ok=True)
            try:
                self._folder.mkdir()
            except FileExistsError:
                raise RunError(
                    f"{self._folder}: is there already; choose another path, or delete it"
                ) from None
        if not lock(self._folder):
            raise RunError(f"{self.path}: another process records there just now")
        self._locked = True
        if self._shard and owner_of(self._parts):
            self.discard()
            raise RunError(f"{self.path}: is being packed just now; try again")
        _allocate(self._folder / RESERVE, RESERVE_BYTES)
        segments = list(manifest.segments) if manifest else []
        return Manifest(segments=segments, dropped=self._dropped_before)

    def _take_place(self) -> Manifest | None:
        """Learn what is there and may be appended to; choose the attempt of several ranks."""
        sharded = self._shard is not None
        found = survey(self.path, self._matrices, self._job, resume=self._resumed, sharded=sharded)
        self._resumed, self.last_step, self._found = found.resumed, found.last_step, found.manifest
        attempt = self._job["restart"] if self._job else 0
        if self._shard:
            attempt = found.attempts
            self._shard = dataclasses.replace(self._shard, attempt=attempt)
        else:
            self._dropped_before = found.dropped
        if found.attempts or self.path.exists() or (found.manifest and found.manifest.segments):
            text = f"restarted by torchrun: attempt {attempt}"
            text = text if found.restarted else "recording resumed"
            self.event(found.last_step, "resumed", text)
        return found.manifest

    def _width(self, stage: str) -> int:
        return self._shard.total(stage) if self._shard else self._matrices.total_rows

    def _era_of(self, path: str, step: int) -> int:
        """Return how often the training has gone back at a matrix whose step may still come."""
        era, last = self._kept.get(path, (0, 0))
        gone_back = step < self._newest or (era == self._era and step <= last)
        self._kept[path] = self._era + gone_back, step
        return self._era + gone_back

    def _clear(self) -> None:
        self._steps: list[tuple[int, float, bool, int]] = []
        self._scalars: list[dict[str, float]] = []
        self._norms: list[dict[str, np.ndarray]] = []
        self._lists: dict[str, list[Any]] = {}
        self._events: list[Event] = []
        self._bytes = 0
        self._committed = time.monotonic()

    def _append(self, path: str, value: Any) -> None:
        self._lists.setdefault(path, []).append(value)
        self._bytes += value.nbytes

    def _take(self) -> Segment:
        segment = Segment(events=self._events)
        steps, times, voids, eras = zip(*self._steps, strict=True) if self._steps else [()] * 4
        segment.arrays["steps/step"] = np.array(steps, dtype=np.int64)
        segment.arrays["steps/time"] = np.array(times, dtype=np.float64)
        segment.arrays["steps/void"] = np.array(voids, dtype=np.uint8)
        if self._shard:
            segment.arrays["steps/era"] = np.array(eras, dtype=np.int64)
        for name in sorted({name for row in self._scalars for name in row}):
            segment.scalars[name] = np.array([row.get(name, np.nan) for row in self._scalars])
        for stage in sorted({stage for row in self._norms for stage in row}):
            missing = np.full(self._width(stage), np.nan, dtype=np.float32)
            rows = [row.get(stage, missing) for row in self._norms]
            segment.arrays[f"neurons/{stage}"] = np.stack(rows)
        for path, values in self._lists.items():
            joined = np.concatenate if path.startswith("samples/") else np.stack
            segment.arrays[path] = joined(values)
        return segment

    def _image(self, segments: Sequence[Segment]) -> bytes:
        """Build an HDF5 file in memory: HDF5 itself never touches the disk here."""
        name = f"{self._token}.h5"
        with h5py.File(name, "x", driver="core", backing_store=False, libver=LIBVER) as file:
            write_segment(file, self._run, self._matrices, segments, shard=self._shard)
            file.flush()
            image: bytes = file.id.get_file_image()
        return image

    def _add(self, image: bytes, rows: int, steps: Sequence[int], level: int) -> Entry:
        self._count += 1
        name = f"segment-{self._token}-{self._count:06d}.h5"
        write_durably(self._folder / name, image)
        first, last = (min(steps), max(steps)) if steps else (0, 0)
        return Entry(name, rows, first, last, len(image), level)

    def _merge(self) -> None:
        """Merge the newest segments while they are many or large together."""
        while tail := self._mergeable():
            try:
                with ExitStack() as stack:
                    files = [stack.enter_context(self._open(entry)) for entry in tail]
                    segments = [read_segment(file) for file in files]
                    for file, entry, segment in zip(files, tail, segments, strict=True):
                        path = self._folder / entry.file
                        for flaw in flaws_of(file, path, segment.arrays, self._matrices):
                            raise RunError(flaw.text)
                    image = self._image(segments)
                steps = [step for entry in tail if entry.rows for step in (entry.first, entry.last)]
                rows = sum(entry.rows for entry in tail)
                merged = self._add(image, rows, steps, tail[0].level + 1)
            except Exception:
                # Somebody damaged an old segment: its own loss, not that of what is yet to come.
                return
            self._manifest.segments[-len(tail) :] = [merged]
            self._manifest.save(self._folder)
            for entry in tail:
                (self._folder / entry.file).unlink(missing_ok=True)

    def _mergeable(self) -> list[Entry]:
        """Return the newest segments of one level if they are to become one, else nothing."""
        tail: list[Entry] = []
        for entry in reversed(self._manifest.segments):
            if entry.bytes > MERGE_LIMIT // 2 or entry.level != self._manifest.segments[-1].level:
                break
            tail.insert(0, entry)
            if len(tail) == MERGE_FAN_IN or sum(entry.bytes for entry in tail) > MERGE_LIMIT:
                return tail
        return []

    def _open(self, entry: Entry) -> h5py.File:
        return h5py.File(self._folder / entry.file, "r", locking=False)

    def _pack(self, status: str) -> str:
        """Make one file of the parts and remove them; return a remark if that was not possible."""
        if self.path.exists() and not self._resumed:
            return f"kept in parts: somebody else created {self.path} meanwhile"
        return pack_in_place(self.path, status, compress=self._compress, apart=self._apart)

    def _size(self) -> int:
        if self._folder.exists():
            return sum(entry.bytes for entry in self._manifest.segments)
        return self.path.stat().st_size


def _allocate(path: Path, size: int) -> None:
    """Write a file that takes all of its room now; noise, which no file system compresses."""
    with path.open("wb") as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
