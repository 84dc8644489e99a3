"""The report: one file with the right numbers, which asks for nothing and believes no name."""

import base64
import datetime
import errno
import hashlib
import itertools
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from normuon_lens.analysis import compare
from normuon_lens.analysis.claims import check_claims
from normuon_lens.cli.main import main
from normuon_lens.dashboard.figures.frame import typed
from normuon_lens.dashboard.panels import BY_ID, View
from normuon_lens.dashboard.report_charts import CELLS, POINTS, _thinned, last_common
from normuon_lens.dashboard.report_content import Shelf, report_of
from normuon_lens.dashboard.report_html import html_of
from normuon_lens.dashboard.report_markdown import markdown_of
from normuon_lens.dashboard.report_parts import Caution, Charts, Facts, Table, Verdicts
from normuon_lens.dashboard.words import duration, factor, inert, named, shown, size
from normuon_lens.errors import LensError
from normuon_lens.runfile import Matrices, Matrix, Writer, made_up_run, open_run

NOW = datetime.datetime(2026, 11, 24, 12, 0, tzinfo=datetime.UTC)
LARGEST = 8e6
VOID = {"br", "col", "hr", "img", "input", "link", "meta"}
MINUS_INFINITY = float("-inf")


class Read(HTMLParser):
    """What a browser makes of a page: elements with their attributes, texts, scripts."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self.scripts, self.open = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == [], "an element is not closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open[-1:] == ["script"] else self.texts).append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    made_up_run(folder / "adamw.h5", optimizer="AdamW", condition=200.0, void=(25,))
    made_up_run(folder / "muon.h5", optimizer="Muon", condition=2.0)
    return folder


@pytest.fixture(scope="module")
def content(folder):
    return report_of(Shelf([folder]), "normuon-lens report runs", NOW)


@pytest.fixture(scope="module")
def page(content):
    return html_of(content)


def of(paths):
    return report_of(Shelf(paths), "normuon-lens report", NOW)


def blocks(report, kind):
    return [b for section in report.sections for b in section.blocks if isinstance(b, kind)]


def table(report, caption):
    (found,) = [block for block in blocks(report, Table) if block.caption == caption]
    return found


def cautions(report):
    return " ".join(block.text for block in blocks(report, Caution))


def both(report):
    """Return both ways of writing a report down: neither may fail where the other does not."""
    return html_of(report), markdown_of(report)


# -- what it says ----------------------------------------------------------------------------------


def test_the_comparison_has_the_numbers_of_compare(folder, content):
    runs = [open_run(folder / name) for name in ("adamw.h5", "muon.h5")]
    found = compare(runs)
    rows = table(content, "Updates by kind of matrix").rows
    assert len(rows) == len(found.rows)
    assert [cell.text for cell in rows[0]] == ["all matrices", "condition number", "200", "2.00"]
    assert rows[0][3].notes[0] == "÷100"
    (whole,) = [r for r in found.rows if (r.group, r.metric) == ("all matrices", "neuron_cv")]
    (row,) = [r for r in rows if (r[0].text, r[1].text) == ("all matrices", "neuron CV")]
    assert row[2].text == shown(whole.values[0].median)
    spread = f"{shown(whole.values[1].low)} – {shown(whole.values[1].high)}"
    assert row[3].notes == (factor(whole.ratios()[1]), spread)
    of_runs = table(content, "Runs")
    at = of_runs.columns.index("loss")
    assert [row[at].text for row in of_runs.rows] == [f"{run.loss:#.4g}" for run in found.runs]
    said = {text for lines in content.sections[1].blocks[-1].lines for _, text in lines}
    assert said == set(found.remarks)


def test_the_observations_are_those_of_claims(folder, content):
    claims = check_claims([open_run(folder / "adamw.h5"), open_run(folder / "muon.h5")])
    (verdicts,) = blocks(content, Verdicts)
    told = [(v.statement, v.source, v.test, v.verdict) for v in verdicts.verdicts]
    assert told == [(c.statement, c.source, c.test, c.verdict) for c in claims]
    assert [len(v.findings) for v in verdicts.verdicts] == [len(c.findings) for c in claims]


def test_the_figures_show_the_worst_matrix_at_the_last_step_that_all_have(tmp_path):
    made_up_run(tmp_path / "long.h5", steps=40, every=10)
    made_up_run(tmp_path / "short.h5", steps=35, every=10)
    store = Shelf([tmp_path])
    assert last_common(store.entries) == 30
    whole, one = blocks(report_of(store, "", NOW), Charts)
    assert [chart.id for chart in whole.charts] == ["loss", "condition", "imbalance"]
    assert [chart.id for chart in one.charts] == ["spectrum", "neurons"]
    assert "at step 30" in "".join(text for _, text in one.title)
    for chart in (*whole.charts, *one.charts):
        texts = chart.numbers.texts
        assert all(cell.text for row in chart.numbers.rows for cell in row[:texts])
    assert one.charts[0].numbers.columns == ("run", "singular value, sorted", "σ / σ₁")
    assert [cell.text for cell in one.charts[0].numbers.rows[0]] == ["long", "1", "1.00"]
    names = {trace["name"] for trace in one.charts[0].data}
    assert names == {"long", "short"}, "none is of another step"


def test_a_theme_changes_the_layout_alone(folder):
    store = Shelf([folder])
    matrix = store.matrices()[1]
    for panel in ("loss", "condition", "imbalance", "spectrum", "neurons", "stages"):
        views = [View(store.entries, matrix, 40, "update", dark) for dark in (False, True)]
        light, dark = (BY_ID[panel].draw(store, view).figure for view in views)
        assert light["data"] == dark["data"]
        assert light["layout"] != dark["layout"]


def test_provenance_is_complete(tmp_path):
    table_ = Matrices([Matrix("w", 4, 3)])
    about = {
        "optimizer": "NorMuon",
        "name": "a run",
        "model": "GPT",
        "seed": 3,
        "versions": {"torch": "2.13.0", "numpy": "2.4"},
        "schedule": {"every": 10, "norms_every": 1},
        "groups": [
            {"lr": 0.02, "betas": [0.95, 0.9], "nesterov": False, "wire_dtype": None},
            {"optimizer": "AdamW", "lr": 0.001},
        ],
        "notes": "a note",
        "created": 1.7e9,
    }
    writer = Writer(tmp_path / "x.h5", about, table_)
    for step in range(1, 31):
        scalars = {"lr": 0.01 * min(step, 31 - step), "recording_overhead": 0.031}
        norms = {"update": np.full(4, float(step != 7))}
        writer.step(step, 1.7e9 + step, scalars=scalars, norms=norms, void=step == 7)
    writer.event(9, "dropped", "recording could not keep up")
    writer.event(12, "schedule", "spectra every 20 steps from here on")
    writer.dropped = 1
    writer.close()
    report = of([tmp_path / "x.h5"])
    recordings = table(report, "Recordings")
    row = dict(zip(recordings.columns, (cell.text for cell in recordings.rows[0]), strict=True))
    assert (row["steps"], row["void"], row["overhead"]) == ("30", "1", "3.1 %")
    (facts,) = blocks(report, Facts)
    told = dict(facts.rows)
    assert told["file"].startswith("x.h5, ")
    assert told["group 1"] == "NorMuon: lr=0.02, betas=[0.95, 0.9]"
    assert told["group 2"] == "AdamW: lr=0.001"
    assert told["learning rate"] == "0.01 at first, 0.15 at most, 0.01 at last"
    assert told["recorded every"] == "every=10, norms_every=1"
    assert told["versions"] == "torch 2.13.0, numpy 2.4"
    assert (told["seed"], told["notes"], told["model"]) == ("3", "a note", "GPT")
    assert told["recorded"] == "2023-11-14 22:13 UTC"
    assert any("spectra every 20 steps" in text for text in facts.warnings)
    assert str(tmp_path) not in "".join(both(report)), "where it lay is nobody's business"


def test_what_cannot_be_compared_is_reported_with_the_reason(tmp_path):
    made_up_run(tmp_path / "a.h5")
    made_up_run(tmp_path / "b.h5", shapes={"other": (4, 4)})
    report = of([tmp_path])
    assert "cannot be compared: a and b have no matrix in common" in cautions(report)
    assert len(blocks(report, Charts)) == 2
    for text in both(report):
        assert "no matrix in common" in text
        assert str(tmp_path) not in text


def test_what_is_live_or_empty_or_broken_is_said(tmp_path):
    made_up_run(tmp_path / "a.h5", close=False)
    Writer(tmp_path / "empty.h5", {"optimizer": "Muon", "name": "empty"}, Matrices([])).commit()
    (tmp_path / "text.h5").write_text("not HDF5")
    report = of([tmp_path])
    said = cautions(report)
    assert "a is still being recorded: this is what it was at step 40" in said
    assert "empty has no step yet" in said
    assert "text.h5 cannot be read and is left out" in said
    assert [key.name for key in report.runs] == ["a", "empty"]
    assert all("text.h5 cannot be read" in text.replace("\\", "") for text in both(report))


def test_runs_without_a_step_make_a_short_report(tmp_path):
    Writer(tmp_path / "a.h5", {"optimizer": "Muon", "name": "a"}, Matrices([])).close()
    report = of([tmp_path / "a.h5"])
    assert [section.id for section in report.sections] == ["short", "provenance"]
    assert len(html_of(report)) < 1e5, "no figure, so nothing to draw it with"
    assert "a has no step yet" in markdown_of(report)


def test_one_step_and_steps_that_are_nan_are_reported(tmp_path):
    made_up_run(tmp_path / "one.h5", steps=1)
    made_up_run(tmp_path / "still.h5", steps=25, void=tuple(range(1, 26)))
    nowhere = Writer(tmp_path / "nan.h5", {"optimizer": "X"}, Matrices([Matrix("w", 4, 3)]))
    for step in (1, 2):
        nan = float("nan")
        nowhere.step(step, 0.0, scalars={"loss": nan}, norms={"update": np.full(4, np.inf)})
        nowhere.spectra("update", step, np.full(3, nan), np.full(1, nan))
    nowhere.close()
    for path in tmp_path.glob("*.h5"):
        both(of([path]))
    html, _ = both(of([tmp_path]))
    assert "NaN" not in Read(html).scripts[0], "JSON knows none"


def test_nothing_readable_is_refused(tmp_path):
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(LensError, match="none of these can be read"):
        of([tmp_path])


def test_runs_of_one_name_are_told_apart_as_in_the_comparison(tmp_path):
    for seed in ("seed0", "seed1"):
        (tmp_path / seed).mkdir()
        made_up_run(tmp_path / seed / "Muon.h5", seed=len(seed))
    report = of([tmp_path / "seed0" / "Muon.h5", tmp_path / "seed1" / "Muon.h5"])
    assert [key.name for key in report.runs] == ["seed0/Muon", "seed1/Muon"]
    assert [row[0].text for row in table(report, "Runs").rows] == ["seed0/Muon", "seed1/Muon"]
    traces = blocks(report, Charts)[0].charts[0].data
    assert {trace["name"] for trace in traces} == {"seed0/Muon", "seed1/Muon"}


# -- the page --------------------------------------------------------------------------------------


def test_nothing_is_asked_of_a_network(page):
    read = Read(page)
    assert len(page.encode()) < LARGEST
    for _, attributes in read.elements:
        assert not {"src", "srcset", "action", "data", "poster", "background"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("href", "#").startswith(("#", "data:,"))
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "@import" not in style
    assert "url(" not in style
    policy = next(a["content"] for a in read.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    _, plotly, ours = read.scripts
    for script in (plotly, ours):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "unsafe-inline" not in policy.split("style-src")[0]
    assert "unsafe-eval" not in policy
    assert "showSendToCloud: false" in ours
    assert page.index("Content-Security-Policy") < page.index("<style>") < page.index("<script")


def test_headings_tables_and_figures_are_in_order(page):
    read = Read(page)
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named_by = [a["aria-labelledby"] for _, a in read.elements if "aria-labelledby" in a]
    assert set(named_by) <= set(ids)
    assert set(re.findall(r'href="#([^"]+)', page)) <= set(ids)
    assert len(read.all("caption")) == len(read.all("table")) > 5
    assert all("scope" in attributes for attributes in read.all("th"))
    plots = [a for a in read.all("div") if a.get("class") == "plot"]
    assert {a["id"] for a in plots} == set(json.loads(read.scripts[0]))
    assert all(len(a["aria-label"]) > 40 for a in plots)


def test_markdown_has_the_same_content_and_whole_tables(content, page):
    text = markdown_of(content)
    for section in content.sections:
        assert f"## {section.title}" in text
    for block in blocks(content, Table):
        assert f"| {' | '.join(block.columns)} |" in text.replace("\\", "")
    for lines in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        bars = [len(re.findall(r"(?<!\\)\|", line)) for line in lines.splitlines()]
        assert len(set(bars)) == 1
    assert "zoom in to see" not in text + page
    assert "click one" not in text + page
    assert "{" not in re.sub(r"`[^`]*`", "", text)


# -- names are data --------------------------------------------------------------------------------

NAMES = {
    "script": "</script><script>alert(1)</script>",
    "handler": "<img src=x onerror=alert(1)>",
    "link": '<a href="javascript:alert(1)">x</a>',
    "markdown link": "[click](javascript:alert(1)) ![x](http://example.org/x.png)",
    "table": "a | b\n| --- |",
    "heading": "\n# heading\n- list\n```\n",
    "attribute": "\" onmouseover='alert(1)' x=\"",
    "template": "{{ 7 * 7 }} {% raw %} %{y}",
    "separators": "a\u2028b\u2029c",
    "right to left": "\u202egnp.exe\u2066",
    "terminal": "\x1b[31m\x07",
    "long": "x" * 2_000,
    "half": "\ud800",
    "empty": "",
}

HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def wicked(tmp_path_factory):
    """Return a report of a run in which everything that can have a name has a wicked one."""
    folder = tmp_path_factory.mktemp("wicked")
    every = list(NAMES.values())
    matrices = [name.replace("\ud800", "") or "w" for name in every]
    matrices = Matrices([Matrix(f"{i}{name}", 4, 4) for i, name in enumerate(matrices)])
    for i in range(5):
        name, other, third = (every[(i + shift) % len(every)] for shift in (0, 5, 9))
        about = {
            "optimizer": other,
            "name": name,
            "notes": third,
            "model": other,
            third: name,
            "versions": {name: other},
            "schedule": [name],
            "groups": [{other: name, "lr": float("inf")}, third, 7],
            "created": [name],
            "seed": {third: [name] * 3},
        }
        writer = Writer(folder / f"{i}.h5", about, matrices)
        for step in range(1, 25):
            norms = {"update": np.linspace(0.1, 1 + i, matrices.total_rows)}
            writer.step(step, 1e300, scalars={"loss": 1.0 + i, "lr": 0.1}, norms=norms)
            sigma = np.tile([1.0, 0.5, 0.1, 1e-3], len(matrices))
            writer.spectra("update", step, sigma, np.full(len(matrices), 1e-9))
        writer.event(3, "schedule", third.replace("\ud800", ""))
        writer.close()
    (folder / "<b>.h5").write_text("not HDF5")
    return of([folder])


def test_names_stay_text_on_the_page(wicked):
    page = html_of(wicked)
    read = Read(page)
    assert len(page.encode()) < LARGEST
    assert len(read.scripts) == 3, "no name ended a script or began one"
    assert not set("<>&") & set(read.scripts[0])
    allowed = {"class", "id", "style", "scope", "role", "tabindex", "lang", "href", "rel", "type"}
    allowed |= {"aria-label", "aria-labelledby", "charset", "name", "content", "http-equiv"}
    for tag, attributes in read.elements:
        assert tag not in {"img", "a", "b"} or attributes.get("href", "").startswith("#")
        assert set(attributes) <= allowed
    assert "49" not in {text.strip() for text in read.texts}
    seen = " ".join(read.texts)
    assert NAMES["handler"] in seen
    assert not HIDDEN.search(page.replace(get_plotlyjs(), ""))
    assert "x" * 500 not in seen, "nobody reads a name of 2,000 letters"
    pictures = json.loads(read.scripts[0])
    names = {trace["name"] for picture in pictures.values() for trace in picture["data"]}
    assert names
    assert not [name for name in names if "<" in name]


def test_names_stay_text_in_markdown(wicked):
    text = markdown_of(wicked)
    bare = re.sub(r"`[^`\n]*`", "", text)
    assert not re.search(r"(?<!\\)[<\[]", bare)
    lines = text.splitlines()
    assert not [x for x in lines if re.match(r"\s*(```|# heading|- list|\| --- \|$)", x)]
    assert len([line for line in lines if line.startswith("# ")]) == 1
    for table_ in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        bars = [len(re.findall(r"(?<!\\)\|", line)) for line in table_.splitlines()]
        assert len(set(bars)) == 1
    assert not HIDDEN.search(text)


# -- how much --------------------------------------------------------------------------------------


def test_lines_keep_their_extremes_within_the_budget():
    rng = np.random.default_rng(0)
    traces = []
    for _ in range(24):
        y = rng.standard_normal(5000)
        y[rng.integers(5000)] = 99.0
        y[7] = np.nan
        values = [None if np.isnan(v) else v for v in y.tolist()]
        traces.append({"x": list(range(5000)), "y": values})
    thinned = _thinned(traces)
    assert sum(len(trace["x"]) for trace in thinned) <= 1.1 * POINTS
    for new, old in zip(thinned, traces, strict=True):
        assert len(new["x"]) == len(new["y"])
        assert max(v for v in new["y"] if v is not None) == 99.0
        assert (new["x"][0], new["x"][-1]) == (0, 4999)
        shown_ = zip(new["x"], new["y"], strict=True)
        known = [(x, v) for x, v in shown_ if v is not None and old["y"][x] is not None]
        assert all(v == pytest.approx(old["y"][x], rel=1e-4) for x, v in known)
    few = [{"x": [1, 2], "y": [0.123456789, None]}]
    assert _thinned(few) == [{"x": [1, 2], "y": [0.12346, None]}]


def test_heatmaps_keep_their_peaks_within_the_budget():
    values = np.full((100, 320), 0.1)
    values[42, 100] = 30.0
    trace = {"x": list(range(320)), "y": list(range(100)), "z": typed(values)}
    thinned = _thinned([trace] * 12)
    assert sum(len(new["x"]) * len(new["y"]) for new in thinned) <= 1.1 * CELLS
    (new, *_) = thinned
    cells = np.frombuffer(base64.b64decode(new["z"]["bdata"]), "<f4").reshape(100, -1)
    assert cells.shape == (100, len(new["x"]))
    assert np.unravel_index(cells.argmax(), cells.shape)[0] == 42
    assert cells.max() > 10
    assert _thinned([trace]) == [trace]


@pytest.mark.parametrize(
    ("say", "value", "text"),
    [
        (shown, 0.0, "0"),
        (shown, 2070.4, "2,070"),
        (shown, 8.637, "8.64"),
        (shown, 99.99, "100"),
        (shown, 999.6, "1,000"),
        (shown, 1.5e7, "1.50e+07"),
        (shown, -2e-5, "-2.00e-05"),
        (shown, float("nan"), "–"),
        (shown, MINUS_INFINITY, "-∞"),
        (factor, 1.5, "×1.50"),
        (factor, 1 / 118, "÷118"),
        (factor, float("nan"), ""),
        (factor, -1.0, ""),
        (size, 999, "999 B"),
        (size, 786_432, "786 kB"),
        (size, 2.5e15, "2,500 TB"),
        (duration, 0.0252, "25.2 ms"),
        (duration, 90.0, "90 s"),
        (duration, 600.0, "10 min"),
        (duration, 86_400.0, "24 h"),
        (inert, "a\nb\x00\u202ec", "a b��c"),
        (named, "", "(no name)"),
        (named, "a" * 50 + "b" * 50, "a" * 29 + "…" + "b" * 30),
    ],
)
def test_figures_and_names_are_short(say, value, text):
    assert say(value) == text


# -- the verb --------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    assert main(["report", *map(str, arguments)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    return told.err


def test_the_name_decides_the_format_and_nothing_is_overwritten(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(folder), "-o", "a b.md"]) == 0
    assert re.fullmatch(r"a b\.md: \d+\.\d kB, 2 runs\n", capsys.readouterr().out)
    text = Path("a b.md").read_text()
    assert text.startswith("# adamw and muon side by side\n")
    assert f"`normuon-lens report {folder} -o 'a b.md'`" in text
    assert "there already" in refused(capsys, folder, "-o", "a b.md")
    assert Path("a b.md").read_text() == text
    assert main(["report", str(folder), "-o", "a b.md", "--force", "--format", "html"]) == 0
    assert re.fullmatch(r"a b\.md: \d\.\d MB, 2 runs\n", capsys.readouterr().out)
    assert Path("a b.md").read_text().startswith("<!DOCTYPE html>")
    assert main(["report", str(folder), "--format", "md"]) == 0
    assert capsys.readouterr().out.startswith("report.md: ")
    assert "no format is known" in refused(capsys, folder, "-o", "a.pdf")
    assert sorted(os.listdir()) == ["a b.md", "report.md"]
    umask = os.umask(0)
    os.umask(umask)
    assert Path("report.md").stat().st_mode & 0o777 == 0o666 & ~umask, "for others to read"


def test_what_cannot_be_written_is_refused_in_a_line(folder, tmp_path, monkeypatch, capsys):
    assert "there is no folder" in refused(capsys, folder, "-o", tmp_path / "none" / "a.html")
    (tmp_path / "a.html").mkdir()
    assert "a folder" in refused(capsys, folder, "-o", tmp_path / "a.html")
    assert "too long" in refused(capsys, folder, "-o", tmp_path / f"{'x' * 300}.html")
    assert "no such file" in refused(capsys, tmp_path / "none.h5", "-o", tmp_path / "b.html")
    before = (folder / "muon.h5").read_bytes()
    told = refused(capsys, folder, "-o", folder / "muon.h5", "--format", "md", "--force")
    assert "is one of the recordings" in told
    assert (folder / "muon.h5").read_bytes() == before

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "c.md").write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in refused(capsys, folder, "-o", tmp_path / "c.md", "--force")
    assert (tmp_path / "c.md").read_text() == "before"
    assert sorted(os.listdir(tmp_path)) == ["a.html", "c.md"]
