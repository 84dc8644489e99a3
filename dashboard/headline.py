"""The figures a newcomer needs: who is badly conditioned, who is imbalanced, who learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from normuon_lens.analysis.crossing import LOSS_WINDOW
from normuon_lens.analysis.measure import Series
from normuon_lens.analysis.settled import SKIP, finite_median, is_bound, settled
from normuon_lens.metrics import CATALOGUE

from .overview import Cell, cells_of
from .store import Entry

EVEN = CATALOGUE["condition_number"].healthy["NorMuon"][1]
BALANCED = CATALOGUE["neuron_cv"].healthy["NorMuon"][1]
"""Above these a matrix counts as ill-conditioned, or as imbalanced."""


class Share(NamedTuple):
    """How many of the matrices that were measured exceed what is healthy.

    Attributes
    ----------
    bad, of : int
        Matrices that do, and all of which it can be told.
    unknown : int
        Matrices of which it cannot: of the condition number only a lower bound is known, which is
        healthy, or the update itself is mostly rounding.
    """

    bad: int
    of: int
    unknown: int


class Headline(NamedTuple):
    """One run in a few figures, NaN where there is none.

    Attributes
    ----------
    condition, imbalance : float
        Medians over all matrices and all steps beyond the first `SKIP`.
    is_lower_bound : bool
        Whether most of the condition numbers are lower bounds, and so is their median.
    starved : float
        Share of all neurons that are starved; the median over the same steps.
    loss : float
        Mean of the last losses up to `loss_step`.
    loss_step : int or None
        The last step by which all runs on show that log a loss have logged one.
    ill_conditioned, imbalanced : Share
        Matrices whose own median is too high. A median over all matrices hides the few in which
        an optimizer goes wrong, such as the tall ones under Muon.
    early : bool
        Whether the run has no step beyond the first `SKIP`, so that those had to count.
    """

    condition: float
    is_lower_bound: bool
    imbalance: float
    starved: float
    loss: float
    loss_step: int | None
    ill_conditioned: Share
    imbalanced: Share
    early: bool


def headlines_of(entries: Sequence[Entry], stage: str) -> list[Headline]:
    """Return the headline figures of some readable runs at a stage, losses at an equal step."""
    step = equal_step(entries)
    return [_headline(entry, stage, step) for entry in entries]


def is_early(series: Series) -> bool:
    """Tell whether a series has steps, but none beyond the first `SKIP`."""
    return len(series.steps) > 0 and int(series.steps[-1]) <= SKIP


def ill_conditioned(cells: Sequence[Cell]) -> Share:
    """Return how many matrices have too high a condition number."""
    return _share(cells, lambda cell: cell.condition, EVEN, bounded=True)


def imbalanced(cells: Sequence[Cell]) -> Share:
    """Return in how many matrices the neurons move too unevenly."""
    return _share(cells, lambda cell: cell.cv, BALANCED, bounded=False)


def equal_step(entries: Sequence[Entry]) -> int | None:
    """Return the last step by which all runs that log a loss have logged one; None without any.

    A loss that is not finite counts as none: it is past that step that runs cannot be compared.
    """
    last = [int(steps[-1]) for steps, _ in map(losses, entries) if len(steps)]
    return min(last, default=None)


def loss_at(entry: Entry, step: int | None) -> float:
    """Return the mean of the last `LOSS_WINDOW` losses up to a step; NaN if there is none."""
    steps, values = losses(entry)
    before = values[steps <= step] if step is not None else values[:0]
    return float(before[-LOSS_WINDOW:].mean()) if len(before) else float("nan")


def losses(entry: Entry) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and the values of the finite losses that a readable run has logged."""
    assert entry.run is not None
    values = entry.run.scalars.get("loss", np.full(len(entry.run.steps), np.nan))
    known = np.isfinite(values)
    return entry.run.steps[known], values[known]


def _headline(entry: Entry, stage: str, loss_step: int | None) -> Headline:
    condition = settled(entry.series("condition_number", stage))
    bound = settled(entry.series("condition_is_lower_bound", stage))
    evenness = entry.series("neuron_cv", stage)
    cells = cells_of(entry, stage)
    return Headline(
        condition=finite_median(condition),
        is_lower_bound=is_bound(condition, bound),
        imbalance=finite_median(settled(evenness)),
        starved=_starved_share(entry, stage),
        loss=loss_at(entry, loss_step),
        loss_step=loss_step,
        ill_conditioned=ill_conditioned(cells),
        imbalanced=imbalanced(cells),
        early=is_early(evenness),
    )


def _share(
    cells: Sequence[Cell], value: Callable[[Cell], float], limit: float, *, bounded: bool
) -> Share:
    measured = [cell for cell in cells if np.isfinite(value(cell))]
    bad = [cell for cell in measured if cell.trusted and value(cell) > limit]
    good = [
        cell
        for cell in measured
        if cell.trusted and value(cell) <= limit and not (bounded and cell.is_bound)
    ]
    told = len(bad) + len(good)
    return Share(len(bad), told, len(measured) - told)


def _starved_share(entry: Entry, stage: str) -> float:
    assert entry.run is not None
    shares = settled(entry.series("neuron_starved", stage))
    sizes = np.array([matrix.m for matrix in entry.run.table])
    # Of the matrices that have a figure at a step: one may not move, or be on a rank that is gone.
    known = np.isfinite(shares)
    neurons = known @ sizes
    starved = np.where(known, shares, 0.0) @ sizes
    return finite_median(starved[neurons > 0] / neurons[neurons > 0])
