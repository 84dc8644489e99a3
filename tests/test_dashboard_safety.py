"""A run file from a stranger: whatever it holds, the page shows it as text, or says what is wrong.

Nothing here looks at a browser. What a browser could be made to do must be in what it is sent, so
that is what is looked at: all of it.
"""

import ast
import csv
import io
import json
import re
import shutil
import time
import tracemalloc
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest

from normuon_lens.dashboard.answers import BY_ID, OVERVIEW, view_of
from normuon_lens.dashboard.app import ASSETS, make_app
from normuon_lens.dashboard.store import Store
from normuon_lens.errors import RunError
from normuon_lens.runfile import Matrices, Matrix, Writer, made_up_run, segment
from normuon_lens.runfile.schema import LIBVER, Shard, printable
from normuon_lens.runfile.synthetic import SHAPES

SCRIPT = "<script>alert(1)</script>"
NAMES = {
    "script": SCRIPT,
    "handler": "<img src=x onerror=alert(1)>",
    "link": '<a href="javascript:alert(1)">click</a>',
    "entity": "&lt;b&gt;&amp;<b>",
    "long": "<b>" + "x" * 10_000,
    "lines": "one\ntwo\r\nthree<br>",
    "terminal": "\x1b[31m\x07<b>",
    "nul": "a\0<b>",
    "right to left": "\u202e<b>gnp.exe\u2066",
    "separators": "a\u2028b\u2029<b>",
    "template": "%{customdata}<b>%{y}",
    "formula": "=HYPERLINK(A1)<b>",
    "quotes": "'\"\\\n); import os #<b>",
    "empty": "",
    "blank": " ",
}
"""What a matrix, a run or an optimizer may be called."""

MARKUP = re.compile(r"<(?!br>|extra>|/extra>|span style=\"color:#[0-9A-F]{6}\">|/span>)", re.I)
"""What Plotly would take for markup and is not our own."""

SECONDS, BYTES = 5.0, 100e6
"""What a file of 100 kB may take to be opened: it takes a tenth of either."""

IDS = ("sound", "x", "y")
"""Ids of the runs that are ticked, where there are such."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "x.h5"
    made_up_run(path, optimizer="Muon", steps=24, every=6)
    return path


@pytest.fixture
def changed(sound, tmp_path):
    """Return what changes a copy of a sound run's file."""

    def make(change, name="x.h5"):
        shutil.copy(sound, tmp_path / name)
        with h5py.File(tmp_path / name, "r+", libver=LIBVER) as file:
            change(file)
        return tmp_path / name

    return make


def replace(file, path, values):
    del file[path]
    file[path] = np.asarray(values)


def call_matrices(*names):
    """Return a change that calls the first matrices so."""

    def change(file):
        kept = file["matrices/name"][len(names) :].tolist()
        replace(file, "matrices/name", [*(name.encode() for name in names), *kept])

    return change


def call_run(**metadata):
    def change(file):
        file.attrs["run"] = np.bytes_(json.dumps(metadata).encode())

    return change


class Looked(NamedTuple):
    """All that the page is sent: decoded JSON, and text."""

    listed: Any
    cards: Any
    pictures: list[Any]
    overviews: list[Any]
    tables: list[Any]
    csv: list[str]


def look(store):
    """Ask for everything that a page shows of these runs."""
    store.refresh()
    client = make_app(store).server.test_client()
    listed, cards = call_back(client, "run-list"), call_back(client, "headline")
    first, chosen = store.matrices()[0], view_of(store, {"query": ""}).matrix
    pictures, overviews, tables, csv = [], [], [], []
    for matrix, stage in ((first, "update"), (chosen, "update"), ("none such", "gradient")):
        asked = {"runs": IDS, "matrix": matrix, "stage": stage, "step": 7}
        wanted = dict.fromkeys([OVERVIEW, *BY_ID])
        found = decoded(client.post("/pictures", json={**asked, "have": wanted}))
        overviews.append(found.pop(OVERVIEW))
        pictures += [found[name] for name in BY_ID]
        for name in BY_ID if matrix == first else ():
            tables.append(decoded(client.post(f"/numbers/{name}", json=asked)))
            csv.append(client.post(f"/csv/{name}", json=asked).get_data(as_text=True))
    return Looked(listed, cards, pictures, overviews, tables, csv)


def call_back(client, part):
    """Return what the callback answers that fills this part of the page."""
    given = {"link.data": "?step=7", "runs.value": IDS, "stage-select.value": "update"}

    def wires(of):
        return [{**wire, "value": given.get(f"{wire['id']}.{wire['property']}")} for wire in of]

    callbacks = client.get("/_dash-dependencies").get_json()
    callback = next(x for x in callbacks if f"{part}.children" in x["output"])
    names = [name.rpartition(".") for name in callback["output"].strip(".").split("...")]
    outputs = [{"id": id, "property": name} for id, _, name in names]
    asked = {
        "output": callback["output"],
        "outputs": outputs if callback["output"].startswith("..") else outputs[0],
        "inputs": wires(callback["inputs"]),
        "state": wires(callback["state"]),
        "changedPropIds": [],
    }
    return decoded(client.post("/_dash-update-component", json=asked))["response"][part]


def decoded(answer):
    """Return an answer's JSON; not every reader of it knows NaN, and a browser does not."""
    assert answer.status_code == 200
    return json.loads(answer.get_data(), parse_constant=pytest.fail)


def texts(part):
    """Yield every text in decoded JSON, keys left out."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, list):
        for item in part:
            yield from texts(item)
    elif isinstance(part, dict):
        for item in part.values():
            yield from texts(item)


def markup(looked):
    """Return what Plotly would take for markup; the rest of the page takes nothing for it."""
    drawn = [[picture["data"], picture["layout"]] for picture in looked.pictures]
    return [text for text in texts(drawn) if MARKUP.search(text)]


def spelled(python):
    """Return what lines of Python do, whatever their texts say."""
    tree = ast.parse(python)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.dump(tree)


# -- names are data ------------------------------------------------------------------------------


def test_markup_is_recognised():
    for harmless in ('<span style="color:#0072B2">▬</span> a', "a<br>b<extra></extra>", "a &lt;b"):
        assert not MARKUP.search(harmless)
    for name in ("script", "handler", "link", "entity", "long"):
        assert MARKUP.search(NAMES[name])


@pytest.fixture(scope="module")
def usual(sound):
    """Return what the Python of every panel does of a run with ordinary names."""
    return [spelled(table["python"]) for table in look(Store([sound])).tables]


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_of_matrices_are_text(name, changed, usual):
    looked = look(Store([changed(call_matrices(name, "other"))]))
    assert not markup(looked)
    imbalance = looked.pictures[list(BY_ID).index("imbalance")]
    assert len(set(imbalance["data"][0]["y"])) == len(SHAPES)
    assert [row["name"] for row in looked.overviews[0]["rows"][:2]] == [printable(name), "other"]
    for text in looked.csv:
        harmless(text)
    # Copied into a notebook, lines do what they do for any other run.
    assert [spelled(table["python"]) for table in looked.tables] == usual


def harmless(text):
    """Expect that a spreadsheet finds numbers, and texts that are no formula."""
    for row in csv.reader(io.StringIO(text)):
        for cell in row:
            if cell[:1] in ("=", "+", "-", "@", "\t", "\r") and cell:
                float(cell)


@pytest.mark.parametrize("name", [name for name in NAMES.values() if name], ids=filter(None, NAMES))
def test_names_of_runs_and_optimizers_are_text(name, changed, tmp_path):
    for number in IDS:
        changed(call_run(name=f"{name}{number}", optimizer=name), f"{number}.h5")
    store = Store([tmp_path])
    looked = look(store)
    assert not markup(looked)
    for part in (looked.listed, looked.cards, looked.overviews):
        assert f"{printable(name)}x" in list(texts(part))
    for text in looked.csv:
        harmless(text)
    # Ids are in links and in the page's own table of contents.
    assert [entry.id for entry in store.entries] == list(IDS)


def test_a_file_name_is_text_too(sound, tmp_path):
    (tmp_path / f"{SCRIPT.replace('/', '_')}.h5").write_bytes(b"no run")
    shutil.copy(sound, tmp_path / "<b>.h5")
    store = Store([tmp_path])
    looked = look(store)
    assert not markup(looked)
    assert "<script>alert(1)<_script>.h5" in list(texts(looked.listed))
    assert all(re.fullmatch(r"[\w.-]+", entry.id) for entry in store.entries)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"name": ["a"], "optimizer": {"b": 1}},
        {"name": None, "optimizer": None},
        {"name": "\ud800", "optimizer": "\udfff", "shadow_of": "\udc00"},
        {"name": "a", "groups": "text"},
        {"name": "a", "groups": {"0": {"update": 1}}},
        {"name": "a", "shadow_of": {"<b>": SCRIPT}},
        {"name": 1e400, "notes": [[[[]]]]},
    ],
    ids=str,
)
def test_metadata_of_any_kind_is_shown(metadata, changed):
    looked = look(Store([changed(call_run(**metadata))]))
    for part in (looked.listed, looked.cards, looked.pictures, looked.overviews):
        "".join(texts(part)).encode()


def test_events_and_status_are_text(changed):
    def change(file):
        file["events/step"] = np.array([3, 4])
        file["events/kind"] = np.array([b"schedule", b"hole"])
        file["events/text"] = np.array([SCRIPT.encode(), b"rank 1: steps 2-3: <b>\xff"])
        file.attrs["status"] = np.bytes_(SCRIPT.encode())

    said = list(texts(look(Store([changed(change)])).listed))
    assert f"at step 3: {SCRIPT}" in said
    assert any(text.endswith(SCRIPT) and "steps" in text for text in said)


def test_the_page_itself_never_takes_text_for_markup():
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc"
    scripts = [script.read_text() for script in sorted(ASSETS.glob("*.js"))]
    assert scripts
    assert not [script for script in scripts if re.search(sinks, script)]
    # plotly.js offers by default to upload the chart to a company's server.
    assert "showSendToCloud: false" in "".join(scripts)


# -- shapes that lie -----------------------------------------------------------------------------

WIDE, HUGE = 2**31, 2**62
OFFSETS = np.cumsum([0, *(m for m, _ in SHAPES.values())])
LIES = {
    "more rows than norms": ("matrices/m", [17, 32, 16, 16, 32, 16]),
    "fewer rows than norms": ("matrices/m", [15, 32, 16, 16, 32, 16]),
    "rows of two swapped": ("matrices/m", [32, 16, 16, 16, 32, 16]),
    "fewer singular values": ("matrices/n", [8, 16, 32, 16, 16, 32]),
    "other columns": ("matrices/n", [16, 17, 32, 16, 16, 32]),
    "negative rows": ("matrices/m", [-16, 32, 16, 16, 32, 48]),
    "negative columns": ("matrices/n", [-16, 16, 32, 16, 16, 32]),
    "no rows": ("matrices/m", [0, 32, 32, 16, 32, 16]),
    "wide": ("matrices/n", [16, WIDE, 32, 16, 16, 32]),
    "huge": ("matrices/m", [HUGE, 32, 16, 16, 32, 16]),
    "huge sum": ("matrices/m", [HUGE] * 6),
    "unsigned": ("matrices/m", np.array([2**64 - 16, 32, 16, 16, 32, 48], np.uint64)),
    "more matrices": ("matrices/m", [16] * 7),
    "one name twice": ("matrices/name", [b"a", b"b", b"c", b"d", b"e", b"a"]),
    "one name twice but for a NUL": ("matrices/name", [b"a", b"b", b"c", b"d", b"e", b"a\0"]),
    "one name twice once decoded": ("matrices/name", [b"\xff", b"\xfe", b"c", b"d", b"e", b"f"]),
    "overlapping rows": ("matrices/row_offset", [0, 15, *OFFSETS[2:6]]),
    "negative offset": ("matrices/row_offset", [-16, *OFFSETS[1:6]]),
    "offsets in another order": ("matrices/row_offset", OFFSETS[5::-1]),
    "norms of fewer steps": ("neurons/update", np.ones((23, 128), np.float32)),
    "norms too long": ("neurons/update", np.ones((24, 129), np.float32)),
    "norms with an axis more": ("neurons/update", np.ones((24, 128, 1), np.float32)),
    "long doubles": ("spectra/update/sigma", np.ones((5, 96), np.longdouble)),
    "spectra too short": ("spectra/update/sigma", np.ones((5, 95))),
    "floors of other steps": ("spectra/update/floor", np.ones((4, 6))),
    "a square matrix": ("updates/update/001", np.ones((5, 16, 16), np.float32)),
    "a transposed matrix": ("updates/update/001", np.ones((5, 16, 32), np.float32)),
    "a matrix of fewer steps": ("updates/update/000", np.ones((4, 16, 16), np.float32)),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_shapes_that_lie_are_one_error(lie, changed):
    path = changed(lambda file: replace(file, *lie))
    begin = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(RunError, match=re.escape(str(path))) as refused:
            Store([path])
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(refused.value)
    assert time.perf_counter() - begin < SECONDS
    assert taken < BYTES
    (entry,) = Store([path.parent]).entries
    assert entry.error == str(refused.value)


def test_a_run_beside_a_liar_is_shown_as_ever(changed, sound):
    liar = changed(lambda file: replace(file, *LIES["rows of two swapped"]), "liar.h5")
    shutil.copy(sound, liar.with_name("sound.h5"))
    store = Store([liar.parent])
    looked, alone = look(store), look(Store([liar.with_name("sound.h5")]))
    assert store.entries[0].error in list(texts(looked.listed))
    assert looked.cards == alone.cards
    assert looked.csv == alone.csv
    for beside, picture in zip(looked.pictures, alone.pictures, strict=True):
        assert beside["data"] == picture["data"]


MOST = 2**31 - 1


@pytest.mark.parametrize(
    ("m", "n", "wrong"),
    [
        (MOST, 16, ""),
        (16, MOST, ""),
        (MOST, MOST, "sigma"),
        (MOST + 1, 16, "impossible shape"),
        (16, MOST + 1, "impossible shape"),
    ],
)
def test_a_size_that_no_norms_contradict_takes_no_memory(m, n, wrong, changed):
    def change(file):
        del file["neurons"]
        del file["updates"]
        file["matrices/m"][0], file["matrices/n"][0] = m, n
        file["matrices/row_offset"][...] = np.cumsum([0, *file["matrices/m"][()]])[:-1]

    path = changed(change)
    tracemalloc.start()
    try:
        if wrong:
            with pytest.raises(RunError, match=wrong):
                Store([path])
        else:
            look(Store([path]))
        assert tracemalloc.get_traced_memory()[1] < BYTES
    finally:
        tracemalloc.stop()


def test_rows_that_no_rank_recorded_take_no_memory(tmp_path):
    shard = Shard(0, (0,), None, {"update": ((0, 8, 1), (0, 4, 1))})
    table = Matrices([Matrix("a", 8, 4), Matrix("b", 4, 4)])
    writer = Writer(tmp_path / "x.h5", {"optimizer": "Muon"}, table, shard=shard)
    for step in (1, 2, 3):
        writer.step(step, 0.0, scalars={"loss": 1.0}, norms={"update": np.ones(12)})
    writer.commit()
    for path in tmp_path.rglob("*.h5"):
        with h5py.File(path, "r+", libver=LIBVER) as file:
            file["matrices/m"][1] = MOST
    tracemalloc.start()
    try:
        (entry,) = Store([tmp_path]).entries
        assert "more rows" in entry.error
        assert tracemalloc.get_traced_memory()[1] < BYTES
    finally:
        tracemalloc.stop()


def test_more_holes_than_steps_could_have_are_refused(changed, monkeypatch):
    def change(file):
        file["events/step"] = np.arange(1000)
        file["events/kind"] = np.full(1000, b"hole")
        file["events/text"] = np.array(
            [f"rank {i}: steps 1–24: gone".encode() for i in range(1000)]
        )

    path = changed(change)
    look(Store([path]))
    monkeypatch.setattr(segment, "MAX_HOLES", 1000 * 24 - 1)
    with pytest.raises(RunError, match="more holes"):
        Store([path])


# -- numbers that lie ----------------------------------------------------------------------------

ALL, LAST = slice(None), -1
ODD = {
    "f": [(ALL, np.nan), (ALL, 0.0), (ALL, -1.0), (LAST, np.nan), (LAST, np.inf), (LAST, 1e308)],
    "i": [(ALL, -1), (ALL, 2**63 - 1), (LAST, -(2**63)), (LAST, 0), (LAST, 2**53 + 1)],
    "u": [(ALL, 255)],
}
NUMBERS = (
    "steps/time",
    "steps/void",
    "steps/scalars",
    "neurons/update",
    "spectra/update/sigma",
    "spectra/update/floor",
    "spectra/update/weight_norm",
    "matrices/group",
)


@pytest.mark.parametrize("path", NUMBERS)
def test_numbers_of_any_size_are_drawn_or_left_out(path, sound, changed):
    with h5py.File(sound, locking=False) as file:  # as who may still have it open
        kind = file[path].dtype.kind
    for i, (place, value) in enumerate(ODD[kind]):

        def change(file, place=place, value=value):
            values = file[path][()]
            with np.errstate(over="ignore"):
                values[place] = value
            file[path][...] = values

        look(Store([changed(change, f"{i}.h5")]))


@pytest.mark.parametrize("path", ["steps/step", "spectra/update/step"])
@pytest.mark.parametrize(("place", "value"), ODD["i"])
def test_impossible_steps_are_refused(path, place, value, changed):
    def change(file):
        steps = file[path][()]
        steps[place] = value
        file[path][...] = steps

    with pytest.raises(RunError, match="impossible steps"):
        Store([changed(change, "odd.h5")])
