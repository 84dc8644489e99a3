"""Sums of squares that neither overflow nor underflow: divide by a power of two first."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def power_of_two(peak: ArrayLike) -> Floats:
    """Give the largest power of two not above `peak`, so that dividing by it is exact.

    Parameters
    ----------
    peak : array_like of shape (...)
        Largest magnitude of what is to be scaled.

    Returns
    -------
    ndarray of shape (...), float64
        The scale; 1 where `peak` is zero or not finite.
    """
    peak = np.asarray(peak, dtype=np.float64)
    ordinary = np.isfinite(peak) & (peak > 0)
    exponent = np.frexp(np.where(ordinary, peak, 1.0))[1]
    # One less than frexp's exponent: 2**1024 would overflow, 2**-1074 is still a number.
    return np.asarray(np.ldexp(1.0, exponent - 1))


def scaled(matrix: ArrayLike) -> tuple[Floats, float, float]:
    """Copy a matrix to float64 with its largest entry brought to [1, 2).

    Parameters
    ----------
    matrix : array_like of any shape, at least one entry
        Real numbers of any float dtype.

    Returns
    -------
    values : ndarray of the same shape, float64
        ``matrix / scale``.
    scale : float
        A power of two; 1 where the matrix is zero or not finite.
    peak : float
        Largest magnitude of `matrix`; NaN or Inf exactly when an entry is. Two reductions, which
        is cheaper than ``isfinite`` over all entries and cannot overflow as a sum of squares can.
    """
    values = np.array(matrix, dtype=np.float64)
    peak = float(max(values.max(), -values.min()))
    scale = float(power_of_two(peak))
    values /= scale
    return values, scale, peak
