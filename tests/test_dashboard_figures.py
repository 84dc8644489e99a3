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
    Marks,
    Stages,
    Update,
    condition_figure,
    empty_figure,
    faded,
    imbalance_figure,
    loss_figure,
    matrix_figure,
    neurons_figure,
    spectrum_figure,
    stages_figure,
    style_of,
    timeline_figure,
    variant,
)
from normuon_lens.dashboard.figures.shapes import SPANS, spans
from normuon_lens.dashboard.panels import smoothed
from normuon_lens.dashboard.thin import blocks, blocks_note, evenly, extremes

ADAMW, MUON, NORMUON = style_of("AdamW"), style_of("Muon"), style_of("NorMuon")
STEPS = np.arange(1, 31)
FALLING = np.geomspace(1.0, 0.01, 30)
CURVES = [Curve("a", ADAMW, STEPS, FALLING), Curve("b", MUON, STEPS, FALLING[::-1])]
BAND = Band("a", NORMUON, STEPS, FALLING, 2 * FALLING, 3 * FALLING)
VALUES = np.linspace(0.0, 0.5, 60, dtype=np.float32).reshape(2, 30)
GRIDS = [Grid("a", ADAMW, STEPS, ["q", "up"], VALUES), Grid("b", MUON, STEPS, ["q", "up"], VALUES)]
LOSS = Loss(CURVES[0], FALLING + 1)
NONE = np.empty(0, np.int64)
MARKS = Marks(
    void=np.array([4, 11, 12, 13, 14]), dropped=np.array([20]), not_finite=np.array([8, 25, 26])
)
UPDATES = [
    Update("a", ADAMW, np.arange(2), np.arange(0, 60, 2), 4 * VALUES, np.array([0.5, 1.5])),
    Update("b", MUON, np.arange(2), np.arange(0, 60, 2), VALUES, np.array([1.0, 1.0])),
]
STAGES = [
    Stages(
        "a",
        ADAMW,
        ["gradient", "update"],
        np.array([9e3, 150.0]),
        np.array([True, False]),
        np.array([0.8, 0.3]),
    ),
    Stages(
        "b",
        NORMUON,
        ["gradient", "momentum", "orthogonalized", "update"],
        np.array([8e3, np.nan, 1.7, 2.2]),
        np.array([False, False, True, False]),
        np.array([0.7, 0.6, 0.3, 0.05]),
    ),
]

FIGURES = {
    "spectrum": lambda dark: spectrum_figure(CURVES, dark=dark),
    "neurons": lambda dark: neurons_figure(CURVES, dark=dark),
    "condition": lambda dark: condition_figure([BAND], until=20, step=7, dark=dark),
    "imbalance": lambda dark: imbalance_figure(
        GRIDS, top=0.4, chosen="up", until=20, step=7, dark=dark
    ),
    "timeline": lambda dark: timeline_figure(GRIDS, until=20, step=7, dark=dark),
    "loss": lambda dark: loss_figure([LOSS], until=20, step=7, dark=dark),
    "matrix": lambda dark: matrix_figure(UPDATES, dark=dark),
    "stages": lambda dark: stages_figure(STAGES, chosen="momentum", dark=dark),
    "marked condition": lambda dark: condition_figure([BAND], marks=[MARKS], dark=dark),
    "marked imbalance": lambda dark: imbalance_figure(GRIDS, top=0.4, marks=[MARKS] * 2, dark=dark),
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


def test_neurons_have_a_band_of_two_healthy_deviations_around_one():
    shapes = neurons_figure(CURVES)["layout"]["shapes"]
    (tinted,) = [shape for shape in shapes if shape["type"] == "rect"]
    assert (tinted["y0"], tinted["y1"]) == pytest.approx((0.7, 1.3))


# -- the update itself ---------------------------------------------------------------------------


def test_an_update_is_a_heatmap_with_its_norms_on_the_edge():
    figure = matrix_figure(UPDATES)
    first, edge, second, _ = figure["data"]
    np.testing.assert_array_equal(decoded(first["z"]), UPDATES[0].values)
    np.testing.assert_array_equal(decoded(second["z"]), UPDATES[1].values)
    assert (first["x"], first["y"]) == (list(range(0, 60, 2)), [0, 1])
    assert (edge["x"], edge["y"]) == ([0.5, 1.5], [0, 1])
    assert edge["fill"] == "tozerox"
    colours = figure["layout"]["coloraxis"]
    assert (colours["cmin"], colours["cmax"]) == (0, 3)
    assert colours["colorbar"]["ticktext"][-1] == "≥ 3"


def test_updates_stand_beside_each_other_each_with_a_slim_edge():
    figure = matrix_figure(UPDATES)
    axes = [figure["layout"][trace["xaxis"].replace("x", "xaxis")] for trace in figure["data"]]
    edges = [side for axis in axes for side in axis["domain"]]
    assert edges == sorted(edges)
    for heat, edge in zip(axes[::2], axes[1::2], strict=True):
        whole = edge["domain"][1] - heat["domain"][0]
        assert edge["domain"][1] - edge["domain"][0] == pytest.approx(0.15 * whole)
    assert {trace["yaxis"] for trace in figure["data"]} == {"y"}
    assert figure["layout"]["yaxis"]["autorange"] == "reversed"


def test_norms_on_the_edge_keep_their_scale_from_zero_to_two_at_least_and_a_line_at_one():
    layout = matrix_figure(UPDATES)["layout"]
    for name in ("xaxis2", "xaxis4"):
        axis = layout[name]
        assert axis["fixedrange"]
        assert axis["rangemode"] == "tozero"
        assert axis["autorangeoptions"] == {"include": 2}
    assert layout["xaxis4"]["matches"] == "x2"
    assert "matches" not in layout["xaxis2"]
    lines = [(line["xref"], line["x0"], line["x1"]) for line in layout["shapes"]]
    assert lines == [("x2", 1, 1), ("x4", 1, 1)]


# -- along the optimizer -------------------------------------------------------------------------


def test_stages_come_in_the_order_of_the_optimizer_whatever_a_run_has():
    figure = stages_figure(STAGES, chosen="orthogonalized")
    order = ["gradient", "momentum", "orthogonalized", "update"]
    assert figure["layout"]["xaxis"]["categoryarray"] == order
    condition, spread, other, _ = figure["data"]
    assert (condition["x"], condition["y"]) == (["gradient", "update"], [9e3, 150.0])
    assert (spread["yaxis"], spread["y"]) == ("y2", [0.8, 0.3])
    assert other["y"] == [8e3, None, 1.7, 2.2]


def test_a_lower_bound_is_hollow_and_said():
    _, _, trace, _ = stages_figure(STAGES)["data"]
    symbols = trace["marker"]["symbol"]
    assert symbols == ["circle", "circle", "circle-open", "circle"]
    assert trace["customdata"] == ["", "", "≥ ", ""]
    assert "%{customdata}" in trace["hovertemplate"]


def test_stages_show_what_is_healthy_and_the_chosen_one():
    column, condition, spread = stages_figure(STAGES, chosen="orthogonalized")["layout"]["shapes"]
    assert (column["x0"], column["x1"]) == (1.5, 2.5)
    assert (condition["yref"], condition["y0"], condition["y1"]) == ("y", 1.0, 100.0)
    assert (spread["yref"], spread["y0"], spread["y1"]) == ("y2", 0.0, 0.15)
    assert len(stages_figure(STAGES, chosen="normalized")["layout"]["shapes"]) == 2


# -- marked steps --------------------------------------------------------------------------------


def test_consecutive_steps_are_one_span():
    assert spans(np.array([12, 4, 11, 13, 30])) == [(4, 4), (11, 13), (30, 30)]
    assert spans(NONE) == []
    assert spans(np.array([7, 7])) == [(7, 7)]


def test_too_many_spans_are_joined_where_they_are_nearest():
    rng = np.random.default_rng(3)
    steps = np.unique(rng.integers(0, 100_000, 2000))
    found = spans(steps)
    assert len(found) <= SPANS
    assert len(found) > SPANS - 10
    # Every step is in a span, every span ends at steps, and no gap left open is narrower than
    # one that was closed.
    firsts, lasts = np.array(found).T
    at = np.searchsorted(firsts, steps, "right") - 1
    assert (steps <= lasts[at]).all()
    assert set(firsts) | set(lasts) <= set(steps.tolist())
    closed = np.diff(steps)[at[1:] == at[:-1]]
    assert (firsts[1:] - lasts[:-1]).min() >= closed.max()
    assert spans(np.arange(0, 4000, 10), limit=5) == [(0, 3990)]


def marked(figure):
    """Return the paths of a figure: only marks are drawn as such."""
    return [shape for shape in figure["layout"]["shapes"] if shape["type"] == "path"]


def corners(shape):
    """Return every part of a path as its points."""
    parts = shape["path"].replace("Z", "").split("M")[1:]
    return [
        [tuple(float(v) for v in point.split(",")) for point in part.split("L")] for part in parts
    ]


def reach(part):
    """Return the first and last x, and the lowest and highest y of a part."""
    across, up = zip(*part, strict=True)
    return min(across), max(across), min(up), max(up)


def test_marks_are_told_apart_by_place_and_shape():
    outer, inner, dropped, tint, walls = marked(condition_figure([BAND], marks=[MARKS]))
    # Void: boxes at the lower edge as wide as they last, hollow.
    assert [reach(part)[:2] for part in corners(outer)] == [(3.5, 4.5), (10.5, 14.5)]
    assert (outer["ysizemode"], outer["yanchor"]) == ("pixel", 0)
    assert 0 < reach(corners(outer)[0])[2] < reach(corners(outer)[0])[3] < 20
    assert (outer["fillcolor"], outer["line"]["color"]) == (NORMUON.colour, NORMUON.colour)
    assert inner["path"] == outer["path"]
    assert inner["fillcolor"] == condition_figure([BAND])["layout"]["paper_bgcolor"]
    assert 0 < inner["line"]["width"] < outer["line"]["width"]
    # Dropped: solid, at the upper edge.
    (box,) = corners(dropped)
    assert (reach(box)[:2], dropped["ysizemode"], dropped["yanchor"]) == ((19.5, 20.5), "pixel", 1)
    assert -20 < reach(box)[2] < reach(box)[3] < 0
    assert dropped["fillcolor"] == NORMUON.colour
    # Not finite: dashed, from top to bottom, and tinted where it lasts.
    assert corners(walls) == [[(x, 0), (x, 1)] for x in (8, 25, 26)]
    assert walls["line"]["dash"] == "4px,3px"
    assert [reach(part) for part in corners(tint)] == [(24.5, 26.5, 0, 1)]
    assert "ysizemode" not in walls | tint


def test_marks_of_runs_in_one_picture_stand_above_each_other_in_their_colours():
    void = Marks(np.array([5]), NONE, NONE)
    losses = [LOSS, LOSS._replace(smooth=CURVES[1])]
    first, _, second, _ = marked(loss_figure(losses, marks=[void, void]))
    assert [first["line"]["color"], second["line"]["color"]] == [ADAMW.colour, MUON.colour]
    borders = (first["line"]["width"] + second["line"]["width"]) / 2
    assert reach(corners(second)[0])[2] > reach(corners(first)[0])[3] + borders
    assert marked(loss_figure(losses)) == []
    with pytest.raises(ValueError, match="argument"):
        loss_figure(losses, marks=[void])


@pytest.mark.parametrize("make", [timeline_figure, lambda g, **k: imbalance_figure(g, top=1, **k)])
def test_marks_of_heatmaps_stand_in_their_own(make):
    shapes = marked(make(GRIDS, marks=[MARKS, MARKS._replace(void=NONE, not_finite=NONE)]))
    assert [shape["xref"] for shape in shapes] == ["x"] * 5 + ["x2"]
    assert [shape["yref"] for shape in shapes] == ["y domain"] * 5 + ["y2 domain"]


def test_few_shapes_are_drawn_however_many_steps_are_marked():
    uneven = np.cumsum(np.arange(1, 20_000) % 37 + 2)
    shapes = marked(timeline_figure(GRIDS[:1], marks=[Marks(uneven, uneven, uneven)]))
    assert len(shapes) <= 5
    assert max(len(corners(shape)) for shape in shapes) <= 2 * SPANS


# -- what there is to no data and to hostile data ------------------------------------------------


def test_no_figure_needs_data():
    makers = spectrum_figure, neurons_figure, condition_figure, loss_figure, stages_figure
    for figure in [make([]) for make in makers]:
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
    update = UPDATES[0]._replace(name=wicked)
    figure = matrix_figure([update])
    assert "<" not in figure["data"][0]["name"] + figure["data"][1]["name"]
    assert "<a" not in figure["layout"]["annotations"][0]["text"]
    assert "<" not in stages_figure([STAGES[0]._replace(name=wicked)])["data"][0]["name"]
    assert "<" not in empty_figure("<b>")["layout"]["annotations"][0]["text"]


def test_long_names_leave_room_for_the_picture():
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    names += ["<" * 10_000, "up"]
    grid = Grid("x" * 5000, ADAMW, STEPS, names, np.zeros((4, 30)))
    figure = imbalance_figure([grid, grid], top=0.4, chosen=names[2])
    labels = figure["layout"]["yaxis"]["labelalias"]
    assert labels[names[0]] == "…0.self_attn.q_proj"
    assert len(labels) == 3
    assert labels["&lt;" * 10_000] == "…" + "&lt;" * 23
    assert len(figure["layout"]["annotations"][0]["text"]) < 100
    # The data keep the whole name: a click on it chooses the matrix.
    assert figure["data"][0]["y"][0] == names[0]


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


def test_steps_left_out_are_blank_columns():
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    steps, filled = evenly(np.array([10, 20, 40, 50]), values)
    assert steps.tolist() == [10, 20, 30, 40, 50]
    np.testing.assert_array_equal(filled, [[0, 1, np.nan, 2, 3], [4, 5, np.nan, 6, 7]])
    assert filled.dtype == np.float32


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [7],
        [1, 2, 3, 4],
        [1, 10, 20, 30],  # no blank column would make these even
        [1, 3, 6, 10],
        [1, 2, 3, 100],  # nearly all would be blank
    ],
)
def test_steps_stay_where_blank_columns_are_no_help(steps):
    given = np.array(steps, np.int64), np.ones((2, len(steps)))
    for before, after in zip(given, evenly(*given), strict=True):
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("length", [1, 2, 159, 160, 161, 256, 640, 641, 768, 1023, 3072])
def test_thinned_heatmaps_stand_evenly_and_within_what_was_given(length):
    _, rows, columns = blocks(np.ones((length, length)))
    for places, limit in ((rows, 160), (columns, 320)):
        block = -(-length // limit)
        assert len(places) == -(-length // block)
        assert set(np.diff(places).tolist()) <= {block}
        assert 0 <= places[0] < block
        assert places[-1] < length
    assert blocks(np.ones((0, 3)))[0].shape == (0, 3)


def test_what_a_cell_stands_for_is_said_where_it_is_more_than_one():
    for given, said in {
        (160, 320): "",
        (640, 320): "Each cell is the RMS of 4 neurons; zoom in to see all.",
        (640, 3701): "Each cell is the RMS of 4 neurons × 12 steps; zoom in to see all.",
    }.items():
        cells, _, _ = blocks(np.ones(given))
        assert blocks_note(given, cells.shape) == said
    note = blocks_note((10, 10), (10, 5), ("neurons", "inputs"))
    assert note == "Each cell is the RMS of 2 inputs; zoom in to see all."


def test_smoothing_starts_unbiased_and_follows():
    assert smoothed(np.full(5, 3.0)) == pytest.approx(3.0)
    assert smoothed(np.array([1.0, 3.0])) == pytest.approx([1.0, 3.9 / 1.9])
