"""A metric of the catalogue, computed from what a run has recorded."""

from __future__ import annotations

from collections.abc import Sequence
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
    needs = set(row.needs)
    if needs <= FROM_NORMS:
        return _over_norms(run, row, stage, after)
    if needs <= FROM_SPECTRA | FROM_NORMS:
        return _over_spectra(run, row, stage, after)
    if needs <= FROM_MATRICES:
        return _over_matrices(run, row, stage, after)
    missing = ", ".join(sorted(needs - FROM_NORMS - FROM_SPECTRA - FROM_MATRICES))
    raise LensError(f"{metric} needs {missing}, which recordings do not hold")


def measurable() -> list[str]:
    """Names of the metrics that recordings hold enough for, in catalogue order."""
    held = FROM_NORMS | FROM_SPECTRA | FROM_MATRICES
    return [name for name, row in CATALOGUE.items() if set(row.needs) <= held]


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


def _over_norms(run: Run, metric: Metric, stage: str, after: int) -> Series:
    norms = run.all_neuron_norms(stage, after)
    taken = ~np.isnan(norms).all(axis=1)
    steps, norms = run.steps[run.steps > after][taken], norms[taken]
    values = np.full((len(steps), len(run.table)), np.nan)
    for i, matrix in enumerate(run.table):
        inputs = {"norms": norms[:, run.table.rows(i)], "columns": matrix.n}
        values[:, i] = metric.compute(*(inputs[name] for name in metric.needs))
    return Series(steps, values)


def _over_spectra(run: Run, metric: Metric, stage: str, after: int) -> Series:
    spectra = run.all_spectra(stage, after)
    # A live run may have committed a spectrum a moment before the row of its step.
    recorded = run.steps[run.steps > after]
    spectra = Spectra(*(part[np.isin(spectra.steps, recorded)] for part in spectra))
    norms = np.empty((0, run.table.total_rows))
    if "norms" in metric.needs:
        norms = run.all_neuron_norms(stage, after)[np.searchsorted(recorded, spectra.steps)]
    values = np.full((len(spectra.steps), len(run.table)), np.nan)
    for i, matrix in enumerate(run.table):
        inputs = {
            "sigma": spectra.sigma[:, run.table.sigmas(i)],
            "floor": spectra.floor[:, i],
            "weight_norm": spectra.weight_norm[:, i],
            "roundoff": _roundoff(run, matrix),
            "norms": norms[:, run.table.rows(i)],
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


def _over_matrices(run: Run, metric: Metric, stage: str, after: int) -> Series:
    kept = [run.update_steps(name, stage) for name in run.matrices]
    steps = np.unique(np.concatenate(kept)) if kept else np.empty(0, np.int64)
    steps = steps[steps > after]
    values = np.full((len(steps), len(run.table)), np.nan)
    for i, name in enumerate(run.matrices):
        for before, now in zip(kept[i], kept[i][1:], strict=False):
            if now > after:
                inputs = {
                    "update": run.update(name, int(now), stage),
                    "previous": run.update(name, int(before), stage),
                }
                value = metric.compute(*(inputs[need] for need in metric.needs))
                values[np.searchsorted(steps, now), i] = value
    return Series(steps, values)
