"""The pictures: valid Plotly, the numbers they were given, and always the same colours."""

import base64
import json

import numpy as np
import plotly.graph_objects as go
import pytest

from normuon_lens.dashboard.figures import (
    Band,
    Curve,
    Grid,
    Loss,
    condition_figure,
    empty_figure,
    faded,
    imbalance_figure,
    loss_figure,
    neurons_figure,
    spectrum_figure,
    style_of,
    timeline_figure,
    variant,
)
from normuon_lens.dashboard.panels import smoothed
from normuon_lens.dashboard.thin import blocks, extremes

ADAMW, MUON, NORMUON = style_of("AdamW"), style_of("Muon"), style_of("NorMuon")
STEPS = np.arange(1, 31)
FALLING = np.geomspace(1.0, 0.01, 30)
CURVES = [Curve("a", ADAMW, STEPS, FALLING), Curve("b", MUON, STEPS, FALLING[::-1])]
BAND = Band("a", NORMUON, STEPS, FALLING, 2 * FALLING, 3 * FALLING)
VALUES = np.linspace(0.0, 0.5, 60, dtype=np.float32).reshape(2, 30)
GRIDS = [Grid("a", ADAMW, STEPS, ["q", "up"], VALUES), Grid("b", MUON, STEPS, ["q", "up"], VALUES)]
LOSS = Loss(CURVES[0], FALLING + 1)

FIGURES = {
    "spectrum": lambda dark: spectrum_figure(CURVES, dark=dark),
    "neurons": lambda dark: neurons_figure(CURVES, dark=dark),
    "condition": lambda dark: condition_figure([BAND], until=20, step=7, dark=dark),
    "imbalance": lambda dark: imbalance_figure(
        GRIDS, top=0.4, chosen="up", until=20, step=7, dark=dark
    ),
    "timeline": lambda dark: timeline_figure(GRIDS, until=20, step=7, dark=dark),
    "loss": lambda dark: loss_figure([LOSS], until=20, step=7, dark=dark),
    "empty": lambda dark: empty_figure("nothing\nyet", dark=dark),
}


def decoded(array):
    shape = tuple(int(side) for side in array["shape"].split(","))
    return np.frombuffer(base64.b64decode(array["bdata"]), "<f4").reshape(shape)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_valid_and_json(name, dark):
    figure = FIGURES[name](dark)
    go.Figure(figure)
    json.dumps(figure, allow_nan=False)


def test_lines_carry_the_numbers_they_were_given():
    for make in (spectrum_figure, neurons_figure):
        first, second = make(CURVES)["data"]
        assert first["x"] == STEPS.tolist()
        assert first["y"] == FALLING.tolist()
        assert second["y"] == FALLING[::-1].tolist()
    high, low, middle = condition_figure([BAND])["data"]
    assert (low["y"], middle["y"], high["y"]) == (
        BAND.low.tolist(),
        BAND.middle.tolist(),
        BAND.high.tolist(),
    )
    raw, smooth = loss_figure([LOSS])["data"]
    assert (raw["y"], smooth["y"]) == (LOSS.raw.tolist(), FALLING.tolist())


def test_heatmaps_carry_the_numbers_they_were_given():
    for figure in (imbalance_figure(GRIDS, top=0.4), timeline_figure(GRIDS)):
        for trace in figure["data"]:
            np.testing.assert_array_equal(decoded(trace["z"]), VALUES)
            assert trace["x"] == STEPS.tolist()
            assert trace["y"] == ["q", "up"]
        assert {trace["coloraxis"] for trace in figure["data"]} == {"coloraxis"}


def test_what_is_not_finite_is_a_gap():
    values = np.array([1.0, np.nan, np.inf])
    (trace,) = spectrum_figure([Curve("a", ADAMW, np.arange(3), values)])["data"]
    assert trace["y"] == [1.0, None, None]


def test_colours_and_dashes_are_fixed():
    assert ADAMW == ("#0072B2", "solid")
    assert MUON == ("#D55E00", "dash")
    assert NORMUON == ("#009E73", "dot")
    line = spectrum_figure([CURVES[1]])["data"][0]["line"]
    assert (line["color"], line["dash"]) == MUON
    others = {style_of("Lion", 0), style_of("Shampoo", 1), style_of("Sophia", 2)}
    assert len(others) == 3
    assert not others & {ADAMW, MUON, NORMUON}


def test_a_second_run_of_an_optimizer_keeps_its_dash_in_another_colour():
    assert variant(MUON, 0) == MUON
    second = variant(MUON, 1)
    assert second.dash == MUON.dash
    assert second.colour != MUON.colour
    assert faded("#0072B2", 0.5) == "rgba(0,114,178,0.5)"


def test_the_cursor_stands_at_the_step_in_every_panel():
    figure = timeline_figure(GRIDS, step=7)
    lines = [shape for shape in figure["layout"]["shapes"] if shape["type"] == "line"]
    assert [(line["xref"], line["x0"], line["x1"]) for line in lines] == [("x", 7, 7), ("x2", 7, 7)]
    shapes = condition_figure([BAND])["layout"]["shapes"]
    assert "line" not in {shape["type"] for shape in shapes}


def test_the_healthy_range_is_drawn_in():
    bands = [shape for shape in spectrum_figure(CURVES)["layout"]["shapes"] if "y0" in shape]
    assert bands[0]["y0"] == pytest.approx(0.68 / 1.15)
    assert neurons_figure(CURVES)["layout"]["shapes"][0]["y0"] == 1.0
    assert (1.0, 100.0) in {
        (shape["y0"], shape["y1"]) for shape in condition_figure([BAND])["layout"]["shapes"]
    }


def test_no_figure_needs_data():
    for figure in (spectrum_figure([]), neurons_figure([]), condition_figure([]), loss_figure([])):
        assert figure["data"] == []
        go.Figure(figure)


def test_names_are_shown_as_they_are_and_never_as_markup():
    wicked = '<a href="https://example.org">x</a>'
    figure = spectrum_figure([Curve(wicked, ADAMW, STEPS, FALLING)])
    assert "<" not in figure["data"][0]["name"]
    grid = Grid(wicked, ADAMW, STEPS, [wicked, "up"], VALUES)
    figure = imbalance_figure([grid], top=0.4, chosen="up")
    assert "<" not in figure["data"][0]["y"][0]
    assert "<a" not in figure["layout"]["annotations"][0]["text"]
    assert "<" not in empty_figure("<b>")["layout"]["annotations"][0]["text"]


def test_why_a_panel_is_empty_is_said_in_short_lines():
    text = "No spectra of stage “orthogonalized” in these runs.\nRecord with stages=True."
    lines = empty_figure(text)["layout"]["annotations"][0]["text"].split("<br>")
    assert " ".join(lines) == text.replace("\n", " ")
    assert max(map(len, lines)) <= 36
    assert lines[-1] == "Record with stages=True."


def test_labels_of_condition_numbers_have_room_where_all_are_one():
    even = BAND._replace(low=BAND.low * 0 + 1, middle=BAND.low * 0 + 1, high=BAND.low * 0 + 1)
    # The axis reaches up to the healthy band's end at 100: a label a decade, not one a digit.
    assert condition_figure([even])["layout"]["yaxis"]["dtick"] == 1


def test_thinned_lines_keep_both_ends_and_every_spike():
    values = np.sin(np.arange(50_000) / 900.0)
    values[12_345], values[40_001], values[7] = 9.0, -9.0, np.nan
    kept = extremes(values, 400)
    assert len(kept) <= 402
    assert {0, 12_345, 40_001, 49_999} <= set(kept.tolist())
    assert extremes(values[:400], 400).tolist() == list(range(400))


def test_thinned_heatmaps_are_the_rms_of_their_blocks():
    rng = np.random.default_rng(0)
    values = rng.random((10, 23))
    values[0, :6] = np.nan
    cells, rows, columns = blocks(values, rows=4, columns=5)
    assert cells.shape == (4, 5) == (len(rows), len(columns))
    row_edges, column_edges = [0, 3, 6, 9, 10], [0, 5, 10, 15, 20, 23]
    for i in range(4):
        for j in range(5):
            block = values[
                row_edges[i] : row_edges[i + 1], column_edges[j] : column_edges[j + 1]
            ].ravel()
            block = block[~np.isnan(block)]
            assert cells[i, j] == pytest.approx(np.sqrt(np.mean(block**2)))
    same, rows, columns = blocks(values, rows=10, columns=23)
    np.testing.assert_array_equal(same, values.astype(np.float32))
    assert rows.tolist() == list(range(10))
    assert np.isnan(blocks(np.full((1, 9), np.nan), 1, 3)[0]).all()


def test_smoothing_starts_unbiased_and_follows():
    assert smoothed(np.full(5, 3.0)) == pytest.approx(3.0)
    assert smoothed(np.array([1.0, 3.0])) == pytest.approx([1.0, 3.9 / 1.9])
