"""A real Chromium on a real server, for tests of the page; what goes wrong in a tab is kept.

What the page shows comes a moment after what was done: tests ask for it through `until`.
"""

import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import axe_playwright_python
import numpy as np
import pytest

from normuon_lens.runfile import Matrices, Matrix, Writer, open_run
from normuon_lens.runfile.synthetic import SHAPES, made_up_update

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
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

AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")

needs_chromium = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no Chromium installed"),
]

PANELS = (
    "condition",
    "imbalance",
    "spectrum",
    "neurons",
    "timeline",
    "matrix",
    "stages",
    "loss",
)
TABLE = Matrices([Matrix(name, m, n) for name, (m, n) in SHAPES.items()])

FIGURE = """id => {
    const plot = document.querySelector(`#${id} > .plot`);
    if (!plot || !plot._fullData || !plot.parentElement.dataset.drawn) return null;
    const list = values => Array.from(values || [], v => ArrayBuffer.isView(v) ? Array.from(v) : v);
    const data = plot._fullData.map(t => ({
        name: t.name, type: t.type, x: list(t.x), y: list(t.y), z: list(t.z),
        dash: t.line && t.line.dash, series: (t.meta || {}).series}));
    const {xaxis, yaxis, shapes} = plot._fullLayout;
    const line = plot.querySelector(".cursor");
    return {
        data,
        x: xaxis && xaxis.range,
        y: yaxis && yaxis.range,
        shapes: (shapes || []).map(({path, yanchor, ysizemode, line}) =>
            ({path, yanchor, ysizemode, dash: line.dash})),
        texts: (plot._fullLayout.annotations || []).map(a => a.text),
        cursor: line && Number(line.dataset.step),
        aside: line && Math.abs(parseFloat(line.style.left) - xaxis._offset
                                - xaxis.d2p(Number(line.dataset.step))),
    };
}"""


@contextmanager
def chromium():
    """Start the browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        browser.new_context()  # one for all tabs: only there is a script compiled once
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def served(*arguments, port=0, token=None):
    """Serve in a process of its own; yield the address, which ends in the token."""
    command = [sys.executable, "-m", "normuon_lens.cli.main", "dashboard", "--no-browser"]
    environment = dict(os.environ)
    if token:
        environment["NORMUON_LENS_TOKEN"] = token
    with subprocess.Popen(
        [*command, "--port", str(port), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
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


@contextmanager
def pages(browser):
    """Yield what opens the page in a new tab; in the end, nothing may have gone wrong in any."""
    opened = []

    def open_page(address, query="", **options):
        opened.append(Page(browser, address, query, **options))
        opened[-1].tab.goto(opened[-1].entrance)
        return opened[-1]

    yield open_page
    for page in opened:
        page.close()


class Page:
    """One tab on the dashboard, and everything that went wrong in it."""

    def __init__(
        self, browser, address, query="", *, width=1440, height=1000, permissions=(), **media
    ):
        self.base, _, token = address.partition("/?token=")
        self.context = browser.contexts[0]
        self.context.grant_permissions(list(permissions), origin=self.base)
        self.tab = self.context.new_page()
        self.tab.set_viewport_size({"width": width, "height": height})
        self.tab.emulate_media(**media)
        self.trouble = []
        tab = self.tab
        tab.on("console", lambda message: self.trouble.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: self.trouble.append(f"error: {error}"))
        tab.on("requestfailed", self._failed)
        tab.on("dialog", lambda dialog: (self.trouble.append("dialog"), dialog.dismiss()))
        tab.on("response", self._check)
        self.entrance = f"{self.base}/?token={token}&{query}"

    def _failed(self, request):
        if request.failure != "net::ERR_ABORTED":  # which a reload breaks off
            self.trouble.append(f"failed: {request.url}")

    def _check(self, response):
        local = response.url.startswith((self.base, "data:", "blob:"))
        if response.status >= 400 or not local:
            self.trouble.append(f"{response.status}: {response.url}")

    def figure(self, panel):
        """Return what a panel shows, with names as they are in the file; None before it is drawn.

        Of each trace of ``data``: name, type, x, y, z, dash, series. Ranges of the axes as ``x``
        and ``y``; the step of the ``cursor``, and how many pixels ``aside`` of it the line stands.
        """
        return self.tab.evaluate(FIGURE, panel)

    def drawn(self, *panels):
        """Wait until panels (all, if none is named) are drawn and nothing more is asked for."""
        until(lambda: all(map(self.figure, panels or PANELS)) and self.quiet())

    def quiet(self):
        """Tell whether nothing is being asked for."""
        return not self.tab.evaluate("document.body.hasAttribute('aria-busy')")

    def view(self):
        """Return what the page looks at."""
        return self.tab.evaluate("window.lens.view")

    def query(self):
        """Return what the address says."""
        return self.tab.evaluate("Object.fromEntries(new URLSearchParams(location.search))")

    def text(self, selector):
        """Return what can be read there."""
        return self.tab.locator(selector).inner_text()

    def notes(self, panel):
        """Return what is said under a panel."""
        return self.tab.locator(f"#{panel}-notes").text_content()

    def press(self, *keys):
        """Press keys, one after the other."""
        for key in keys:
            self.tab.keyboard.press(key)

    def at(self, panel, across, down, subplot=0):
        """Return the point of the window at these shares of a panel's plot."""
        area = self.tab.locator(f"#{panel} .nsewdrag").nth(subplot)
        area.scroll_into_view_if_needed()
        box = area.bounding_box()
        return box["x"] + box["width"] * across, box["y"] + box["height"] * down

    def click(self, panel, across, down, subplot=0):
        """Click into a plot."""
        self.tab.mouse.click(*self.at(panel, across, down, subplot))

    def drag(self, panel, across, down):
        """Zoom in to shares of the plot, each (from, to)."""
        start, end = (self.at(panel, across[i], down[i]) for i in (0, 1))
        self.tab.mouse.move(*start)
        self.tab.mouse.down()
        self.tab.mouse.move(*end, steps=4)
        self.tab.mouse.up()

    def violations(self, part="html"):
        """Return what axe-core finds to be a serious or critical barrier, there or anywhere."""
        if self.tab.evaluate("typeof axe") == "undefined":
            self.tab.evaluate(AXE.read_text())  # a script tag is forbidden by the page's policy
        run = "part => axe.run(part, {resultTypes: ['violations']})"
        found = self.tab.evaluate(run, part)["violations"]
        return [
            (problem["id"], node["target"], node["failureSummary"])
            for problem in found
            if problem["impact"] in ("serious", "critical")
            for node in problem["nodes"]
        ]

    def close(self):
        """Close the tab; nothing may have gone wrong in it."""
        if self.tab.is_closed():
            return
        trouble = list(self.trouble)  # before what closing cuts short
        self.tab.evaluate("localStorage.clear()")
        self.tab.close()
        assert trouble == [], trouble


STEPS = range(2, 82, 2)
"""Of a recorded run: not every step, so that a step and a recorded step are not the same."""


def record(
    path, optimizer, condition, *, stages=("update",), void=(), lost=(), infinite=(), **more
):
    """Record a finished run whose updates have one condition number, and open it.

    Parameters
    ----------
    stages : sequence of str
        Recorded with norms at each of `STEPS`, and with spectra and matrices at every fifth.
    void, lost, infinite : sequence of int
        Steps that moved nothing, whose sample was dropped, at which the first neuron was not
        finite.
    **more
        Further metadata.
    """
    writer = Writer(path, {"optimizer": optimizer, "name": path.stem, **more}, TABLE)
    rng = np.random.default_rng(len(optimizer))
    for i, step in enumerate(STEPS):
        moved = step not in void
        taken = {
            stage: [made_up_update((x.m, x.n), condition, rng) * moved for x in TABLE]
            for stage in stages
        }
        norms = {s: np.concatenate([np.linalg.norm(u, axis=1) for u in taken[s]]) for s in stages}
        if step in infinite:
            norms["update"][0] = np.inf
        scalars = {"loss": 4.0 / np.sqrt(step)}
        writer.step(step, 1.7e9 + step, scalars=scalars, norms=norms, void=not moved)
        if step in lost:
            writer.event(step, "dropped", "recording could not keep up")
        for stage, updates in taken.items() if i % 5 == 4 else ():
            sigma = [np.linalg.svd(update, compute_uv=False) for update in updates]
            writer.spectra(stage, step, np.concatenate(sigma), np.full(len(TABLE), 1e-12))
            for k, update in enumerate(updates):
                writer.matrix(stage, k, step, update)
    writer.close()
    return open_run(path)


class Training:
    """A recording that grows when told to."""

    def __init__(self, path, name):
        self.writer = Writer(path, {"optimizer": "NorMuon", "name": name}, TABLE)
        self.step = 0

    def run(self, steps):
        """Train on, and commit."""
        rng = np.random.default_rng(self.step)
        sigma = np.concatenate([np.linspace(1.0, 0.5, matrix.k) for matrix in TABLE])
        for _ in range(steps):
            self.step += 1
            norms = {"update": rng.uniform(0.9, 1.1, TABLE.total_rows)}
            self.writer.step(self.step, time.time(), scalars={"loss": 3.0 / self.step}, norms=norms)
            self.writer.spectra("update", self.step, sigma, np.full(len(TABLE), 1e-9))
        self.writer.commit()
