"""What can be taken away from the page in a real Chromium: pictures, numbers, Python, links."""

import ast
import base64
import csv
import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from browsing import PANELS, chromium, needs_chromium, pages, record, served, until

pytest.importorskip("playwright.sync_api")
pytestmark = needs_chromium

UP, STEP = "blocks.1.mlp.up", 42

PIXELS = """async image => {
    const bytes = Uint8Array.from(atob(image), letter => letter.charCodeAt(0));
    const picture = await createImageBitmap(new Blob([bytes], {type: "image/png"}));
    const canvas = new OffscreenCanvas(picture.width, picture.height);
    const pen = canvas.getContext("2d");
    pen.drawImage(picture, 0, 0);
    const pixels = new Uint32Array(
        pen.getImageData(0, 0, picture.width, picture.height).data.buffer);
    return {width: picture.width, height: picture.height, colours: new Set(pixels).size};
}"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [
        record(folder / "adamw.h5", "AdamW", 200.0, stages=["momentum", "update"]),
        record(folder / "muon & co.h5", "Muon", 2.0, void=[14]),
    ]


@pytest.fixture(scope="module")
def page(runs):
    with (
        served(runs[0].path.parent) as address,
        chromium() as browser,
        pages(browser) as open_page,
    ):
        permissions = ["clipboard-read", "clipboard-write"]
        page = open_page(address, f"matrix={UP}&step={STEP}", permissions=permissions)
        page.drawn()
        yield page


@pytest.fixture(params=PANELS)
def panel(page, request):
    """Open the dialog of one panel after the other."""
    page.tab.locator(f"[data-panel={request.param}]").click()
    page.tab.locator(".taking-table td").first.wait_for()
    yield request.param
    page.press("Escape")


def fetched(page, way):
    """Click a download; return its name and its bytes."""
    with page.tab.expect_download() as expected:
        page.tab.locator(f"[data-take={way}]").click()
    download = expected.value
    return download.suggested_filename, download.path().read_bytes()


def copied(page, way):
    """Click what copies; return the clipboard."""
    page.tab.evaluate("navigator.clipboard.writeText('')")
    page.tab.locator(way).click()
    return until(lambda: page.tab.evaluate("navigator.clipboard.readText()"))


def evaluated(python):
    """Run a snippet as a notebook does, and return the value of its last expression."""
    *first, last = ast.parse(python).body
    space = {}
    exec(compile(ast.Module(first, []), "copied", "exec"), space)
    return eval(compile(ast.Expression(last.value), "copied", "eval"), space)


def numbers_of(row):
    """Return the numbers among the cells of a row, ascending."""
    found = []
    for cell in row:
        try:
            found.append(float(cell))
        except ValueError:
            continue
    return sorted(found)


def points(figure):
    """Yield run and numbers of every point of a figure, ascending: what is a name is left out."""
    for trace in figure["data"]:
        if trace["type"] == "heatmap":
            cells = [
                (x, y, z)
                for y, line in zip(trace["y"], trace["z"], strict=True)
                for x, z in zip(trace["x"], line, strict=True)
            ]
        else:
            cells = zip(trace["x"], trace["y"], strict=True)
        for cell in cells:
            known = [x for x in cell if isinstance(x, int | float) and not np.isnan(x)]
            yield trace["name"].replace("&amp;", "&"), sorted(known)


def test_pictures_and_numbers_are_those_that_are_shown(page, panel):
    tab = page.tab
    dialog = tab.get_by_role("dialog", name="Numbers and downloads")
    title = tab.locator(f"#{panel}-title").text_content()
    assert dialog.locator(".taking-title").text_content() == title
    assert dialog.locator(".taking-summary").text_content() == tab.text_content(f"#{panel}-summary")

    name, table = fetched(page, "csv")
    assert name.startswith(f"{panel}-{UP}-step-{STEP}")
    assert name.endswith(".csv")
    header, *rows = csv.reader(io.StringIO(table.decode()))
    assert header[0] == "run"
    shown = list(points(page.figure(panel)))
    assert [row[0] for row in rows] == [run for run, _ in shown]
    given = [numbers_of(row[1:]) for row in rows]
    assert list(map(len, given)) == [len(numbers) for _, numbers in shown]
    np.testing.assert_allclose(
        np.concatenate(given), np.concatenate([numbers for _, numbers in shown]), rtol=1e-6
    )
    first = dialog.locator(".taking-table tbody tr").first.locator("td").all_inner_texts()
    assert numbers_of(first) == given[0]
    most = dialog.locator(".taking-table tbody tr").count()
    assert most == min(len(rows), 400)

    box = tab.locator(f"#{panel} > .plot").bounding_box()
    width, height = max(box["width"], 480), max(box["height"], 280) + 34
    name, image = fetched(page, "png")
    assert name.endswith(".png")
    pixels = tab.evaluate(PIXELS, base64.b64encode(image).decode())
    assert abs(pixels["width"] - 2 * width) <= 2
    assert abs(pixels["height"] - 2 * height) <= 2
    assert pixels["colours"] > 20

    name, drawing = fetched(page, "svg")
    assert name.endswith(".svg")
    root = ElementTree.fromstring(drawing)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = " ".join(
        "".join(text.itertext()) for text in root.iter(root.tag.replace("}svg", "}text"))
    )
    assert title in words
    assert UP in words or panel in ("condition", "imbalance", "loss")
    assert "muon & co" in words


@pytest.mark.parametrize("panel", ["spectrum", "neurons", "matrix"], indirect=True)
def test_python_gives_the_numbers_that_are_shown(page, panel):
    given = evaluated(copied(page, "[data-take=python]"))
    shown = [t for t in page.figure(panel)["data"] if t["type"] == "heatmap" or panel != "matrix"]
    assert len(given) == len(shown) == 2
    for values, trace in zip(given, shown, strict=True):
        np.testing.assert_allclose(trace["z"] or trace["y"], values, rtol=1e-5)


def test_the_link_is_the_address(page):
    page.press("ArrowLeft")
    until(lambda: page.query()["step"] == str(STEP - 2))
    assert copied(page, "#copy-link") == page.tab.url
    page.tab.locator("#said").get_by_text("Link copied").wait_for()
