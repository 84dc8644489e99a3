"""What the page is answered: no more than changed, the numbers behind it, and sense to nonsense."""

import csv as csv_module
import io
import json

import numpy as np
import plotly.graph_objects as go
import pytest

from normuon_lens.dashboard import draw
from normuon_lens.dashboard.answers import OVERVIEW, ROWS, csv, numbers, pictures, view_of
from normuon_lens.dashboard.app import make_app
from normuon_lens.dashboard.figures.numbers import table_of
from normuon_lens.dashboard.panels import BY_ID, Window
from normuon_lens.dashboard.store import Store
from normuon_lens.errors import LensError
from normuon_lens.runfile import Matrices, Matrix, Writer, made_up_run, open_run

MATRIX = "blocks.1.mlp.up"
ALL = [*BY_ID, OVERVIEW]
OF_A_STEP = {"spectrum", "neurons", "matrix", "stages"}


def two_runs(folder):
    for optimizer, condition in (("AdamW", 200.0), ("Muon", 2.0)):
        path = folder / f"{optimizer.lower()}.h5"
        made_up_run(path, optimizer=optimizer, condition=condition, void=(30,))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return two_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def store(folder):
    return Store([folder])


@pytest.fixture(scope="module")
def client(store):
    return make_app(store).server.test_client()


def asked(**change):
    given = {"runs": ["adamw", "muon"], "matrix": MATRIX, "step": 40, "stage": "update"}
    return {**given, "dark": False, **change}


def answer(store, have=None, **change):
    view = view_of(store, asked(**change))
    return pictures(store, view, dict.fromkeys(ALL) if have is None else have)


def keys(given):
    return {name: picture["key"] for name, picture in given.items()}


# -- what is sent --------------------------------------------------------------------------------


def test_everything_is_sent_once_and_then_only_what_changed(store):
    first = answer(store)
    assert list(first) == ALL
    json.dumps(first, allow_nan=False)
    have = keys(first)
    assert answer(store, have) == {}
    assert set(answer(store, have, step=20)) == OF_A_STEP
    assert set(answer(store, have, matrix="blocks.0.attn.q")) == {
        *OF_A_STEP,
        "timeline",
        "imbalance",  # which marks it
    }
    assert set(answer(store, have, dark=True)) == set(BY_ID)
    assert set(answer(store, have, runs=["muon"])) == set(ALL)


def test_a_step_between_two_samples_redraws_only_what_has_another_nearest(store):
    have = keys(answer(store, step=17))
    # Norms are taken at every step, spectra and matrices at 1, 10, 20 and 40: 30 was void.
    assert set(answer(store, have, step=18)) == {"neurons", "stages"}
    assert set(answer(store, have, step=12)) == OF_A_STEP


def test_a_void_step_is_never_the_one_shown(store):
    names = [trace["name"] for trace in answer(store, step=30)["spectrum"]["data"]]
    assert names == ["adamw @ 20", "muon @ 20"]


def test_the_zoom_is_kept_for_the_same_subject_and_gone_for_another(store):
    def revision(**change):
        given = answer(store, **change)
        return {name: given[name]["layout"]["uirevision"] for name in BY_ID}

    before = revision()
    assert revision(step=10) == revision(dark=True) == before
    other = revision(matrix="blocks.0.attn.q")
    kept = {name for name in BY_ID if other[name] == before[name]}
    assert kept == {"condition", "imbalance", "loss"}
    assert not set(revision(runs=["muon"]).values()) & set(before.values())


def test_a_grown_run_sends_its_pictures_anew(tmp_path):
    store = Store([two_runs(tmp_path)])
    have = keys(answer(store))
    (tmp_path / "muon.h5").unlink()
    made_up_run(tmp_path / "muon.h5", optimizer="Muon", condition=2.0, steps=50)
    assert store.refresh()
    assert set(answer(store, have)) == set(ALL)


def test_zooming_in_brings_what_was_thinned(tmp_path):
    table = Matrices([Matrix("w", 400, 4)])
    writer = Writer(tmp_path / "x.h5", {"optimizer": "AdamW"}, table)
    norms = np.random.default_rng(0).uniform(0.5, 1.5, (900, 400)).astype(np.float32)
    for step, row in enumerate(norms, start=1):
        writer.step(step, float(step), scalars={}, norms={"update": row})
    writer.close()
    store = Store([tmp_path])
    whole = answer(store, {"timeline": None}, runs=["x"], matrix="w")["timeline"]
    assert len(whole["data"][0]["x"]) < 900
    assert whole["notes"] == ["Each cell is the RMS of 3 neurons × 3 steps; zoom in to see all."]
    windows = {"timeline": [99.6, 200.4, 49.5, 149.5]}
    part = answer(store, {"timeline": None}, runs=["x"], matrix="w", windows=windows)["timeline"]
    assert part["notes"] == []
    assert part["data"][0]["x"] == list(range(99, 203))
    assert part["data"][0]["y"] == list(range(49, 150))
    _, rows = table_of(part)
    values = np.array([row[-1] for row in rows]).reshape(101, 104)
    ratio = (norms / norms.mean(axis=1, keepdims=True)).T
    np.testing.assert_allclose(values, ratio[49:150, 98:202], rtol=1e-6)


# -- what is said of it --------------------------------------------------------------------------


def test_void_lost_and_broken_steps_are_marked_and_told(tmp_path):
    table = Matrices([Matrix("w", 4, 4), Matrix("v", 4, 4)])
    writer = Writer(tmp_path / "x.h5", {"optimizer": "AdamW"}, table)
    for step in range(1, 31):
        norms = np.ones(8)
        if step == 7:
            norms[2] = np.inf
        norms *= step != 5
        writer.step(step, step, scalars={"loss": 1.0}, norms={"update": norms}, void=step == 5)
        sigma = np.tile([1.0, 0.9, 0.8, 0.7], 2)
        writer.spectra("update", step, sigma, np.full(2, 1e-9))
    writer.event(12, "dropped", "3 samples: the helper process could not keep up")
    writer.close()
    store = Store([tmp_path])
    given = answer(store, runs=["x"], matrix="w", step=7)
    told = (
        "x: 1 void step, which moved nothing (below), samples lost at 1 step (above), "
        "not finite at 1 step (dashed)"
    )
    for name in ("condition", "imbalance", "timeline"):
        assert told in given[name]["notes"], name
        plain = answer(store, {name: None}, runs=[], matrix="w")[name]["layout"]
        assert len(given[name]["layout"]["shapes"]) >= len(plain.get("shapes", [])) + 3
    assert given["neurons"]["notes"] == ["x: 1 of 4 neurons not finite (NaN or ∞)"]
    assert None not in given["neurons"]["data"][0]["y"]


def test_the_table_of_all_matrices_has_every_figure(folder, store):
    table = answer(store, {OVERVIEW: None})[OVERVIEW]
    assert [run["name"] for run in table["runs"]] == ["adamw", "muon"]
    assert [row["name"] for row in table["rows"]] == store.matrices()
    for row in table["rows"]:
        assert [cell["condition"] for cell in row["cells"]] == pytest.approx([200, 2], rel=1e-6)
        norms = open_run(folder / "muon.h5").neuron_norms(row["name"])[20:].astype(np.float64)
        moved = norms[norms.any(axis=1)]
        cv = np.median(moved.std(axis=1) / moved.mean(axis=1))
        assert row["cells"][1]["cv"] == pytest.approx(cv, rel=1e-6)


# -- the same numbers elsewhere --------------------------------------------------------------------


@pytest.mark.parametrize("panel", BY_ID)
def test_the_csv_is_the_table_and_the_table_is_the_picture(panel, store):
    view = view_of(store, asked())
    given = numbers(store, view, panel)
    columns, *rows = csv_module.reader(io.StringIO(csv(store, view, panel)))
    assert columns == given["columns"]
    assert len(rows) == given["total"]
    assert [[str("" if x is None else x) for x in row] for row in given["rows"]] == rows[:ROWS]
    assert given["total"] > 0


@pytest.mark.parametrize("panel", ["spectrum", "neurons", "matrix"])
def test_the_python_gives_the_numbers_of_the_picture(panel, store):
    # 33 was not sampled, and 30 is void: the spectra and matrices shown are of step 40.
    view = view_of(store, asked(step=33))
    code = numbers(store, view, panel)["python"]
    assert code.count("\n") == 3
    *head, last = code.splitlines()
    names: dict = {}
    exec("\n".join(head), names)
    columns, rows = table_of(BY_ID[panel].draw(store, view).figure)
    for run, values in zip(["adamw", "muon"], eval(last, names), strict=True):
        name = run if panel == "neurons" else f"{run} @ 40"
        shown = [row[-1] for row in rows if row[0] == name]
        if panel == "matrix":
            cells = columns.index("entry / RMS")
            shown = [row[cells] for row in rows if row[0] == name and row[cells] is not None]
        np.testing.assert_allclose(shown, np.ravel(values), rtol=2e-6)


@pytest.mark.parametrize("panel", ["condition", "imbalance", "timeline", "stages", "loss"])
def test_the_python_of_whole_runs_runs(panel, store):
    *head, last = numbers(store, view_of(store, asked()), panel)["python"].splitlines()
    names: dict = {}
    exec("\n".join(head), names)
    assert len(eval(last, names)) > 0


@pytest.mark.parametrize("panel", BY_ID)
def test_a_notebook_draws_what_the_page_draws(panel, folder, store):
    paths = [folder / "adamw.h5", open_run(folder / "muon.h5")]
    figure = draw(panel, paths, matrix=MATRIX, step=40)
    assert isinstance(figure, go.Figure)
    page = BY_ID[panel].draw(store, view_of(store, asked())).figure
    assert figure.to_plotly_json()["layout"]["xaxis"] == page["layout"]["xaxis"]
    assert len(figure.data) == len(page["data"])
    assert [trace.name for trace in figure.data] == [trace.get("name") for trace in page["data"]]


def test_a_notebook_is_told_what_there_is(folder):
    with pytest.raises(LensError, match=r"no panel is called 'spectra': there are condition, "):
        draw("spectra", [folder])
    with pytest.raises(LensError, match=r"no matrix 'up' in these runs: there are blocks\.0"):
        draw("spectrum", [folder], matrix="up")
    with pytest.raises(LensError, match=r"no stage 'momentum' in these runs: there are update"):
        draw("spectrum", [folder], stage="momentum")


# -- routes ----------------------------------------------------------------------------------------

NONSENSE = (
    None,
    [],
    "text",
    {"runs": 3, "matrix": ["x"], "step": "5", "stage": None, "windows": 7, "have": []},
    {"runs": [None, "../../etc/passwd"], "step": 10**30, "have": {"nowhere": 1, "loss": {}}},
    {"windows": {"matrix": [1e300, 2, "3", None], "timeline": [9, 1, -5, -9]}, "have": {"x": 1}},
    {"query": "?runs=%00&matrix=<b>&step=99999999999999999999", "have": {"matrix": None}},
)


@pytest.mark.parametrize("given", NONSENSE)
@pytest.mark.parametrize("route", ["/pictures", "/numbers/timeline", "/csv/matrix"])
def test_nonsense_is_answered_with_sense(route, given, client):
    assert client.post(route, json=given).status_code == 200
    assert client.post(route, data=b"\xff{", content_type="application/json").status_code == 200


def test_unknown_panels_are_unknown(client):
    for route in ("/numbers/nowhere", "/csv/../../etc"):
        assert client.post(route, json={}).status_code in (404, 405)


def test_windows_are_read_as_four_numbers(store):
    view = view_of(store, asked(windows={"matrix": [0, 5, 1, 7], "loss": [1, 2], "x": "y"}))
    assert view.windows == {"matrix": Window(0.0, 5.0, 1.0, 7.0)}


def test_every_panel_can_be_asked_for():
    assert set(BY_ID) == {
        "spectrum",
        "neurons",
        "condition",
        "imbalance",
        "timeline",
        "loss",
        "matrix",
        "stages",
    }
