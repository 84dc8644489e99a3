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
"""Above these a run is called badly conditioned, or imbalanced."""


class Headline(NamedTuple):
    """One run in three figures, NaN where there is none.

    Attributes
    ----------
    condition, imbalance : float
        Medians over all matrices and all steps beyond the first `SKIP`.
    loss : float
        Mean of the last losses logged.
    early : bool
        Whether the run has no step beyond the first `SKIP`, so that those had to count.
    """

    condition: float
    imbalance: float
    loss: float
    early: bool

    @property
    def badly_conditioned(self) -> bool:
        """Whether the condition number exceeds what Muon and NorMuon show."""
        return self.condition > EVEN

    @property
    def imbalanced(self) -> bool:
        """Whether the imbalance exceeds what NorMuon shows."""
        return self.imbalance > BALANCED


def headline(entry: Entry, stage: str) -> Headline:
    """Return a readable run's headline figures at a stage."""
    assert entry.run is not None
    imbalance = entry.series("neuron_cv", stage)
    return Headline(
        condition=_median(entry.series("condition_number", stage)),
        imbalance=_median(imbalance),
        loss=final_loss(entry.run),
        early=not (imbalance.steps > SKIP).any(),
    )


def _median(series: Series) -> float:
    late = series.steps > SKIP
    values = series.values[late] if late.any() else series.values
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else math.nan
