"""Time and memory: by clocks that are known, and counts made by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from trainings import SHAPES, training

from normuon_lens.analysis.comparison.expense import Clock, clocks, state_bytes

LOSSES = np.ones(30)


def test_a_logged_clock_is_believed_if_all_runs_have_one(tmp_path: Path) -> None:
    spent = 0.5 + 0.25 * np.arange(30)
    a = training(tmp_path / "a.h5", LOSSES, scalars={"seconds": spent})
    b = training(tmp_path / "b.h5", LOSSES, scalars={"seconds": 2 * spent})
    source, (mine, other) = clocks([a, b])
    assert source == "seconds"
    assert (mine.at(1), mine.at(3.5), mine.at(30)) == (0.5, 1.125, 7.75)
    assert other.at(30) == 15.5
    assert (mine.a_step(1, 30), other.a_step(1, 30)) == (0.25, 0.5)


@pytest.mark.parametrize(
    "seconds",
    [
        None,
        np.where(np.arange(30) < 20, np.arange(30), 0.0),  # started anew
        np.where(np.arange(30) < 20, np.arange(30), math.nan),  # ended early
        np.where(np.arange(30) == 29, 1.0, math.nan),  # once
    ],
)
def test_else_the_time_of_day_is_everybodys_clock(
    seconds: np.ndarray | None, tmp_path: Path
) -> None:
    a = training(tmp_path / "a.h5", LOSSES, scalars={"seconds": np.arange(30)})
    b = training(
        tmp_path / "b.h5",
        LOSSES,
        seconds_a_step=0.5,
        scalars=None if seconds is None else {"seconds": seconds},
    )
    source, (mine, other) = clocks([a, b])
    assert source == "times"
    assert (mine.at(1), mine.at(30), other.at(30)) == (0, 29, 14.5)
    assert other.a_step(1, 30) == 0.5


def test_a_pause_does_not_make_steps_longer() -> None:
    steps = np.array([10, 20, 30, 50, 60, 70])
    clock = Clock(steps, np.array([0.0, 5.0, 10.0, 1020.0, 1025.0, 1030.0]))
    assert clock.a_step(0, 100) == 0.5
    assert clock.a_step(30, 50) == 50.5
    assert math.isnan(clock.a_step(60, 60))
    assert clock.at(55) == 1022.5
    assert math.isnan(clock.at(math.nan))
    assert math.isnan(Clock(steps[:1], np.zeros(1)).at(10))


def test_state_is_counted_as_the_rules_keep_it(tmp_path: Path) -> None:
    m, n = SHAPES["blocks.0.up"]
    names = ["AdamW", "Adam", "Muon", "NorMuon", "Lion"]
    runs = [training(tmp_path / f"{x}.h5", LOSSES[:1], optimizer=x) for x in names]
    source, sizes = state_bytes(runs, ["blocks.0.up", "blocks.1.up"])
    assert source == "counted"
    adam, muon = 2 * 4 * 2 * m * n, 2 * 4 * m * n
    np.testing.assert_array_equal(sizes, [adam, adam, muon, 2 * 4 * m * (n + 1), math.nan])
    assert state_bytes(runs[-1:], ["blocks.0.up"])[0] == ""
    for optimizer, setting in (
        ("AdamW", {"amsgrad": True}),
        ("NorMuon", {"granularity": "coordinate"}),
    ):
        path = tmp_path / f"more-{optimizer}.h5"
        more = training(path, LOSSES[:1], optimizer=optimizer, groups=[setting])
        assert math.isnan(state_bytes([more], ["blocks.0.up"])[1][0])


def test_recorded_state_is_believed_if_it_is_of_the_same_and_whole(tmp_path: Path) -> None:
    sizes = np.where(np.arange(30) % 10 == 0, 1000.0 + np.arange(30), math.nan)
    recorded: dict[str, Sequence[float] | np.ndarray] = {"optimizer_state_bytes": sizes}
    a = training(tmp_path / "a.h5", LOSSES, scalars=recorded)
    b = training(tmp_path / "b.h5", LOSSES, scalars=recorded, optimizer="Lion")
    assert state_bytes([a, b], list(SHAPES)) == ("recorded", [1020, 1020])
    assert state_bytes([a, b], ["out"])[0] == "counted", "of fewer matrices"
    shard = training(tmp_path / "c.h5", LOSSES, scalars=recorded, world_size=2)
    assert state_bytes([a, shard], list(SHAPES))[0] == "counted", "of one rank"
    none = training(tmp_path / "d.h5", LOSSES)
    assert state_bytes([a, none], list(SHAPES))[0] == "counted"
