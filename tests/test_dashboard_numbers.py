"""Pictures in numbers and in words: what a table, a CSV and a text alternative say of them."""

import csv
import io

import numpy as np
import pytest

from normuon_lens.dashboard.figures import (
    Band,
    Curve,
    Grid,
    Loss,
    Stages,
    Update,
    condition_figure,
    csv_of,
    empty_figure,
    imbalance_figure,
    loss_figure,
    matrix_figure,
    neurons_figure,
    spectrum_figure,
    stages_figure,
    style_of,
    summary_of,
    table_of,
    timeline_figure,
)

ADAMW, MUON = style_of("AdamW"), style_of("Muon")
STEPS = np.array([1, 2])
BANDS = [
    Band(
        "AdamW", ADAMW, STEPS, np.array([2.0, 3.0]), np.array([12.1, 2310.4]), np.array([9e3, 8.0])
    ),
    Band("Muon", MUON, STEPS, np.array([1.0, 1.0]), np.array([np.nan, 1.5]), np.array([2.0, 2.5])),
]
GRID = Grid(
    "AdamW", ADAMW, STEPS, ["q", "up"], np.array([[0.1, 0.25], [np.nan, 0.7]], dtype=np.float32)
)
UPDATE = Update(
    "AdamW",
    ADAMW,
    np.array([0, 3]),
    np.array([5]),
    np.array([[0.5], [np.inf]], dtype=np.float32),
    np.array([0.4, np.nan]),
)
STAGES = Stages(
    "AdamW",
    ADAMW,
    ["gradient", "update"],
    np.array([9e3, 150.0]),
    np.array([False, True]),
    np.array([0.8, 0.3]),
)


def test_lines_in_long_form():
    curves = [
        Curve("AdamW", ADAMW, np.array([1, 2]), np.array([1.0, 0.5])),
        Curve("Muon", MUON, np.array([1]), np.array([np.nan])),
    ]
    rows = [["AdamW", 1, 1.0], ["AdamW", 2, 0.5], ["Muon", 1, None]]
    assert table_of(spectrum_figure(curves)) == (["run", "singular value, sorted", "σ / σ₁"], rows)
    assert table_of(neurons_figure(curves)) == (["run", "neuron, sorted", "norm / mean"], rows)


def test_a_band_is_three_series():
    columns, rows = table_of(condition_figure(BANDS[:1], until=20, step=1))
    assert columns == ["run", "series", "optimizer step", "condition number"]
    assert sorted(rows) == [
        ["AdamW", "10 %", 1, 2.0],
        ["AdamW", "10 %", 2, 3.0],
        ["AdamW", "90 %", 1, 9e3],
        ["AdamW", "90 %", 2, 8.0],
        ["AdamW", "median", 1, 12.1],
        ["AdamW", "median", 2, 2310.4],
    ]


def test_a_loss_is_two_series():
    smooth = Curve("AdamW", ADAMW, STEPS, np.array([3.0, 2.0]))
    columns, rows = table_of(loss_figure([Loss(smooth, np.array([3.5, 1.5]))]))
    assert columns == ["run", "series", "optimizer step", "loss"]
    assert rows == [
        ["AdamW", "raw", 1, 3.5],
        ["AdamW", "raw", 2, 1.5],
        ["AdamW", "smoothed", 1, 3.0],
        ["AdamW", "smoothed", 2, 2.0],
    ]


def test_heatmaps_are_a_row_a_cell_in_as_few_digits_as_they_have():
    cells = [
        ["AdamW", "q", 1, 0.1],
        ["AdamW", "q", 2, 0.25],
        ["AdamW", "up", 1, None],
        ["AdamW", "up", 2, 0.7],
    ]
    columns = ["run", "matrix", "optimizer step", "CV"]
    assert table_of(imbalance_figure([GRID], top=0.4, chosen="up")) == (columns, cells)
    numbered = GRID._replace(rows=[0, 7])
    columns, rows = table_of(timeline_figure([numbered, numbered]))
    assert columns == ["run", "neuron", "optimizer step", "norm / mean"]
    assert rows[:4] == rows[4:]
    assert rows[3] == ["AdamW", 7, 2, 0.7]


def test_the_digits_of_a_cell_are_those_of_its_32_bits():
    values = np.random.default_rng(0).lognormal(0, 20, (9, 9)).astype(np.float32)
    grid = Grid("a", ADAMW, np.arange(9), range(9), values)
    _, rows = table_of(timeline_figure([grid]))
    np.testing.assert_array_equal(np.array([row[-1] for row in rows], "f4"), values.ravel())


def test_an_update_tells_its_entries_and_its_norms():
    assert table_of(matrix_figure([UPDATE])) == (
        ["run", "neuron", "input", "entry / RMS", "norm / mean"],
        [
            ["AdamW", 0, 5, 0.5, None],
            ["AdamW", 3, 5, None, None],
            ["AdamW", 0, None, None, 0.4],
            ["AdamW", 3, None, None, None],
        ],
    )


def test_stages_tell_which_numbers_are_lower_bounds():
    assert table_of(stages_figure([STAGES])) == (
        ["run", "stage", "condition number", "lower bound", "neuron CV"],
        [
            ["AdamW", "gradient", 9e3, False, None],
            ["AdamW", "update", 150.0, True, None],
            ["AdamW", "gradient", None, None, 0.8],
            ["AdamW", "update", None, None, 0.3],
        ],
    )


def test_nothing_is_an_empty_table():
    assert table_of(empty_figure("No run is ticked.")) == ([], [])


# -- CSV -----------------------------------------------------------------------------------------


def test_csv_is_the_table():
    assert csv_of(imbalance_figure([GRID], top=0.4)) == (
        "run,matrix,optimizer step,CV\nAdamW,q,1,0.1\nAdamW,q,2,0.25\nAdamW,up,1,\nAdamW,up,2,0.7\n"
    )


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_a_name_is_no_formula_to_a_spreadsheet(start):
    wicked = f'{start}HYPERLINK("https://example.org","a")'
    grid = GRID._replace(name=wicked, rows=[wicked, "a=b"], values=-GRID.values)
    rows = list(csv.reader(io.StringIO(csv_of(imbalance_figure([grid], top=0.4)), newline="")))
    assert {row[0] for row in rows[1:]} == {"'" + wicked}
    assert {row[1] for row in rows[1:]} == {"'" + wicked, "a=b"}
    # Numbers are what they are.
    assert rows[1][3] == "-0.1"


def test_names_come_back_as_they_were_given():
    wicked = '<b>"a", & b</b>\n&lt;'
    grid = GRID._replace(name=wicked, rows=[wicked, "up"])
    figure = imbalance_figure([grid], top=0.4)
    assert table_of(figure)[1][0][:2] == [wicked, wicked]
    assert summary_of(figure).startswith("CV by matrix over optimizer step, 1 to 2. <b>")
    rows = list(csv.reader(io.StringIO(csv_of(figure), newline="")))
    assert rows[1][:2] == [wicked, wicked]


# -- words ---------------------------------------------------------------------------------------


def test_a_summary_says_what_over_what_and_where_each_run_lies():
    assert summary_of(condition_figure(BANDS)) == (
        "Condition number over optimizer step, 1 to 2. AdamW: last 2310, from 12.1 to 2310. "
        "Muon: 1.5."
    )
    assert summary_of(imbalance_figure([GRID], top=0.4)) == (
        "CV by matrix over optimizer step, 1 to 2. AdamW: from 0.1 to 0.7, highest in matrix up."
    )


def test_a_summary_tells_the_smoothed_loss_only():
    smooth = Curve("AdamW", ADAMW, STEPS, np.array([3.0, 2.0]))
    assert summary_of(loss_figure([Loss(smooth, np.array([9.0, 9.0]))])) == (
        "Loss over optimizer step, 1 to 2. AdamW: last 2, from 2 to 3."
    )


def test_a_sigma_stays_small():
    curve = Curve("AdamW", ADAMW, STEPS, np.array([1.0, 2e-6]))
    assert summary_of(spectrum_figure([curve])) == (
        "σ / σ₁ over singular value, sorted, 1 to 2. AdamW: last 2e-06, from 2e-06 to 1."
    )


def test_the_summary_of_an_update_tells_entries_and_norms():
    assert summary_of(matrix_figure([UPDATE])) == (
        "Entry / RMS by neuron over input, 5. AdamW: from 0.5 to 0.5, highest in neuron 0. "
        "Norm / mean over neuron, 0 to 3. AdamW: 0.4."
    )


def test_the_summary_of_stages_tells_a_lower_bound():
    assert summary_of(stages_figure([STAGES])) == (
        "Condition number over stage, gradient to update. "
        "AdamW: last at least 150, from 150 to 9000. "
        "Neuron CV over stage, gradient to update. AdamW: last 0.3, from 0.3 to 0.8."
    )


def test_the_last_known_number_is_told_where_the_last_is_a_gap():
    gap = STAGES._replace(condition=np.array([9e3, np.nan]), bound=np.array([True, False]))
    assert "AdamW: at least 9000." in summary_of(stages_figure([gap]))


def test_nobody_listens_to_a_dozen_runs():
    curves = [Curve(f"run {i}", ADAMW, STEPS, np.array([1.0, 0.5])) for i in range(11)]
    text = summary_of(neurons_figure(curves))
    assert "run 7: last 0.5" in text
    assert "run 8" not in text
    assert text.endswith("And 3 more.")


def test_where_nothing_is_finite_that_is_said():
    nothing = GRID._replace(values=np.full((2, 2), np.nan, dtype=np.float32))
    assert summary_of(timeline_figure([nothing])).endswith("AdamW: nothing finite.")
    curve = Curve("AdamW", ADAMW, STEPS, np.array([np.nan, np.inf]))
    assert summary_of(neurons_figure([curve])).endswith("AdamW: nothing finite.")


def test_the_summary_of_an_empty_picture_is_its_text():
    text = "No spectra of stage “a<b>” in these runs.\nRecord them with attach(…, stages=True)"
    assert summary_of(empty_figure(text)) == text.replace("\n", " ")
