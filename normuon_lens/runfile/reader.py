"""Opens a recording, finished or still being made, as one :class:`Run`.

A run reads only what it is asked for. It merges its segments by step, takes the later record
where a resumed training repeated a step, reports a damaged segment and goes on without it, and
learns of new segments by :meth:`Run.refresh`.
"""

from __future__ import annotations

import difflib
import html
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from normuon_lens.errors import RunError
from normuon_lens.runfile.flaws import Flaw
from normuon_lens.runfile.manifest import INTERRUPTED, NAME, RECORDING, Manifest
from normuon_lens.runfile.rank_files import Handles, OutOfDate, RankSegment
from normuon_lens.runfile.ranks import Attempt, Ranks, read_ranks
from normuon_lens.runfile.schema import (
    STAGES,
    Event,
    Matrices,
    parts_of,
    printable,
    rank_folders,
)
from normuon_lens.runfile.segment import Segment, without_samples
from normuon_lens.runfile.source import Damage, File, Hole, Source, holes_of


class Spectra(NamedTuple):
    """Singular values of one matrix over the sampled steps.

    Attributes
    ----------
    steps : ndarray of shape (Ts,), int64
    sigma : ndarray of shape (Ts, k), float64
        Descending; NaN where a sample was dropped or the matrix was not finite.
    floor : ndarray of shape (Ts,), float64
        Below which a value is noise, same unit as sigma.
    weight_norm : ndarray of shape (Ts,), float64
        Frobenius norm of the weight before the step.
    """

    steps: np.ndarray
    sigma: np.ndarray
    floor: np.ndarray
    weight_norm: np.ndarray


def open_run(path: str | Path) -> Run:
    """Open the recording at `path`.

    Parameters
    ----------
    path : str or Path
        ``runs/x.h5``, whether it is finished, being recorded, or was interrupted. The folder
        ``runs/x.h5.parts`` is accepted too.

    Returns
    -------
    Run

    Raises
    ------
    RunError
        If there is no recording, or nothing in it can be read.
    """
    path = Path(path)
    if path.name.endswith(".parts"):
        path = path.with_name(path.name.removesuffix(".parts"))
    return Run(path)


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Return the recordings among `paths`; folders are searched one level deep.

    Parameters
    ----------
    paths : iterable of str or Path
        Run files, their ``.parts``, and folders. Among several paths (a shell's ``*``) those
        that are plainly something else are left out.

    Returns
    -------
    list of Path
        Each once, in the order given; what lies in a folder sorted by name. They are found by
        their names and signatures; whether they can be read is for :func:`open_run` to say.

    Raises
    ------
    RunError
        If a path does not exist, or no recording is among them.
    """
    given = [Path(path) for path in paths]
    found: list[Path] = []
    for path in given:
        if path.name.endswith(".parts"):
            path = path.with_name(path.name.removesuffix(".parts"))
        if not path.exists() and not parts_of(path).exists():
            raise RunError(f"{path}: no such file or folder")
        found += _runs_in(path) if path.is_dir() else [path]
    recordings = [path for path in found if _looks_like_a_run(path)]
    if not recordings and len(found) == 1:
        return found  # opening it says what it is instead
    if not recordings:
        raise RunError(
            f"{', '.join(map(str, given[:3]))}: no recordings there; record one with "
            "attach(...), or make three with: normuon-lens demo"
        )
    return list(dict.fromkeys(recordings))


def _runs_in(folder: Path) -> list[Path]:
    files = {path for path in folder.glob("*.h5") if path.is_file()}
    parts = {path.with_suffix("") for path in folder.glob("*.h5.parts") if path.is_dir()}
    return sorted(files | parts)


def _looks_like_a_run(path: Path) -> bool:
    return path.suffix == ".h5" or parts_of(path).exists() or h5py.is_hdf5(path)


class Run:
    """One recording: one optimizer in one training.

    Attributes
    ----------
    path : Path
        Where the recording lies, or will lie once it is finished.
    metadata : dict
        Optimizer class and hyper-parameters, model, versions, schedule, notes.
    table : Matrices
        The recorded matrices with their shapes and columns.
    steps : ndarray of shape (T,), int64
        Recorded optimizer steps, ascending, each once.
    times : ndarray of shape (T,), float64
        Unix time in seconds when each step ended.
    void : ndarray of shape (T,), bool
        Steps that moved nothing.
    scalars : dict of str to ndarray of shape (T,)
        What the training logged, float64, NaN where it logged nothing.
    status : str
        ``"recording"``, ``"finished"``, ``"interrupted"``, or why it stopped.
    dropped : int
        Samples lost because recording could not keep up.
    overlaps : int
        Steps recorded more than once (a resumed training); the last record counts.
    damaged : list of Damage
        Segments that could not be read.
    holes : list of Hole
        Recorded steps that lack what one of several ranks recorded, by rank, then by step; what
        is missing there is NaN.
    ranks : tuple of int
        The ranks that record, the lead first; () for a recording that is one file, or of one
        process.
    events : list of Event
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.status = RECORDING
        self.damaged: list[Damage] = []
        self._sources: list[Source] = []
        self._of_ranks: Ranks | None = None
        self._segments: dict[Path, RankSegment] = {}
        self._handles = Handles()
        self._distrusted: dict[Path, str] = {}
        self._alive: tuple[bool, ...] = ()
        self._stamp: object = None
        self._manifest: Manifest | None = None
        self.refresh()

    # -- what it is --------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The run's own name, or its file's."""
        return printable(str(self.metadata.get("name") or self.path.name.removesuffix(".h5")))

    @property
    def optimizer(self) -> str:
        """Class name of the optimizer of the matrices, such as ``"NorMuon"``."""
        return printable(str(self.metadata.get("optimizer", "unknown")))

    @property
    def matrices(self) -> list[str]:
        """Names of the recorded matrices, in model order."""
        return list(self.table.names)

    @property
    def stages(self) -> list[str]:
        """Stages with neuron norms or spectra, in optimizer order."""
        paths = {path for source in self._sources for path in source.paths}
        return [s for s in STAGES if f"neurons/{s}" in paths or f"spectra/{s}/sigma" in paths]

    @property
    def live(self) -> bool:
        """Whether more steps may come."""
        return self.status == RECORDING

    def shape(self, matrix: str) -> tuple[int, int]:
        """Return (m, n) of a matrix; RunError naming the closest if there is none."""
        found = self.table[self._index_of(matrix)]
        return found.m, found.n

    # -- numbers -----------------------------------------------------------------------------

    def neuron_norms(self, matrix: str, stage: str = "update") -> np.ndarray:
        """Row L2 norms of a matrix at every recorded step.

        Returns
        -------
        ndarray of shape (T, m), float32
            NaN in steps whose norms were not taken, ∞ where a norm was not finite.

        Raises
        ------
        RunError
            If the run has no such matrix or stage.
        """
        columns = self.table.rows(self._index_of(matrix))
        return self._over_steps(f"neurons/{stage}", columns)

    def all_neuron_norms(
        self, stage: str = "update", after: int = 0, until: int | None = None
    ) -> np.ndarray:
        """Row L2 norms of all matrices side by side, at the recorded steps beyond `after`.

        Parameters
        ----------
        stage : str
        after : int
        until : int, optional
            Last step wanted: a long history need not be in memory at once.

        Returns
        -------
        ndarray of shape (T', Σm), float32
            Rows as ``run.steps[run.steps > after]``, columns as ``run.table.rows(i)`` says.
        """
        return self._over_steps(f"neurons/{stage}", slice(None), after, until)

    def spectrum_steps(self, stage: str = "update") -> np.ndarray:
        """Return the sampled steps (Ts,) of a stage's spectra, ascending."""
        return self._sampled(f"spectra/{stage}/step")[0]

    def spectra(self, matrix: str, stage: str = "update") -> Spectra:
        """Singular values of a matrix at every sampled step.

        Raises
        ------
        RunError
            If the run has no such matrix, or no spectra of this stage.
        """
        i = self._index_of(matrix)
        return self._spectra(stage, self.table.sigmas(i), i, after=0)

    def all_spectra(
        self, stage: str = "update", after: int = 0, until: int | None = None
    ) -> Spectra:
        """Singular values of all matrices side by side, at the sampled steps beyond `after`.

        Parameters
        ----------
        stage : str
        after : int
        until : int, optional
            Last step wanted: a long history need not be in memory at once.

        Returns
        -------
        Spectra
            With sigma of shape (Ts, Σk), columns as ``run.table.sigmas(i)`` says, and floor and
            weight_norm of shape (Ts, M).
        """
        return self._spectra(stage, slice(None), slice(None), after, until)

    def spectrum(self, matrix: str, step: int, stage: str = "update") -> np.ndarray:
        """All min(m, n) singular values of a matrix at one sampled step, descending, float64.

        Raises
        ------
        RunError
            If the step was not sampled; the message names the nearest that was.
        """
        i = self._index_of(matrix)
        place = self._place_of(f"spectra/{stage}/step", step, f"spectrum of {matrix!r}")
        sigma: np.ndarray = self._gather(f"spectra/{stage}/sigma", [place], self.table.sigmas(i))[0]
        return sigma

    def update_steps(self, matrix: str, stage: str = "update") -> np.ndarray:
        """Return the steps (Tm,) at which the full matrix was kept, ascending."""
        return self._sampled(f"updates/{stage}/{self._index_of(matrix):03d}_step")[0]

    def update(self, matrix: str, step: int, stage: str = "update") -> np.ndarray:
        """Return the full matrix (m, n) at one step, float32.

        Raises
        ------
        RunError
            If it was not kept at this step; the message names the nearest that was.
        """
        path = f"updates/{stage}/{self._index_of(matrix):03d}"
        source, row = self._place_of(f"{path}_step", step, f"full matrix of {matrix!r}")
        values = source.read(path, (row,)).astype(np.float32)
        if f"{path}_scale" in source.index:
            values *= source.index[f"{path}_scale"][row]
        return values

    def stored_dtype(self, matrix: str, step: int, stage: str = "update") -> str:
        """Return to what a full matrix was rounded when it was kept: "float32" or "float16".

        Raises
        ------
        RunError
            As of :meth:`update`.
        """
        path = f"updates/{stage}/{self._index_of(matrix):03d}"
        source, _ = self._place_of(f"{path}_step", step, f"full matrix of {matrix!r}")
        return "float16" if f"{path}_scale" in source.index else "float32"

    # -- life --------------------------------------------------------------------------------

    def refresh(self) -> bool:
        """Look for new segments; cheap when there are none.

        Returns
        -------
        bool
            Whether anything changed.

        Raises
        ------
        RunError
            If the recording is gone, or nothing in it can be read.
        """
        known = {x.path: x for x in self._sources if isinstance(x, File) and x.path != self.path}
        while (stamp := self._look()) != self._stamp or self._somebody_ended():
            if self._load(known):
                self._stamp = stamp
                return True
        alive = self._manifest.writer_lives() if self._manifest else self._of_ranks is not None
        if self.status == RECORDING and not alive:
            self.status = INTERRUPTED
            return True
        return False

    def __repr__(self) -> str:
        span = f"steps {self.steps[0]}…{self.steps[-1]}" if len(self.steps) else "no steps"
        shapes = f"{len(self.table)} matrices"
        sampled = len(self.spectrum_steps())
        text = f"<Run {self.name!r}: {self.optimizer}, {span}, {shapes}, {sampled} spectra each"
        if self.damaged:
            text += f", {len(self.damaged)} damaged segments"
        if self.ranks:
            text += f", {len(self.ranks)} ranks"
        if self.holes:
            text += f", {len(self.holes)} holes"
        return f"{text}, {self.status}>"

    def _repr_html_(self) -> str:
        def cell(text: object) -> str:
            return f"<td>{html.escape(str(text))}</td>"

        kept = {name: len(self.update_steps(name)) for name in self.matrices}
        rows = "".join(
            f"<tr>{cell(x.name)}{cell(f'{x.m} × {x.n}')}{cell(x.dtype)}{cell(kept[x.name])}</tr>"
            for x in self.table
        )
        return (
            f"<p>{html.escape(repr(self))}</p><table><thead><tr><th>matrix</th><th>shape</th>"
            f"<th>dtype</th><th>full matrices kept</th></tr></thead><tbody>{rows}</tbody></table>"
        )

    def segments(self) -> list[Segment]:
        """Return all records, file by file, to be copied into one: what packing needs."""
        return [without_samples(source.segment(), source.later) for source in self._sources]

    @property
    def size(self) -> int:
        """Bytes that :meth:`flaws` reads: of all numbers, as they are once they are read."""
        return sum(source.size for source in self._sources)

    @property
    def has_checksums(self) -> bool:
        """Whether all files have checksums: those of older versions have none."""
        return all(source.has_digests for source in self._sources)

    def flaws(self, progress: Callable[[int], None] | None = None) -> Iterator[Flaw]:
        """Read every number once, and yield those that cannot be read or have changed.

        Parameters
        ----------
        progress : callable, optional
            Called with the bytes that were read, piece by piece.
        """
        for source in self._sources:
            yield from source.flaws(progress)

    def leave_out(self, flaws: Iterable[Flaw]) -> None:
        """Let :meth:`segments` go without what is flawed; of a rank, without its whole segment."""
        flaws = list(flaws)
        files = {source.path: source for source in self._sources if isinstance(source, File)}
        for source in files.values():
            source.left_out = [flaw for flaw in flaws if flaw.path == source.path and flaw.dataset]
        of_ranks = [flaw for flaw in flaws if flaw.path not in files]
        self._distrusted = {flaw.path: f"{flaw.what}: {flaw.reason}" for flaw in of_ranks}
        if of_ranks:
            self._load(files)

    # -- how ---------------------------------------------------------------------------------

    def _look(self) -> object:
        """Return what changes when the recording does: the stamps of its file and manifests."""
        parts = parts_of(self.path)
        stamps = {path: _stamp_of(path) for path in (self.path, parts / NAME)}
        try:
            folders = [x for ranks in rank_folders(parts).values() for x in ranks.values()]
        except OSError as error:  # it is being removed, or may not be read
            raise RunError(f"{parts}: {error.strerror}") from None
        for folder in folders:
            stamps[folder] = None if folder.is_symlink() else _stamp_of(folder / NAME)
        if not folders and not any(stamps.values()):
            if parts.is_dir():
                raise RunError(f"{parts}: damaged, it has no {NAME}")
            raise RunError(f"{self.path}: no such recording")
        return stamps

    def _somebody_ended(self) -> bool:
        """Tell whether a rank's process ended without a word, for whom nobody need wait now."""
        return self._of_ranks is not None and self._of_ranks.alive() != self._alive

    def _load(self, known: dict[Path, File]) -> bool:
        """Read the list of files and those that are not `known` yet, which is added to.

        Returns
        -------
        bool
            False when the list was out of date before all of it was read: files were merged or
            packed meanwhile.
        """
        # Order matters: packing replaces the file first and removes the parts afterwards.
        parts = parts_of(self.path)
        manifest = Manifest.load(parts)
        files: list[tuple[Path, tuple[int, int] | None]] = []
        if self.path.exists():
            files.append((self.path, None))
        for entry in manifest.segments if manifest else []:
            files.append((parts / entry.file, (entry.first, entry.last)))
        sources: list[Source] = []
        damaged: list[Damage] = []
        for path, steps in files:
            try:
                if path != self.path and path.is_symlink():
                    raise RunError("a link, which is not followed")
                source = known.get(path) or File(path)
                if sources and source.matrices != sources[0].matrices:
                    raise RunError("its matrices are not this run's")
            except RunError as error:
                if not path.exists() and not self._lists(path):
                    return False
                damaged.append(Damage(path, steps, str(error).removeprefix(f"{path}: ")))
                continue
            sources.append(source)
            if path != self.path:
                known[path] = source
        of_ranks = None
        folders = {} if manifest else rank_folders(parts)
        if folders:
            segments = dict(self._segments)
            table = sources[0].matrices if sources else None
            try:
                of_ranks = read_ranks(
                    self.path, parts, table, segments, self._handles, self._distrusted
                )
            except OutOfDate:
                return False
            if Manifest.load(parts) or rank_folders(parts) != folders:
                return False  # packed meanwhile, and what was read may be half of it
            sources += of_ranks.attempts
            damaged += of_ranks.damaged
        if not sources and not manifest and not damaged and not of_ranks:
            return False
        if not sources and damaged:
            raise RunError(f"{damaged[0].path}: {damaged[0].reason}")
        self._manifest, self._sources, self.damaged = manifest, sources, damaged
        self._of_ranks = of_ranks
        self._alive = of_ranks.alive() if of_ranks else ()
        members = [x for of in of_ranks.members for x in of] if of_ranks else []
        self._segments = {x.path: x for member in members for x in member.segments}
        self._handles.keep(self._segments)
        self._adopt()
        return True

    def _lists(self, path: Path) -> bool:
        manifest = Manifest.load(parts_of(self.path))
        return any(entry.file == path.name for entry in manifest.segments) if manifest else False

    def _adopt(self) -> None:
        """Derive the merged view: every step once, in order, from the last file that has it."""
        later = np.empty(0, np.int64)
        for source in reversed(self._sources):
            source.later = later
            if isinstance(source, Attempt):
                later = np.union1d(later, source.index["steps/step"])
        newest = self._sources[-1] if self._sources else None
        self.metadata: dict[str, Any] = newest.metadata if newest else {}
        self.table = newest.matrices if newest else Matrices([])
        self.ranks: tuple[int, ...] = newest.ranks if isinstance(newest, Attempt) else ()
        self.events: list[Event] = [event for s in self._sources for event in s.events]
        self.status, self.dropped = self._state()
        self._sampled_cache: dict[str, tuple[np.ndarray, list[tuple[Source, int]]]] = {}
        self.steps, self._order = _each_once(self._concatenate("steps/step"))
        self.overlaps = sum(s.rows for s in self._sources) - len(self.steps)
        self.holes: list[Hole] = holes_of(self._sources, self.steps, self._order)
        self.times = self._concatenate("steps/time", np.float64)[self._order]
        self.void = self._concatenate("steps/void", np.uint8)[self._order].astype(bool)
        names = sorted({name for source in self._sources for name in source.scalars})
        self.scalars = {name: self._scalar(name) for name in names}

    def _state(self) -> tuple[str, int]:
        files = [source for source in self._sources if isinstance(source, File)]
        if self._of_ranks:
            before = sum(source.dropped for source in files)
            return self._of_ranks.status(), self._of_ranks.dropped() + before
        if self._manifest is None:
            return files[-1].status, files[-1].dropped
        if self._manifest.status == RECORDING and not self._manifest.writer_lives():
            return INTERRUPTED, self._manifest.dropped
        return self._manifest.status, self._manifest.dropped

    def _scalar(self, name: str) -> np.ndarray:
        blocks = [s.scalars.get(name, np.full(s.rows, np.nan)) for s in self._sources]
        values: np.ndarray = np.concatenate(blocks)[self._order]
        return values

    def _concatenate(self, path: str, dtype: Any = np.int64) -> np.ndarray:
        blocks = [source.index[path] for source in self._sources]
        return np.concatenate(blocks) if blocks else np.empty(0, dtype)

    def _index_of(self, matrix: str) -> int:
        try:
            return self.table.index(matrix)
        except KeyError:
            close = difflib.get_close_matches(str(matrix), self.matrices, 3, 0.3)
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
            raise RunError(f"{self.path}: no matrix {matrix!r}{hint}") from None

    def _spectra(
        self, stage: str, sigmas: slice, matrices: Any, after: int, until: int | None = None
    ) -> Spectra:
        steps, places = self._sampled(f"spectra/{stage}/step")
        if not len(steps) and stage not in self.stages:
            raise RunError(f"{self.path}: no spectra of stage {stage!r} are recorded")
        start = int(np.searchsorted(steps, after, side="right"))
        stop = None if until is None else int(np.searchsorted(steps, until, side="right"))
        steps, places = steps[start:stop], places[start:stop]
        if not places:
            none = np.empty((0, len(self.table)))[:, matrices]
            return Spectra(steps, np.empty((0, self.table.total_sigmas))[:, sigmas], none, none)
        return Spectra(
            steps,
            self._gather(f"spectra/{stage}/sigma", places, sigmas),
            self._gather(f"spectra/{stage}/floor", places, matrices),
            self._gather(f"spectra/{stage}/weight_norm", places, matrices),
        )

    def _over_steps(
        self, path: str, columns: slice, after: int = 0, until: int | None = None
    ) -> np.ndarray:
        if not any(path in source.paths for source in self._sources):
            raise RunError(f"{self.path}: no {path} recorded; it has {', '.join(self.stages)}")
        width = len(range(*columns.indices(self.table.total_rows)))
        stop = None if until is None else np.searchsorted(self.steps, until, side="right")
        wanted = self._order[np.searchsorted(self.steps, after, side="right") : stop]
        values = np.full((len(wanted), width), np.nan, dtype=np.float32)
        first = 0
        for source in self._sources:
            here = (wanted >= first) & (wanted < first + source.rows)
            if path in source.paths and here.any():
                rows = wanted[here] - first
                low = int(rows.min())
                block = source.read(path, (slice(low, int(rows.max()) + 1), columns))
                in_order = len(block) == len(rows) and bool((np.diff(rows) == 1).all())
                values[here] = block if in_order else block[rows - low]
            first += source.rows
        return values

    def _sampled(self, path: str) -> tuple[np.ndarray, list[tuple[Source, int]]]:
        """Return the distinct steps of a sampled quantity and the file and row of each."""
        if path not in self._sampled_cache:
            places = [
                (source, row)
                for source in self._sources
                if path in source.index
                for row in np.flatnonzero(~np.isin(source.index[path], source.later)).tolist()
            ]
            recorded = [int(source.index[path][row]) for source, row in places]
            steps, order = _each_once(np.array(recorded, dtype=np.int64))
            self._sampled_cache[path] = steps, [places[i] for i in order]
        return self._sampled_cache[path]

    def _place_of(self, path: str, step: int, what: str) -> tuple[Source, int]:
        steps, places = self._sampled(path)
        at = int(np.searchsorted(steps, step))
        if at < len(steps) and steps[at] == step:
            return places[at]
        if not len(steps):
            raise RunError(f"{self.path}: no {what} is recorded at all")
        nearest = steps[np.argmin(np.abs(steps - step))]
        raise RunError(f"{self.path}: no {what} at step {step}; the nearest is step {nearest}")

    def _gather(self, path: str, places: list[tuple[Source, int]], column: Any) -> np.ndarray:
        """Read rows from several files, each file once."""
        rows: dict[Source, list[int]] = {}
        for source, row in places:
            rows.setdefault(source, []).append(row)
        read: dict[tuple[Source, int], np.ndarray] = {}
        for source, wanted in rows.items():
            if path in source.index:
                block, low = source.index[path][:, column], 0
            else:
                low = min(wanted)
                block = source.read(path, (slice(low, max(wanted) + 1), column))
            read.update({(source, row): block[row - low] for row in wanted})
        return np.array([read[place] for place in places])


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise RunError(f"{path}: not a file")
    return found.st_ino, found.st_mtime_ns, found.st_size


def _each_once(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct steps ascending, and for each the index of its last occurrence."""
    reversed_steps, first = np.unique(steps[::-1], return_index=True)
    return reversed_steps, len(steps) - 1 - first
