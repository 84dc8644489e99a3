"""The runs on show, followed while they grow: every number is computed once and kept.

A metric over a run's history is measured when first asked for and then only for steps not seen
yet. One lock guards it all: the server answers several requests at once, a run knows one reader.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from normuon_lens.analysis.measure import Series, measure_all
from normuon_lens.errors import RunError
from normuon_lens.runfile import STAGES, Matrix, Run, find_runs, open_run

from .figures.frame import Marks
from .figures.palette import KNOWN, Style, style_of, variant

OF_NORMS = ("neuron_cv", "neuron_starved", "neuron_not_finite")
OF_SPECTRA = ("condition_number", "condition_is_lower_bound", "update_error")
"""What the page tells of every matrix and step, by what it is measured from: each is read once."""

T = TypeVar("T")

KEPT_MATRICES = 2
"""Histories of single matrices kept for each run: they are large, and one is looked at."""

_changes = itertools.count(time.time_ns() // 1000)
"""Numbers every change anew, also after a restart: a page may outlive its server."""


class Moment(NamedTuple):
    """What a matrix was at one recorded step: all of it (m, n), values (k,), norms (m,), or ()."""

    step: int
    values: np.ndarray


class Entry:
    """One run on the page, or the reason why it cannot be read.

    Attributes
    ----------
    id : str
        Names the run in links and controls; says nothing about where it lies.
    path : Path
    run : Run or None
        None while it cannot be read.
    error : str
        Why it cannot be read; empty if it can.
    style : Style
        Its colour and dash.
    version : int
        Another with every change: what was drawn of one version needs no drawing again.
    """

    def __init__(self, id: str, path: Path) -> None:
        self.id = id
        self.path = path
        self.run: Run | None = None
        self.error = ""
        self.style: Style = style_of("")
        self.version = next(_changes)
        self._last: tuple[float, int, float, int, list[Matrix]] | None = None
        self._series: dict[tuple[str, str], Series] = {}
        self._once: tuple[int, dict[object, Any]] = (0, {})
        self._measured: dict[tuple[tuple[str, ...], str], int] = {}
        self._norms: OrderedDict[tuple[str, str], Series] = OrderedDict()
        self._spectra: OrderedDict[tuple[str, str], Series] = OrderedDict()

    @property
    def name(self) -> str:
        """The run's own name, or its file's while it cannot be read."""
        return self.run.name if self.run else self.path.name

    @property
    def optimizer(self) -> str:
        """Class name of the optimizer; empty while nothing is known of it."""
        return self.run.optimizer if self.run and self.run.metadata else ""

    @property
    def live(self) -> bool:
        """Whether more steps may come."""
        return self.run is not None and self.run.live

    @property
    def begun(self) -> bool:
        """Whether there is a step."""
        return self.run is not None and len(self.run.steps) > 0

    def refresh(self) -> bool:
        """Look for new steps; tell whether anything changed."""
        before = self.error
        try:
            if self.run is None:
                self.run, changed = open_run(self.path), True
            else:
                changed = self.run.refresh()
            self.error = ""
        except RunError as error:
            changed = self.run is not None
            self.run, self.error = None, str(error)
        if changed and not self._continues():
            self._series.clear()
            self._measured.clear()
            self._norms.clear()
            self._spectra.clear()
        changed = changed or self.error != before
        if changed:
            self.version = next(_changes)
        return changed

    def series(self, metric: str, stage: str) -> Series:
        """Return a metric over all steps, NaN in void ones; empty where it is not recorded.

        Parameters
        ----------
        metric : str
            One of `OF_NORMS` or `OF_SPECTRA`.
        """
        run = self.run
        if run is None:
            return _nothing(0)
        together = OF_NORMS if metric in OF_NORMS else OF_SPECTRA
        if self._measured.get((together, stage)) != self.version:
            self._measured[together, stage] = self.version
            after = max(_end(self._series.get((each, stage))) for each in together)
            for each, new in measure_all(run, together, stage=stage, after=after).items():
                if each != "neuron_not_finite":
                    new.values[np.isin(new.steps, run.steps[run.void])] = np.nan
                self._series[each, stage] = _joined(self._series.get((each, stage)), new)
        return self._series.get((metric, stage), _nothing(len(run.table)))

    def metric_at(self, metric: str, matrix: str, stage: str, step: int) -> Moment | None:
        """Return a metric of a matrix, at the step nearest to `step` that has one, as values ()."""
        if self.run is None or matrix not in self.run.matrices:
            return None
        steps, values = self.series(metric, stage)
        column = values[:, self.run.table.index(matrix)]
        known = np.isfinite(column)
        return _nearest(Series(steps[known], column[known]), step)

    def norms(self, matrix: str, stage: str) -> Series:
        """Return the row norms (T, m) of a matrix over all steps that moved something."""
        run = self.run
        if run is None or matrix not in run.matrices or stage not in run.stages:
            return _nothing(0)
        seen = self._norms.get((matrix, stage))
        after = _end(seen)
        try:
            if seen is None:
                values = run.neuron_norms(matrix, stage)
            else:
                columns = run.table.rows(run.table.index(matrix))
                values = run.all_neuron_norms(stage, after)[:, columns]
        except RunError:
            return seen or _nothing(0)
        fresh = run.steps > after
        steps, void = run.steps[fresh], run.void[fresh]
        whole = ~void & ~np.isnan(values).all(axis=1)
        joined = _joined(seen, Series(steps[whole], values[whole]))
        return _keep(self._norms, (matrix, stage), joined)

    def spectra(self, matrix: str, stage: str) -> Series:
        """Return the singular values (Ts, k) of a matrix, NaN at and below their noise floor."""
        run = self.run
        if run is None or matrix not in run.matrices:
            return _nothing(0)
        seen = self._spectra.get((matrix, stage))
        index = run.table.index(matrix)
        try:
            if seen is None:
                steps, sigma, floor, _ = run.spectra(matrix, stage)
            else:
                steps, sigma, floor, _ = run.all_spectra(stage, _end(seen))
                sigma, floor = sigma[:, run.table.sigmas(index)], floor[:, index]
        except RunError:
            return seen or _nothing(0)
        moved = np.isin(steps, run.steps[~run.void]) & (sigma > floor[:, None]).any(axis=1)
        values = np.where(sigma > floor[:, None], sigma, np.nan)[moved]
        return _keep(self._spectra, (matrix, stage), _joined(seen, Series(steps[moved], values)))

    def spectrum_at(self, matrix: str, stage: str, step: int) -> Moment | None:
        """Return the singular values at the sampled step nearest to `step`, NaN where only noise.

        None if there are none.
        """
        return _nearest(self.spectra(matrix, stage), step)

    def norms_at(self, matrix: str, stage: str, step: int) -> Moment | None:
        """Return the row norms at the recorded step nearest to `step`; None if there are none."""
        return _nearest(self.norms(matrix, stage), step)

    def update_at(self, matrix: str, stage: str, step: int) -> Moment | None:
        """Return the full matrix kept at the step nearest to `step`; None if none was kept."""
        nearest = self.moments("update", matrix, stage, step)
        if self.run is None or not nearest:
            return None
        try:
            return Moment(nearest[0], self.run.update(matrix, nearest[0], stage))
        except RunError:  # its file is gone or damaged since the last look
            return None

    def moments(self, what: str, matrix: str, stage: str, step: int) -> list[int]:
        """Return the step, if any, that would be shown of a ``spectrum``, ``norms``, ``update``."""
        if what == "update":
            kept = self._kept(matrix, stage)
            return [int(kept[np.abs(kept - step).argmin()])] if len(kept) else []
        found = {"spectrum": self.spectrum_at, "norms": self.norms_at}[what](matrix, stage, step)
        return [] if found is None else [found.step]

    def marks(self, stage: str) -> Marks:
        """Return the steps that moved nothing, lost a sample, or were not finite."""
        return self.once(("marks", stage), lambda: self._marks(stage))

    def _marks(self, stage: str) -> Marks:
        run = self.run
        if run is None:
            return Marks(*np.empty((3, 0), np.int64))
        lost = [event.step for event in run.events if event.kind == "dropped"]
        lost += [s for hole in run.holes for s in range(hole.steps[0], hole.steps[1] + 1)]
        steps, broken = self.series("neuron_not_finite", stage)
        return Marks(
            run.steps[run.void],
            np.unique(np.array(lost, dtype=np.int64)),
            steps[(broken > 0).any(axis=1)],
        )

    def once(self, key: object, compute: Callable[[], T]) -> T:
        """Return what `compute` gave for `key` since the run last changed."""
        if self._once[0] != self.version:
            self._once = self.version, {}
        kept = self._once[1]
        if key not in kept:
            kept[key] = compute()
        found: T = kept[key]
        return found

    def _kept(self, matrix: str, stage: str) -> np.ndarray:
        """Return the steps (Tm,) at which the full matrix was kept and something moved."""
        run = self.run
        if run is None or matrix not in run.matrices:
            return np.empty(0, np.int64)
        kept = run.update_steps(matrix, stage)
        return kept[~np.isin(kept, run.steps[run.void])]

    def _continues(self) -> bool:
        """Tell whether the recording only grew since the last look, and remember this look."""
        run, last = self.run, self._last
        if run is None or not len(run.steps):
            self._last = None
            return last is None
        times, table = (float(run.times[0]), float(run.times[-1])), list(run.table)
        self._last = times[0], int(run.steps[-1]), times[1], run.overlaps, table
        if last is None:
            return True
        first, step, when, overlaps, known = last
        at = int(np.searchsorted(run.steps, step))
        same = at < len(run.steps) and (run.times[0], run.times[at]) == (first, when)
        return bool(same and run.overlaps == overlaps and table == known)


class Store:
    """All runs on show, from files and from folders that are watched.

    Parameters
    ----------
    paths : sequence of Path
        Run files and folders of them.
    wait : bool
        Accept folders that are empty or not there yet.

    Raises
    ------
    RunError
        If a path does not exist, or a folder holds no recording, unless `wait`; if a file that
        is named cannot be read.

    Attributes
    ----------
    version : int
        Another whenever a run came, went or changed.
    """

    def __init__(self, paths: Sequence[Path], *, wait: bool = False) -> None:
        self.lock = threading.RLock()
        self.folders = [path for path in paths if _is_folder(path, wait)]
        if not wait:
            find_runs(paths)
        files = [path for path in paths if path not in self.folders]
        self._files = find_runs(files) if files else []
        self._entries: dict[Path, Entry] = {}
        self._others: dict[str, int] = {}
        self._steps: tuple[int, list[int]] = (0, [1])
        self.version = next(_changes)
        self.refresh()
        # What was named must be readable; what lies in a folder is shown with its reason.
        for path in self._files:
            if self._entries[path].error:
                raise RunError(self._entries[path].error)

    @property
    def entries(self) -> list[Entry]:
        """All runs, in the order in which they were found."""
        return list(self._entries.values())

    @property
    def live(self) -> bool:
        """Whether more steps may come."""
        return any(entry.live for entry in self.entries)

    def refresh(self) -> bool:
        """Look for new runs and new steps; tell whether anything changed."""
        with self.lock:
            found = self._look()
            changed = False
            for path in [path for path in self._entries if path not in found]:
                del self._entries[path]
                changed = True
            for path in found:
                if path not in self._entries:
                    self._entries[path] = Entry(self._free_id(path), path)
                    changed = True
                entry = self._entries[path]
                if entry.refresh():
                    changed = True
            if changed:
                self._assign_styles()
                self.version = next(_changes)
            return changed

    def chosen(self, ids: Sequence[str]) -> list[Entry]:
        """Return the readable runs among `ids`."""
        return [entry for entry in self.entries if entry.id in ids and entry.run is not None]

    def label(self, entry: Entry) -> str:
        """Return a run's name, or its id where two runs carry the same name."""
        same = sum(other.name == entry.name for other in self.entries)
        return entry.id if same > 1 else entry.name

    def matrices(self) -> list[str]:
        """Names of all runs' matrices, each once, in model order."""
        runs = [entry.run for entry in self.entries if entry.run]
        return list(dict.fromkeys(name for run in runs for name in run.matrices))

    def stages(self) -> list[str]:
        """Return the stages that any run has recorded, in optimizer order; at least the update."""
        found = {stage for entry in self.entries if entry.run for stage in entry.run.stages}
        return [stage for stage in STAGES if stage in found] or ["update"]

    def recorded_steps(self) -> list[int]:
        """Return the steps that any run has recorded, ascending; [1] while there is none."""
        if self._steps[0] != self.version:
            runs = [entry.run.steps for entry in self.entries if entry.run]
            known = np.unique(np.concatenate([np.empty(0, np.int64), *runs])).tolist()
            self._steps = self.version, known or [1]
        return self._steps[1]

    def _look(self) -> list[Path]:
        found = list(self._files)
        for folder in self.folders:
            try:
                found += find_runs([folder])
            except RunError:
                continue  # nothing in it yet
        return list(dict.fromkeys(found))

    def _free_id(self, path: Path) -> str:
        """Return an id that is no path: a file's name, and a number where it is taken."""
        name = re.sub(r"[^\w.-]+", "-", path.name.removesuffix(".h5")) or "run"
        taken = {entry.id for entry in self.entries}
        numbered = (f"{name}-{number}" for number in range(2, len(taken) + 3))
        return next(free for free in (name, *numbered) if free not in taken)

    def _assign_styles(self) -> None:
        """Give every run its optimizer's style; an optimizer met first keeps its own for good."""
        met: dict[str, int] = {}
        for entry in self.entries:
            name = entry.optimizer
            if name and name not in KNOWN:
                self._others.setdefault(name, len(self._others))
            style = style_of(name, self._others.get(name, 0))
            entry.style = variant(style, met.get(name, 0))
            met[name] = met.get(name, 0) + 1


def _is_folder(path: Path, wait: bool) -> bool:
    if path.name.endswith((".h5", ".parts")):
        return False
    return path.is_dir() or (wait and not path.exists())


def _nothing(columns: int) -> Series:
    return Series(np.empty(0, np.int64), np.empty((0, columns)))


def _nearest(series: Series, step: int) -> Moment | None:
    if not len(series.steps):
        return None
    at = int(np.abs(series.steps - step).argmin())
    return Moment(int(series.steps[at]), series.values[at])


def _end(seen: Series | None) -> int:
    return int(seen.steps[-1]) if seen is not None and len(seen.steps) else 0


def _joined(seen: Series | None, new: Series) -> Series:
    if seen is None or not len(seen.steps):
        return new
    if not len(new.steps):
        return seen
    return Series(
        np.concatenate([seen.steps, new.steps]), np.concatenate([seen.values, new.values])
    )


def _keep(
    cache: OrderedDict[tuple[str, str], Series], key: tuple[str, str], series: Series
) -> Series:
    cache[key] = series
    cache.move_to_end(key)
    if len(cache) > KEPT_MATRICES:
        cache.popitem(last=False)
    return series
