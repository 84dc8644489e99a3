"""Metrics of kept matrices: what plain float64 NumPy finds, and no condition beyond its floor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normuon_lens.analysis.offline.stored import Answer, Batch, identity, measure_batch, obtainable
from normuon_lens.errors import RunError
from normuon_lens.metrics import CATALOGUE
from normuon_lens.runfile import Matrices, Matrix, Run, Writer, made_up_run, open_run
from normuon_lens.runfile.synthetic import made_up_update

SHAPE = (24, 16)
STEPS = (2, 4, 6)


def record(path: Path, condition: float = 50.0, **options: Any) -> Run:
    """Keep updates and gradients at steps 2, 4 and 6, of which 2 and 6 were sampled."""
    floor, dtype = options.pop("floor", 0.0), options.pop("dtype", "float32")
    weight_norm = options.pop("weight_norm", 3.0)
    metadata = {"optimizer": "SGD", "groups": [{"update": options.pop("update", "exact")}]}
    writer = Writer(path, metadata, Matrices([Matrix("w", *SHAPE, dtype=dtype)]), **options)
    rng = np.random.default_rng(0)
    for step in range(1, 7):
        update = made_up_update(SHAPE, condition, rng)
        norms = {"update": np.linalg.norm(update, axis=1)}
        writer.step(step, float(step), scalars={}, norms=norms)
        if step in STEPS:
            writer.matrix("update", 0, step, update)
            if step != 4:
                writer.matrix("gradient", 0, step, made_up_update(SHAPE, 10.0, rng))
                sigma = np.linalg.svd(update, compute_uv=False)
                writer.spectra(
                    "update", step, sigma, np.array([floor]), weight_norm=np.array([weight_norm])
                )
    writer.close()
    return open_run(path)


def analysed(run: Run, metrics: tuple[str, ...] = (), stage: str = "update") -> Answer:
    metrics = metrics or tuple(obtainable(run, stage))
    steps = tuple(run.update_steps("w", stage).tolist())
    return measure_batch(Batch(str(run.path), identity(run), stage, "w", steps, metrics))


def test_every_metric_is_what_plain_numpy_finds(tmp_path: Path) -> None:
    run = record(tmp_path / "x.h5")
    assert set(obtainable(run, "update")) == set(CATALOGUE) - {"update_to_weight_spectral"}
    answer = analysed(run)
    for step, found in zip(STEPS, answer, strict=True):
        assert isinstance(found, dict)
        update = run.update("w", step).astype(np.float64)
        sigma = np.linalg.svd(update, compute_uv=False)
        norms = np.sqrt((update**2).sum(axis=1))
        rms = math.sqrt((update**2).mean())
        p5, p95 = np.percentile(sigma, [5, 95])
        expected = {
            "condition_number": sigma[0] / sigma[-1],
            "condition_is_lower_bound": 0.0,
            "resolved": 16.0,
            "sigma_max": sigma[0],
            "spread_p95_p5": p95 / p5,
            "stable_rank": (sigma**2).sum() / sigma[0] ** 2,
            "neuron_cv": norms.std() / norms.mean(),
            "neuron_max_min": norms.max() / norms.min(),
            "neuron_p90": np.percentile(norms, 90) / norms.mean(),
            "update_rms": rms,
            "update_to_weight": math.nan if step == 4 else np.linalg.norm(update) / 3.0,
            "update_error": math.nan if step == 4 else 0.0,
        }
        if step != 2:
            before = run.update("w", step - 2).astype(np.float64)
            scale = np.linalg.norm(update) * np.linalg.norm(before)
            expected["cosine_previous"] = (update * before).sum() / scale
        else:
            expected["cosine_previous"] = math.nan
        if step != 4:
            gradient = run.update("w", step, "gradient").astype(np.float64)
            nuclear = np.linalg.svd(gradient, compute_uv=False).sum()
            scale = nuclear * np.linalg.norm(update) / 4.0
            expected["alignment"] = -(update * gradient).sum() / scale
        else:
            expected["alignment"] = math.nan
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-6, nan_ok=True), (step, name)


def test_other_stages_are_held_against_neither_weight_nor_gradient(tmp_path: Path) -> None:
    run = record(tmp_path / "x.h5")
    names = obtainable(run, "gradient")
    assert not {"alignment", "update_to_weight", "update_error"} & set(names)
    found = analysed(run, stage="gradient")[1]
    assert isinstance(found, dict)
    assert found["condition_number"] == pytest.approx(10.0, rel=1e-5)
    plain = made_up_run(tmp_path / "y.h5", steps=1)
    assert "alignment" not in obtainable(plain, "update"), "it kept no gradient"


BOUND = ("condition_number", "condition_is_lower_bound")


def noise(roundoff: float, norm: float) -> float:
    return float(0.4 * roundoff * norm * (SHAPE[0] ** -0.5 + SHAPE[1] ** -0.5))


@pytest.mark.parametrize(("store", "roundoff"), [("float32", 2.0**-24), ("float16", 2.0**-11)])
def test_floor_is_that_of_the_rounding_when_it_was_stored(
    store: str, roundoff: float, tmp_path: Path
) -> None:
    run = record(tmp_path / "x.h5", 1e9, store=store)
    for step, found in zip(STEPS, analysed(run, BOUND), strict=True):
        assert isinstance(found, dict)
        update = run.update("w", step).astype(np.float64)
        sigma = np.linalg.svd(update, compute_uv=False)
        floor = noise(roundoff, float(np.linalg.norm(update)))
        assert sigma[-1] < 3 * floor, "what is left of it is noise"
        assert found["condition_number"] <= sigma[0] / floor * (1 + 1e-6)
        bound = sigma[-1] <= floor
        assert found["condition_is_lower_bound"] == bound


def test_floor_of_the_recorder_counts_where_it_is_the_larger(tmp_path: Path) -> None:
    run = record(tmp_path / "x.h5", floor=1e-4)  # of σ₁ = 1e-3, and σₖ = 2e-5
    found = analysed(run, BOUND)
    assert [one[BOUND[1]] for one in found if isinstance(one, dict)] == [1.0, 0.0, 1.0]
    values = [one[BOUND[0]] for one in found if isinstance(one, dict)]
    assert values == pytest.approx([10.0, 50.0, 10.0], rel=1e-5)


def test_floor_of_a_difference_of_weights_holds_between_samples(tmp_path: Path) -> None:
    options = {"dtype": "bfloat16", "update": "difference", "floor": 1e-4, "weight_norm": 0.25}
    run = record(tmp_path / "x.h5", **options)
    floor = noise(2.0**-8, 0.25)
    found = analysed(run, BOUND)[1]
    assert isinstance(found, dict)
    assert found[BOUND[0]] == pytest.approx(1e-3 / floor, rel=1e-5)
    assert found[BOUND[1]] == 1.0


def test_void_and_infinite_steps_have_no_condition(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "x.h5", {"optimizer": "SGD"}, Matrices([Matrix("w", 2, 2)]))
    for step, values in enumerate([np.zeros((2, 2)), np.full((2, 2), np.inf), np.eye(2)], 1):
        writer.step(step, float(step), scalars={}, norms={"update": np.ones(2)})
        writer.matrix("update", 0, step, values)
    writer.close()
    void, infinite, whole = analysed(open_run(tmp_path / "x.h5"))
    assert isinstance(void, dict)
    assert isinstance(infinite, dict)
    assert isinstance(whole, dict)
    assert math.isnan(void["condition_number"])
    assert (void["sigma_max"], void["neuron_dead"]) == (0.0, 2.0)
    assert math.isnan(infinite["condition_number"])
    assert infinite["neuron_not_finite"] == 2.0
    assert math.isnan(whole["cosine_previous"])
    assert whole["condition_number"] == 1.0


def test_what_cannot_be_read_is_told_and_the_rest_is_analysed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = record(tmp_path / "x.h5")
    read = Run.update

    def damaged(self: Run, matrix: str, step: int, stage: str = "update") -> np.ndarray:
        if step == 4:
            raise RunError(f"{self.path}: damaged (a chunk)")
        return read(self, matrix, step, stage)

    monkeypatch.setattr(Run, "update", damaged)
    found = analysed(run, BOUND)
    assert found[1] == f"{run.path}: damaged (a chunk)"
    assert [isinstance(one, dict) for one in found] == [True, False, True]


def test_a_worker_refuses_another_recording_in_its_place(tmp_path: Path) -> None:
    run = record(tmp_path / "x.h5")
    batch = Batch(str(run.path), identity(run), "update", "w", (2,), BOUND)
    measure_batch(batch)
    run.path.unlink()
    with pytest.raises(RunError, match="no such recording"):
        measure_batch(batch)
    made_up_run(run.path, steps=2, every=1, shapes={"w": SHAPE})
    with pytest.raises(RunError, match="another recording here"):
        measure_batch(batch)
