"""Losses without noise: against plain loops, and curves whose crossing is known in closed form."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from trainings import training

from normuon_lens.analysis.crossing import LOSS_WINDOW, final_loss, smoothed_loss, steps_to

STEPS = np.arange(1, 401)


def test_smoothed_losses_are_the_means_of_the_last_finite_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    losses = 3 + rng.standard_normal(60)
    losses[[4, 5, 30]] = math.nan, math.inf, -math.inf
    run = training(tmp_path / "x.h5", losses)
    logged = [(step, loss) for step, loss in enumerate(losses, 1) if math.isfinite(loss)]
    steps, values = smoothed_loss(run, window=7)
    assert steps.tolist() == [step for step, _ in logged]
    for i, value in enumerate(values):
        assert value == pytest.approx(np.mean([loss for _, loss in logged[max(0, i - 6) : i + 1]]))
    assert final_loss(run, window=7) == values[-1]
    assert final_loss(run, window=7, until=33) == values[steps <= 33][-1]
    assert final_loss(run, window=1, until=31) == losses[29]


def test_nothing_logged_is_nothing_to_smooth(tmp_path: Path) -> None:
    run = training(tmp_path / "x.h5", np.full(5, math.nan))
    for scalar in ("loss", "accuracy"):
        steps, values = smoothed_loss(run, scalar)
        assert len(steps) == len(values) == 0
        assert math.isnan(final_loss(run, scalar))
        assert math.isnan(steps_to(run, 1.0, scalar))
    logged = training(tmp_path / "y.h5", np.ones(5))
    assert math.isnan(final_loss(logged, until=0))


def test_an_exponential_decay_crosses_where_its_formula_says(tmp_path: Path) -> None:
    end, height, rate = 1.7, 4.0, 0.02
    run = training(tmp_path / "x.h5", end + height * np.exp(-rate * STEPS))
    # The mean over the last w values is the curve itself, raised by a constant factor.
    lag = (math.exp(rate * LOSS_WINDOW) - 1) / (LOSS_WINDOW * (math.exp(rate) - 1))
    for target in (4.0, 2.5, 1.75):
        exact = math.log(height * lag / (target - end)) / rate
        # Between two steps the curve is replaced by its chord, off by rate / 8 of a step at most.
        assert steps_to(run, target) == pytest.approx(exact, abs=rate / 8)
    assert math.isnan(steps_to(run, end))


@pytest.mark.parametrize("every", [1, 7])
def test_a_straight_fall_is_interpolated_exactly(every: int, tmp_path: Path) -> None:
    losses = np.where(STEPS % every == 0, 50 - 0.1 * STEPS, math.nan)
    run = training(tmp_path / "x.h5", losses)
    lag = every * (LOSS_WINDOW - 1) / 2
    for target in (30.0, 29.03, 20.001):
        assert steps_to(run, target) == pytest.approx((50 - target) / 0.1 + lag)
    assert steps_to(run, final_loss(run)) == pytest.approx(400 // every * every)


def test_one_lucky_batch_is_no_crossing(tmp_path: Path) -> None:
    losses = np.where(STEPS < 200, 3.0, 1.0)
    losses[99] = 1.0
    # 1 of 20 batches at 1.0 makes 2.9, 11 of 20 make 1.9.
    assert steps_to(training(tmp_path / "x.h5", losses), 1.9) == pytest.approx(210)


def test_the_first_of_several_crossings_counts(tmp_path: Path) -> None:
    losses = np.array([3.0, 2.0, 3.0, 1.0])
    assert steps_to(training(tmp_path / "x.h5", losses), 2.5, window=1) == 1.5
    assert steps_to(training(tmp_path / "y.h5", losses), 3.0, window=1) == 1
    assert (
        steps_to(training(tmp_path / "z.h5", losses, steps=[10, 30, 40, 80]), 1.5, window=1) == 70
    )
