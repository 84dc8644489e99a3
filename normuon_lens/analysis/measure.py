"""A metric of the catalogue, computed from what a run has recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from normuon_lens.analysis.results import results_of
from normuon_lens.errors import LensError
from normuon_lens.metrics import CATALOGUE, Metric, describe
from normuon_lens.metrics.spectrum import UNIT_ROUNDOFF
from normuon_lens.runfile import Matrix, Run, Spectra

FROM_NORMS = {"norms", "columns"}
FROM_SPECTRA = {"sigma", "floor", "weight_norm", "roundoff"}
FROM_MATRICES = {"update", "previous", "gradient"}
"""What a run can supply, by the schedule on which it was recorded."""

HELD = FROM_NORMS | FROM_SPECTRA | FROM_MATRICES
"""All that a run can supply."""

BLOCK_BYTES = 32 << 20
"""Norms, and spectra, that are read at once; what one matrix needs then stays in the cache."""

CHUNK = 256
"""Records in a chunk of a packed file: a block of some whole chunks reads none twice."""

NEVER = np.iinfo(np.int64).max
"""A step beyond all others."""


class Series(NamedTuple):
    """One metric over steps.

    Attributes
    ----------
    steps : ndarray of shape (T,), int64
    values : ndarray of shape (T, M), float64
        One column a matrix, in ``run.matrices`` order; NaN where there is no such number.
    """

    steps: np.ndarray
    values: np.ndarray


def measure(run: Run, metric: str, *, stage: str = "update", after: int = 0) -> Series:
    """Compute a metric for every matrix at every step where the run has what it needs.

    Parameters
    ----------
    run : Run
    metric : str
        A name of :data:`normuon_lens.metrics.CATALOGUE`.
    stage : str
        Where along the optimizer.
    after : int
        Only steps beyond this one: a live reader asks for what is new.

    Returns
    -------
    Series

    Raises
    ------
    LensError
        If there is no such metric, or the run does not hold what it needs.
    """
    row = describe(metric)
    blocks = _blocks(run, stage, run.steps[run.steps > after])
    return _joined([block.measure(row) for block in blocks])


def measure_all(
    run: Run, metrics: Sequence[str], *, stage: str = "update", after: int = 0
) -> dict[str, Series]:
    """Compute several metrics in one pass: norms and spectra are read once, in blocks of steps.

    Parameters
    ----------
    run : Run
    metrics : sequence of str
        Names of :data:`normuon_lens.metrics.CATALOGUE`.
    stage, after
        As of :func:`measure`.

    Returns
    -------
    dict of str to Series
        What :func:`measure` gives, in the order asked for; without those that it refuses because
        the run does not hold what they need.

    Raises
    ------
    LensError
        If there is no such metric.
    """
    rows = [describe(metric) for metric in metrics]
    parts: dict[str, list[Series]] = {row.name: [] for row in rows}
    for block in _blocks(run, stage, run.steps[run.steps > after]):
        for row in [row for row in rows if row.name in parts]:
            try:
                parts[row.name].append(block.measure(row))
            except LensError:
                del parts[row.name]
    return {name: _joined(found) for name, found in parts.items()}


def measure_pieces(
    run: Run, metrics: Sequence[str], steps: np.ndarray, *, stage: str = "update"
) -> Iterator[tuple[str, Series]]:
    """Compute metrics at some steps, piece by piece: never is all of a long history in memory.

    Parameters
    ----------
    run : Run
    metrics : sequence of str
        Names of :data:`normuon_lens.metrics.CATALOGUE` that the run does not :func:`lack`.
    steps : ndarray of shape (T,), int64
        Recorded steps, ascending. Of others no more is read than lies in a chunk with these.
    stage : str

    Yields
    ------
    metric : str
        All metrics of a block of steps, one after the other, then those of the next block.
    piece : Series
        Next part of what :func:`measure` gives, without the steps that are not wanted.

    Raises
    ------
    LensError
        If a metric cannot be had, or a file cannot be read.
    """
    rows = [describe(metric) for metric in metrics]
    for block in _blocks(run, stage, steps):
        for row in rows:
            yield row.name, block.measure(row)


def measurable() -> list[str]:
    """Names of the metrics that a recording can hold enough for, in catalogue order."""
    return [name for name, row in CATALOGUE.items() if set(row.needs) <= HELD]


def lack(run: Run, metric: str, stage: str = "update") -> str:
    """Return why a run has nothing to compute a metric of a stage from; empty if it has.

    Raises
    ------
    LensError
        If there is no such metric.
    """
    row = describe(metric)
    try:
        next(_blocks(run, stage, np.empty(0, np.int64))).measure(row)
    except LensError as error:
        return str(error)
    if not len(taken_at(run, metric, stage)):
        what = "spectra" if FROM_SPECTRA & set(row.needs) else "full matrices"
        return f"{run.path}: {metric} needs {what} of stage {stage!r}, and none were taken"
    return ""


def taken_at(run: Run, metric: str, stage: str = "update") -> np.ndarray:
    """Return the steps (T,), ascending, at which a run took what a metric is computed from."""
    needs = set(describe(metric).needs)
    if needs <= FROM_NORMS:
        return run.steps
    if needs <= FROM_SPECTRA | FROM_NORMS:
        return run.spectrum_steps(stage)
    kept = [run.update_steps(name, stage) for name in run.matrices]
    return np.unique(np.concatenate([np.empty(0, np.int64), *kept]))


class _Block:
    """What a run holds of a stage at some steps; norms and spectra are read when needed."""

    def __init__(self, run: Run, stage: str, steps: np.ndarray, shared: _Shared) -> None:
        self.run, self.stage, self.steps, self.shared = run, stage, steps, shared

    @cached_property
    def norms(self) -> np.ndarray:
        """Row norms of all matrices side by side, one row a step of `steps`."""
        if not len(self.steps):
            return self.run.all_neuron_norms(self.stage, NEVER)
        first, last = int(self.steps[0]), int(self.steps[-1])
        norms = self.run.all_neuron_norms(self.stage, first - 1, last)
        steps = self.run.steps
        return norms[np.isin(steps[(steps >= first) & (steps <= last)], self.steps)]

    @cached_property
    def spectra(self) -> Spectra:
        """Spectra of all matrices side by side, of sampled steps that are among `steps`."""
        return self.shared.spectra(self.steps)

    def measure(self, metric: Metric) -> Series:
        """Compute one metric; LensError if the run does not hold what it needs."""
        needs = set(metric.needs)
        if missing := needs - HELD:
            raise LensError(
                f"{metric.name} needs the {' and the '.join(sorted(missing))}, which no recording "
                "holds; with a checkpoint's, call "
                f"normuon_lens.metrics.{metric.name}({', '.join(metric.needs)})"
            )
        if needs <= FROM_NORMS:
            return _over_norms(self, metric)
        if needs <= FROM_SPECTRA | FROM_NORMS:
            return _over_spectra(self, metric)
        return _over_matrices(self, metric)


class _Shared:
    """What the blocks of a stage have in common.

    Spectra are taken far less often than norms: a chunk of theirs spans many chunks of norms, so
    they are read for several blocks at once.
    """

    def __init__(self, run: Run, stage: str, steps: np.ndarray) -> None:
        sampled = run.spectrum_steps(stage)
        wanted = sampled[np.isin(sampled, steps)]
        self._run, self._stage = run, stage
        self._parts = _cut(wanted, sampled, 8 * run.table.total_sigmas)
        self._held: tuple[int, Spectra] | None = None

    def spectra(self, steps: np.ndarray) -> Spectra:
        """Return the spectra of those of the ascending steps at which there are some."""
        found = []
        for number, part in enumerate(self._parts):
            if len(steps) and len(part) and part[0] <= steps[-1] and steps[0] <= part[-1]:
                spectra = self._read(number)
                found.append([each[np.isin(spectra.steps, steps)] for each in spectra])
        if not found:
            return self._run.all_spectra(self._stage, NEVER)
        return Spectra(*map(np.concatenate, zip(*found, strict=True)))

    @cached_property
    def analysed(self) -> dict[tuple[str, str, int], float]:
        """What an analysis has found already, by metric, matrix and step."""
        frame = results_of(self._run)
        if frame is None:
            return {}
        slow = [name for name, row in CATALOGUE.items() if FROM_MATRICES & set(row.needs)]
        frame = frame[(frame.stage == self._stage) & frame.metric.isin(slow)]
        at = zip(frame.metric, frame.matrix, frame.step, strict=True)
        return dict(zip(at, frame.value, strict=True))

    def _read(self, number: int) -> Spectra:
        if self._held is None or self._held[0] != number:
            first, last = int(self._parts[number][0]), int(self._parts[number][-1])
            self._held = number, self._run.all_spectra(self._stage, first - 1, last)
        return self._held[1]


def _blocks(run: Run, stage: str, steps: np.ndarray) -> Iterator[_Block]:
    """Yield recorded steps in blocks; a single empty one if there are none."""
    shared = _Shared(run, stage, steps)
    for part in _cut(steps, run.steps, 4 * run.table.total_rows):
        yield _Block(run, stage, part, shared)


def _cut(wanted: np.ndarray, recorded: np.ndarray, row_bytes: int) -> list[np.ndarray]:
    """Cut wanted steps where a block is full, or a chunk of the recorded ones lies between."""
    full = max(1, BLOCK_BYTES // (CHUNK * max(1, row_bytes)))
    chunk = np.searchsorted(recorded, wanted) // CHUNK
    ends = (np.diff(chunk) > 1) | (np.diff(chunk // full) > 0)
    return np.split(wanted, np.flatnonzero(ends) + 1)


def _joined(parts: Sequence[Series]) -> Series:
    return Series(*map(np.concatenate, zip(*parts, strict=True)))


def _over_norms(block: _Block, metric: Metric) -> Series:
    taken = ~np.isnan(block.norms).all(axis=1)
    steps, norms = block.steps[taken], block.norms[taken]
    table = block.run.table
    values = np.full((len(steps), len(table)), np.nan)
    for i, matrix in enumerate(table):
        inputs = {"norms": norms[:, table.rows(i)], "columns": matrix.n}
        values[:, i] = metric.compute(*(inputs[name] for name in metric.needs))
    return Series(steps, values)


def _over_spectra(block: _Block, metric: Metric) -> Series:
    spectra, table = block.spectra, block.run.table
    norms = np.empty((0, table.total_rows))
    if "norms" in metric.needs:
        norms = block.norms[np.searchsorted(block.steps, spectra.steps)]
    values = np.full((len(spectra.steps), len(table)), np.nan)
    for i, matrix in enumerate(table):
        inputs = {
            "sigma": spectra.sigma[:, table.sigmas(i)],
            "floor": spectra.floor[:, i],
            "weight_norm": spectra.weight_norm[:, i],
            "roundoff": roundoff(block.run, matrix),
            "norms": norms[:, table.rows(i)],
            "columns": matrix.n,
        }
        values[:, i] = metric.compute(*(inputs[name] for name in metric.needs))
    return Series(spectra.steps, values)


def roundoff(run: Run, matrix: Matrix) -> float:
    """Return the unit roundoff of a weight whose updates are differences of weights, else 0."""
    try:
        exact = run.metadata["groups"][matrix.group]["update"] == "exact"
    except (KeyError, IndexError, TypeError):  # recorded by a version that knew no other way
        exact = False
    return 0.0 if exact else UNIT_ROUNDOFF.get(matrix.dtype, 0.0)


def _over_matrices(block: _Block, metric: Metric) -> Series:
    run, stage = block.run, block.stage
    if "gradient" in metric.needs and stage != "update":
        raise LensError(f"{metric.name} is of the update alone, not of stage {stage!r}")
    places = {name: _places(run, name, stage, metric) for name in run.matrices}
    if "gradient" in metric.needs and not any(places.values()):
        raise LensError(
            f"{run.path}: {metric.name} needs gradients kept whole beside the updates: record them "
            "with attach(…, stages=True)"
        )
    steps = taken_at(run, metric.name, stage)
    steps = steps[np.isin(steps, block.steps)]
    values = np.full((len(steps), len(run.table)), np.nan)
    for row, step in enumerate(steps.tolist()):
        for i, name in enumerate(run.matrices):
            if step not in places[name]:
                continue
            key = metric.name, name, step
            if key in block.shared.analysed:
                values[row, i] = block.shared.analysed[key]
            else:
                at = places[name][step]
                inputs = [run.update(name, *at[need]) for need in metric.needs]
                values[row, i] = metric.compute(*inputs)
    return Series(steps, values)


def _places(
    run: Run, matrix: str, stage: str, metric: Metric
) -> dict[int, dict[str, tuple[int, str]]]:
    """Return, by step, at which step and stage each matrix lies that a metric needs."""
    kept = run.update_steps(matrix, stage).tolist()
    if "previous" in metric.needs:
        return {
            now: {"update": (now, stage), "previous": (before, stage)}
            for before, now in pairwise(kept)
        }
    beside = set(run.update_steps(matrix, "gradient").tolist())
    return {
        step: {"update": (step, stage), "gradient": (step, "gradient")}
        for step in kept
        if step in beside
    }
