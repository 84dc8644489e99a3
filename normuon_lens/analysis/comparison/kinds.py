"""What updates are like, by kind of matrix: quantiles over steps and over matrices of one kind."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from normuon_lens.analysis.comparison.seeds import Variant
from normuon_lens.analysis.measure import Series, lack, measure_all
from normuon_lens.analysis.settled import is_bound, settled
from normuon_lens.errors import LensError
from normuon_lens.runfile import Run

BOUNDS = {"condition_number": "condition_is_lower_bound"}
"""Metrics whose values may be lower bounds, and the metric that says of which that is true."""


@dataclass(frozen=True)
class Quantiles:
    """Median, 10th and 90th percentile over steps and matrices; NaN where nothing was measured.

    Attributes
    ----------
    median, low, high : float
    count : int
        Numbers that went in.
    is_lower_bound : bool
        Whether most of them are lower bounds, and so is their median.
    """

    median: float
    low: float
    high: float
    count: int
    is_lower_bound: bool = False


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
    by_variant : tuple of Quantiles
        One a variant, over all its runs.
    """

    group: str
    metric: str
    values: tuple[Quantiles, ...]
    by_variant: tuple[Quantiles, ...]

    def ratios(self) -> list[float]:
        """Medians relative to the first run's."""
        return _ratios(self.values)

    def variant_ratios(self) -> list[float]:
        """Medians of variants relative to the first one's."""
        return _ratios(self.by_variant)


def matrix_group(name: str) -> str:
    """Return a matrix's name with its numbers replaced: ``blocks.3.mlp.up`` is one of a kind."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def rows_of(
    runs: Sequence[Run],
    metrics: Sequence[str],
    matrices: Sequence[str],
    variants: Sequence[Variant],
    first: int,
    last: int,
    skip: int,
) -> Iterator[Row]:
    """Measure runs, group by group of matrices.

    Parameters
    ----------
    runs : sequence of Run
    metrics : sequence of str
        Names of the catalogue.
    matrices : sequence of str
        Those that count; every run has them.
    variants : sequence of Variant
        The runs that are taken together.
    first, last : int
        Of the steps that count.
    skip : int
        Leave out the first so many, as :func:`normuon_lens.analysis.settled.settled` does.

    Yields
    ------
    Row
        Metric by metric of each group; ``"all matrices"`` last, if there are several groups.

    Raises
    ------
    LensError
        If no run has what a metric needs, or there is no such metric.
    """
    measured = [_measured(run, metrics, matrices, first, last, skip) for run in runs]
    for metric in metrics:
        if not any(metric in found for found in measured):
            raise LensError(lack(runs[0], metric))
    for group, columns in _groups(matrices).items():
        for metric in metrics:
            values = [
                _Values(*(part[:, columns] for part in found[metric]))
                if metric in found
                else _Values(np.empty((0, len(columns))), np.empty((0, len(columns))))
                for found in measured
            ]
            pooled = [
                _Values(*map(np.concatenate, zip(*(values[i] for i in variant.runs), strict=True)))
                for variant in variants
            ]
            yield Row(group, metric, tuple(map(_quantiles, values)), tuple(map(_quantiles, pooled)))


class _Values(NamedTuple):
    """Numbers of some matrices over steps, both of shape (T', M'): and which are lower bounds."""

    values: np.ndarray
    bounds: np.ndarray


def _measured(
    run: Run, metrics: Sequence[str], matrices: Sequence[str], first: int, last: int, skip: int
) -> dict[str, _Values]:
    """Return what a run holds of the metrics for some matrices, at the steps that count."""
    bounds = [BOUNDS[metric] for metric in metrics if metric in BOUNDS]
    series = measure_all(run, [*metrics, *bounds], after=first - 1)
    columns = [run.table.index(name) for name in matrices]
    counted = {
        name: settled(Series(steps[steps <= last], values[steps <= last]), skip=skip)[:, columns]
        for name, (steps, values) in series.items()
    }
    return {
        name: _Values(
            counted[name],
            counted[BOUNDS[name]] if name in BOUNDS else np.zeros_like(counted[name]),
        )
        for name in metrics
        if name in counted
    }


def _groups(matrices: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(matrices):
        groups.setdefault(matrix_group(name), []).append(i)
    if len(groups) > 1:
        groups["all matrices"] = list(range(len(matrices)))
    return groups


def _quantiles(found: _Values) -> Quantiles:
    finite = found.values[np.isfinite(found.values)]
    if not finite.size:
        return Quantiles(math.nan, math.nan, math.nan, 0)
    low, median, high = map(float, np.percentile(finite, [10, 50, 90]))
    return Quantiles(median, low, high, int(finite.size), is_bound(*found))


def _ratios(values: Sequence[Quantiles]) -> list[float]:
    first = values[0].median
    return [value.median / first if first else math.nan for value in values]
