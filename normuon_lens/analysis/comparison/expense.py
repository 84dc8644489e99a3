"""What runs cost: time by one clock for all of them, and the state of their optimizers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from normuon_lens.analysis.comparison.variants import groups_of
from normuon_lens.optim.cost import BYTES, state_elements
from normuon_lens.runfile import Run

LOGGED = "seconds"
"""Scalar that may be logged: time spent on the training so far, in seconds."""

RECORDED = "optimizer_state_bytes"
"""Scalar that recorders write: bytes of the optimizer's state for the recorded matrices."""

COUNTED = {"Adam": "AdamW", "AdamW": "AdamW", "Muon": "Muon", "NorMuon": "NorMuon"}
"""Optimizers whose state is known from shapes, by the rule that it is counted as."""


class Clock(NamedTuple):
    """Time spent by the end of steps.

    Attributes
    ----------
    steps : ndarray of shape (T',), int64
    seconds : ndarray of shape (T',), float64
        Since the training began where it logged that, else since the first recorded step ended.
    """

    steps: np.ndarray
    seconds: np.ndarray

    def at(self, step: float) -> float:
        """Return the time at a step, interpolated between two; NaN for NaN, or with fewer."""
        if math.isnan(step) or len(self.steps) < 2:
            return math.nan
        return float(np.interp(step, self.steps, self.seconds))

    def a_step(self, first: int, last: int) -> float:
        """Return the median time that a step took, of steps beyond `first` up to `last`."""
        chosen = (self.steps >= first) & (self.steps <= last)
        took = np.diff(self.seconds[chosen]) / np.diff(self.steps[chosen])
        return float(np.median(took)) if len(took) else math.nan


def clocks(runs: Sequence[Run]) -> tuple[str, list[Clock]]:
    """Return the time of each run, by a clock that they all have.

    Returns
    -------
    source : {"seconds", "times"}
        The scalar :data:`LOGGED`, if every run has logged one to its end that never falls:
        trainings that take turns on one machine know their own time by it alone. Else the time of
        day at which steps ended, which counts pauses too.
    clocks : list of Clock
    """
    logged = [_clock(run, run.scalars.get(LOGGED)) for run in runs]
    if all(map(_is_clock, runs, logged)):
        return "seconds", logged
    by_day = [_clock(run, run.times) for run in runs]
    return "times", [clock._replace(seconds=clock.seconds - _first(clock)) for clock in by_day]


def state_bytes(runs: Sequence[Run], matrices: Sequence[str]) -> tuple[str, list[float]]:
    """Return the bytes that each run's optimizer keeps for the matrices they have in common.

    Returns
    -------
    source : {"recorded", "counted", ""}
        As :data:`RECORDED`, if every run has that, of just these matrices and of all their rows.
        Else counted from the shapes, in float32: AdamW 2mn, Muon mn, NorMuon m(n + 1). Empty if
        there is nothing to be said of any run.
    sizes : list of float
        NaN for an optimizer whose state is not known.
    """
    recorded = [_recorded(run, matrices) for run in runs]
    if not any(map(math.isnan, recorded)):
        return "recorded", recorded
    counted = [_counted(run, matrices) for run in runs]
    return "" if all(map(math.isnan, counted)) else "counted", counted


def _clock(run: Run, times: np.ndarray | None) -> Clock:
    times = np.full(len(run.steps), np.nan) if times is None else times
    known = np.isfinite(times)
    return Clock(run.steps[known], times[known])


def _is_clock(run: Run, clock: Clock) -> bool:
    """Tell whether times were logged as often at the end as before, and never fall."""
    if len(clock.steps) < 2:
        return False
    ends = run.steps[-1] - clock.steps[-1] <= np.diff(clock.steps).max()
    return bool(ends and (np.diff(clock.seconds) >= 0).all())


def _first(clock: Clock) -> float:
    return float(clock.seconds[0]) if len(clock.seconds) else 0.0


def _recorded(run: Run, matrices: Sequence[str]) -> float:
    known = run.scalars.get(RECORDED, np.empty(0))
    known = known[np.isfinite(known)]
    # Of a training on several ranks it is the state of one of them.
    whole = run.metadata.get("world_size", 1) == 1 and set(run.matrices) == set(matrices)
    return float(known[-1]) if len(known) and whole else math.nan


def _counted(run: Run, matrices: Sequence[str]) -> float:
    rule = COUNTED.get(run.optimizer)
    more = any(x.get("amsgrad") or x.get("granularity") == "coordinate" for x in groups_of(run))
    if rule is None or more:
        return math.nan
    return float(BYTES["float32"] * sum(state_elements(rule, *run.shape(x)) for x in matrices))
