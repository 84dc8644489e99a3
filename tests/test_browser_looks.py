"""The page in a real Chromium: how it looks, who can use it, and that hostile names do nothing."""

import re
from itertools import product

import numpy as np
import pytest
from browsing import (
    PANELS,
    Page,
    chromium,
    needs_chromium,
    pages,
    record,
    served,
    until,
)

from normuon_lens.runfile import Matrices, Matrix, Writer, made_up_run
from normuon_lens.runfile.schema import printable

pytest.importorskip("playwright.sync_api")
pytestmark = needs_chromium

WICKED = "<img src=x onerror=alert(1)>"
NAMES = {WICKED: (16, 8), "x" * 10_000: (8, 8), "two\nlines\t'\"&amp;": (8, 16), "=1+1": (8, 8)}

PROBLEMS = """() => {
    const found = [];
    const width = window.innerWidth;
    const told = element => `${element.className.baseVal ?? element.className} ` +
        `“${element.textContent.slice(0, 40)}”`;
    if (document.documentElement.scrollWidth > width)
        found.push(`the page is ${document.documentElement.scrollWidth} wide`);
    const inside = (box, of, slack) => box.left >= of.left - slack && box.top >= of.top - slack
        && box.right <= of.right + slack && box.bottom <= of.bottom + slack;
    const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1.5
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1.5;

    // Texts of the page: inside their card, and none over another.
    const scope = document.querySelectorAll(".card, .bar, .run");
    for (const card of scope) {
        const of = card.getBoundingClientRect();
        const texts = [];
        const walk = document.createTreeWalker(card, NodeFilter.SHOW_TEXT);
        while (walk.nextNode()) {
            const host = walk.currentNode.parentElement;
            if (host.closest(".unseen, .graph, style, .overview-table")) continue;
            const range = document.createRange();
            range.selectNodeContents(walk.currentNode);
            for (const box of range.getClientRects()) if (box.width) texts.push([box, host]);
        }
        texts.forEach(([box, host], i) => {
            if (!inside(box, of, 1)) found.push(`beyond its card: ${told(host)}`);
            for (const [other, there] of texts.slice(0, i))
                if (meet(box, other)) found.push(`${told(host)} over ${told(there)}`);
        });
    }

    // Texts of the pictures: inside them, the legend over none, labels of one axis apart.
    for (const plot of document.querySelectorAll(".js-plotly-plot")) {
        const of = plot.getBoundingClientRect();
        const id = plot.parentElement.id;
        const of_class = selector => [...plot.querySelectorAll(selector)]
            .map(text => [text.getBoundingClientRect(), text])
            .filter(([box, text]) => box.width && text.textContent.trim()
                && getComputedStyle(text).opacity !== "0");
        const texts = of_class("text");
        for (const [box, text] of texts)
            if (!inside(box, of, 1)) found.push(`${id}: clipped ${told(text)}`);
        // Names over narrow heatmaps end at the next one: that is how it is meant.
        const titles = of_class(".xtitle, .ytitle, .legendtext");
        const names = of_class(".annotation-text");
        const labels = of_class(".xtick text, .ytick text, .x2tick text, .x3tick text");
        const straight = labels.filter(([, text]) => !/rotate\\((?!0)/.test(
            text.getAttribute("transform") || ""));
        titles.forEach(([box, text], i) => {
            for (const [other, there] of [...titles.slice(0, i), ...names, ...labels])
                if (meet(box, other)) found.push(`${id}: ${told(text)} over ${told(there)}`);
        });
        straight.forEach(([box, text], i) => {
            for (const [other, there] of straight.slice(0, i))
                if (meet(box, other)) found.push(`${id}: ${told(text)} over ${told(there)}`);
        });
    }
    return found;
}"""


FITTING = """() => [...document.querySelectorAll(".js-plotly-plot")].every(plot => {
    const {width, height} = plot.getBoundingClientRect();
    const layout = plot._fullLayout;
    return Math.abs(layout.width - width) < 2 && Math.abs(layout.height - height) < 2;
})"""

PAPER = {"light": "rgb(255, 255, 255)", "dark": "rgb(24, 29, 38)"}
DESKS = {"light": "rgb(243, 245, 248)", "dark": "rgb(15, 19, 26)"}
PAPERS = """[...document.querySelectorAll(".graph > .plot > .plot-container .main-svg:first-child")]
    .map(picture => getComputedStyle(picture).backgroundColor)"""
DESK = "getComputedStyle(document.body).backgroundColor"

LINES = (None, "median", "smoothed")
"""Series that are not the background of another."""


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser):
    with pages(browser) as open_page:
        yield open_page


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    record(folder / "adamw.h5", "AdamW", 200.0, void=[14], lost=[24])
    record(folder / "muon.h5", "Muon", 2.0, stages=["gradient", "momentum", "update"])
    record(folder / "normuon.h5", "NorMuon", 3.0, infinite=[50])
    with served(folder) as address:
        yield address


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    table = Matrices([Matrix(name, m, n) for name, (m, n) in NAMES.items()])
    for i, name in enumerate([WICKED, "y" * 10_000, "two\nlines"]):
        writer = Writer(folder / f"{i}.h5", {"optimizer": WICKED, "name": name}, table)
        for step in range(1, 31):
            norms = np.linspace(0.1, 1.0 + i, table.total_rows)
            writer.step(step, 1.7e9 + step, scalars={"loss": 1.0}, norms={"update": norms})
            sigma = np.concatenate([np.linspace(1.0, 0.001, matrix.k) for matrix in table])
            writer.spectra("update", step, sigma, np.full(len(table), 1e-9))
            for k, matrix in enumerate(table):
                writer.matrix("update", k, step, np.ones((matrix.m, matrix.n)))
        writer.close()
    (folder / "text.h5").write_text("not HDF5")
    whole = made_up_run(folder / "half.h5", steps=2).path.read_bytes()
    (folder / "half.h5").write_bytes(whole[: len(whole) // 2])
    with served(folder) as address:
        yield address


# -- looks ---------------------------------------------------------------------------------------


def test_no_text_is_cut_off_or_over_another_at_any_width(open_page, address):
    page = open_page(address)
    page.drawn()
    found = {}
    for theme, width in product(("light", "dark"), (1920, 1440, 1100, 390)):
        page.tab.emulate_media(color_scheme=theme)
        page.tab.set_viewport_size({"width": width, "height": 1000})
        until(lambda theme=theme: set(page.tab.evaluate(PAPERS)) == {PAPER[theme]})
        until(lambda: page.tab.evaluate(FITTING) and page.quiet())
        if problems := page.tab.evaluate(PROBLEMS):
            found[theme, width] = problems
    assert not found, "\n".join(f"{at}: {x}" for at, texts in found.items() for x in texts)


def test_the_theme_follows_the_system_until_one_is_chosen_and_no_tool_sends_pictures_away(
    open_page, address
):
    page = open_page(address, color_scheme="dark")
    page.drawn()
    assert set(page.tab.evaluate(PAPERS)) == {PAPER["dark"]}
    # Nothing appears under the mouse that would send a picture away.
    for panel in PANELS:
        page.tab.mouse.move(*page.at(panel, 0.5, 0.5))
    assert page.tab.locator(".modebar-btn, .plotlyjsicon, a[href^=http]").count() == 0
    told = page.tab.evaluate("document.body.innerText").lower()
    assert not {"share", "cloud", "studio"} & set(told.split())
    page.tab.locator("#theme-button").click()
    until(lambda: set(page.tab.evaluate(PAPERS)) == {PAPER["light"]})
    page.tab.reload()
    page.drawn()
    assert set(page.tab.evaluate(PAPERS)) == {PAPER["light"]}


def test_until_the_first_numbers_there_is_a_shape_of_them_which_moves_for_whom_it_may(
    browser, address
):
    page = Page(browser, address, reduced_motion="reduce")
    moving = "document.getAnimations().filter(each => each.playState == 'running').length"
    held = []
    page.tab.route("**/pictures", lambda route: held.append(route))
    page.tab.goto(page.entrance)
    skeletons = page.tab.locator(".graph:not([data-drawn])")
    until(lambda: skeletons.count() == len(PANELS))
    until(lambda: held)
    before = "getComputedStyle(document.querySelector('#spectrum'), '::before')"
    assert page.tab.evaluate(f"{before}.content") == '""'
    assert page.tab.evaluate(moving) == 0
    page.tab.emulate_media(reduced_motion="no-preference")
    until(lambda: page.tab.evaluate(moving) >= len(PANELS))
    page.tab.emulate_media(reduced_motion="reduce")
    # Without the handler what it holds is sent on, and what comes later passes.
    page.tab.unroute("**/pictures")
    page.drawn()
    assert skeletons.count() == 0
    assert page.tab.evaluate(f"{before}.content") == "none"
    assert page.tab.evaluate(moving) == 0
    page.close()


# -- for everybody ---------------------------------------------------------------------------------


def test_axe_finds_no_barriers(open_page, address):
    page = open_page(address)
    page.drawn()
    tab = page.tab
    for theme in ("light", "dark"):
        tab.emulate_media(color_scheme=theme)
        until(lambda theme=theme: set(tab.evaluate(PAPERS)) == {PAPER[theme]} and page.quiet())
        assert page.violations() == []
        page.press("?")
        tab.get_by_role("dialog", name="Help").wait_for()
        assert page.violations("#help") == []
        page.press("Escape")
        tab.locator("[data-panel=neurons]").click()
        tab.get_by_role("dialog").locator("td").first.wait_for()
        assert page.violations("#taking") == []
        page.press("Escape")
        tab.get_by_role("button", name="Table").click()
        tab.locator("#overview td").first.wait_for()
        assert page.violations(".imbalance-card") == []
        tab.get_by_role("button", name="Map").click()


def test_axe_finds_no_barriers_while_the_page_waits(open_page, tmp_path):
    with served("--wait", tmp_path) as address:
        page = open_page(address)
        for theme in ("light", "dark"):
            page.tab.emulate_media(color_scheme=theme)
            page.tab.get_by_role("heading", name="Waiting for the first recording").wait_for()
            until(lambda theme=theme: page.tab.evaluate(DESK) == DESKS[theme])
            assert page.violations() == []
        page.close()


def test_every_control_is_reached_by_the_keyboard_and_every_panel_is_told(open_page, address):
    page = open_page(address)
    page.drawn()
    tab = page.tab
    controls = "#runs input, .headline .leads, .switch button, [data-panel], #matrix-select, "
    controls += "#step [role=slider], #stage-select, #play, #copy-link, #theme-button, #help-button"
    count = tab.locator(controls).count()
    assert count > 20
    reached = set()
    focused = "controls => [...document.querySelectorAll(controls)].indexOf(document.activeElement)"
    for _ in range(2 * count):
        page.press("Tab")
        reached.add(tab.evaluate(focused, controls))
    assert reached >= set(range(count))

    for panel in PANELS:
        section = tab.locator(f".{panel}-card")
        title = section.locator("h3").inner_text()
        assert tab.get_by_role("region", name=title, exact=True).count() == 1
        told = section.get_attribute("aria-describedby")
        words = tab.locator(f"#{told}").text_content()
        assert {"adamw:", "muon:", "normuon:"} <= set(words.split())

    # Colour is never alone: neither in the lines nor beside the names.
    for panel in ("condition", "spectrum", "neurons", "stages", "loss"):
        lines = {(t["name"], t["dash"]) for t in page.figure(panel)["data"] if t["series"] in LINES}
        assert len({dash for _, dash in lines}) == len(lines) == 3
    swatches = tab.locator("#run-list .swatch")
    strokes = [swatches.nth(i).evaluate("x => x.style.backgroundImage") for i in range(3)]
    assert len({re.sub(r"rgb\(.*?\)", "", stroke) for stroke in strokes}) == 3

    # A dialog takes the focus, and gives it back.
    button = tab.locator("[data-panel=loss]")
    button.focus()
    page.press("Enter")
    dialog = tab.get_by_role("dialog", name="Numbers and downloads")
    dialog.wait_for()
    assert dialog.evaluate("it => it.contains(document.activeElement)")
    page.press("Escape")
    assert button.evaluate("it => it === document.activeElement")


# -- safe ----------------------------------------------------------------------------------------


def test_names_are_shown_and_never_run_and_files_that_lie_say_so(open_page, hostile):
    page = open_page(hostile)
    page.drawn()
    tab = page.tab
    listed = page.text("#run-list")
    assert WICKED in listed
    assert "y" * 10_000 in listed
    assert "two?lines" in tab.locator("#run-list").text_content()
    troubles = tab.locator("#run-list .trouble")
    until(lambda: troubles.count() == 2)
    said = " ".join(troubles.all_inner_texts())
    assert "text.h5: not a readable HDF5 file" in said
    assert "half.h5: truncated" in said
    page.press(*"[[[[")
    for name, (rows, _) in zip(map(printable, NAMES), NAMES.values(), strict=True):
        until(lambda name=name: page.query()["matrix"] == name)
        until(lambda rows=rows: len(page.figure("neurons")["data"][0]["y"]) == rows)
        tab.locator("[data-panel=neurons]").click()
        tab.get_by_role("dialog").locator("td").first.wait_for()
        assert WICKED in tab.locator(".taking-table").text_content()
        page.press("Escape")
        page.press("]")
    tab.get_by_role("button", name="Table").click()
    names = tab.locator("#overview tbody .leads").all_text_contents()
    assert names == list(map(printable, NAMES))
    assert tab.locator("img, iframe, object, script[src*=x]").count() == 0
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_without_the_token_it_says_where_that_is(browser, address):
    context = browser.new_context()
    tab = context.new_page()
    for place in ("", "/?token=wrong", "/assets/lens.js"):
        answer = tab.goto(address.partition("/?")[0] + place)
        assert answer.status == 403
        assert "Open the address that normuon-lens printed" in tab.inner_text("body")
    context.close()
