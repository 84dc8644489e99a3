"""Tables and comparisons: the same numbers as a loop over the recorded arrays gives."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import normuon_lens as nl
from normuon_lens.analysis import measure, measure_all
from normuon_lens.analysis.measure import measurable
from normuon_lens.errors import LensError
from normuon_lens.metrics import CATALOGUE
from normuon_lens.runfile import Matrices, Matrix, Run, Writer, made_up_run, open_run

RECORDED = [name for name in measurable() if name != "alignment"]
"""What a made-up run holds enough for: it keeps no gradients."""


def test_every_measurable_metric_has_a_value_for_every_matrix(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "x.h5", steps=30, every=5)
    lengths = {"norms": 30, "sigma": 7, "update": 7}
    for name in RECORDED:
        series = measure(run, name)
        needs = CATALOGUE[name].needs
        expected = next(lengths[need] for need in ("sigma", "update", "norms") if need in needs)
        if "weight_norm" in needs:
            expected = 7
        assert series.values.shape == (expected, 6), name
        first = 1 if "previous" in needs else 0
        assert np.isfinite(series.values[first:]).all(), name


def test_measures_equal_a_loop_over_the_arrays(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "x.h5", steps=30, every=5, condition=50)
    cv, cond = measure(run, "neuron_cv"), measure(run, "condition_number")
    cosine = measure(run, "cosine_previous")
    for i, name in enumerate(run.matrices):
        for row, norms in zip(cv.values, run.neuron_norms(name).astype(float), strict=True):
            assert row[i] == pytest.approx(np.std(norms) / np.mean(norms))
        np.testing.assert_allclose(cond.values[:, i], 50)
        before, now = (run.update(name, step).ravel() for step in (5, 10))
        expected = before @ now / np.linalg.norm(before) / np.linalg.norm(now)
        assert cosine.values[2, i] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("metric", ["neuron_cv", "condition_number", "cosine_previous"])
def test_asking_for_what_is_new_gives_the_rest_of_the_whole(metric: str, tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "x.h5", steps=30, every=5)
    whole = measure(run, metric)
    for after in (0, 1, 12, 29, 30, 99):
        rest = measure(run, metric, after=after)
        np.testing.assert_array_equal(rest.steps, whole.steps[whole.steps > after])
        np.testing.assert_array_equal(rest.values, whole.values[whole.steps > after])


@pytest.fixture
def few_steps_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a block of three steps, with which neither a schedule nor an end falls together."""
    module = sys.modules["normuon_lens.analysis.measure"]  # its function has the same name
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    monkeypatch.setattr(module, "CHUNK", 3)


@pytest.mark.usefixtures("few_steps_a_block")
def test_blocks_give_what_the_whole_history_gives(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "x.h5", steps=31, every=5, void=(8, 10))
    found = measure_all(run, measurable())
    assert list(found) == RECORDED
    norms, spectra = run.all_neuron_norms(), run.all_spectra()
    assert spectra.steps.tolist() == [1, 5, 10, 15, 20, 25, 30]
    for name in ("neuron_cv", "neuron_starved", "neuron_p99", "update_rms"):
        assert found[name].steps.tolist() == list(range(1, 32))
        for i, matrix in enumerate(run.table):
            inputs = {"norms": norms[:, run.table.rows(i)], "columns": matrix.n}
            row = CATALOGUE[name]
            expected = row.compute(*(inputs[need] for need in row.needs))
            np.testing.assert_array_equal(found[name].values[:, i], expected)
    for i in range(len(run.table)):
        sigma, size = spectra.sigma[:, run.table.sigmas(i)], norms[:, run.table.rows(i)]
        expected = CATALOGUE["condition_number"].compute(sigma, spectra.floor[:, i])
        np.testing.assert_array_equal(found["condition_number"].values[:, i], expected)
        # ‖W‖ is 1 in made-up runs, so this is the norm of the update at the sampled steps.
        frobenius = np.sqrt((size[spectra.steps - 1].astype(float) ** 2).sum(axis=1))
        np.testing.assert_allclose(found["update_to_weight"].values[:, i], frobenius)


@pytest.mark.usefixtures("few_steps_a_block")
@pytest.mark.parametrize("after", [0, 1, 12, 30, 31])
def test_several_metrics_are_each_what_it_is_alone(after: int, tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "x.h5", steps=31, every=5, void=(8,))
    names = ["neuron_p1", "condition_number", "cosine_previous", "update_error", "neuron_dead"]
    found = measure_all(run, names, after=after)
    assert list(found) == names
    for name in names:
        alone = measure(run, name, after=after)
        np.testing.assert_array_equal(found[name].steps, alone.steps)
        np.testing.assert_array_equal(found[name].values, alone.values)
        whole = measure(run, name)
        np.testing.assert_array_equal(alone.values, whole.values[whole.steps > after])


@pytest.mark.usefixtures("few_steps_a_block")
def test_norms_are_read_once_and_never_all_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_up_run(tmp_path / "x.h5", steps=31, every=5)
    read: list[int] = []
    whole = Run.all_neuron_norms

    def counted(*given: object) -> np.ndarray:
        norms = whole(*given)  # type: ignore[arg-type]
        read.append(len(norms))
        return norms

    monkeypatch.setattr(Run, "all_neuron_norms", counted)
    measure_all(run, ["neuron_cv", "neuron_p1", "update_error", "condition_number"])
    assert max(read) == 3
    assert sum(read) == 31


def test_a_metric_that_lacks_its_inputs_is_left_out(tmp_path: Path) -> None:
    table = Matrices([Matrix("w", 2, 2)])
    writer = Writer(tmp_path / "x.h5", {"optimizer": "Muon"}, table)
    writer.step(1, 1.0, scalars={}, norms={"gradient": np.ones(2)})
    writer.spectra("update", 1, np.array([4.0, 2.0]), np.array([1e-9]))
    writer.close()
    run = open_run(tmp_path / "x.h5")
    names = ["neuron_cv", "condition_number", "update_error", "alignment"]
    assert list(measure_all(run, names)) == ["condition_number"]
    assert measure_all(run, names)["condition_number"].values.tolist() == [[2.0]]
    # Spectra may still come where norms are: an empty series, as `measure` gives it.
    gradient = measure_all(run, names, stage="gradient")
    assert gradient["neuron_cv"].values.tolist() == [[0.0]]
    assert gradient["condition_number"].values.shape == (0, 1)
    assert measure_all(run, names, stage="momentum") == {}
    with pytest.raises(LensError, match="condition_number"):
        measure_all(run, ["conditon_number"])


@pytest.mark.usefixtures("few_steps_a_block")
def test_steps_without_norms_are_not_steps_of_a_metric(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "x.h5", {"optimizer": "Muon"}, Matrices([Matrix("w", 2, 2)]))
    for step in range(1, 14):
        norms = {"update": np.array([1.0, 3.0])} if step % 4 == 1 else {}
        writer.step(step, float(step), scalars={}, norms=norms)
    writer.close()
    series = measure(open_run(tmp_path / "x.h5"), "neuron_cv")
    assert series.steps.tolist() == [1, 5, 9, 13]
    assert series.values.tolist() == [[0.5]] * 4


def test_a_run_without_steps_has_empty_series(tmp_path: Path) -> None:
    Writer(tmp_path / "x.h5", {"optimizer": "Muon"}, Matrices([Matrix("w", 2, 2)])).close()
    run = open_run(tmp_path / "x.h5")
    assert measure_all(run, ["neuron_cv", "condition_number"]) == {}
    assert measure(run, "cosine_previous").values.shape == (0, 1)


def test_void_steps_have_no_condition_number(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "x.h5", steps=20, every=5, void=(10,))
    series = measure(run, "condition_number")
    assert np.isnan(series.values[series.steps == 10]).all()
    assert np.isfinite(series.values[series.steps != 10]).all()


def test_unknown_or_unrecorded_metrics_are_refused(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "x.h5", steps=2)
    with pytest.raises(LensError, match="condition_number"):
        measure(run, "conditon_number")
    with pytest.raises(LensError, match="alignment needs gradient"):
        measure(run, "alignment")
    with pytest.raises(LensError, match="momentum"):
        measure(run, "neuron_cv", stage="momentum")


def test_table_is_long_and_complete(three_runs: Path) -> None:
    runs = [open_run(path) for path in sorted(three_runs.iterdir())]
    frame = nl.table(runs, metrics=["condition_number", "neuron_cv"])
    assert list(frame.columns) == ["run", "step", "matrix", "stage", "metric", "value"]
    assert len(frame) == 3 * 6 * (5 + 40)
    wanted = frame[(frame.metric == "condition_number") & (frame.run == "muon")]
    np.testing.assert_allclose(wanted.value, 1.7)
    some = nl.table(runs, metrics=["neuron_cv"], steps=[10, 20])
    assert sorted(some.step.unique()) == [10, 20]
    assert nl.table([]).empty
