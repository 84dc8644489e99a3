"""The three figures a newcomer needs: who is badly conditioned, who is imbalanced, who learns."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from normuon_lens.analysis.comparison import SKIP, final_loss
from normuon_lens.analysis.measure import Series
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
    condition = _settled(entry.series("condition_number", stage))
    imbalance = entry.series("neuron_cv", stage)
    settled = _settled(imbalance)
    return Headline(
        condition=_median(condition),
        imbalance=_median(settled),
        loss=final_loss(entry.run),
        ill_conditioned=_share(condition, EVEN),
        imbalanced=_share(settled, BALANCED),
        early=len(imbalance.steps) > 0 and not (imbalance.steps > SKIP).any(),
    )


def _settled(series: Series) -> np.ndarray:
    late = series.steps > SKIP
    return series.values[late] if late.any() else series.values


def _median(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else math.nan


def _share(values: np.ndarray, limit: float) -> Share:
    medians = np.array([_median(column) for column in values.T])
    return Share(int((medians > limit).sum()), int(np.isfinite(medians).sum()))
