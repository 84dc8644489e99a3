"""The page in a real Chromium: it draws, follows user and runs, and talks to nobody else."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from normuon_lens.runfile import Matrices, Matrix, Writer, made_up_run
from normuon_lens.runfile.synthetic import SHAPES

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no Chromium installed"),
]

FLAGS = [
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    *(["--no-sandbox"] if os.geteuid() == 0 else []),
]

GRAPHS = ("spectrum", "neurons", "condition", "imbalance", "timeline", "loss")
UP = "blocks.1.mlp.up"
WICKED = "<b>live</b><img src=x onerror=alert(1)>"
TABLE = Matrices([Matrix(name, m, n) for name, (m, n) in SHAPES.items()])


class Training:
    """A recording that grows when told to."""

    def __init__(self, path, name):
        self.writer = Writer(path, {"optimizer": "NorMuon", "name": name}, TABLE)
        self.step = 0

    def run(self, steps):
        rng = np.random.default_rng(self.step)
        for _ in range(steps):
            self.step += 1
            norms = {"update": rng.uniform(0.9, 1.1, TABLE.total_rows)}
            scalars = {"loss": 3.0 / self.step}
            self.writer.step(self.step, time.time(), scalars=scalars, norms=norms)
            sigma = np.concatenate([np.linspace(1.0, 0.5, matrix.k) for matrix in TABLE])
            self.writer.spectra("update", self.step, sigma, np.full(len(TABLE), 1e-9))
        self.writer.commit()


@contextmanager
def served(*arguments):
    """Serve in a process of its own; yield the address."""
    command = [sys.executable, "-m", "normuon_lens.cli.main", "dashboard", "--no-browser"]
    with subprocess.Popen(
        [*command, "--port", "0", *map(str, arguments)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process.stdout.readline().split()[0]
        finally:
            process.terminate()


def until(holds, seconds=30.0):
    """Poll a condition from here: the page's policy forbids Playwright's wait_for_function.

    The bound is that of Playwright itself: only what never happens takes so long.
    """
    deadline = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)
    return value


class Page:
    """One tab on the dashboard, and everything that went wrong in it."""

    def __init__(self, browser, address, query="", **options):
        self.context = browser.new_context(viewport={"width": 1440, "height": 1000}, **options)
        self.tab = self.context.new_page()
        self.trouble = []
        tab = self.tab
        tab.on("console", lambda message: self.trouble.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: self.trouble.append(f"error: {error}"))
        tab.on("requestfailed", lambda request: self.trouble.append(f"failed: {request.url}"))
        tab.on("dialog", lambda dialog: (self.trouble.append("dialog"), dialog.dismiss()))
        tab.on("response", self._check)
        self.address = address
        tab.goto(address + query)

    def _check(self, response):
        local = response.url.startswith((self.address, "data:", "blob:"))
        if response.status >= 400 or not local:
            self.trouble.append(f"{response.status}: {response.url}")

    def figure(self, graph):
        """Return a drawn graph's data and layout; empty before it is drawn."""
        return self.tab.evaluate(
            """id => {
                const plot = document.querySelector(`#${id} .js-plotly-plot`);
                if (!plot || !plot._fullData) return {data: [], layout: {}};
                const data = plot._fullData.map(t => ({
                    name: t.name, type: t.type, points: (t.z || t.x || []).length,
                    x: Array.from(t.x || []), y: Array.from(t.y || [])}));
                const {xaxis, yaxis} = plot._fullLayout;
                const line = plot.querySelector(".cursor");
                return {data, layout: {x: xaxis.range, y: yaxis.range,
                    cursor: line && Number(line.dataset.step),
                    aside: line && Math.abs(parseFloat(line.style.left) - xaxis._offset
                                            - xaxis.d2p(Number(line.dataset.step)))}};
            }""",
            graph,
        )

    def drawn(self):
        """Wait until all graphs hold data."""
        until(lambda: all(self.figure(graph)["data"] for graph in GRAPHS))

    def query(self):
        """Return what the address says."""
        return self.tab.evaluate("Object.fromEntries(new URLSearchParams(location.search))")

    def close(self):
        """Close the tab; nothing may have gone wrong in it."""
        self.context.close()
        assert self.trouble == []


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    conditions = {"AdamW": 200.0, "Muon": 2.0, "NorMuon": 3.0}
    for seed, (optimizer, condition) in enumerate(conditions.items()):
        path = folder / f"{optimizer.lower()}.h5"
        made_up_run(path, optimizer=optimizer, condition=condition, seed=seed)
    return folder


@pytest.fixture(scope="module")
def address(runs):
    with served(runs) as address:
        yield address


@pytest.fixture
def open_page(browser, address):
    pages = []

    def open_it(query="", at=address, **options):
        pages.append(Page(browser, at, query, **options))
        return pages[-1]

    yield open_it
    for page in pages:
        page.close()


def test_all_six_graphs_are_drawn_and_follow_step_matrix_and_runs(open_page):
    page = open_page()
    page.drawn()
    figures = {graph: page.figure(graph) for graph in GRAPHS}
    for graph, lines in (("spectrum", 3), ("neurons", 3), ("condition", 9), ("loss", 6)):
        assert len(figures[graph]["data"]) == lines
    for graph in ("imbalance", "timeline"):
        assert [trace["type"] for trace in figures[graph]["data"]] == ["heatmap"] * 3
    assert all(trace["points"] for figure in figures.values() for trace in figure["data"])
    assert "all 6 ill-conditioned" in page.tab.locator("#headline").inner_text()
    until(lambda: page.query().get("step") == "latest")

    # The keyboard moves the step, whatever has the focus.
    page.tab.keyboard.press("PageUp")
    until(lambda: page.query()["step"] == "30")
    page.tab.get_by_role("slider").focus()
    page.tab.keyboard.press("ArrowLeft")
    until(lambda: page.query()["step"] == "29")
    until(lambda: page.figure("neurons")["data"][0]["y"] != figures["neurons"]["data"][0]["y"])
    for graph in ("condition", "imbalance", "timeline", "loss"):
        until(lambda graph=graph: page.figure(graph)["layout"]["cursor"] == 29)
    until(lambda: page.figure("spectrum")["data"][0]["name"] == "adamw @ 30")

    # Another matrix.
    before = page.figure("spectrum")["data"][0]["points"]
    page.tab.locator("#matrix-select").click()
    page.tab.get_by_role("option", name="blocks.0.mlp.down").click()
    until(lambda: page.query()["matrix"] == "blocks.0.mlp.down")
    until(lambda: page.figure("neurons")["data"][0]["points"] == 16)
    assert before == page.figure("spectrum")["data"][0]["points"] == 16
    page.tab.get_by_role("heading", name="Spectrum").click()
    page.tab.keyboard.press("]")
    until(lambda: page.query()["matrix"] == "blocks.1.attn.q")

    # One run less.
    page.tab.locator("#runs").get_by_text("muon", exact=True).click()
    until(lambda: page.query()["runs"] == "adamw,normuon")
    until(lambda: [t["name"] for t in page.figure("loss")["data"][2:]] == ["adamw", "normuon"])

    # The help.
    page.tab.keyboard.press("?")
    page.tab.get_by_role("dialog").get_by_text("ten recorded steps").wait_for()
    page.tab.keyboard.press("Escape")


def test_a_link_restores_the_view_and_a_click_moves_it(open_page):
    page = open_page(f"?runs=muon&matrix={UP}&step=20&stage=update")
    page.drawn()
    assert [trace["name"] for trace in page.figure("spectrum")["data"]] == ["muon"]
    assert len(page.figure("neurons")["data"][0]["y"]) == 32
    until(lambda: page.figure("loss")["layout"]["cursor"] == 20)
    assert UP in page.tab.locator("#matrix-select").input_value()
    until(lambda: page.query() == {"runs": "muon", "matrix": UP, "step": "20", "stage": "update"})

    # The first row of the imbalance, three quarters of the way.
    box = page.tab.locator("#imbalance .nsewdrag").first.bounding_box()
    page.tab.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 12)
    until(lambda: page.query()["matrix"] == "blocks.0.attn.q")
    until(lambda: 28 <= int(page.query()["step"]) <= 32)


def test_a_live_run_grows_and_a_zoom_survives(open_page, runs):
    training = Training(runs / "zlive.h5", WICKED)
    training.run(45)
    page = open_page("?runs=zlive&step=latest")
    page.drawn()
    until(lambda: page.figure("condition")["layout"]["cursor"] == 45)
    status = page.tab.locator("#run-list").get_by_text("step 45")
    status.wait_for()
    until(lambda: " s ago" in status.inner_text())

    # Names are data: shown, never run.
    assert WICKED in page.tab.locator("#run-list").inner_text()
    assert page.tab.locator("img[src=x]").count() == 0

    for graph in ("condition", "imbalance"):
        box = page.tab.locator(f"#{graph} .nsewdrag").first.bounding_box()
        left, top = box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.2
        page.tab.mouse.move(left, top)
        page.tab.mouse.down()
        page.tab.mouse.move(left + box["width"] * 0.4, top + box["height"] * 0.6, steps=4)
        page.tab.mouse.up()
        until(lambda graph=graph: 10 < page.figure(graph)["layout"]["x"][0] < 20)
        until(lambda graph=graph: page.figure(graph)["layout"]["aside"] < 1)
    zoomed = {graph: page.figure(graph)["layout"] for graph in ("condition", "imbalance")}

    training.run(15)
    until(lambda: page.figure("loss")["data"][0]["x"][-1:] == [60])
    page.tab.locator("#run-list").get_by_text("step 60").wait_for()
    for graph, before in zoomed.items():
        until(lambda graph=graph: page.figure(graph)["layout"]["cursor"] == 60)
        after = page.figure(graph)
        assert after["data"][0]["x"][-1] == 60
        assert (after["layout"]["x"], after["layout"]["y"]) == (before["x"], before["y"])
    page.tab.keyboard.press("PageUp")
    until(lambda: page.figure("condition")["layout"]["cursor"] == 50)
    assert page.figure("condition")["layout"]["x"] == zoomed["condition"]["x"]

    # The step was moved away: it stays there when the run grows and ends.
    training.run(5)
    training.writer.close()
    page.tab.locator("#run-list").get_by_text("65 steps · finished").wait_for()
    assert page.query()["step"] == "50"
    (runs / "zlive.h5").unlink()
    until(lambda: WICKED not in page.tab.locator("#run-list").inner_text())


def test_a_page_opened_before_the_first_recording_waits_for_it(open_page, tmp_path):
    with served("--wait", tmp_path) as address:
        page = open_page(at=address, color_scheme="dark")
        page.tab.get_by_role("heading", name="Waiting for the first recording").wait_for()
        assert str(tmp_path) in page.tab.locator("#waiting").inner_text()
        made_up_run(tmp_path / "first.h5", optimizer="Muon", steps=10)
        page.drawn()
        assert not page.tab.locator("#waiting").is_visible()
        paper = "document.querySelector('#loss .main-svg').style.background"
        assert page.tab.evaluate(paper) == "rgb(24, 29, 38)"
        page.tab.locator("#theme-button").click()
        until(lambda: page.tab.evaluate(paper) == "rgb(255, 255, 255)")
        page.close()
