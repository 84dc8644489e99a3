"""The three figures a newcomer needs: who is badly conditioned, who is imbalanced, who learns."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from normuon_lens.analysis.comparison import final_loss
from normuon_lens.analysis.settled import SKIP, finite_median, is_bound, settled
from normuon_lens.metrics import CATALOGUE

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
        Matrices of which only a lower bound is known, which is healthy.
    """

    bad: int
    of: int
    unknown: int


class Headline(NamedTuple):
    """One run in three figures, NaN where there is none.

    Attributes
    ----------
    condition, imbalance : float
        Medians over all matrices and all steps beyond the first `SKIP`.
    is_lower_bound : bool
        Whether most of the condition numbers are lower bounds, and so is their median.
    loss : float
        Mean of the last losses logged.
    ill_conditioned, imbalanced : Share
        Matrices whose own median is too high. A median over all matrices hides the few in which
        an optimizer goes wrong, such as the tall ones under Muon.
    early : bool
        Whether the run has no step beyond the first `SKIP`, so that those had to count.
    """

    condition: float
    is_lower_bound: bool
    imbalance: float
    loss: float
    ill_conditioned: Share
    imbalanced: Share
    early: bool


def headline(entry: Entry, stage: str) -> Headline:
    """Return a readable run's headline figures at a stage."""
    assert entry.run is not None
    condition = settled(entry.series("condition_number", stage))
    bound = settled(entry.series("condition_is_lower_bound", stage))
    evenness = entry.series("neuron_cv", stage)
    imbalance = settled(evenness)
    return Headline(
        condition=finite_median(condition),
        is_lower_bound=is_bound(condition, bound),
        imbalance=finite_median(imbalance),
        loss=final_loss(entry.run),
        ill_conditioned=_share(condition, EVEN, bound),
        imbalanced=_share(imbalance, BALANCED, np.zeros_like(imbalance)),
        early=len(evenness.steps) > 0 and not (evenness.steps > SKIP).any(),
    )


def _share(values: np.ndarray, limit: float, bound: np.ndarray) -> Share:
    medians = np.array([finite_median(column) for column in values.T])
    bounds = np.array([is_bound(*pair) for pair in zip(values.T, bound.T, strict=True)], dtype=bool)
    unknown = int((bounds & (medians <= limit)).sum())
    measured = int(np.isfinite(medians).sum())
    return Share(int((medians > limit).sum()), measured - unknown, unknown)
