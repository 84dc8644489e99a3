"""Loss curves without their noise: where a run ends, and when it reaches a loss.

The loss of a single batch says little. What is read everywhere is the mean of the last logged
losses, whose last value is the final loss; so every run reaches its own final loss, at its end if
it fell until then and earlier if noise took it there before.
"""

from __future__ import annotations

import math

import numpy as np

from normuon_lens.runfile import Run

LOSS_WINDOW = 20
"""A loss is the mean of so many last logged losses: single batches are noisy."""


def smoothed_loss(
    run: Run, scalar: str = "loss", window: int = LOSS_WINDOW
) -> tuple[np.ndarray, np.ndarray]:
    """Return the trailing mean of a scalar over its last finite values.

    Parameters
    ----------
    run : Run
    scalar : str
        As it was logged.
    window : int
        How many values a mean is over; at the beginning, of as many as there are.

    Returns
    -------
    steps : ndarray of shape (T',), int64
        Those at which a finite value was logged; none if there is no such scalar.
    values : ndarray of shape (T',), float64
    """
    logged = run.scalars.get(scalar, np.full(len(run.steps), np.nan))
    known = np.isfinite(logged)
    values = logged[known].astype(np.float64)
    if not len(values):
        return run.steps[known], values
    counts = np.minimum(np.arange(1, len(values) + 1), window)
    return run.steps[known], np.convolve(values, np.ones(window))[: len(values)] / counts


def final_loss(
    run: Run, scalar: str = "loss", window: int = LOSS_WINDOW, until: int | None = None
) -> float:
    """Return the last smoothed loss, or the last one up to step `until`; NaN if there is none."""
    steps, values = smoothed_loss(run, scalar, window)
    before = values if until is None else values[steps <= until]
    return float(before[-1]) if len(before) else math.nan


def steps_to(run: Run, target: float, scalar: str = "loss", window: int = LOSS_WINDOW) -> float:
    """Return the step at which the smoothed loss first is at `target` or below.

    Parameters
    ----------
    run : Run
    target : float
    scalar, window
        As of :func:`smoothed_loss`.

    Returns
    -------
    float
        Between the two logged steps around the crossing by linear interpolation; the first
        logged step if the run begins there; NaN if it never gets there.
    """
    steps, values = smoothed_loss(run, scalar, window)
    below = np.flatnonzero(values <= target)
    if not len(below):
        return math.nan
    at = int(below[0])
    if at == 0:
        return float(steps[0])
    share = (values[at - 1] - target) / (values[at - 1] - values[at])
    return float(steps[at - 1] + share * (steps[at] - steps[at - 1]))
