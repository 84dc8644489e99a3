"""Comparisons: the numbers that one line of NumPy gives, over the steps that all runs have."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from trainings import training

from normuon_lens.analysis import Comparison, compare, measure
from normuon_lens.analysis.comparison.kinds import Quantiles, Row, matrix_group
from normuon_lens.analysis.comparison.side_by_side import FIGURES
from normuon_lens.analysis.crossing import final_loss, steps_to
from normuon_lens.errors import LensError
from normuon_lens.runfile import Run, made_up_run

STEPS = np.arange(1, 121)
FALL = 1.5 + 4 * np.exp(-0.05 * STEPS)


@pytest.fixture
def pair(tmp_path: Path) -> list[Run]:
    """Return a run of 120 steps, and a faster one of 80 with half of the spectra."""
    slow = training(tmp_path / "slow.h5", FALL, scalars={"val_loss": FALL + 1}, condition=100)
    fast = training(
        tmp_path / "fast.h5", FALL[:80] - 0.5, optimizer="Muon", every=20, seconds_a_step=2.0
    )
    return [slow, fast]


def row(comparison: Comparison, group: str, metric: str) -> Row:
    return next(x for x in comparison.rows if (x.group, x.metric) == (group, metric))


def test_quantiles_are_over_the_steps_that_all_runs_have(pair: list[Run]) -> None:
    comparison = compare(pair, ["condition_number", "neuron_cv"], skip=30)
    assert (comparison.first_step, comparison.last_step) == (1, 80)
    assert comparison.rows[-1].group == "all matrices"
    for group, columns in (("blocks.*.up", [0, 1]), ("out", [2]), ("all matrices", [0, 1, 2])):
        for metric in ("condition_number", "neuron_cv"):
            for run, found in zip(pair, row(comparison, group, metric).values, strict=True):
                steps, values = measure(run, metric)
                chosen = values[(steps > 30) & (steps <= 80)][:, columns]
                low, median, high = np.percentile(chosen, [10, 50, 90])
                expected = Quantiles(median, low, high, chosen.size)
                assert found == expected


def test_comparison_takes_matrices_by_name_not_by_place(tmp_path: Path) -> None:
    shapes = {"up": (12, 4), "down": (4, 12)}
    backwards = dict(reversed(shapes.items()))
    a = made_up_run(tmp_path / "a.h5", shapes=shapes, condition=10)
    b = made_up_run(tmp_path / "b.h5", shapes={**backwards, "more": (3, 3)}, condition=20)
    comparison = compare([a, b], ["resolved", "condition_number"])
    assert {each.group for each in comparison.rows} == {"up", "down", "all matrices"}
    for group in ("up", "down"):
        np.testing.assert_allclose(row(comparison, group, "condition_number").ratios(), [1, 2])


def test_groups_are_names_with_their_numbers_replaced() -> None:
    assert matrix_group("blocks.11.mlp.up") == "blocks.*.mlp.up"
    assert matrix_group("0.layer2.3") == "*.layer2.*"


def test_losses_are_compared_at_an_equal_step_but_the_target_is_the_end(pair: list[Run]) -> None:
    slow, fast = pair
    comparison = compare(pair)
    mine, other = comparison.runs
    assert mine.loss == final_loss(slow, until=80)
    assert mine.val_loss == FALL[79] + 1
    assert other.loss == final_loss(fast)
    assert math.isnan(other.val_loss)
    assert (comparison.target.loss, comparison.target.of) == (final_loss(slow), "slow")
    assert mine.target_step == 120
    assert other.target_step == steps_to(fast, final_loss(slow))
    # By the time of day, from the end of the first step, two seconds a step.
    assert comparison.clock == "times"
    assert other.target_seconds == pytest.approx(2 * (other.target_step - 1))
    assert (mine.step_seconds, other.step_seconds) == (1, 2)
    assert (mine.seconds, other.seconds) == (79, 158)
    assert comparison.state == "counted"
    assert mine.state_bytes == 2 * other.state_bytes == 2 * 4 * 3 * 18


def test_another_target_can_be_asked_for(pair: list[Run]) -> None:
    comparison = compare(pair, target=2.0)
    assert (comparison.target.loss, comparison.target.of) == (2.0, "")
    assert [run.target_step for run in comparison.runs] == [steps_to(run, 2.0) for run in pair]
    for bad in (math.nan, math.inf):
        with pytest.raises(LensError, match="must be a number"):
            compare(pair, target=bad)


def test_a_target_without_losses_is_refused(tmp_path: Path) -> None:
    silent = training(tmp_path / "x.h5", np.full(5, math.nan))
    with pytest.raises(LensError, match="no run has logged a loss"):
        compare([silent], target=2.0)
    assert math.isnan(compare([silent]).target.loss)


def test_a_shadow_has_updates_but_no_loss_and_no_time(tmp_path: Path) -> None:
    real = training(tmp_path / "real.h5", FALL, scalars={"val_loss": FALL})
    shadow = training(
        tmp_path / "shadow.h5",
        FALL,
        optimizer="NorMuon",
        shadow_of="AdamW",
        scalars={"val_loss": FALL},
    )
    comparison = compare([real, shadow])
    found = asdict(comparison.runs[1])
    assert [name for name in FIGURES if math.isfinite(found[name])] == ["state_bytes"]
    assert row(comparison, "out", "neuron_cv").values[1].count == 100
    assert math.isnan(compare([shadow, real]).target.loss)
    with pytest.raises(LensError, match="no run has logged a loss"):
        compare([shadow], target=2.0)


def test_bounds_are_told_from_numbers(tmp_path: Path) -> None:
    known = training(tmp_path / "a.h5", FALL, condition=100)
    lost = training(tmp_path / "b.h5", FALL, condition=1e5, floor=0.01, seed=1)
    found = row(compare([known, lost]), "out", "condition_number").values
    assert [value.is_lower_bound for value in found] == [False, True]
    assert not row(compare([lost]), "out", "neuron_cv").values[0].is_lower_bound


def test_runs_of_one_variant_are_pooled(tmp_path: Path) -> None:
    runs = [
        training(
            tmp_path / f"{optimizer}{seed}.h5",
            FALL + seed / 8 - (optimizer == "Muon") / 2,
            optimizer=optimizer,
            seed=seed,
            condition=condition + seed,
        )
        for optimizer, condition in (("AdamW", 100), ("Muon", 3))
        for seed in range(3)
    ]
    comparison = compare(runs, ["condition_number"])
    assert [variant.name for variant in comparison.variants] == ["AdamW", "Muon"]
    assert [run.variant for run in comparison.runs] == ["AdamW"] * 3 + ["Muon"] * 3
    of_variants = row(comparison, "out", "condition_number")
    # A third of the values each is 100, 101 and 102.
    assert of_variants.by_variant[0].median == pytest.approx(101)
    assert of_variants.by_variant[0].count == 3 * of_variants.values[0].count
    np.testing.assert_allclose(of_variants.variant_ratios(), [1, 4 / 101])
    first, other = comparison.variants
    losses = [final_loss(run) for run in runs]
    assert first.spreads["loss"].mean == pytest.approx(np.mean(losses[:3]))
    assert first.spreads["loss"].sd == pytest.approx(np.std(losses[:3], ddof=1)) == 1 / 8
    paired = other.against_first["loss"]
    assert (paired.better, paired.worse, paired.p) == (3, 0, 0.25)
    assert paired.difference.mean == pytest.approx(-0.5)
    assert paired.difference.sd == pytest.approx(0, abs=1e-12)
    # Seeds 1 and 2 of AdamW never get as low as seed 0 did in as many steps.
    assert first.spreads["target_step"].count == 1
    assert other.against_first["target_step"].better == 3
    assert set(other.against_first) == {"loss", "val_loss", "target_step"}


def test_a_comparison_is_json(pair: list[Run]) -> None:
    content = json.loads(json.dumps(asdict(compare(pair))))
    assert content["variants"][1]["spreads"]["loss"]["count"] == 1
    assert content["remarks"][0].startswith("compared over steps 1–80")


def test_a_metric_that_one_run_lacks_is_missing_there(tmp_path: Path) -> None:
    a = training(tmp_path / "a.h5", FALL)
    b = training(tmp_path / "b.h5", FALL[:5])
    found = row(compare([a, b]), "out", "condition_number").values
    assert [value.count for value in found] == [0, 0], "the first spectrum is of step 10"
    c = training(tmp_path / "c.h5", FALL - 0.1, every=200)
    found = row(compare([a, c]), "out", "condition_number").values
    assert [value.count for value in found] == [10, 0]
    with pytest.raises(LensError, match="alignment needs gradients"):
        compare([a, c], ["alignment"])
    with pytest.raises(LensError, match="neuron_vc"):
        compare([a], ["neuron_vc"])


def test_a_run_of_first_steps_alone_is_taken_with_a_warning(tmp_path: Path) -> None:
    comparison = compare([training(tmp_path / "a.h5", FALL[:15])], ["neuron_cv"])
    assert row(comparison, "out", "neuron_cv").values[0].count == 15
    assert "compared over none but the first 20 steps" in comparison.remarks[-1]
