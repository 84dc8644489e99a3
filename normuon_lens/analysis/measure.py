"""A metric of the catalogue, computed from what a run has recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from normuon_lens.errors import LensError
from normuon_lens.metrics import CATALOGUE, Metric, describe
from normuon_lens.metrics.spectrum import UNIT_ROUNDOFF
from normuon_lens.runfile import Matrix, Run, Spectra

if TYPE_CHECKING:
    import pandas as pd

FROM_NORMS = {"norms", "columns"}
FROM_SPECTRA = {"sigma", "floor", "weight_norm", "roundoff"}
FROM_MATRICES = {"update", "previous"}
"""What a run can supply, by the schedule on which it was recorded."""

HELD = FROM_NORMS | FROM_SPECTRA | FROM_MATRICES
"""All that a run can supply."""

BLOCK_BYTES = 32 << 20
"""Norms that are read at once; what is computed from one matrix's then stays in the cache."""

CHUNK = 256
"""Steps in a chunk of a packed file: a block of some whole chunks reads none twice."""


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
        If there is no such metric, or recordings do not hold what it needs.
    """
    row = describe(metric)
    missing = set(row.needs) - HELD
    if missing:
        named = ", ".join(sorted(missing))
        raise LensError(f"{metric} needs {named}, which recordings do not hold")
    return _in_blocks(run, [row], stage, after, lenient=False)[metric]


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
    rows = [row for row in map(describe, metrics) if set(row.needs) <= HELD]
    return _in_blocks(run, rows, stage, after, lenient=True)


def measurable() -> list[str]:
    """Names of the metrics that recordings hold enough for, in catalogue order."""
    return [name for name, row in CATALOGUE.items() if set(row.needs) <= HELD]


def table(
    runs: Sequence[Run],
    metrics: Sequence[str] = ("condition_number", "neuron_cv"),
    *,
    stages: Sequence[str] = ("update",),
    steps: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Return metrics of several runs as one long frame.

    Parameters
    ----------
    runs : sequence of Run
    metrics, stages : sequence of str
    steps : sequence of int, optional
        Keep only these steps.

    Returns
    -------
    pandas.DataFrame
        Columns run, step, matrix, stage, metric, value; one row a number.
    """
    import pandas as pd

    frames = []
    for run in runs:
        for stage in stages:
            for metric in metrics:
                series = measure(run, metric, stage=stage)
                wide = pd.DataFrame(series.values, index=series.steps, columns=run.matrices)
                if steps is not None:
                    wide = wide.loc[wide.index.isin(list(steps))]
                long = wide.rename_axis("step").reset_index()
                long = long.melt("step", var_name="matrix", value_name="value")
                frames.append(long.assign(run=run.name, stage=stage, metric=metric))
    columns = ["run", "step", "matrix", "stage", "metric", "value"]
    return (
        pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)
    )


class _Block:
    """What a run holds of a stage in steps of a span; norms and spectra are read when needed."""

    def __init__(
        self, run: Run, stage: str, after: int, until: int, spectra: Callable[[], Spectra]
    ) -> None:
        self.run, self.stage, self.after, self.until = run, stage, after, until
        self.steps = run.steps[(run.steps > after) & (run.steps <= until)]
        self._spectra = spectra

    @cached_property
    def norms(self) -> np.ndarray:
        """Row norms of all matrices side by side, one row a step of `steps`."""
        return self.run.all_neuron_norms(self.stage, self.after, self.until)

    @cached_property
    def spectra(self) -> Spectra:
        """Spectra of all matrices side by side, of sampled steps that are among `steps`."""
        spectra = self._spectra()
        # A live run may have committed a spectrum a moment before the row of its step.
        return Spectra(*(part[np.isin(spectra.steps, self.steps)] for part in spectra))

    def measure(self, metric: Metric) -> Series:
        """Compute one metric; LensError if the run does not hold what it needs."""
        needs = set(metric.needs)
        if needs <= FROM_NORMS:
            return _over_norms(self, metric)
        if needs <= FROM_SPECTRA | FROM_NORMS:
            return _over_spectra(self, metric)
        return _over_matrices(self, metric)


def _in_blocks(
    run: Run, rows: Sequence[Metric], stage: str, after: int, *, lenient: bool
) -> dict[str, Series]:
    """Compute metrics block by block; lenient leaves out those that cannot be."""
    # Spectra are few, and read once for all blocks.
    spectra = cache(lambda: run.all_spectra(stage, after))
    parts: dict[str, list[Series]] = {row.name: [] for row in rows}
    for first, last in _spans(run, after):
        block = _Block(run, stage, first, last, spectra)
        for row in rows:
            if row.name not in parts:
                continue
            try:
                parts[row.name].append(block.measure(row))
            except LensError:
                if not lenient:
                    raise
                del parts[row.name]
    return {
        name: Series(*map(np.concatenate, zip(*found, strict=True)))
        for name, found in parts.items()
    }


def _spans(run: Run, after: int) -> list[tuple[int, int]]:
    """Return the blocks of recorded steps: beyond the first of a pair, up to the second."""
    steps = run.steps[run.steps > after]
    size = max(1, BLOCK_BYTES // (4 * CHUNK * max(1, run.table.total_rows))) * CHUNK
    ends = [*steps[size - 1 : -1 : size].tolist(), int(steps[-1]) if len(steps) else after]
    return list(pairwise([after, *ends]))


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
            "roundoff": _roundoff(block.run, matrix),
            "norms": norms[:, table.rows(i)],
            "columns": matrix.n,
        }
        values[:, i] = metric.compute(*(inputs[name] for name in metric.needs))
    return Series(spectra.steps, values)


def _roundoff(run: Run, matrix: Matrix) -> float:
    """Return the unit roundoff of a weight whose updates are differences of weights, else 0."""
    try:
        exact = run.metadata["groups"][matrix.group]["update"] == "exact"
    except (KeyError, IndexError, TypeError):  # recorded by a version that knew no other way
        exact = False
    return 0.0 if exact else UNIT_ROUNDOFF.get(matrix.dtype, 0.0)


def _over_matrices(block: _Block, metric: Metric) -> Series:
    run, stage = block.run, block.stage
    kept = [run.update_steps(name, stage) for name in run.matrices]
    steps = np.unique(np.concatenate(kept)) if kept else np.empty(0, np.int64)
    steps = steps[(steps > block.after) & (steps <= block.until)]
    values = np.full((len(steps), len(run.table)), np.nan)
    for i, name in enumerate(run.matrices):
        for before, now in zip(kept[i], kept[i][1:], strict=False):
            if block.after < now <= block.until:
                inputs = {
                    "update": run.update(name, int(now), stage),
                    "previous": run.update(name, int(before), stage),
                }
                value = metric.compute(*(inputs[need] for need in metric.needs))
                values[np.searchsorted(steps, now), i] = value
    return Series(steps, values)
