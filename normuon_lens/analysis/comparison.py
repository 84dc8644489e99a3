"""Runs side by side: what each optimizer does to the same kinds of matrices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from normuon_lens.analysis.measure import measure
from normuon_lens.analysis.settled import SKIP, settled
from normuon_lens.errors import LensError
from normuon_lens.runfile import Run

METRICS = ("condition_number", "spread_p95_p5", "neuron_cv", "neuron_max_min")
"""What is compared: conditioning with and without the smallest values, then imbalance."""

LOSS_WINDOW = 20
"""The final loss is the mean of so many last logged losses: single batches are noisy."""


@dataclass(frozen=True)
class Quantiles:
    """Median, 10th and 90th percentile over steps and matrices; NaN where nothing was measured.

    Attributes
    ----------
    median, low, high : float
    count : int
        Numbers that went in.
    """

    median: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class RunSummary:
    """One run of a comparison."""

    name: str
    optimizer: str
    status: str
    steps: int
    dropped: int
    loss: float
    val_loss: float


@dataclass(frozen=True)
class Row:
    """One metric of one group of matrices, in every run.

    Attributes
    ----------
    group : str
        Names with their numbers replaced, such as ``blocks.*.mlp.up``; ``"all matrices"``.
    metric : str
    values : tuple of Quantiles
        One a run, in the comparison's order.
    """

    group: str
    metric: str
    values: tuple[Quantiles, ...]

    def ratios(self) -> list[float]:
        """Medians relative to the first run's."""
        first = self.values[0].median
        return [value.median / first if first else float("nan") for value in self.values]


@dataclass(frozen=True)
class Comparison:
    """Several runs, and what differs between them.

    Attributes
    ----------
    skipped : int
        First steps that were left out.
    runs : tuple of RunSummary
    rows : tuple of Row
        Group by group, ``"all matrices"`` last.
    """

    skipped: int
    runs: tuple[RunSummary, ...]
    rows: tuple[Row, ...]


def compare(
    runs: Sequence[Run], metrics: Sequence[str] = METRICS, *, skip: int = SKIP
) -> Comparison:
    """Compare runs over the matrices that they have in common.

    Parameters
    ----------
    runs : sequence of Run
        At least one.
    metrics : sequence of str
        Names of the catalogue.
    skip : int
        Leave out the first so many steps. A run that is no longer than that is taken whole.

    Returns
    -------
    Comparison

    Raises
    ------
    LensError
        If the runs share no matrix, or one of the same name has two shapes.
    """
    groups = _groups(_common(runs))
    measured = {
        (i, metric): settled(measure(run, metric), skip=skip)
        for i, run in enumerate(runs)
        for metric in metrics
    }
    rows = []
    for group, names in groups.items():
        for metric in metrics:
            values = tuple(
                _quantiles(measured[i, metric][:, [run.table.index(name) for name in names]])
                for i, run in enumerate(runs)
            )
            rows.append(Row(group, metric, values))
    return Comparison(skip, tuple(_summary(run) for run in runs), tuple(rows))


def matrix_group(name: str) -> str:
    """Return a matrix's name with its numbers replaced: ``blocks.3.mlp.up`` is one of a kind."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def final_loss(run: Run, scalar: str = "loss") -> float:
    """Return the mean of the last :data:`LOSS_WINDOW` logged values; NaN if none was logged."""
    values = run.scalars.get(scalar, np.empty(0))
    values = values[np.isfinite(values)]
    return float(values[-LOSS_WINDOW:].mean()) if len(values) else float("nan")


def _common(runs: Sequence[Run]) -> list[str]:
    shared = [name for name in runs[0].matrices if all(name in run.table.names for run in runs)]
    if not shared:
        names = " and ".join(str(run.path) for run in runs)
        raise LensError(f"{names} have no matrix in common: they are not of one model")
    for name in shared:
        shapes = {run.shape(name) for run in runs}
        if len(shapes) > 1:
            shown = ", ".join(f"{m} × {n}" for m, n in sorted(shapes))
            raise LensError(f"{name} is {shown} in these runs: they are not of one model")
    return shared


def _groups(names: Sequence[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(matrix_group(name), []).append(name)
    if len(groups) > 1:
        groups["all matrices"] = list(names)
    return groups


def _quantiles(values: np.ndarray) -> Quantiles:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return Quantiles(float("nan"), float("nan"), float("nan"), 0)
    low, median, high = np.percentile(finite, [10, 50, 90])
    return Quantiles(float(median), float(low), float(high), int(finite.size))


def _summary(run: Run) -> RunSummary:
    validation = run.scalars.get("val_loss", np.empty(0))
    validation = validation[np.isfinite(validation)]
    return RunSummary(
        name=run.name,
        optimizer=run.optimizer,
        status=run.status,
        steps=len(run.steps),
        dropped=run.dropped,
        loss=final_loss(run),
        val_loss=float(validation[-1]) if len(validation) else float("nan"),
    )
