"""The three figures a newcomer needs: who is badly conditioned, who is imbalanced, who learns."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from normuon_lens.analysis.comparison import final_loss
from normuon_lens.analysis.settled import SKIP, finite_median, settled
from normuon_lens.metrics import CATALOGUE

from .store import Entry

EVEN = CATALOGUE["condition_number"].healthy["NorMuon"][1]
BALANCED = CATALOGUE["neuron_cv"].healthy["NorMuon"][1]
"""Above these a matrix counts as ill-conditioned, or as imbalanced."""


class Share(NamedTuple):
    """How many of the matrices that were measured exceed what is healthy."""

    bad: int
    of: int


class Headline(NamedTuple):
    """One run in three figures, NaN where there is none.

    Attributes
    ----------
    condition, imbalance : float
        Medians over all matrices and all steps beyond the first `SKIP`.
    loss : float
        Mean of the last losses logged.
    ill_conditioned, imbalanced : Share
        Matrices whose own median is too high. A median over all matrices hides the few in which
        an optimizer goes wrong, such as the tall ones under Muon.
    early : bool
        Whether the run has no step beyond the first `SKIP`, so that those had to count.
    """

    condition: float
    imbalance: float
    loss: float
    ill_conditioned: Share
    imbalanced: Share
    early: bool


def headline(entry: Entry, stage: str) -> Headline:
    """Return a readable run's headline figures at a stage."""
    assert entry.run is not None
    condition = settled(entry.series("condition_number", stage))
    evenness = entry.series("neuron_cv", stage)
    imbalance = settled(evenness)
    return Headline(
        condition=finite_median(condition),
        imbalance=finite_median(imbalance),
        loss=final_loss(entry.run),
        ill_conditioned=_share(condition, EVEN),
        imbalanced=_share(imbalance, BALANCED),
        early=len(evenness.steps) > 0 and not (evenness.steps > SKIP).any(),
    )


def _share(values: np.ndarray, limit: float) -> Share:
    medians = np.array([finite_median(column) for column in values.T])
    return Share(int((medians > limit).sum()), int(np.isfinite(medians).sum()))
