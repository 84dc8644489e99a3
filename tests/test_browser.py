"""The page in a real Chromium: what it draws, how its parts move together, and that it is live."""

import re
import time

import numpy as np
import pytest
from browsing import (
    PANELS,
    STEPS,
    TABLE,
    Training,
    chromium,
    needs_chromium,
    pages,
    record,
    served,
    until,
)

pytest.importorskip("playwright.sync_api")
pytestmark = needs_chromium

UP, DOWN, FIRST = "blocks.1.mlp.up", "blocks.0.mlp.down", "blocks.0.attn.q"
STAGES = ["gradient", "momentum", "orthogonalized", "update"]
VOID, LOST, INFINITE = (14, 16), 24, 50
TOKEN = "the-same-after-a-restart"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    marked = {"void": VOID, "lost": [LOST], "infinite": [INFINITE]}
    return {
        "adamw": record(folder / "adamw.h5", "AdamW", 200.0),
        "muon": record(folder / "muon.h5", "Muon", 2.0, stages=STAGES, **marked),
        "normuon": record(folder / "normuon.h5", "NorMuon", 3.0, shadow_of="AdamW"),
    }


@pytest.fixture(scope="module")
def address(runs):
    with served(runs["muon"].path.parent) as address:
        yield address


@pytest.fixture
def open_page(browser):
    with pages(browser) as open_page:
        yield open_page


def norms_of(run, matrix, stage="update"):
    """Return the neuron norms at every step that moved something; NaN is what was not finite."""
    norms = run.neuron_norms(matrix, stage)[~run.void].astype(float)
    norms[np.isinf(norms)] = np.nan
    return norms


def cv(norms):
    return np.std(norms, axis=-1) / np.mean(norms, axis=-1)


def over_mean(norms):
    return norms / norms.mean(axis=-1, keepdims=True)


def condition_of(run, matrix):
    """Return the condition numbers at the steps with a spectrum."""
    return np.array([np.divide(*run.spectrum(matrix, s)[[0, -1]]) for s in run.spectrum_steps()])


def places(mark):
    """Return the steps that a mark on the time axis stands at."""
    parts = [re.findall(r"([\d.]+),", part) for part in mark["path"].split("M")[1:]]
    return [np.mean([float(x) for x in part]) for part in parts]


def about(value):
    """Return what three digits on the page may be of a value."""
    return pytest.approx(value, rel=0.006)


# -- what is there -------------------------------------------------------------------------------


def test_the_overview_comes_first_and_every_part_of_it_leads_to_a_matrix(open_page, address, runs):
    page = open_page(address)
    page.drawn()
    tab = page.tab
    typical = {}
    for card, (name, run) in enumerate(runs.items()):
        shown = tab.locator(".headline").nth(card)
        assert shown.locator(".headline-name").inner_text() == name
        labels = shown.locator(".figure .label").all_inner_texts()
        values = shown.locator(".figure .value").all_inner_texts()
        assert labels[:3] == ["condition", "imbalance", "starved"]
        assert labels[3].split()[::2] in (["loss", "80"], ["loss,", "80"])
        settled = run.steps[~run.void] > 20
        spread = {each: cv(norms_of(run, each)[settled]) for each in run.matrices}
        typical[name] = {
            each: (np.median(condition_of(run, each)), np.nanmedian(spread[each]))
            for each in run.matrices
        }
        assert float(values[0]) == about(np.median([condition_of(run, x) for x in run.matrices]))
        assert float(values[1]) == about(np.nanmedian([*spread.values()]))
        assert float(values[3]) == about(run.scalars["loss"][-20:].mean())

    # Sentences, each with the matrix that it is about.
    said = page.text("#headline .findings >> nth=0")
    assert "200 times" in said
    assert "all 6 matrices" in said
    finding = tab.locator(".finding .leads", has_text="not finite")
    assert f"{FIRST} under muon" in finding.inner_text()
    assert str(INFINITE) in finding.inner_text()
    assert page.view()["matrix"] != FIRST
    finding.click()
    until(lambda: page.query() == {**page.query(), "matrix": FIRST, "step": str(INFINITE)})
    assert FIRST in tab.locator("#matrix-select").input_value()
    until(lambda: FIRST in page.text("#chosen"))
    until(lambda: len(page.figure("neurons")["data"][0]["y"]) == 16)

    # The table: a row a matrix, in order of the model until a heading is clicked.
    tab.get_by_role("button", name="Table").click()
    assert not tab.locator("#imbalance").is_visible()
    rows = tab.locator("#overview tbody tr")

    def order():
        return tab.locator("#overview tbody .leads").all_inner_texts()

    assert order() == TABLE.names
    assert rows.nth(0).get_attribute("aria-current") == "true"
    for i, name in enumerate(TABLE.names):
        cells = rows.nth(i).locator("td").all_inner_texts()
        for run, (condition, spread) in enumerate(typical[each][name] for each in runs):
            assert float(cells[2 * run]) == about(condition)
            assert float(cells[2 * run + 1].split()[0]) == about(spread)
    assert rows.locator("td.bad", has_text="200").count() == 6
    ranked = sorted(TABLE.names, key=lambda name: -typical["adamw"][name][1])
    for way, expected in (("descending", ranked), ("ascending", ranked[::-1])):
        tab.locator("#overview thead button").nth(2).click()
        heading = tab.locator("#overview thead th[scope=col]").nth(2)
        assert heading.get_attribute("aria-sort") == way
        assert order() == expected
    tab.locator("#overview .leads", has_text=DOWN).click()
    until(lambda: page.query()["matrix"] == DOWN)
    assert tab.locator("#overview [aria-current] .leads").all_inner_texts() == [DOWN]
    tab.get_by_role("button", name="Map").click()

    # The map: the fourth row of the last run, three quarters of the way.
    until(lambda: page.figure("imbalance"))
    page.click("imbalance", 0.75, 3.5 / 6, subplot=2)
    until(lambda: page.query()["matrix"] == "blocks.1.attn.q")
    until(lambda: 58 <= int(page.query()["step"]) <= 64)


def test_all_panels_show_the_numbers_of_the_runs(open_page, address, runs):
    page = open_page(address, f"matrix={UP}&step=61")
    page.drawn()
    shown = {panel: page.figure(panel) for panel in PANELS}

    def lines(panel, **those):
        found = [
            trace
            for trace in shown[panel]["data"]
            if all(trace[key] == value for key, value in those.items())
        ]
        assert len(found) == 3
        return zip(found, runs.values(), strict=True)

    def same(shown, expected):
        given = np.array(shown, dtype=float)
        np.testing.assert_allclose(given, np.asarray(expected, float), rtol=1e-5)

    for line, run in lines("condition", series="median"):
        same(line["x"], run.spectrum_steps())
        same(line["y"], np.median([condition_of(run, name) for name in run.matrices], axis=0))
    for grid, run in lines("imbalance"):
        assert grid["y"] == run.matrices
        for row, name in zip(grid["z"], run.matrices, strict=True):
            expected = cv(norms_of(run, name))
            known = np.isfinite(expected)
            same(np.array(row)[~run.void][known], expected[known])
    for line, run in lines("spectrum"):
        sigma = run.spectrum(UP, 60)
        same(line["y"], sigma / sigma[0])
        assert line["name"] == f"{run.name} @ 60"
    for line, run in lines("neurons"):
        norms = run.neuron_norms(UP).astype(float)[run.steps == 60][0]
        same(line["y"], np.sort(over_mean(norms))[::-1])
    for grid, run in lines("timeline"):
        cells = np.transpose(grid["z"])
        moved = ~np.isnan(cells).all(axis=1)
        same(np.array(grid["x"])[moved], run.steps[~run.void])
        same(cells[moved], over_mean(norms_of(run, UP)))
    for grid, run in lines("matrix", type="heatmap"):
        update = np.abs(run.update(UP, 60).astype(float))
        same(grid["z"], update / np.sqrt((update**2).mean()))
    for line, run in lines("matrix", type="scatter"):
        same(line["x"], over_mean(np.linalg.norm(run.update(UP, 60).astype(float), axis=1)))
    for line, run in lines("loss", series="raw"):
        same(line["y"], run.scalars["loss"])
    assert [shown[panel]["cursor"] for panel in PANELS if shown[panel]["cursor"]] == [61] * 4
    assert max(shown[panel]["aside"] for panel in ("condition", "imbalance", "timeline")) < 1

    # What is not as it should be is marked, and told.
    for panel in ("condition", "imbalance", "timeline", "loss"):
        marks = shown[panel]["shapes"]
        ticks = [mark for mark in marks if mark["ysizemode"] == "pixel"]
        below, above = ([m for m in ticks if m["yanchor"] == edge] for edge in (0, 1))
        assert {place for mark in below for place in places(mark)} == set(VOID)
        assert {place for mark in above for place in places(mark)} == {LOST}
        dashed = [mark for mark in marks if mark["path"] and mark["dash"] not in (None, "solid")]
        assert [places(mark) for mark in dashed] == [[INFINITE]]
    for panel in ("condition", "imbalance", "timeline"):
        said = page.notes(panel)
        assert said.startswith("muon: 2 void steps")
        assert "lost" in said
        assert "not finite" in said
    assert "in the shadow of AdamW" in page.text("#run-list .run >> nth=2")
    assert "shadow" not in page.text("#run-list .run >> nth=1")

    # Every stage that one of them recorded, and at a click what it looks like there.
    muon = runs["muon"]
    evenness = shown["stages"]["data"][3]
    assert evenness["x"] == STAGES
    same(
        evenness["y"],
        [cv(muon.neuron_norms(UP, s).astype(float)[muon.steps == 60][0]) for s in STAGES],
    )
    page.tab.locator("#stage-select").click()
    assert page.tab.get_by_role("option").all_inner_texts() == STAGES
    page.press("Escape")
    page.click("stages", 0.5 / 4, 0.5)
    until(lambda: page.query()["stage"] == "gradient")
    assert page.tab.locator("#stage-select").input_value() == "gradient"
    until(lambda: [t["name"] for t in page.figure("spectrum")["data"]] == ["muon @ 60"])
    sigma = muon.spectrum(UP, 60, "gradient")
    same(page.figure("spectrum")["data"][0]["y"], sigma / sigma[0])
    page.tab.get_by_role("heading", name="Spectrum").click()
    page.press("Home")
    until(lambda: page.figure("neurons")["data"][0]["name"] == "muon")


# -- moving --------------------------------------------------------------------------------------


def test_the_keyboard_and_the_slider_move_all_panels(open_page, address, runs):
    page = open_page(address, f"step=40&matrix={DOWN}")
    page.drawn()
    tab = page.tab

    def at(step):
        """Wait until the page is at a step: the address, the control, lines and pictures."""
        latest = "latest" if step == STEPS[-1] else str(step)
        until(lambda: page.query()["step"] == latest)
        until(lambda: page.text("#step-reading").startswith(f"{step}"))
        for panel in ("condition", "imbalance", "timeline", "loss"):
            until(lambda panel=panel: page.figure(panel)["cursor"] == step)
        norms = runs["adamw"].neuron_norms(page.view()["matrix"])[list(STEPS).index(step)]
        until(
            lambda: np.allclose(
                page.figure("neurons")["data"][0]["y"], np.sort(over_mean(norms))[::-1], rtol=1e-4
            )
        )

    for key, step in (
        ("ArrowLeft", 38),
        ("PageDown", 58),
        ("ArrowRight", 60),
        ("PageUp", 40),
        ("Home", 2),
        ("End", 80),
    ):
        page.press(key)
        at(step)
    page.press("ArrowLeft", "ArrowLeft", "ArrowLeft")
    at(74)

    # The slider has keys of its own, and the mouse.
    slider = tab.get_by_role("slider")
    slider.focus()
    page.press("ArrowLeft")
    at(72)
    track = tab.locator("#step").bounding_box()
    tab.mouse.click(track["x"] + track["width"] / 2, track["y"] + track["height"] / 2)
    until(lambda: 36 <= int(page.query()["step"]) <= 46)
    assert page.text("#step-reading").split()[0] == page.query()["step"]

    # The matrices, and what shows one of them only.
    tab.get_by_role("heading", name="Spectrum").click()
    page.press("]")
    until(lambda: page.query()["matrix"] == "blocks.1.attn.q")
    page.press("[", "[")
    until(lambda: page.query()["matrix"] == "blocks.0.mlp.up")
    until(lambda: "blocks.0.mlp.up" in tab.locator("#matrix-select").input_value())
    until(lambda: len(page.figure("timeline")["data"][0]["y"]) == 32)
    tab.locator("#matrix-select").click()
    tab.get_by_role("option", name=DOWN).click()
    until(lambda: page.query()["matrix"] == DOWN)
    until(lambda: len(page.figure("timeline")["data"][0]["y"]) == 16)

    # Space plays from the beginning, and stops.
    tab.get_by_role("heading", name="Spectrum").click()
    page.press("End")
    at(80)
    page.press(" ")
    assert tab.locator("#play").get_attribute("aria-pressed") == "true"
    until(lambda: 8 <= page.view()["step"] < 80)
    page.press(" ")
    assert tab.locator("#play").get_attribute("aria-pressed") == "false"
    until(page.quiet)
    stopped = page.view()["step"]
    time.sleep(0.5)
    at(stopped)
    assert stopped < 80

    # A run less; the help.
    tab.locator("#runs").get_by_text("muon", exact=True).click()
    until(lambda: page.query()["runs"] == "adamw,normuon")
    until(lambda: len(page.figure("loss")["data"]) == 4)
    until(lambda: len(page.figure("imbalance")["data"]) == 2)
    until(lambda: tab.locator(".headline").count() == 2)
    page.press("?")
    tab.get_by_role("dialog").get_by_text("ten recorded steps").wait_for()
    page.press("Escape")
    assert tab.get_by_role("dialog").count() == 0


def test_a_link_restores_the_view_exactly(open_page, address, runs):
    link = {"runs": "muon,normuon", "matrix": UP, "step": "44", "stage": "momentum"}
    page = open_page(address, "&".join(f"{key}={value}" for key, value in link.items()))
    page.drawn()
    until(lambda: page.query() == link)
    assert "token" not in page.tab.url
    tab = page.tab
    boxes = tab.locator("#runs").get_by_role("checkbox")
    until(lambda: boxes.count() == 3)
    assert [boxes.nth(i).is_checked() for i in range(3)] == [False, True, True]
    assert UP in tab.locator("#matrix-select").input_value()
    assert tab.locator("#stage-select").input_value() == "momentum"
    assert tab.get_by_role("slider").get_attribute("aria-valuenow") == "44"
    assert page.figure("loss")["cursor"] == 44
    (line,) = page.figure("neurons")["data"]
    norms = runs["muon"].neuron_norms(UP, "momentum")[list(STEPS).index(44)]
    np.testing.assert_allclose(line["y"], np.sort(over_mean(norms))[::-1], rtol=1e-4)

    # The same page once more, by the address that it shows now.
    page.press("ArrowRight")
    until(lambda: page.query()["step"] == "46")
    tab.reload()
    page.drawn()
    until(lambda: page.query() == {**link, "step": "46"})
    assert page.view() == {
        "runs": ["muon", "normuon"],
        "matrix": UP,
        "step": 46,
        "stage": "momentum",
        "dark": False,
    }


# -- live ----------------------------------------------------------------------------------------


def test_a_zoom_survives_all_but_another_subject(open_page, tmp_path):
    training = Training(tmp_path / "long.h5", "long")
    training.run(500)
    with served(tmp_path) as address:
        page = open_page(address, f"matrix={UP}")
        page.drawn()
        assert "Each cell is the RMS of 2 steps" in page.notes("timeline")
        assert np.diff(page.figure("timeline")["data"][0]["x"]).max() == 2

        def ranges():
            found = {panel: page.figure(panel) for panel in zoomed}
            return {panel: (figure["x"], figure["y"]) for panel, figure in found.items()}

        zoomed = ("condition", "imbalance", "timeline")
        for panel in zoomed:
            page.drag(panel, (0.3, 0.6), (0.2, 0.8))
            until(lambda panel=panel: 130 < page.figure(panel)["x"][0] < 170)
        # Zoomed in there is room for every step.
        until(lambda: set(np.diff(page.figure("timeline")["data"][0]["x"])) == {1})
        until(lambda: page.notes("timeline") == "")
        until(lambda: page.notes("imbalance") == "")
        before = ranges()
        for x, y in before.values():
            assert 280 < x[1] < 320
            assert abs(y[1] - y[0]) > 0

        training.run(15)
        page.tab.locator("#run-list").get_by_text("step 515").wait_for()
        until(lambda: page.figure("loss")["data"][0]["x"][-1] == 515)
        until(lambda: page.figure("condition")["data"][0]["x"][-1] == 515)
        assert ranges() == before
        page.press("PageUp")
        until(lambda: page.query()["step"] == "505")
        until(lambda: page.figure("condition")["cursor"] == 505)
        until(page.quiet)
        assert ranges() == before
        track = page.tab.locator("#step").bounding_box()
        page.tab.mouse.click(track["x"] + track["width"] / 2, track["y"] + track["height"] / 2)
        until(lambda: 240 < page.view()["step"] < 270)
        until(page.quiet)
        assert ranges() == before

        # Another matrix is another subject of the one panel only.
        page.press("]")
        until(lambda: page.figure("timeline")["x"][1] > 500)
        until(page.quiet)
        after = ranges()
        assert {panel for panel in zoomed if after[panel] != before[panel]} == {"timeline"}
        until(lambda: "RMS of 2 steps" in page.notes("timeline"))
        for panel in ("condition", "imbalance"):
            page.tab.mouse.dblclick(*page.at(panel, 0.5, 0.5))
            until(lambda panel=panel: page.figure(panel)["x"][1] > 500)
        until(lambda: "RMS of 2 steps" in page.notes("imbalance"))
        training.writer.close()
        page.close()


def test_the_page_follows_runs_that_come_grow_end_start_over_and_go(open_page, tmp_path):
    with served("--wait", tmp_path) as address:
        page = open_page(address)
        page.tab.get_by_role("heading", name="Waiting for the first recording").wait_for()
        assert f"normuon-lens demo -o {tmp_path}" in page.text("#waiting")

        first = Training(tmp_path / "first.h5", "first")
        first.run(30)
        page.drawn("loss", "condition")
        until(lambda: not page.tab.locator("#waiting").is_visible())
        listed = page.tab.locator("#run-list .run")
        until(lambda: listed.count() == 1)
        until(lambda: "step 30" in listed.nth(0).inner_text())
        until(lambda: " s ago" in listed.nth(0).inner_text())
        aged = listed.nth(0).inner_text()
        until(lambda: [trace["x"][-1] for trace in page.figure("loss")["data"]] == [30, 30])
        until(lambda: listed.nth(0).inner_text() not in ("", aged))  # a second later

        second = Training(tmp_path / "second.h5", "second")
        second.run(40)
        until(lambda: listed.count() == 2)
        until(lambda: page.query()["runs"] == "first,second")
        assert page.tab.locator("#runs").get_by_role("checkbox", name="second").is_checked()
        until(lambda: len(page.figure("condition")["data"]) == 6)
        until(lambda: page.figure("loss")["cursor"] == 40)

        # The newest step is followed, until the step is moved away.
        first.run(20)
        until(lambda: page.figure("loss")["cursor"] == 50)
        page.press("PageUp")
        until(lambda: page.query()["step"] == "40")
        first.run(10)
        first.writer.close()
        until(lambda: "60 steps · finished" in listed.nth(0).inner_text())
        assert page.query()["step"] == "40"

        # It starts over under the same name, and has come less far.
        (tmp_path / "first.h5").unlink()
        until(lambda: listed.count() == 1)
        until(lambda: page.query()["runs"] == "second")
        again = Training(tmp_path / "first.h5", "anew")
        again.run(7)
        until(lambda: "anew" in page.text("#run-list"))
        until(lambda: page.query()["runs"] == "second,first")
        until(lambda: [t["x"][-1] for t in page.figure("loss")["data"][:2]] in ([7, 40], [40, 7]))
        again.writer.close()
        second.writer.close()
        page.close()


def test_a_server_that_is_gone_is_told_and_the_page_works_on_when_it_is_back(open_page, runs):
    folder = runs["muon"].path.parent
    with served(folder, token=TOKEN) as address:
        page = open_page(address)
        page.drawn()
        assert not page.tab.locator("#lost").is_visible()
        port = int(page.base.rsplit(":", 1)[1])
    page.press("Home")
    page.tab.locator("#lost").get_by_text("does not answer").wait_for()
    assert page.trouble  # refused connections, which the browser tells
    with served(folder, port=port, token=TOKEN):
        page.tab.locator("#lost").wait_for(state="hidden")
        page.trouble.clear()
        page.press("End")
        until(lambda: page.query()["step"] == "latest")
        page.press("PageUp", "ArrowLeft")
        until(lambda: page.figure("spectrum")["data"][0]["name"] == "adamw @ 60")
        page.close()
