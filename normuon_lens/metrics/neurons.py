"""How evenly an update is shared among the output neurons, the rows of the matrix.

Every measure takes neuron norms r of shape (..., m) and gives one float64 figure for each leading
index. Ratios do not depend on the learning rate. A layer that did not move (all norms zero) has no
ratio, and a layer with a single NaN or Inf has no figure at all: both give NaN, without a warning.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from normuon_lens.errors import LensError
from normuon_lens.metrics._numeric import Floats, power_of_two

STARVED = 0.1
"""A row below this share of the layer's mean norm counts as starved."""


@np.errstate(all="ignore")
def row_norms(matrix: ArrayLike) -> Floats:
    """Compute the L2 norm of every row, accumulated in float64.

    Parameters
    ----------
    matrix : array_like of shape (m, n)
        Real, any float dtype.

    Returns
    -------
    ndarray of shape (m,), float64
        In the unit of `matrix`; NaN or Inf in the rows that hold one.

    Raises
    ------
    LensError
        When `matrix` is not a real two-dimensional array with at least one column.
    """
    given = np.asarray(matrix)
    if given.ndim != 2 or given.shape[1] == 0 or np.iscomplexobj(given):
        raise LensError(
            f"row norms need a real matrix with columns, got shape {given.shape} of {given.dtype}"
        )
    values = given.astype(np.float64)
    # Row by row: a common scale would flush a faint row to zero, and zero means dead.
    scale = power_of_two(np.maximum(values.max(axis=1), -values.min(axis=1)))
    values /= scale[:, None]
    return np.asarray(scale * np.sqrt(np.vecdot(values, values)))


@np.errstate(all="ignore")
def frobenius_norm(norms: ArrayLike) -> Floats:
    """Compute the Frobenius norm of the whole matrix, √Σr².

    Parameters
    ----------
    norms : array_like of shape (..., m)
        Row norms.

    Returns
    -------
    ndarray of shape (...), float64
        In the unit of `norms`; 0 for a void step.
    """
    relative, scale = _relative(norms)
    return np.asarray(scale * np.sqrt(np.vecdot(relative, relative)))


@np.errstate(all="ignore")
def neuron_mean(norms: ArrayLike) -> Floats:
    """Compute the mean neuron norm.

    Parameters
    ----------
    norms : array_like of shape (..., m)
        Row norms.

    Returns
    -------
    ndarray of shape (...), float64
        In the unit of `norms`; 0 for a void step.
    """
    relative, scale = _relative(norms)
    return np.asarray(scale * relative.mean(axis=-1))


@np.errstate(all="ignore")
def neuron_variance(norms: ArrayLike) -> Floats:
    """Compute the raw population variance of the neuron norms.

    It grows with the square of the learning rate; compare optimizers by `neuron_variance_unit`.

    Parameters
    ----------
    norms : array_like of shape (..., m)
        Row norms.

    Returns
    -------
    ndarray of shape (...), float64
        In the unit of `norms`, squared; 0 for a void step. Beyond the range of float64 it is Inf,
        below it 0.
    """
    relative, scale = _relative(norms)
    return np.asarray(scale * scale * relative.var(axis=-1))


@np.errstate(all="ignore")
def neuron_variance_unit(norms: ArrayLike) -> Floats:
    """Compute the population variance of r / rms(r): comparable across optimizers.

    Parameters
    ----------
    norms : array_like of shape (..., m)
        Row norms.

    Returns
    -------
    ndarray of shape (...), float64
        From 0 (all equal) towards 1 (one row holds everything); NaN for a void step.
    """
    relative, _ = _relative(norms)
    return np.asarray(relative.var(axis=-1) / np.square(relative).mean(axis=-1))


@np.errstate(all="ignore")
def neuron_cv(norms: ArrayLike) -> Floats:
    """Compute the coefficient of variation, population standard deviation over mean.

    Parameters
    ----------
    norms : array_like of shape (..., m)
        Row norms.

    Returns
    -------
    ndarray of shape (...), float64
        From 0 (all equal) to √(m − 1) (one row holds everything); NaN for a void step.
    """
    relative, _ = _relative(norms)
    return np.asarray(relative.std(axis=-1) / relative.mean(axis=-1))


@np.errstate(all="ignore")
def neuron_max_min(norms: ArrayLike) -> Floats:
    """Compute the largest norm over the smallest one among live rows (norm above zero).

    Parameters
    ----------
    norms : array_like of shape (..., m)
        Row norms.

    Returns
    -------
    ndarray of shape (...), float64
        At least 1; NaN for a void step.
    """
    norms = _finite(norms)
    largest = norms.max(axis=-1, keepdims=True)
    smallest = np.where(norms > 0, norms, largest).min(axis=-1)
    return np.asarray(largest[..., 0] / smallest)


@np.errstate(all="ignore")
def neuron_gini(norms: ArrayLike) -> Floats:
    """Compute the Gini coefficient: half the mean absolute difference of two rows, over the mean.

    Parameters
    ----------
    norms : array_like of shape (..., m)
        Row norms.

    Returns
    -------
    ndarray of shape (...), float64
        From 0 (all equal) to 1 − 1/m (one row holds everything); NaN for a void step.
    """
    relative, _ = _relative(norms)
    m = relative.shape[-1]
    weights = 2.0 * np.arange(1, m + 1) - m - 1
    return np.asarray(np.vecdot(np.sort(relative, axis=-1), weights) / (m * relative.sum(axis=-1)))


@np.errstate(all="ignore")
def neuron_percentile(norms: ArrayLike, percent: float) -> Floats:
    """Compute a percentile of the neuron norms relative to their mean.

    Parameters
    ----------
    norms : array_like of shape (..., m)
        Row norms.
    percent : float
        From 0 to 100, by value; interpolated linearly as ``numpy.percentile`` does.

    Returns
    -------
    ndarray of shape (...), float64
        1 means: as large as the mean. NaN for a void step.
    """
    relative, _ = _relative(norms)
    # As numpy.percentile, which would copy a long history with its axes exchanged.
    place = percent / 100 * (relative.shape[-1] - 1)
    low = int(place)
    high = min(low + 1, relative.shape[-1] - 1)
    sorted_there = np.partition(relative, [low, high], axis=-1)
    below, above = sorted_there[..., low], sorted_there[..., high]
    return np.asarray((below + (place - low) * (above - below)) / relative.mean(axis=-1))


@np.errstate(all="ignore")
def neuron_top1_share(norms: ArrayLike) -> Floats:
    """Compute the share of the squared norm held by the largest 1 % of the rows.

    Parameters
    ----------
    norms : array_like of shape (..., m)
        Row norms.

    Returns
    -------
    ndarray of shape (...), float64
        Of max(1, ⌊m / 100⌋) rows. That count over m if all are equal, 1 if they hold everything;
        NaN for a void step.
    """
    relative, _ = _relative(norms)
    energy = np.sort(np.square(relative), axis=-1)
    top = max(1, energy.shape[-1] // 100)
    return np.asarray(energy[..., -top:].sum(axis=-1) / energy.sum(axis=-1))


def neuron_dead(norms: ArrayLike) -> Floats:
    """Count the rows whose norm is exactly zero.

    Parameters
    ----------
    norms : array_like of shape (..., m)
        Row norms.

    Returns
    -------
    ndarray of shape (...), float64
        From 0 to m (void step); NaN where a norm is not finite.
    """
    norms = _finite(norms)
    return np.where(np.isnan(norms[..., 0]), np.nan, (norms == 0).sum(axis=-1))


def neuron_dead_share(norms: ArrayLike) -> Floats:
    """Compute the share of rows whose norm is exactly zero.

    Parameters
    ----------
    norms : array_like of shape (..., m)
        Row norms.

    Returns
    -------
    ndarray of shape (...), float64
        From 0 to 1 (void step); NaN where a norm is not finite.
    """
    return np.asarray(neuron_dead(norms) / np.shape(norms)[-1])


def neuron_starved(norms: ArrayLike) -> Floats:
    """Compute the share of rows below a tenth of the layer's mean norm; dead rows count too.

    Parameters
    ----------
    norms : array_like of shape (..., m)
        Row norms.

    Returns
    -------
    ndarray of shape (...), float64
        From 0 to 1; NaN for a void step.
    """
    relative, _ = _relative(norms)
    mean = relative.mean(axis=-1, keepdims=True)
    return np.where(mean[..., 0] > 0, (relative < STARVED * mean).mean(axis=-1), np.nan)


def neuron_not_finite(norms: ArrayLike) -> Floats:
    """Count the rows whose norm was recorded and is not finite.

    Parameters
    ----------
    norms : array_like of shape (..., m)
        Row norms; NaN where none was recorded, ∞ where one was not finite.

    Returns
    -------
    ndarray of shape (...), float64
        From 0 to m.
    """
    return np.asarray(np.isinf(norms).sum(axis=-1), dtype=np.float64)


def starved_streak(norms: ArrayLike) -> NDArray[np.int64]:
    """Count for how many recorded steps in a row each neuron has been starved.

    A void or non-finite step says nothing about any single neuron: it neither lengthens a streak
    nor ends it.

    Parameters
    ----------
    norms : array_like of shape (T, m)
        Row norms of one matrix, step by step.

    Returns
    -------
    ndarray of shape (T, m), int64
        Length of the streak that reaches up to and including each step; 0 where not starved.

    Raises
    ------
    LensError
        When `norms` is not two-dimensional.
    """
    relative, _ = _relative(norms)
    if relative.ndim != 2:
        raise LensError(f"starved_streak needs norms of shape (steps, m), got {relative.shape}")
    mean = relative.mean(axis=-1, keepdims=True)
    starved = relative < STARVED * mean
    streak = np.zeros(relative.shape, dtype=np.int64)
    current = np.zeros(relative.shape[1], dtype=np.int64)
    for t, moved in enumerate(mean[:, 0] > 0):
        if moved:
            current = np.where(starved[t], current + 1, 0)
        streak[t] = current
    return streak


def update_rms(norms: ArrayLike, columns: int) -> Floats:
    """Compute the root mean square of all entries of the update, ‖U‖_F / √(mn).

    Parameters
    ----------
    norms : array_like of shape (..., m)
        Row norms.
    columns : int
        n, how many entries a row has.

    Returns
    -------
    ndarray of shape (...), float64
        In the unit of `norms`; 0 for a void step.
    """
    return np.asarray(frobenius_norm(norms) / np.sqrt(np.shape(norms)[-1] * columns))


def _finite(norms: ArrayLike) -> Floats:
    """Give the norms as float64, NaN throughout rows that hold anything not finite."""
    norms = np.asarray(norms, dtype=np.float64)
    return np.where(np.isfinite(norms).all(axis=-1, keepdims=True), norms, np.nan)


def _relative(norms: ArrayLike) -> tuple[Floats, Floats]:
    """Divide the norms by a power of two that brings the largest to [1, 2); give that power too."""
    norms = _finite(norms)
    scale = power_of_two(norms.max(axis=-1))
    return norms / scale[..., None], scale
