"""What may stand side by side: each refusal and each warning, by a run that deserves it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainings import SHAPES, training

from normuon_lens.analysis import compare
from normuon_lens.analysis.comparison.comparable import caveats, shared_matrices, shared_steps
from normuon_lens.errors import LensError
from normuon_lens.runfile import Matrices, Run, Writer, made_up_run, open_run

LOSSES = 1.5 + 4 / np.arange(1, 121)


@pytest.fixture
def usual(tmp_path: Path) -> Run:
    return training(tmp_path / "usual.h5", LOSSES, model="GPT", parameters=54, world_size=1)


def said(*runs: Run) -> str:
    first, last = shared_steps(runs)
    labels = [run.path.name.removesuffix(".h5") for run in runs]
    return "\n".join(caveats(runs, labels, shared_matrices(runs), first, last))


@pytest.mark.parametrize(
    ("way", "says"),
    [
        ({"shapes": {"down": (3, 6)}}, "no matrix in common: they are not of one model"),
        ({"shapes": {**SHAPES, "out": (3, 5)}}, "out is 3 × 6 in .*usual.h5 and 3 × 5 in .*x.h5"),
        ({"parameters": 55}, "54 parameters and .*x.h5 of one with 55"),
        ({"steps": range(121, 241)}, "ends at step 120 and .*x.h5 begins at step 121"),
        ({"losses": []}, "x.h5 has no step: leave it out"),
    ],
)
def test_what_is_not_comparable_is_refused(
    way: dict[str, Any], says: str, usual: Run, tmp_path: Path
) -> None:
    other = training(tmp_path / "x.h5", **{"losses": LOSSES, **way})
    with pytest.raises(LensError, match=says) as caught:
        compare([usual, other])
    assert "\n" not in str(caught.value)
    assert len(compare([usual]).runs) == 1


def test_runs_without_updates_are_refused(usual: Run, tmp_path: Path) -> None:
    writer = Writer(tmp_path / "x.h5", {"optimizer": "SGD"}, usual.table)
    writer.step(1, 0.0, scalars={}, norms={"gradient": np.ones(usual.table.total_rows)})
    writer.close()
    with pytest.raises(LensError, match=r"x\.h5 holds no updates to compare, only gradient"):
        compare([usual, open_run(tmp_path / "x.h5")])
    Writer(tmp_path / "y.h5", {"optimizer": "SGD"}, Matrices([])).close()
    with pytest.raises(LensError, match=r"y\.h5 has no"):
        compare([open_run(tmp_path / "y.h5")])


def test_a_recording_is_not_compared_with_itself(tmp_path: Path) -> None:
    again = "are one recording: a run compared with itself says nothing"
    run = made_up_run(tmp_path / "usual.h5", steps=2)
    (tmp_path / "link.h5").symlink_to(run.path)
    for other in (run, open_run(tmp_path / "link.h5")):
        with pytest.raises(LensError, match=again):
            compare([run, other])
    ways: dict[str, dict[str, Any]] = {"a": {}, "b": {}, "c": {"shadow_of": "SGD"}}
    a, b, shadow = (
        training(tmp_path / f"{name}.h5", LOSSES[:9], created=1.5, **way)
        for name, way in ways.items()
    )
    with pytest.raises(LensError, match=again):
        compare([a, shadow, b])
    compare([a, shadow])
    for each in (a, b):
        each.metadata["created"] = [1.5]  # a file may say anything
    compare([a, b])


def test_there_is_something_to_compare() -> None:
    with pytest.raises(LensError, match="there is no run"):
        compare([])


def test_runs_that_are_alike_need_no_remark(usual: Run, tmp_path: Path) -> None:
    other = training(
        tmp_path / "x.h5", LOSSES * (1 + 1e-4), model="GPT", parameters=54, world_size=1
    )
    assert said(usual, other) == ""


ALMOST = LOSSES * (1 + 1e-4)

UNLIKE: list[tuple[dict[str, Any], str]] = [
    (
        {"losses": ALMOST[:100]},
        "compared over steps 1–100, which all runs went through, of 1–120 (u",
    ),
    (
        {"shapes": {**SHAPES, "more": (2, 2)}},
        "compared over the 3 matrices that all runs have, of ",
    ),
    ({"every": 30}, "spectra were not taken equally often, 12 (usual), 4 (x)"),
    ({"model": "Net"}, "models are not alike: GPT (usual), Net (x)"),
    ({"world_size": 8}, "numbers of ranks are not alike: 1 (usual), 8 (x)"),
    (
        {"losses": LOSSES * 1.01},
        "data or first weights are not the same: seed 0 begins at loss 5.5 ",
    ),
    ({"losses": LOSSES}, "usual, x: the same loss at every step, as of one training"),
    (
        {"shadow_of": "SGD"},
        "x: a shadow, which is what its rule would have done to the weights that",
    ),
    ({"losses": np.full(120, math.nan)}, "x: no loss was logged"),
    (
        {"losses": np.where(np.arange(120) % 40, math.nan, 5.5)},
        "x: 3 losses were logged, and a loss",
    ),
    (
        {"losses": np.where(np.arange(120) < 110, 5.5, math.nan)},
        "x: no finite loss was logged after",
    ),
    ({"close": False}, "x: still being recorded, so its figures will change"),
]


@pytest.mark.parametrize(("way", "says"), UNLIKE)
def test_what_is_unlike_is_said(way: dict[str, Any], says: str, usual: Run, tmp_path: Path) -> None:
    remarks = said(usual, training(tmp_path / "x.h5", **{"losses": ALMOST, **way})).splitlines()
    assert len(remarks) == 1
    assert remarks[0].startswith(says)


def test_what_is_true_of_several_runs_is_said_once(usual: Run, tmp_path: Path) -> None:
    others = [training(tmp_path / f"{i}.h5", np.full(120, math.nan)) for i in range(2)]
    assert said(usual, *others) == "0, 1: no loss was logged"
