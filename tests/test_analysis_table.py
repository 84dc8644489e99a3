"""The long table: a row a number, only of what is asked for, and only that is read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import normuon_lens as nl
from normuon_lens.analysis import measure
from normuon_lens.analysis.measure import measurable, measure_pieces
from normuon_lens.analysis.results import Kept, Results
from normuon_lens.analysis.table import COLUMNS, labels
from normuon_lens.errors import LensError
from normuon_lens.metrics import CATALOGUE
from normuon_lens.runfile import Matrices, Matrix, Run, Writer, made_up_run, open_run

TABLE = Matrices([Matrix("up", 5, 3), Matrix("down", 3, 5)])


TINY = {matrix.name: (matrix.m, matrix.n) for matrix in TABLE}


def staged_run(path: Path, name: str = "staged", *, broken: bool = False) -> Run:
    """Write six steps with gradients beside the updates, matrices kept at 1, 2, 4 and 6."""
    writer = Writer(path, {"optimizer": "Muon", "name": name}, TABLE)
    rng = np.random.default_rng(0)
    for step in range(1, 7):
        of_stage = {
            stage: [rng.standard_normal((x.m, x.n)).astype(np.float32) for x in TABLE]
            for stage in ("gradient", "update")
        }
        norms = {
            stage: np.concatenate([np.linalg.norm(x, axis=1) for x in of])
            for stage, of in of_stage.items()
        }
        if broken and step == 3:
            norms["update"][0] = np.inf
        writer.step(step, float(step), scalars={}, norms=norms, void=step == 5)
        if step in (1, 2, 4, 6):
            for stage, of in of_stage.items():
                for i, x in enumerate(of):
                    writer.matrix(stage, i, step, x)
    writer.close()
    return open_run(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("made") / "x.h5"
    return made_up_run(path, steps=31, every=5, void=(7, 10))


def value(frame: pd.DataFrame, **where: object) -> float:
    for column, wanted in where.items():
        frame = frame[frame[column] == wanted]
    (found,) = frame["value"]
    return float(found)


# -- what is in it -------------------------------------------------------------------------------


def test_all_of_it_is_what_measure_gives_in_order(made: Run) -> None:
    run, frame = made, nl.table(made, "all")
    assert tuple(frame.columns) == COLUMNS
    assert [str(frame[name].dtype) for name in ("step", "value")] == ["int64", "float64"]
    rows = []
    for metric in measurable():
        if metric != "alignment":
            steps, values = measure(run, metric)
            for step, row in zip(steps, values, strict=True):
                numbers = [
                    (run.name, step, matrix, "update", metric, number)
                    for matrix, number in zip(run.matrices, row, strict=True)
                ]
                rows += [number for number in numbers if not np.isnan(number[-1])]
    assert list(frame.itertuples(index=False, name=None)) == rows


def test_names_are_categories_in_the_order_of_the_model(three_runs: Path) -> None:
    frame = nl.table(three_runs, ["neuron_cv", "condition_number"])
    assert list(frame["run"].cat.categories) == ["adamw", "muon", "normuon"]
    assert list(frame["matrix"].cat.categories) == open_run(three_runs / "muon.h5").matrices
    assert list(frame["metric"].cat.categories) == ["neuron_cv", "condition_number"]
    # One byte each: a long history is no larger than its steps and values.
    assert frame.memory_usage(index=False).sum() < 21 * len(frame)


def test_a_row_is_a_number(tmp_path: Path) -> None:
    staged_run(tmp_path / "x.h5", broken=True)
    frame = nl.table(tmp_path / "x.h5", ["neuron_not_finite", "neuron_cv"])
    assert not frame["value"].isna().any()
    assert value(frame, metric="neuron_not_finite", step=3, matrix="up") == 1
    broken = frame[(frame["metric"] == "neuron_cv") & (frame["step"] == 3)]
    assert list(broken["matrix"]) == ["down"]


def test_infinity_is_a_number(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "x.h5", {"optimizer": "Muon"}, TABLE)
    writer.step(1, 1.0, scalars={}, norms={})
    writer.spectra("update", 1, np.array([1.0, 0.5, 0.0, np.nan, np.nan, np.nan]), np.zeros(2))
    writer.close()
    frame = nl.table(tmp_path / "x.h5", "condition_number")
    assert frame[["matrix", "value"]].to_numpy().tolist() == [["up", np.inf]]


def test_alignment_and_cosine_equal_their_formulas(tmp_path: Path) -> None:
    run = staged_run(tmp_path / "x.h5")
    frame = nl.table(run, ["alignment", "cosine_previous"], ["update", "gradient"])
    counts = frame.groupby(["metric", "stage"]).size().to_dict()
    assert counts == {
        ("alignment", "update"): 4 * 2,
        ("cosine_previous", "update"): 3 * 2,
        ("cosine_previous", "gradient"): 3 * 2,
    }
    for matrix in run.matrices:
        gradient = run.update(matrix, 4, "gradient").astype(float)
        update, before = (run.update(matrix, step).astype(float) for step in (4, 2))
        nuclear = np.linalg.svd(gradient, compute_uv=False).sum()
        norm = np.linalg.norm(update)
        expected = -(gradient * update).sum() / (nuclear * norm / np.sqrt(3))
        found = value(frame, metric="alignment", matrix=matrix, step=4)
        assert found == pytest.approx(expected, rel=1e-12)
        expected = (update * before).sum() / norm / np.linalg.norm(before)
        found = value(frame, metric="cosine_previous", matrix=matrix, step=4, stage="update")
        assert found == pytest.approx(expected, rel=1e-12)


def test_what_an_analysis_found_is_not_computed_again(tmp_path: Path) -> None:
    run = staged_run(tmp_path / "x.h5")
    metrics = ["alignment", "cosine_previous", "neuron_cv"]
    computed = nl.table(run, metrics, "all")
    results = Results(run)
    results.add(Kept("update", 0, 4), {"alignment": 0.0, "cosine_previous": 7.0, "neuron_cv": 7.0})
    results.add(Kept("gradient", 1, 4), {"cosine_previous": 8.0})
    results.close()
    frame = nl.table(run, metrics, "all")
    changed = frame[frame["value"] != computed["value"]]
    # From whole matrices alone: neuron norms were measured on the live tensor.
    assert changed[["matrix", "stage", "metric", "step", "value"]].to_numpy().tolist() == [
        ["down", "gradient", "cosine_previous", 4, 8.0],
        ["up", "update", "alignment", 4, 0.0],
        ["up", "update", "cosine_previous", 4, 7.0],
    ]


# -- which runs ----------------------------------------------------------------------------------


def test_runs_are_given_as_they_come(three_runs: Path) -> None:
    adamw = three_runs / "adamw.h5"
    run = open_run(adamw)
    whole = nl.table([run])
    some: list[Any] = [run, adamw, str(adamw), [adamw, run], (x for x in [str(adamw)])]
    for given in some:
        pd.testing.assert_frame_equal(nl.table(given), whole)
    assert list(nl.table(three_runs)["run"].unique()) == ["adamw", "muon", "normuon"]
    twice = nl.table(run, ["neuron_cv", "neuron_cv"], ["update", "update"], [5, 5])
    assert len(twice) == 6
    mixed = nl.table([three_runs / "muon.h5", three_runs])
    assert list(mixed["run"].unique()) == ["muon", "adamw", "normuon"]


def test_runs_of_one_name_stay_apart(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("seed1/m.h5", "seed2/m.h5", "seed2/n.h5")]
    runs = [staged_run(path, "Muon") for path in paths]
    other = staged_run(tmp_path / "x.h5", "AdamW")
    assert labels([*runs, other]) == ["seed1/m", "seed2/m", "n", "AdamW"]
    assert labels(runs[:1]) == ["Muon"]
    # A name that looks like the end of another's path.
    assert len({*labels([*runs, staged_run(tmp_path / "y.h5", "n")])}) == 4
    frame = nl.table(runs, "neuron_cv")
    assert frame.groupby("run").size().to_dict() == {"seed1/m": 12, "seed2/m": 12, "n": 12}


def test_runs_of_other_models_share_the_table(tmp_path: Path) -> None:
    a = made_up_run(tmp_path / "a.h5", steps=2, shapes={"q": (3, 3), "up": (4, 2)})
    b = made_up_run(tmp_path / "b.h5", steps=2, shapes={"up": (5, 2), "v": (3, 3)})
    frame = nl.table([a, b], "neuron_mean")
    assert list(frame["matrix"].cat.categories) == ["q", "up", "v"]
    for run in (a, b):
        for i, name in enumerate(run.matrices):
            column = frame[(frame["run"] == run.name) & (frame["matrix"] == name)]["value"]
            np.testing.assert_array_equal(column, measure(run, "neuron_mean").values[:, i])


def test_what_one_run_lacks_another_may_have(tmp_path: Path) -> None:
    plain = made_up_run(tmp_path / "plain.h5", steps=4)
    staged = staged_run(tmp_path / "x.h5")
    frame = nl.table([plain, staged], ["neuron_cv", "alignment"], ["gradient", "update"])
    counts = frame.groupby(["run", "metric", "stage"]).size().to_dict()
    assert counts == {
        ("plain", "neuron_cv", "update"): 24,
        ("staged", "neuron_cv", "gradient"): 12,
        ("staged", "neuron_cv", "update"): 12,
        ("staged", "alignment", "update"): 8,
    }
    every = nl.table([plain, staged], "all", "all")
    assert set(every["stage"]) == {"gradient", "update"}
    assert set(every["metric"]) == set(measurable())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"metrics": "conditon_number"}, "closest are condition_number"),
        ({"metrics": "update_to_weight_spectral"}, r"needs the weight.*spectral\(sigma, weight\)"),
        ({"metrics": "alignment"}, r"x.h5: alignment needs gradients .*stages=True"),
        ({"stages": "momentum"}, r"x.h5: stage 'momentum' is not recorded, only update;.*stages"),
        ({"stages": ["update", "updates"]}, "no stage is called 'updates'"),
        ({"steps": 99}, "no condition_number and no neuron_cv at step 99; .* is 31"),
        ({"steps": 3, "metrics": "condition_number"}, "at step 3; the nearest .* is 1"),
        ({"steps": [2.5]}, r"whole numbers, got \[2.5\]"),
        ({"steps": 2**70}, "whole numbers"),
    ],
)
def test_what_no_run_has_is_refused_in_one_line(
    made: Run, given: dict[str, object], says: str
) -> None:
    with pytest.raises(LensError, match=says) as error:
        nl.table(made, **given)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_run_without_samples_says_so(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "x.h5", {"optimizer": "Muon"}, TABLE)
    writer.step(1, 1.0, scalars={}, norms={"update": np.ones(8)})
    writer.close()
    run = open_run(tmp_path / "x.h5")
    for metric, what in (("condition_number", "spectra"), ("cosine_previous", "full matrices")):
        with pytest.raises(LensError, match=f"x.h5: {metric} needs {what}"):
            nl.table(run, metric)
    assert len(nl.table(run, "neuron_cv")) == 2


def test_a_run_that_has_only_begun_has_no_rows(tmp_path: Path) -> None:
    Writer(tmp_path / "x.h5", {"optimizer": "Muon"}, TABLE).commit()
    run = open_run(tmp_path / "x.h5")
    for frame in (nl.table([]), nl.table(run, "all", "momentum"), nl.table(run, steps=3)):
        assert frame.empty
        assert tuple(frame.columns) == COLUMNS
    full = made_up_run(tmp_path / "y.h5", steps=2)
    assert set(nl.table([run, full])["run"]) == {"y"}


# -- only what is asked for is read --------------------------------------------------------------


@pytest.mark.parametrize("steps", [20, [10, 20], range(1, 31, 3), np.array([20, 1, 20])])
def test_some_steps_are_those_of_the_whole(made: Run, steps: int | list[int] | range) -> None:
    metrics = ["update_to_weight", "cosine_previous", "neuron_p90"]
    whole = nl.table(made, metrics)
    some = nl.table(made, metrics, steps=steps)
    wanted = whole[whole["step"].isin(np.atleast_1d(steps).tolist())].reset_index(drop=True)
    pd.testing.assert_frame_equal(some, wanted)


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Count the records that are read, of norms and of spectra."""
    read: dict[str, list[int]] = {"norms": [], "spectra": []}
    norms, spectra = Run.all_neuron_norms, Run.all_spectra

    def count_norms(*given: object) -> np.ndarray:
        found = norms(*given)  # type: ignore[arg-type]
        read["norms"].append(len(found))
        return found

    def count_spectra(*given: object) -> object:
        found = spectra(*given)  # type: ignore[arg-type]
        read["spectra"].append(len(found.steps))
        return found

    monkeypatch.setattr(Run, "all_neuron_norms", count_norms)
    monkeypatch.setattr(Run, "all_spectra", count_spectra)
    return read


@pytest.fixture
def few_steps_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["normuon_lens.analysis.measure"]  # its function has the same name
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    monkeypatch.setattr(module, "CHUNK", 3)


def test_nothing_between_steps_far_apart_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["normuon_lens.analysis.measure"], "CHUNK", 3)
    run = made_up_run(tmp_path / "x.h5", steps=60, every=2, shapes=TINY)
    read = counted(monkeypatch)
    metrics = ["condition_number", "neuron_cv", "update_to_weight", "neuron_gini"]
    frame = nl.table(run, metrics, steps=[2, 50])
    assert len(frame) == 4 * 2 * 2
    assert sum(read["norms"]) == sum(read["spectra"]) == 2


@pytest.mark.usefixtures("few_steps_a_block")
def test_spectra_are_read_once_and_never_all_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_up_run(tmp_path / "x.h5", steps=31, every=2, shapes=TINY)
    whole = measure(run, "condition_number")
    read = counted(monkeypatch)
    pieces = [piece for _, piece in measure_pieces(run, ["condition_number"], run.steps)]
    assert sum(read["spectra"]) == len(whole.steps) == 16
    assert max(read["spectra"]) == 3
    np.testing.assert_array_equal(np.concatenate([x.steps for x in pieces]), whole.steps)
    np.testing.assert_array_equal(np.concatenate([x.values for x in pieces]), whole.values)
    assert not read["norms"]


def test_every_measurable_metric_is_of_the_catalogue() -> None:
    assert set(CATALOGUE) - set(measurable()) == {"update_to_weight_spectral"}
