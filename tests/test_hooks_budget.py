"""Recording stays within its budget, as a made-up cost of every kind of step shows."""

from __future__ import annotations

import pytest

from normuon_lens.errors import AttachError
from normuon_lens.hooks.budget import WINDOW, Budget
from normuon_lens.hooks.schedule import Schedule

REST = 0.1
"""Seconds of a training step without any recording."""


def spend(budget: Budget, schedule: Schedule, costs: dict[str, float], steps: int) -> Schedule:
    """Let time pass under the schedule that the budget allows; returns the last one."""
    for step in range(1, steps + 1):
        cost = costs[schedule.kind(step)]
        budget.spent(schedule.kind(step), cost, REST + cost)
        schedule = budget.affordable(schedule)
    return schedule


def share(schedule: Schedule, costs: dict[str, float]) -> float:
    """Work out what recording costs under a schedule in the long run."""
    steps = range(2, 2 + schedule.every * schedule.norms_every * 10)
    return sum(costs[schedule.kind(step)] for step in steps) / (REST * len(steps))


@pytest.mark.parametrize(
    ("costs", "asked"),
    [
        ({"": 0.0, "norms": 0.002, "sample": 0.08}, Schedule(10, 1, 10)),
        ({"": 0.0, "norms": 0.02, "sample": 0.3}, Schedule(10, 1, 50)),
        ({"": 0.001, "norms": 0.004, "sample": 0.9}, Schedule(4, 2, 0)),
    ],
)
def test_recording_is_thinned_until_it_fits(costs: dict[str, float], asked: Schedule) -> None:
    assert share(asked, costs) > 0.05
    thinned = spend(Budget(0.05, asked), asked, costs, 20 * WINDOW)
    assert share(thinned, costs) <= 0.05
    # And no more than need be: half as rare would be too dear.
    assert share(Schedule(max(asked.every, thinned.every // 3), 1, 0), costs) > 0.05
    assert thinned.every % asked.every == 0
    assert (thinned.matrices_every == 0) == (asked.matrices_every == 0)


def test_what_fits_is_left_alone() -> None:
    asked = Schedule(10, 1, 10)
    costs = {"": 0.0, "norms": 0.002, "sample": 0.01}
    assert spend(Budget(0.05, asked), asked, costs, 5 * WINDOW) == asked


def test_what_cannot_be_thinned_does_not_starve_the_rest() -> None:
    asked = Schedule(10, 1, 10)
    costs = {"": 0.2, "norms": 0.202, "sample": 0.23}  # a shadow takes twice the training's time
    thinned = spend(Budget(0.05, asked), asked, costs, 40 * WINDOW)
    without = {kind: cost - 0.2 for kind, cost in costs.items()}
    assert 0.25 * 0.05 / 3 < share(thinned, without) <= 0.25 * 0.05


def test_it_comes_back_when_it_can_be_afforded_again() -> None:
    asked = Schedule(10, 1, 10)
    budget = Budget(0.05, asked)
    dear = spend(budget, asked, {"": 0.0, "norms": 0.001, "sample": 0.5}, 4 * WINDOW)
    assert dear.every > 10
    cheap = {"": 0.0, "norms": 0.001, "sample": 0.002}
    assert spend(budget, dear, cheap, 40 * WINDOW).every == 10


def test_nothing_changes_before_there_is_something_to_go_by() -> None:
    asked = Schedule(10, 1, 10)
    costs = {"": 1.0, "norms": 1.0, "sample": 1.0}
    assert spend(Budget(0.05, asked), asked, costs, WINDOW - 1) == asked


@pytest.mark.parametrize("share", [0, -1, float("nan"), float("inf")])
def test_a_share_that_makes_no_sense_is_refused(share: float) -> None:
    with pytest.raises(AttachError, match="expected a share of the training time"):
        Budget(share, Schedule())
