"""Turns records into immutable segments, and segments into one file.

A segment is built in memory, written, fsynced and renamed, then listed in the manifest: from
then on its steps are *committed* and no later accident can touch them. Small segments are merged
into larger ones, as a log-structured store does, so that a week's run has hundreds of files.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from normuon_lens.errors import RunError
from normuon_lens.runfile.guard import damage, open_guarded
from normuon_lens.runfile.manifest import (
    FINISHED,
    NAME,
    Entry,
    Manifest,
    process_lives,
    replace_durably,
    write_durably,
)
from normuon_lens.runfile.schema import LIBVER, Event, Matrices, parts_of, to_json
from normuon_lens.runfile.segment import Segment, read_matrices, read_segment, write_segment

COMMIT_SECONDS = 2.0
COMMIT_BYTES = 16 << 20
MERGE_FAN_IN = 16
"""As many neighbouring segments of one level become one of the next."""
MERGE_LIMIT = 64 << 20
"""Fewer are merged as soon as they exceed this many bytes; beyond half of it a segment is left as
it is. So no recording has more files than its bytes over half of this, and some."""
PACK_LIMIT = 16 << 30
"""A recording beyond this many bytes stays in parts on close."""
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
        What describes the run, at least ``optimizer`` (class name). JSON-serialisable.
    matrices : Matrices
        The table of matrices.
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
        The last step that was added; after opening, that of the recording resumed, or 0.
    committed : int
        The last step that is committed; 0 if there is none.

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
        resume: bool = False,
        store: str = "float32",
        compress: bool = False,
        commit_seconds: float = COMMIT_SECONDS,
        commit_bytes: int = COMMIT_BYTES,
        apart: bool = False,
    ) -> None:
        self.path = path
        self._parts = parts_of(path)
        self._run = to_json(metadata)
        self._matrices = matrices
        self._resumed = resume
        self._store = store
        self._compress = compress
        self._commit_seconds = commit_seconds
        self._commit_bytes = commit_bytes
        self._apart = apart
        self._token = uuid.uuid4().hex[:8]
        self._count = 0
        self.last_step = 0
        self._dropped_before = 0
        self._locked = False
        self._found: Manifest | None = None
        self._clear()
        try:
            self._manifest = self._claim()
            self.committed = self.last_step
            if resume and (self._manifest.segments or path.exists()):
                self.event(self.last_step, "resumed", "recording resumed")
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
            Row norms of all matrices by stage; a stage left out is NaN in this step.
        void : bool
            Whether the step moved nothing.
        """
        self._steps.append((step, time, void))
        self.last_step = step
        self._scalars.append(dict(scalars))
        self._norms.append({stage: np.asarray(row, np.float32) for stage, row in norms.items()})
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
    ) -> None:
        """Add the singular values of all matrices at one step.

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
        """
        unknown = np.full(len(self._matrices), np.nan)
        record = {
            "step": np.int64(step),
            "sigma": np.asarray(sigma, np.float64),
            "floor": np.asarray(floor, np.float64),
            "weight_norm": unknown if weight_norm is None else np.asarray(weight_norm, float),
            "decay": unknown if decay is None else np.asarray(decay, float),
        }
        for name, value in record.items():
            self._append(f"spectra/{stage}/{name}", value)

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
        """Commit, then pack the parts into the file at :attr:`path`.

        Parameters
        ----------
        status : str
            ``"finished"``, or why the recording ends.
        pack : bool
            Leave the parts as they are if False.

        Returns
        -------
        Closed
        """
        self._manifest.status = status
        self._commit()
        self._merge()
        remark = self._pack(status) if pack else ""
        self._unlock()
        steps = sum(entry.rows for entry in self._manifest.segments)
        return Closed(self.path, self._size(), steps, remark)

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
            (self._parts / RESERVE).unlink(missing_ok=True)
            self._manifest.save(self._parts)
        if not (self._parts / NAME).exists():  # somebody removed the recording
            self.committed = 0
        self._unlock()

    def discard(self) -> None:
        """Undo the opening: a new recording leaves nothing, a resumed one is as it was found."""
        with suppress(OSError):
            if self._found:
                self._found.save(self._parts)
            elif self._locked:
                (self._parts / NAME).unlink(missing_ok=True)
            for mine in self._parts.glob(f"segment-{self._token}-*"):
                mine.unlink()
        self._unlock()

    # -- how ---------------------------------------------------------------------------------

    def _commit(self) -> None:
        segment = self._take()
        steps = [step for step, _, _ in self._steps]
        entry = self._add(self._image([segment]), segment.rows, steps, level=0)
        self._manifest.segments.append(entry)
        self._manifest.save(self._parts)
        self.committed = entry.last if steps else self.committed
        self._clear()

    def _unlock(self) -> None:
        with suppress(OSError):
            if self._locked:
                (self._parts / RESERVE).unlink(missing_ok=True)
                (self._parts / "lock").unlink(missing_ok=True)
            self._parts.rmdir()  # only if nothing was recorded

    def _claim(self) -> Manifest:
        """Create or take over the folder of parts; never an existing recording by accident."""
        parts, path = self._parts, self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not self._resumed:
            raise RunError(
                f"{path}: exists already; choose another path, delete it, "
                "or append with resume=True"
            )
        if parts.exists():
            self._take_over()
        self._found = manifest = Manifest.load(parts)
        self._continue(manifest)
        parts.mkdir(exist_ok=True)
        self._lock()
        _allocate(parts / RESERVE, RESERVE_BYTES)
        segments = list(manifest.segments) if manifest else []
        return Manifest(segments=segments, dropped=self._dropped_before)

    def _take_over(self) -> None:
        lock = self._parts / "lock"
        owner = lock.read_text().split() if lock.exists() else []
        here = os.uname().nodename
        if len(owner) == 2 and (owner[0] != here or process_lives(int(owner[1]))):
            raise RunError(
                f"{self.path}: being recorded by process {owner[1]} on {owner[0]}; "
                "choose another path"
            )
        if not self._resumed:
            raise RunError(
                f"{self._parts}: remains of an interrupted recording; choose another path, "
                "delete it, or append with resume=True"
            )
        lock.unlink(missing_ok=True)
        for leftover in self._parts.glob("*.tmp"):
            leftover.unlink()

    def _lock(self) -> None:
        try:
            with (self._parts / "lock").open("x") as file:
                self._locked = True
                file.write(f"{os.uname().nodename} {os.getpid()}")
        except FileExistsError:
            raise RunError(f"{self.path}: another process records there just now") from None

    def _continue(self, manifest: Manifest | None) -> None:
        """Check that what is there is a recording of these matrices; learn how far it came."""
        if self.path.exists():
            with open_guarded(self.path) as file, damage(self.path):
                self._check_matrices(file)
                steps = file["steps/step"]
                self.last_step = int(steps[-1]) if len(steps) else 0
                self._dropped_before = int(file.attrs.get("dropped", 0))
        if manifest is None:
            return
        self._dropped_before = manifest.dropped
        recorded = [entry.last for entry in manifest.segments if entry.rows]
        self.last_step = recorded[-1] if recorded else self.last_step
        for path in [self._parts / entry.file for entry in manifest.segments[-1:]]:
            with open_guarded(path) as file, damage(path):
                self._check_matrices(file)

    def _check_matrices(self, file: h5py.File) -> None:
        if read_matrices(file) != self._matrices:
            raise RunError(f"{self.path}: a recording of other matrices; choose another path")

    def _clear(self) -> None:
        self._steps: list[tuple[int, float, bool]] = []
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
        steps, times, voids = zip(*self._steps, strict=True) if self._steps else ((), (), ())
        segment.arrays["steps/step"] = np.array(steps, dtype=np.int64)
        segment.arrays["steps/time"] = np.array(times, dtype=np.float64)
        segment.arrays["steps/void"] = np.array(voids, dtype=np.uint8)
        for name in sorted({name for row in self._scalars for name in row}):
            segment.scalars[name] = np.array([row.get(name, np.nan) for row in self._scalars])
        missing = np.full(self._matrices.total_rows, np.nan, dtype=np.float32)
        for stage in sorted({stage for row in self._norms for stage in row}):
            rows = [row.get(stage, missing) for row in self._norms]
            segment.arrays[f"neurons/{stage}"] = np.stack(rows)
        for path, values in self._lists.items():
            segment.arrays[path] = np.stack(values)
        return segment

    def _image(self, segments: Sequence[Segment]) -> bytes:
        """Build an HDF5 file in memory: HDF5 itself never touches the disk here."""
        name = f"{self._token}.h5"
        with h5py.File(name, "x", driver="core", backing_store=False, libver=LIBVER) as file:
            write_segment(file, self._run, self._matrices, segments)
            file.flush()
            image: bytes = file.id.get_file_image()
        return image

    def _add(self, image: bytes, rows: int, steps: Sequence[int], level: int) -> Entry:
        self._count += 1
        name = f"segment-{self._token}-{self._count:06d}.h5"
        write_durably(self._parts / name, image)
        first, last = (min(steps), max(steps)) if steps else (0, 0)
        return Entry(name, rows, first, last, len(image), level)

    def _merge(self) -> None:
        """Merge the newest segments while they are many or large together."""
        while tail := self._mergeable():
            try:
                with ExitStack() as stack:
                    files = [stack.enter_context(self._open(entry)) for entry in tail]
                    image = self._image([read_segment(file) for file in files])
                steps = [step for entry in tail if entry.rows for step in (entry.first, entry.last)]
                rows = sum(entry.rows for entry in tail)
                merged = self._add(image, rows, steps, tail[0].level + 1)
            except Exception:
                # Somebody damaged an old segment: its own loss, not that of what is yet to come.
                return
            self._manifest.segments[-len(tail) :] = [merged]
            self._manifest.save(self._parts)
            for entry in tail:
                (self._parts / entry.file).unlink(missing_ok=True)

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
        return h5py.File(self._parts / entry.file, "r", locking=False)

    def _pack(self, status: str) -> str:
        """Make one file of the parts and remove them; return a remark if that was not possible."""
        total = sum(entry.bytes for entry in self._manifest.segments)
        total += self.path.stat().st_size if self.path.exists() else 0
        free = shutil.disk_usage(self._parts).free
        if total > PACK_LIMIT:
            return f"kept in parts: {total >> 30} GiB, more than is packed into one file"
        if total * 1.2 + COMMIT_BYTES > free:
            return f"kept in parts: packing needs {total >> 20} MiB, {free >> 20} MiB are free"
        if self.path.exists() and not self._resumed:
            return f"kept in parts: somebody else created {self.path} meanwhile"
        temporary = self._parts / "packed.tmp"
        try:
            temporary.unlink(missing_ok=True)
            if self._apart:
                _in_a_fork(lambda: self._write_packed(temporary, status))
            else:
                self._write_packed(temporary, status)
            replace_durably(temporary, self.path)
            # Killed right here, the same steps lie in both places; a reader takes each step once.
            Manifest(status=status).save(self._parts)
        except Exception as error:  # a damaged segment may raise anything; the parts are kept
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            return f"kept in parts: {_reason(error)}"
        shutil.rmtree(self._parts, ignore_errors=True)
        return ""

    def _write_packed(self, temporary: Path, status: str) -> None:
        with ExitStack() as stack:
            files = [stack.enter_context(open_guarded(self.path))] if self.path.exists() else []
            files += [stack.enter_context(self._open(entry)) for entry in self._manifest.segments]
            segments = [read_segment(file) for file in files]
            packed = stack.enter_context(h5py.File(temporary, "x", libver=LIBVER))
            write_segment(
                packed, self._run, self._matrices, segments, packed=True, compress=self._compress
            )
            packed.attrs["status"] = np.bytes_(status.encode())
            packed.attrs["dropped"] = self._manifest.dropped
            packed.flush()

    def _size(self) -> int:
        if self._parts.exists():
            return sum(file.stat().st_size for file in self._parts.glob("*.h5"))
        return self.path.stat().st_size


def _in_a_fork(work: Callable[[], None]) -> None:
    """Do `work` in a forked process; RunError with the reason when it fails or crashes."""
    of, to = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except Exception as error:
            os.write(to, _reason(error).encode())
        finally:
            os._exit(1)
    os.close(to)
    with open(of, encoding="utf-8") as pipe:
        reason = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise RunError(f"the packed file could not be written ({reason or f'exit code {code}'})")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _allocate(path: Path, size: int) -> None:
    """Write a file that takes all of its room now; noise, which no file system compresses."""
    with path.open("wb") as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
