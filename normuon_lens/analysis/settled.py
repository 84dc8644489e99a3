"""One number out of a metric's history: what counts once a training has found its feet."""

from __future__ import annotations

import math

import numpy as np

from normuon_lens.analysis.measure import Series

SKIP = 20
"""First steps left out: the momentum fills up, and no rule is representative there."""


def settled(series: Series, *, skip: int = SKIP) -> np.ndarray:
    """Return the values (T', M) of a series beyond the first `skip` steps.

    A series with no step beyond them is returned whole: a short run is better shown than empty.
    """
    late = series.steps > skip
    return series.values[late] if late.any() else series.values


def finite_median(values: np.ndarray) -> float:
    """Return the median of what is finite in `values`; NaN if nothing is."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else math.nan


def is_bound(values: np.ndarray, bounds: np.ndarray) -> bool:
    """Tell whether most of what is finite in `values` is a lower bound, and so is its median.

    Parameters
    ----------
    values, bounds : ndarray of one shape
        The second is not zero where a value is a lower bound.
    """
    finite = np.isfinite(values)
    return bool(finite.any() and np.mean(bounds[finite] != 0) > 0.5)
