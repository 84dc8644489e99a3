"""Where an update goes: how far against the weight, and how close to the gradient.

All accumulate in float64. What is undefined, because something is zero or not finite, is NaN.
"""

import numpy as np
from numpy.typing import ArrayLike

from normuon_lens.errors import LensError
from normuon_lens.metrics._numeric import Floats, scaled
from normuon_lens.metrics.spectrum import singular_values


@np.errstate(all="ignore")
def update_to_weight(update_norm: ArrayLike, weight_norm: ArrayLike) -> Floats:
    """Compute how large the update is beside the weight, ‖U‖ / ‖W‖.

    Parameters
    ----------
    update_norm : array_like of shape (...)
        Norm of the update.
    weight_norm : array_like of shape (...)
        The same norm of the weight before the step: Frobenius both, or spectral both.

    Returns
    -------
    ndarray of shape (...), float64
        0 for a void step; NaN for a zero weight or where a norm is not finite.
    """
    update = np.asarray(update_norm, dtype=np.float64)
    weight = np.asarray(weight_norm, dtype=np.float64)
    usable = np.isfinite(update) & np.isfinite(weight) & (weight > 0)
    return np.asarray(update / np.where(usable, weight, np.nan))


@np.errstate(all="ignore")
def update_error(update_norm: ArrayLike, weight_norm: ArrayLike, roundoff: ArrayLike) -> Floats:
    """Estimate how much of an update is the rounding of the weights it is a difference of.

    Rounding a weight makes an error of RMS ~0.4·u·|w|, see
    `normuon_lens.metrics.spectrum.rounding_noise`; an update below the resolution of the weight is
    lost altogether, which is an error of 1.

    Parameters
    ----------
    update_norm, weight_norm : array_like of shape (...)
        Frobenius norms of the update and of the weight before the step.
    roundoff : float
        Unit roundoff u of the weight's dtype; 0 if the update is no difference of weights.

    Returns
    -------
    ndarray of shape (...), float64
        Relative error, from 0 to 1; NaN for a void step or where a norm is not finite.
    """
    update = np.asarray(update_norm, dtype=np.float64)
    usable = np.isfinite(update) & (update > 0)
    noise = 0.4 * np.asarray(roundoff) * np.asarray(weight_norm, dtype=np.float64)
    return np.asarray(np.minimum(1.0, noise / np.where(usable, update, np.nan)))


def update_to_weight_spectral(sigma: ArrayLike, weight: ArrayLike) -> Floats:
    """Compute σ₁(U) / σ₁(W): the largest relative change of the layer's gain.

    Parameters
    ----------
    sigma : array_like of shape (..., k)
        Singular values of the update, descending along the last axis.
    weight : array_like of shape (m, n)
        The weight before the step.

    Returns
    -------
    ndarray of shape (...), float64
        0 for a void step; NaN for a zero weight or where anything is not finite.
    """
    # σ₁ alone is wanted: with infinite noise no small value can ask for the dearer route.
    weight_sigma, _ = singular_values(weight, noise=np.inf)
    return update_to_weight(np.asarray(sigma)[..., 0], weight_sigma[0])


@np.errstate(all="ignore")
def cosine(a: ArrayLike, b: ArrayLike) -> float:
    """Compute the cosine of the angle between two matrices, ⟨A,B⟩ / (‖A‖_F·‖B‖_F).

    Parameters
    ----------
    a, b : array_like of one and the same shape
        Real, any float dtype.

    Returns
    -------
    float
        From −1 to 1; NaN when either is zero or not finite.

    Raises
    ------
    LensError
        When the shapes differ.
    """
    x, y = _pair("cosine", a, b)
    return float(np.clip(_inner(x, y) / np.sqrt(_inner(x, x) * _inner(y, y)), -1.0, 1.0))


@np.errstate(all="ignore")
def alignment(gradient: ArrayLike, update: ArrayLike) -> float:
    """Compute −⟨G,U⟩ / (‖G‖_* · ‖U‖_F/√k): first-order progress beside the polar factor's.

    The update moves against the gradient, so the sign is turned: a descent step is positive. With
    U = −c·polar(G) and G of full rank k = min(m, n) the figure is exactly 1. It is no maximum: at
    equal Frobenius norm the gradient itself descends faster (up to √k), by leaning on few
    directions.

    Parameters
    ----------
    gradient, update : array_like of shape (m, n)
        Real, any float dtype.

    Returns
    -------
    float
        From −√k to √k, invariant to the scale of both; NaN when either is zero or not finite.

    Raises
    ------
    LensError
        When the shapes differ or are not those of a matrix.
    """
    x, y = _pair("alignment", gradient, update)
    nuclear = singular_values(x)[0].sum()
    return float(-_inner(x, y) / (nuclear * np.sqrt(_inner(y, y) / min(x.shape))))


@np.errstate(all="ignore")
def leverage_scores(momentum: ArrayLike) -> Floats:
    """Compute how much of each row's own direction the matrix spans, diag(M (MᵀM)⁺ Mᵀ).

    The square root of a row's score is the norm which that row gets in the polar factor of M: the
    imbalance that orthogonalization itself brings in. With m ≤ n and full rank all scores are 1.

    Parameters
    ----------
    momentum : array_like of shape (m, n)
        Real, any float dtype.

    Returns
    -------
    ndarray of shape (m,), float64
        Each from 0 to 1, together the numerical rank of M (singular values above
        max(m, n)·eps·σ₁); all NaN when M is zero or not finite.

    Raises
    ------
    LensError
        When `momentum` is not a real, non-empty, two-dimensional array.
    """
    given = np.asarray(momentum)
    if given.ndim != 2 or given.size == 0 or np.iscomplexobj(given):
        raise LensError(
            "leverage scores need a real matrix with rows and columns, "
            f"got shape {given.shape} of {given.dtype}"
        )
    m, n = given.shape
    values, _, peak = scaled(given)
    if not np.isfinite(peak) or peak == 0:
        return np.full(m, np.nan)
    # The tall orientation: LAPACK takes several times as long over a wide matrix.
    if m >= n:
        left, sigma, _ = np.linalg.svd(values, full_matrices=False)
    else:
        _, sigma, right = np.linalg.svd(values.T, full_matrices=False)
        left = right.T
    spanned = left[:, sigma > max(m, n) * np.finfo(np.float64).eps * sigma[0]]
    return np.asarray(np.vecdot(spanned, spanned))


def _pair(measure: str, a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    """Give two matrices of equal shape as float64, each scaled to a largest entry in [1, 2)."""
    if np.shape(a) != np.shape(b):
        raise LensError(
            f"{measure} needs two matrices of one shape, got {np.shape(a)} and {np.shape(b)}"
        )
    return scaled(a)[0], scaled(b)[0]


def _inner(x: Floats, y: Floats) -> np.float64:
    """Compute the Frobenius inner product."""
    return np.float64(np.dot(x.ravel(), y.ravel()))
