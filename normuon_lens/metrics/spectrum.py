"""The singular values of an update, and how far they can be believed.

A singular value is only as good as the arithmetic that made it. Every spectrum therefore travels
with a *floor*: below it a value is noise, of the method or of the rounding that the matrix went
through before. The condition number stops there and says that it is a lower bound.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from normuon_lens.errors import LensError
from normuon_lens.metrics._numeric import Floats, scaled

GRAM_LIMIT = 2800
"""Smaller side up to which the Gram route is used: an exact spectrum beyond.

Not a crossover in speed: with one thread of numpy's OpenBLAS 3072² takes 4.5 s against 10.9 s.
"""

GRAM_FLOOR = 1e-7
"""Floor of the Gram route over σ₁. Squaring leaves √eps = 1.5e-8, and some room for its growth."""

GRAM_TRUSTED = 1e-6
"""Smallest σ/σ₁ taken from the Gram route where no noise is known of."""

GRAM_ERROR = 4e-16
"""An error of the Gram route is below GRAM_ERROR·σ₁²/σ. Measured up to 1400², the worst spectrum of
several being evenly spaced values: 3.3e-16; 5e-17 on updates of real layers."""

NEWTON_SCHULZ_BAND = (0.68, 1.15)
"""Where the quintic (3.4445, -4.7750, 2.0315) leaves singular values after five steps."""

UNIT_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
"""Largest relative error of rounding once to nearest."""


@np.errstate(all="ignore")
def singular_values(matrix: ArrayLike, *, noise: float = 0.0) -> tuple[Floats, float]:
    """Compute all singular values of a matrix, and the floor below which they are noise.

    The Gram matrix of the smaller side is tried first, in float64: two to three times as fast as an
    SVD, exact enough while no singular value lies below 1e-6 σ₁, or above 2e-7 σ₁ as long as its
    error is less than the `noise` that is in the matrix anyway. Where a value is smaller, and
    `noise` has not already drowned it, or where the smaller side exceeds 2800, a float64 SVD
    follows.

    Parameters
    ----------
    matrix : array_like of shape (m, n)
        Real, any float dtype, at least one row and one column.
    noise : float, default 0
        Absolute rounding noise already in `matrix`, see `rounding_noise`.

    Returns
    -------
    sigma : ndarray of shape (min(m, n),), float64
        Descending, in the unit of `matrix`. All NaN when an entry is not finite, all zero for a
        zero matrix. A value beyond the largest float64 is Inf.
    floor : float
        The larger of `noise` and the floor of the route taken: 1e-7 σ₁ (Gram) or
        max(m, n)·eps·σ₁ (SVD). NaN when an entry is not finite.

    Raises
    ------
    LensError
        When `matrix` is not a real, non-empty, two-dimensional array.
    """
    given = np.asarray(matrix)
    if given.ndim != 2 or given.size == 0 or np.iscomplexobj(given):
        raise LensError(
            "singular values need a real matrix with rows and columns, "
            f"got shape {given.shape} of {given.dtype}"
        )
    m, n = given.shape
    values, scale, peak = scaled(given)
    if not np.isfinite(peak):  # LAPACK would raise on NaN and print on Inf
        return np.full(min(m, n), np.nan), np.nan
    if peak == 0:
        return np.zeros(min(m, n)), max(0.0, noise)
    sigma, floor = _routes(values if m >= n else values.T, noise / scale)
    return sigma * scale, float(np.maximum(floor * scale, noise))


def _routes(tall: Floats, noise: float) -> tuple[Floats, float]:
    """Take the cheapest route that is exact enough, for a tall matrix that is finite and scaled."""
    if tall.shape[1] <= GRAM_LIMIT:
        # Written as a product with its own transpose, numpy calls syrk: half the work.
        eigenvalues = np.linalg.eigvalsh(tall.T @ tall)[::-1]
        sigma = np.sqrt(np.maximum(eigenvalues, 0.0))
        lost_in_noise = GRAM_ERROR * sigma[0] ** 2 <= noise * sigma[-1]
        clear_of_floor = sigma[-1] >= 2 * GRAM_FLOOR * sigma[0]
        if max(sigma[-1], noise) >= GRAM_TRUSTED * sigma[0] or (lost_in_noise and clear_of_floor):
            return sigma, float(GRAM_FLOOR * sigma[0])
    sigma = np.asarray(np.linalg.svd(tall, compute_uv=False), dtype=np.float64)
    return sigma, float(tall.shape[0] * np.finfo(np.float64).eps * sigma[0])


def rounding_noise(shape: tuple[int, int], norm: float, dtype: str) -> float:
    """Estimate the spectral norm of the error made by rounding a matrix once.

    Rounding adds independent errors of RMS ~0.4·u·|entry|; as a random matrix their spectral norm
    is 0.4·u·‖A‖_F·(m^-½ + n^-½). Singular values below it cannot be told from zero.

    Parameters
    ----------
    shape : tuple of int
        (m, n) of the matrix.
    norm : float
        Frobenius norm of what was rounded.
    dtype : {"float32", "bfloat16", "float16", "float64"}
        What it was rounded to.

    Returns
    -------
    float
        In the unit of `norm`.

    Raises
    ------
    LensError
        When `dtype` is none of the four.
    """
    if dtype not in UNIT_ROUNDOFF:
        known = ", ".join(UNIT_ROUNDOFF)
        raise LensError(f"no rounding noise known for dtype {dtype!r}: expected one of {known}")
    m, n = shape
    return float(0.4 * UNIT_ROUNDOFF[dtype] * norm * (m**-0.5 + n**-0.5))


class ConditionNumber(NamedTuple):
    """A condition number that knows its limits.

    Attributes
    ----------
    value : ndarray of shape (...), float64
        σ₁ / max(σₖ, floor); NaN for a void or non-finite spectrum.
    is_lower_bound : ndarray of shape (...), bool
        Whether σₖ ≤ floor, so that the truth is `value` or anything above. False where `value`
        is NaN.
    resolved : ndarray of shape (...), int64
        How many singular values lie above the floor.
    floor : ndarray of shape (...), float64
        The floor used, in the unit of σ.
    """

    value: Floats
    is_lower_bound: NDArray[np.bool_]
    resolved: NDArray[np.int64]
    floor: Floats


@np.errstate(all="ignore")
def condition_number(sigma: ArrayLike, floor: ArrayLike) -> ConditionNumber:
    """Compute σ₁ / max(σₖ, floor) with its caveats.

    Parameters
    ----------
    sigma : array_like of shape (..., k)
        Singular values, descending along the last axis.
    floor : array_like of shape (...)
        As `singular_values` returns it.

    Returns
    -------
    ConditionNumber
        Of arrays of shape (...). With a floor of 0, a singular matrix has the value Inf; with a
        floor above σ₁ any matrix has the value 1, a lower bound that says nothing.
    """
    sigma, relative = _relative(sigma)
    floor = np.broadcast_to(np.asarray(floor, dtype=np.float64), sigma.shape[:-1])
    # relative[..., 0] is 1, or NaN where there is nothing to divide.
    value = relative[..., 0] * sigma[..., 0] / np.maximum(sigma[..., -1], floor)
    value = np.maximum(value, 1.0)  # all of it below the floor: nothing is known but this
    return ConditionNumber(
        value=np.asarray(value),
        is_lower_bound=np.asarray((sigma[..., -1] <= floor) & ~np.isnan(value)),
        resolved=np.asarray((sigma > floor[..., None]).sum(axis=-1)),
        floor=floor,
    )


def sigma_max(sigma: ArrayLike) -> Floats:
    """Give the spectral norm, σ₁.

    Parameters
    ----------
    sigma : array_like of shape (..., k)
        Singular values, descending along the last axis.

    Returns
    -------
    ndarray of shape (...), float64
        In the unit of `sigma`; 0 for a void step, NaN for a spectrum that is not finite.
    """
    sigma = np.asarray(sigma, dtype=np.float64)
    return np.where(np.isfinite(sigma).all(axis=-1), sigma[..., 0], np.nan)


def spread_median(sigma: ArrayLike, floor: ArrayLike = 0.0) -> Floats:
    """Compute σ₁ over the median singular value.

    Parameters
    ----------
    sigma : array_like of shape (..., k)
        Singular values, descending along the last axis.
    floor : array_like of shape (...), default 0
        The denominator is not taken below it.

    Returns
    -------
    ndarray of shape (...), float64
        At least 1; NaN for a void or non-finite spectrum, Inf where the denominator is 0.
    """
    return _spread(sigma, floor, 0.0, 0.5)


def spread_p95_p5(sigma: ArrayLike, floor: ArrayLike = 0.0) -> Floats:
    """Compute the 95th over the 5th percentile of the singular values, counted by value.

    Nine tenths of the singular values lie between the two. Percentiles interpolate linearly, as
    ``numpy.percentile`` does.

    Parameters
    ----------
    sigma : array_like of shape (..., k)
        Singular values, descending along the last axis.
    floor : array_like of shape (...), default 0
        The denominator is not taken below it.

    Returns
    -------
    ndarray of shape (...), float64
        At least 1; NaN for a void or non-finite spectrum, Inf where the denominator is 0.
    """
    return _spread(sigma, floor, 0.05, 0.95)


def spread_p90(sigma: ArrayLike, floor: ArrayLike = 0.0) -> Floats:
    """Compute σ₁ over the value that 90 % of the singular values reach: the trimmed condition.

    σ_p90 is counted from the largest down, so it is the 10th percentile by value: what the
    condition number becomes when the smallest tenth of the singular values is left out.

    Parameters
    ----------
    sigma : array_like of shape (..., k)
        Singular values, descending along the last axis.
    floor : array_like of shape (...), default 0
        The denominator is not taken below it.

    Returns
    -------
    ndarray of shape (...), float64
        At least 1; NaN for a void or non-finite spectrum, Inf where the denominator is 0.
    """
    return _spread(sigma, floor, 0.0, 0.9)


def stable_rank(sigma: ArrayLike) -> Floats:
    """Compute ‖A‖_F² / σ₁²: how many directions as strong as the first would hold the energy.

    Parameters
    ----------
    sigma : array_like of shape (..., k)
        Singular values, descending along the last axis.

    Returns
    -------
    ndarray of shape (...), float64
        From 1 (rank one) to k (orthogonal); NaN for a void or non-finite spectrum.
    """
    _, relative = _relative(sigma)
    return np.asarray(np.square(relative).sum(axis=-1))


@np.errstate(all="ignore")
def entropy_rank(sigma: ArrayLike) -> Floats:
    """Compute exp(H(p)) of the energy shares p = σ² / Σσ²: the effective number of directions.

    Parameters
    ----------
    sigma : array_like of shape (..., k)
        Singular values, descending along the last axis.

    Returns
    -------
    ndarray of shape (...), float64
        From 1 (rank one) to k (orthogonal); NaN for a void or non-finite spectrum.
    """
    energy = np.square(_relative(sigma)[1])
    share = energy / energy.sum(axis=-1, keepdims=True)
    entropy = -(share * np.log(np.where(share == 0, 1.0, share))).sum(axis=-1)
    return np.asarray(np.exp(entropy))


@np.errstate(all="ignore")
def orthogonality_error(sigma: ArrayLike) -> Floats:
    """Compute ‖s² − 1‖₂ / √k with s = σ / rms(σ): the distance from an orthogonal matrix.

    Equal to ‖UUᵀ − I‖_F / √k on the smaller side, for the update scaled to unit mean energy; any
    learning rate gives the same figure.

    Parameters
    ----------
    sigma : array_like of shape (..., k)
        Singular values, descending along the last axis.

    Returns
    -------
    ndarray of shape (...), float64
        From 0 (orthogonal) to √(k − 1) (rank one); NaN for a void or non-finite spectrum.
    """
    energy = np.square(_relative(sigma)[1])
    energy = energy / energy.mean(axis=-1, keepdims=True)
    return np.asarray(np.sqrt(np.square(energy - 1.0).mean(axis=-1)))


def newton_schulz_share(sigma: ArrayLike) -> Floats:
    """Compute the largest share of singular values that one rescaling brings into the band.

    Five Newton-Schulz steps leave singular values in [0.68, 1.15], and the learning rate then
    scales them all. The scale is taken out by choosing the one that suits best: what counts is how
    many values lie within one factor 1.15 / 0.68 = 1.69 of each other. A fixed scale such as
    rms(σ) = 1 would push values that were inside the band out of it.

    Parameters
    ----------
    sigma : array_like of shape (..., k)
        Singular values, descending along the last axis.

    Returns
    -------
    ndarray of shape (...), float64
        From 1/k to 1; NaN for a void or non-finite spectrum.
    """
    _, relative = _relative(sigma)
    k = relative.shape[-1]
    rows = relative.reshape(-1, k)
    share = np.full(len(rows), np.nan)
    low, high = NEWTON_SCHULZ_BAND
    for i in np.flatnonzero(~np.isnan(rows[:, 0])):
        ascending = rows[i, ::-1]
        # For each value taken as the lower edge: how many lie below the upper edge.
        ends = np.searchsorted(ascending, ascending * (high / low), side="right")
        inside = np.where(ascending > 0, ends - np.arange(k), 0)
        share[i] = inside.max() / k
    return share.reshape(relative.shape[:-1])


@np.errstate(all="ignore")
def _relative(sigma: ArrayLike) -> tuple[Floats, Floats]:
    """Give σ as float64 and σ/σ₁, the latter NaN throughout rows that are void or not finite."""
    sigma = np.asarray(sigma, dtype=np.float64)
    top = sigma[..., :1]
    usable = (top > 0) & np.isfinite(sigma).all(axis=-1, keepdims=True)
    return sigma, sigma / np.where(usable, top, np.nan)


@np.errstate(all="ignore")
def _spread(sigma: ArrayLike, floor: ArrayLike, upper: float, lower: float) -> Floats:
    """Divide two order statistics, given as shares of the way from the largest down."""
    sigma, relative = _relative(sigma)
    relative_floor = np.asarray(floor, dtype=np.float64) / sigma[..., 0]
    spread = _down(relative, upper) / np.maximum(_down(relative, lower), relative_floor)
    return np.asarray(np.maximum(spread, 1.0))


def _down(sigma: Floats, share: float) -> Floats:
    """Interpolate linearly, `share` of the way from the largest to the smallest value."""
    position = share * (sigma.shape[-1] - 1)
    above = int(position)
    below = min(above + 1, sigma.shape[-1] - 1)
    weight = position - above
    return np.asarray((1 - weight) * sigma[..., above] + weight * sigma[..., below])
