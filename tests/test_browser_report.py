"""The report in a real Chromium, opened as a file: it draws, in both themes and on paper."""

from types import SimpleNamespace

import pytest
from browsing import Page, chromium, needs_chromium, record, until

from normuon_lens.cli.main import main

pytest.importorskip("playwright.sync_api")
pytestmark = needs_chromium

PAPERS = """() => [...new Set([...document.querySelectorAll(".plot .main-svg:first-child")]
    .map(picture => getComputedStyle(picture).backgroundColor))]"""
LIGHT, DARK = "rgb(255, 255, 255)", "rgb(24, 29, 38)"
DRAWN = "document.body.dataset.drawn"
FIGURES = ["loss", "condition", "imbalance", "spectrum", "neurons", "stages"]

BEYOND = """() => [...document.querySelectorAll("main *")].filter(element => {
    if (element.closest(".wide, .sideways, .again")) return false;
    const {right, width} = element.getBoundingClientRect();
    return width && right > document.documentElement.clientWidth + 1;
}).map(element => element.outerHTML.slice(0, 80))"""

ON_PAPER = """() => {
    dispatchEvent(new Event("beforeprint"));
    return [...document.querySelectorAll(".plot")].map(plot => plot._fullLayout.width);
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    record(folder / "adamw.h5", "AdamW", 200.0, void=[14], lost=[24])
    record(folder / "<b>muon.h5", "Muon", 2.0, stages=["gradient", "momentum", "update"])
    assert main(["report", str(folder), "-o", str(folder / "report.html")]) == 0
    return folder / "report.html"


def test_a_report_needs_nothing_but_itself(report):
    trouble = []
    with chromium() as browser:
        tab = browser.contexts[0].new_page()
        tab.on("console", lambda message: trouble.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: trouble.append(f"error: {error}"))
        tab.on("dialog", lambda dialog: (trouble.append("dialog"), dialog.dismiss()))
        tab.on("request", lambda request: trouble.append(request.url))
        tab.emulate_media(color_scheme="dark")
        tab.goto(report.as_uri())
        until(lambda: tab.evaluate(DRAWN))
        asked = [url for url in trouble if not url.startswith(("data:", "blob:"))]
        assert asked == [report.as_uri()]
        trouble.clear()
        plots = "[...document.querySelectorAll('.plot.js-plotly-plot')].map(plot => plot.id)"
        assert tab.evaluate(plots) == FIGURES

        # It is as dark as the system, and can be used by everybody.
        axe = SimpleNamespace(tab=tab)
        assert tab.evaluate(PAPERS) == [DARK]
        assert Page.violations(axe) == []
        tab.emulate_media(color_scheme="light")
        until(lambda: tab.evaluate(PAPERS) == [LIGHT])
        assert Page.violations(axe, "#short") == []  # here are all the colours
        for width in (1440, 760, 390):
            tab.set_viewport_size({"width": width, "height": 900})
            until(lambda: tab.evaluate(BEYOND) == [])
            assert tab.evaluate("document.documentElement.scrollWidth") <= width

        # A figure answers the mouse; nothing on it would send it away.
        tab.locator("#neurons .nsewdrag").hover()
        tab.locator("#neurons .hoverlayer .legendtext, #neurons .hovertext").first.wait_for()
        assert tab.locator(".modebar-btn, .plotlyjsicon, a[href^=http]").count() == 0

        # On paper it is light, and no wider than the paper.
        tab.emulate_media(color_scheme="dark")
        until(lambda: tab.evaluate(PAPERS) == [DARK])
        assert max(tab.evaluate(ON_PAPER)) < 700
        assert tab.evaluate(PAPERS) == [LIGHT]
        tab.emulate_media(media="print")
        assert tab.locator("nav").is_hidden()
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == LIGHT
        assert [text for text in trouble if not text.startswith(("data:", "blob:"))] == []
