"""What the page is fed: every number once, runs that come, go, start over or are damaged."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from normuon_lens.analysis import measure
from normuon_lens.dashboard.app import make_app
from normuon_lens.dashboard.controls import Controls, most_imbalanced, steered
from normuon_lens.dashboard.headline import headlines_of
from normuon_lens.dashboard.layout import headlines, run_list, waiting_text
from normuon_lens.dashboard.link import Link, read_link
from normuon_lens.dashboard.panels import PANELS, View
from normuon_lens.dashboard.store import Store
from normuon_lens.errors import RunError
from normuon_lens.runfile import Matrices, Matrix, Writer, made_up_run
from normuon_lens.runfile.schema import parts_of
from normuon_lens.runfile.synthetic import SHAPES, made_up_update

MATRIX = "blocks.1.mlp.up"
TABLE = Matrices([Matrix(name, m, n) for name, (m, n) in SHAPES.items()])


class Training:
    """A recording that a test appends to."""

    def __init__(self, path, *, optimizer="NorMuon", start=1_000.0, name=None):
        self.writer = Writer(path, {"optimizer": optimizer, "name": name or path.stem}, TABLE)
        self.start, self.step = start, 0
        self.rng = np.random.default_rng(1)

    def run(self, steps, void=()):
        for _ in range(steps):
            self.step += 1
            updates = [made_up_update((m.m, m.n), 30.0, self.rng) for m in TABLE]
            if self.step in void:
                updates = [0 * update for update in updates]
            norms = np.concatenate([np.linalg.norm(update, axis=1) for update in updates])
            loss = {"loss": 4.0 / np.sqrt(self.step)}
            self.writer.step(
                self.step,
                self.start + self.step,
                scalars=loss,
                norms={"update": norms},
                void=self.step in void,
            )
            if self.step % 5 == 1:
                sigma = [np.linalg.svd(update, compute_uv=False) for update in updates]
                floor = np.full(len(TABLE), 1e-12)
                self.writer.spectra("update", self.step, np.concatenate(sigma), floor)
        self.writer.commit()


def view(store, **change):
    entries = store.chosen([entry.id for entry in store.entries])
    return View(entries, MATRIX, 40, "update", False)._replace(**change)


def panel(name):
    return next(panel for panel in PANELS if panel.id == name)


@pytest.fixture
def folder(tmp_path):
    made_up_run(tmp_path / "adamw.h5", optimizer="AdamW", condition=200)
    made_up_run(tmp_path / "muon.h5", optimizer="Muon", condition=2)
    return tmp_path


# -- following a run -----------------------------------------------------------------------------


def test_series_grown_step_by_step_equal_the_full_computation(tmp_path):
    training = Training(tmp_path / "live.h5")
    training.run(3)
    store = Store([tmp_path])
    (entry,) = store.entries
    for more in (1, 4, 7, 20):
        for metric in ("condition_number", "neuron_cv"):
            entry.series(metric, "update")
        entry.norms(MATRIX, "update")
        entry.spectra(MATRIX, "update")
        training.run(more)
        assert store.refresh()
    for metric in ("condition_number", "neuron_cv"):
        grown, full = entry.series(metric, "update"), measure(entry.run, metric)
        np.testing.assert_array_equal(grown.steps, full.steps)
        np.testing.assert_array_equal(grown.values, full.values)
    steps, norms = entry.norms(MATRIX, "update")
    np.testing.assert_array_equal(steps, entry.run.steps)
    np.testing.assert_array_equal(norms, entry.run.neuron_norms(MATRIX))
    steps, sigma = entry.spectra(MATRIX, "update")
    np.testing.assert_array_equal(steps, entry.run.spectrum_steps())
    np.testing.assert_array_equal(sigma, entry.run.spectra(MATRIX).sigma)
    assert entry.live
    training.writer.close()
    assert store.refresh()
    assert not store.live
    assert not store.refresh()


def test_void_steps_have_no_condition_number_and_are_never_the_nearest(tmp_path):
    training = Training(tmp_path / "run.h5")
    training.run(12, void=(6, 11))
    training.writer.close()
    (entry,) = Store([tmp_path]).entries
    steps, values = entry.series("condition_number", "update")
    assert np.isnan(values[np.isin(steps, [6, 11])]).all()
    assert np.isfinite(values[steps == 1]).all()
    assert entry.spectrum_at(MATRIX, "update", 11).step == 1
    assert entry.norms_at(MATRIX, "update", 6).step in (5, 7)


def test_the_nearest_sampled_step_is_shown_and_named(folder):
    store = Store([folder])
    assert store.entries[0].spectrum_at(MATRIX, "update", 17).step == 20
    figure = panel("spectrum").draw(store, view(store, step=17)).figure
    assert [trace["name"] for trace in figure["data"]] == ["adamw @ 20", "muon @ 20"]
    figure = panel("spectrum").draw(store, view(store, step=20)).figure
    assert [trace["name"] for trace in figure["data"]] == ["adamw", "muon"]


def test_noise_is_left_out_of_a_spectrum(tmp_path):
    writer = Writer(tmp_path / "r.h5", {"optimizer": "AdamW"}, Matrices([Matrix("w", 3, 3)]))
    writer.step(1, 1.0, scalars={}, norms={"update": np.ones(3)})
    writer.spectra("update", 1, np.array([1.0, 0.1, 1e-9]), np.array([1e-6]))
    writer.close()
    (entry,) = Store([tmp_path]).entries
    sigma = entry.spectrum_at("w", "update", 1).values
    np.testing.assert_array_equal(sigma, [1.0, 0.1, np.nan])


# -- runs that come, go and start over -----------------------------------------------------------


def test_runs_appear_and_vanish_in_a_watched_folder(folder):
    store = Store([folder])
    before = store.version
    assert not store.refresh()
    made_up_run(folder / "normuon.h5", optimizer="NorMuon")
    assert store.refresh()
    assert store.version != before
    assert [entry.id for entry in store.entries] == ["adamw", "muon", "normuon"]
    (folder / "adamw.h5").unlink()
    assert store.refresh()
    assert [entry.id for entry in store.entries] == ["muon", "normuon"]


def test_a_named_file_that_is_deleted_says_so_and_comes_back(tmp_path):
    path = tmp_path / "a.h5"
    made_up_run(path, steps=5)
    store = Store([path])
    path.unlink()
    assert store.refresh()
    assert store.entries[0].run is None
    assert str(path) in store.entries[0].error
    assert not store.refresh()
    made_up_run(path, steps=7)
    assert store.refresh()
    assert store.entries[0].run.steps[-1] == 7


def test_a_run_that_starts_over_is_measured_anew(tmp_path):
    path = tmp_path / "run.h5"
    first = Training(path)
    first.run(30)
    store = Store([tmp_path])
    (entry,) = store.entries
    assert len(entry.series("neuron_cv", "update").steps) == 30
    shutil.rmtree(parts_of(path))
    second = Training(path, start=9_000.0)
    second.run(4)
    assert store.refresh()
    assert entry.series("neuron_cv", "update").steps.tolist() == [1, 2, 3, 4]
    assert entry.norms(MATRIX, "update").steps.tolist() == [1, 2, 3, 4]


def test_a_run_of_other_matrices_at_the_same_times_is_measured_anew(tmp_path):
    path = tmp_path / "run.h5"
    made_up_run(path, steps=25)
    (entry,) = (store := Store([tmp_path])).entries
    assert entry.series("neuron_cv", "update").values.shape == (25, 6)
    path.unlink()
    made_up_run(path, steps=25, shapes={"other": (4, 4), "matrix": (8, 4)})
    assert store.refresh()
    assert entry.series("neuron_cv", "update").values.shape == (25, 2)


def test_a_resumed_run_that_repeats_steps_is_measured_anew(tmp_path):
    path = tmp_path / "run.h5"
    made_up_run(path, steps=20, condition=5, every=1, shapes=SHAPES)
    store = Store([tmp_path])
    (entry,) = store.entries
    entry.series("condition_number", "update")
    writer = Writer(path, {"optimizer": "AdamW"}, TABLE, resume=True)
    norms = np.ones(TABLE.total_rows)
    writer.step(15, 5.0, scalars={}, norms={"update": norms})
    writer.close()
    assert store.refresh()
    series = entry.series("neuron_cv", "update")
    assert series.values[series.steps == 15] == pytest.approx(0.0)


def test_a_damaged_file_is_reported_on_the_page(folder):
    (folder / "muon.h5").write_bytes((folder / "muon.h5").read_bytes()[:5000])
    store = Store([folder])
    broken = store.entries[1]
    assert broken.run is None
    assert "muon.h5" in broken.error
    shown = str(run_list(store)[1])
    assert "muon.h5" in shown
    assert "alert" in shown
    assert [entry.id for entry in store.chosen(["adamw", "muon"])] == ["adamw"]


def test_paths_are_checked_unless_waiting(tmp_path):
    with pytest.raises(RunError, match="no recordings"):
        Store([tmp_path])
    with pytest.raises(RunError, match="no such"):
        Store([tmp_path / "nowhere"])
    store = Store([tmp_path / "nowhere"], wait=True)
    assert store.entries == []
    assert str(tmp_path / "nowhere") in str(waiting_text(store))
    made_up_run(tmp_path / "nowhere" / "a.h5", steps=2)
    assert store.refresh()
    assert [entry.id for entry in store.entries] == ["a"]


def test_ids_say_nothing_of_paths_and_are_each_once(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        made_up_run(tmp_path / place / "my run, é.h5", optimizer="Muon", steps=2)
    store = Store([tmp_path / "one", tmp_path / "two"])
    assert [entry.id for entry in store.entries] == ["my-run-é", "my-run-é-2"]
    first, second = store.entries
    assert first.style.dash == second.style.dash == "dash"
    assert first.style.colour != second.style.colour
    assert store.label(second) == "my-run-é-2"


def test_a_new_optimizer_keeps_its_colour_when_others_come(tmp_path):
    made_up_run(tmp_path / "m.h5", optimizer="Lion", steps=2)
    store = Store([tmp_path])
    style = store.entries[0].style
    made_up_run(tmp_path / "a.h5", optimizer="Sophia", steps=2)
    store.refresh()
    styles = {entry.optimizer: entry.style for entry in store.entries}
    assert styles["Lion"] == style != styles["Sophia"]


# -- what is drawn -------------------------------------------------------------------------------


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.id)
def test_every_panel_draws_every_run(panel, folder):
    store = Store([folder])
    figure = panel.draw(store, view(store)).figure
    assert len(figure["data"]) >= 2


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.id)
def test_every_empty_panel_says_why(panel, folder):
    store = Store([folder])
    for change, expected in (
        ({"runs": []}, "No run is ticked"),
        ({"stage": "momentum"}, "stages=True"),
    ):
        figure = panel.draw(store, view(store, **change)).figure
        if panel.id in ("loss", "stages") and "stage" in change:
            continue
        assert figure["data"] == []
        assert expected in figure["layout"]["annotations"][0]["text"]


def test_runs_of_other_models_share_the_rows_of_the_imbalance(tmp_path):
    made_up_run(tmp_path / "a.h5", steps=3, shapes={"x": (4, 4), "y": (4, 4)})
    made_up_run(tmp_path / "b.h5", steps=3, shapes={"y": (4, 4), "z": (4, 4)})
    store = Store([tmp_path])
    figure = panel("imbalance").draw(store, view(store)).figure
    assert [trace["y"] for trace in figure["data"]] == [["x", "y", "z"]] * 2


def test_the_headline_says_who_is_ill_conditioned_and_who_imbalanced(folder):
    store = Store([folder])
    adamw, muon = headlines_of(store.entries, "update")
    assert adamw.condition == pytest.approx(200, rel=1e-6)
    assert adamw.ill_conditioned == (6, 6, 0)
    assert muon.condition == pytest.approx(2, rel=1e-6)
    assert muon.ill_conditioned == (0, 6, 0)
    assert not adamw.is_lower_bound
    assert not muon.is_lower_bound
    assert adamw.loss == pytest.approx(np.mean(4 / np.sqrt(np.arange(21, 41))))
    assert not adamw.early
    assert adamw.imbalance > 0


def test_the_headline_gives_no_verdict_on_what_is_lost_in_rounding(tmp_path):
    """Of three matrices, in one the floor hides all that is below σ₁, and in one below σ₁/500."""
    table = Matrices([Matrix(name, 4, 4) for name in ("hidden", "known", "at least 500")])
    writer = Writer(tmp_path / "x.h5", {"optimizer": "AdamW"}, table)
    sigma = np.array([1, 0.9, 0.8, 0.7, 1, 0.9, 0.8, 0.5, 1, 0.9, 0.8, 1e-6])
    for step in range(21, 27):
        writer.step(step, float(step), scalars={}, norms={"update": np.ones(12)})
        # Every other step moves nothing: no condition number, and so no bound of one.
        writer.spectra("update", step, sigma * (step % 2), np.array([2.0, 1e-9, 2e-3]))
    writer.close()
    store = Store([tmp_path])
    (entry,) = store.entries
    (figures,) = headlines_of([entry], "update")
    assert figures.ill_conditioned == (1, 2, 1)
    assert figures.is_lower_bound
    said = str(headlines(store, [entry], [figures], []))
    assert r"≥\xa02.00" in said  # with a space that does not break
    assert "1 of 3 high" in said


def test_the_headline_of_a_stage_that_was_not_recorded_is_empty_not_early(folder):
    nothing = headlines_of(Store([folder]).entries, "momentum")[0]
    assert np.isnan([nothing.condition, nothing.imbalance]).all()
    assert nothing.ill_conditioned.of == 0
    assert not nothing.early


# -- controls ------------------------------------------------------------------------------------


def test_controls_start_at_the_newest_step_of_the_most_imbalanced_matrix(folder):
    store = Store([folder])
    start = steered(store, Controls([], None, None, "update", None))
    assert start.ticked == ["adamw", "muon"]
    assert start.matrix == most_imbalanced(store.entries) in store.matrices()
    assert start.step is None
    assert store.recorded_steps() == list(range(1, 41))


def test_a_link_is_restored_and_nonsense_in_it_ignored(folder):
    store = Store([folder])
    asked = read_link(f"?runs=muon&matrix={MATRIX}&step=17&stage=update")
    assert asked == Link(["muon"], MATRIX, 17, "update")
    restored = steered(store, Controls([], asked.runs, asked.matrix, "update", asked.step))
    assert restored == Controls(["adamw", "muon"], ["muon"], MATRIX, "update", 17)
    wrong = steered(store, Controls([], ["../../etc"], "<b>", "nowhere", 10**9))
    assert wrong.ticked == ["adamw", "muon"]
    assert wrong.matrix in store.matrices()
    assert wrong.stage == "update"
    assert wrong.step == 40
    assert read_link("?step=latest").step is None
    assert read_link("?step=-1&runs") == read_link(None) == Link()


def test_new_runs_come_ticked_and_unticked_ones_stay_so(folder):
    store = Store([folder])
    made_up_run(folder / "normuon.h5", optimizer="NorMuon", steps=3)
    store.refresh()
    now = steered(store, Controls(["adamw", "muon"], ["muon"], MATRIX, "update", 5))
    assert now.ticked == ["muon", "normuon"]
    assert now.step == 5


def test_the_page_is_locked_down(folder):
    app = make_app(Store([folder]))
    assert app.scripts.config.serve_locally
    assert app.css.config.serve_locally
    assert Path(app.config.assets_folder).is_dir()
