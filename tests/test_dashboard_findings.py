"""What the page says first, against runs whose every figure is known in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from normuon_lens.analysis.settled import finite_median
from normuon_lens.dashboard.findings import MOST, Finding, findings
from normuon_lens.dashboard.headline import Share, headlines_of
from normuon_lens.dashboard.overview import HISTORY, medians, overview, sparkline, thinned
from normuon_lens.dashboard.store import Entry, Store
from normuon_lens.runfile import Matrices, Matrix, Writer

STEPS = range(1, 31)


def spread(m: int, cv: float) -> np.ndarray:
    """Return m norms, half above and half below their mean 1, of this CV."""
    return np.repeat([1 - cv, 1 + cv], [m // 2, m - m // 2])


def starving(m: int, starved: int) -> np.ndarray:
    """Return m norms of which so many are nearly nothing, and the others equal."""
    return np.repeat([0.01, 1.0], [starved, m - starved])


def record(
    path: Path,
    norms: Mapping[str, np.ndarray],
    *,
    conditions: Mapping[str, float] | None = None,
    at: Callable[[int, np.ndarray], np.ndarray] = lambda step, row: row,
    floor: float = 1e-12,
    steps: Sequence[int] = STEPS,
    loss: Callable[[int], float] | None = None,
    void: Sequence[int] = (),
    stage: str = "update",
    columns: int = 4,
    dtype: str = "float32",
    weight_norm: float = float("nan"),
) -> None:
    """Write a run of these norms a matrix, changed by `at`, and of these condition numbers."""
    table = Matrices([Matrix(name, len(row), columns, dtype) for name, row in norms.items()])
    writer = Writer(path, {"optimizer": path.stem, "name": path.stem}, table)
    row = np.concatenate(list(norms.values()))
    for step in steps:
        moved = 0 * row if step in void else at(step, row)
        scalars = {} if loss is None else {"loss": loss(step)}
        writer.step(step, float(step), scalars=scalars, norms={stage: moved}, void=step in void)
        if conditions is not None:
            sigma = [np.geomspace(1.0, 1.0 / conditions[x.name], x.k) for x in table]
            writer.spectra(
                stage,
                step,
                np.concatenate(sigma),
                np.full(len(table), floor),
                weight_norm=np.full(len(table), weight_norm),
            )
    writer.close()


def entries(folder: Path) -> list[Entry]:
    return Store([folder]).entries


def told(folder: Path, stage: str = "update") -> list[Finding]:
    found = entries(folder)
    return findings(found, stage, {entry.id: entry.id for entry in found})


def text(finding: Finding) -> str:
    return "".join(part for _, part in finding.parts)


def said(folder: Path, stage: str = "update") -> list[str]:
    return [text(finding) for finding in told(folder, stage)]


# -- the table of matrices -------------------------------------------------------------------------


def test_a_cell_holds_the_medians_over_settled_steps(tmp_path: Path) -> None:
    def early(step: int, row: np.ndarray) -> np.ndarray:
        return row if step > 20 else row**3  # far more uneven, and not to count

    norms = {"even": spread(40, 0.1), "hungry": starving(40, 6)}
    conditions = {"even": 3.0, "hungry": 700.0}
    record(tmp_path / "Muon.h5", norms, conditions=conditions, at=early)
    even, hungry = overview(entries(tmp_path), "update")
    assert (even.name, even.m, even.n) == ("even", 40, 4)
    (cell,) = even.cells
    assert cell is not None
    assert cell.condition == pytest.approx(3)
    assert cell.cv == pytest.approx(0.1)
    assert (cell.starved, cell.not_finite, cell.is_bound, cell.trusted) == (0, 0, False, True)
    assert len(cell.history) == len(STEPS)
    assert cell.history[-1] == pytest.approx(0.1)
    assert cell.history[0] == pytest.approx(np.std(spread(40, 0.1) ** 3) / (1 + 3 * 0.01), rel=1e-5)
    (cell,) = hungry.cells
    assert cell is not None
    assert cell.condition == pytest.approx(700)
    assert cell.starved == pytest.approx(6)


def test_runs_of_other_models_have_empty_cells(tmp_path: Path) -> None:
    record(tmp_path / "a.h5", {"x": spread(4, 0.1), "y": spread(6, 0.2)})
    record(tmp_path / "b.h5", {"y": spread(6, 0.3), "z": spread(4, 0.4), "x": spread(8, 0.5)})
    rows = overview(entries(tmp_path), "update")
    found = {(row.name, row.m): [cell and round(cell.cv, 5) for cell in row.cells] for row in rows}
    assert found == {
        ("x", 4): [0.1, None],
        ("y", 6): [0.2, 0.3],
        ("z", 4): [None, 0.4],
        ("x", 8): [None, 0.5],
    }
    assert overview([], "update") == []


def test_what_was_not_recorded_is_nan_and_not_zero(tmp_path: Path) -> None:
    record(tmp_path / "a.h5", {"x": spread(4, 0.1)})
    (row,) = overview(entries(tmp_path), "update")
    (cell,) = row.cells
    assert cell is not None
    assert np.isnan(cell.condition)
    assert cell.cv == pytest.approx(0.1)
    (row,) = overview(entries(tmp_path), "momentum")
    (cell,) = row.cells
    assert cell is not None
    assert np.isnan([cell.condition, cell.cv, cell.starved]).all()
    assert cell.history == ()


def test_steps_that_were_not_finite_are_counted_by_matrix(tmp_path: Path) -> None:
    def break_y(step: int, row: np.ndarray) -> np.ndarray:
        return np.where(np.arange(8) == 5, np.inf, row) if step in (25, 27) else row

    record(tmp_path / "a.h5", {"x": spread(4, 0.1), "y": spread(4, 0.1)}, at=break_y)
    x, y = (row.cells[0] for row in overview(entries(tmp_path), "update"))
    assert x is not None
    assert y is not None
    assert (x.not_finite, y.not_finite) == (0, 2)
    assert y.cv == pytest.approx(0.1), "what is finite still counts"


def test_medians_are_those_of_each_column_alone() -> None:
    rng = np.random.default_rng(0)
    for steps in (0, 1, 2, 7, 50):
        values = rng.choice([1.0, 2.5, 7.0, np.nan, np.inf, -np.inf], size=(steps, 40))
        values += rng.random((steps, 40))
        expected = [finite_median(column) for column in values.T]
        np.testing.assert_array_equal(medians(values), expected)


@pytest.mark.parametrize("steps", [1, 39, 40, 41, 100, 999])
def test_histories_keep_the_peaks(steps: int) -> None:
    values = np.random.default_rng(steps).random((steps, 3))
    values[: steps // 2, 2] = np.nan
    shown = thinned(values)
    assert len(shown) == min(steps, HISTORY)
    bounds = [steps * i // len(shown) for i in range(len(shown) + 1)]
    for i, row in enumerate(shown):
        block = values[bounds[i] : bounds[i + 1]]
        for found, column in zip(row, block.T, strict=True):
            peak = max((x for x in column.tolist() if x == x), default=np.nan)
            np.testing.assert_equal(found, peak)


def test_sparklines_break_where_nothing_is_known() -> None:
    nan = float("nan")
    assert sparkline([0.0, 0.5, 1.0], top=1.0) == "M0.0 20.0L50.0 10.0 L100.0 0.0"
    assert sparkline([0.0, 9.0], top=2.0) == "M0.0 20.0L100.0 0.0"
    assert sparkline([1, 1, nan, 0, nan, 0.5, 0], top=2.0) == (
        "M0.0 10.0L16.7 10.0M50.0 20.0L50.0 20.0M83.3 15.0L100.0 20.0"
    )
    assert sparkline([0.5], top=1.0) == "M50.0 10.0L50.0 10.0"
    assert sparkline([nan, nan], top=1.0) == ""
    assert sparkline([], top=1.0) == ""


# -- the headline ----------------------------------------------------------------------------------


def test_losses_are_compared_at_the_last_step_that_all_have_reached(tmp_path: Path) -> None:
    record(tmp_path / "ahead.h5", {"x": spread(4, 0)}, steps=range(1, 101), loss=float)
    record(tmp_path / "behind.h5", {"x": spread(4, 0)}, steps=range(1, 61), loss=lambda s: 2.0 * s)
    record(tmp_path / "silent.h5", {"x": spread(4, 0)}, steps=range(1, 6))
    ahead, behind, silent = headlines_of(entries(tmp_path), "update")
    assert ahead.loss_step == behind.loss_step == silent.loss_step == 60
    assert ahead.loss == pytest.approx(np.mean(np.arange(41, 61)))
    assert behind.loss == pytest.approx(2 * ahead.loss)
    assert np.isnan(silent.loss)
    (alone,) = headlines_of(entries(tmp_path)[:1], "update")
    assert (alone.loss_step, alone.loss) == (100, pytest.approx(90.5))
    (nobody,) = headlines_of(entries(tmp_path)[2:], "update")
    assert nobody.loss_step is None


def test_a_loss_that_is_lost_ends_the_comparison(tmp_path: Path) -> None:
    def diverging(step: int) -> float:
        return 3.0 if step <= 12 else float("nan")

    record(tmp_path / "a.h5", {"x": spread(4, 0)}, loss=diverging)
    record(tmp_path / "b.h5", {"x": spread(4, 0)}, loss=lambda step: 2.0)
    assert [row.loss_step for row in headlines_of(entries(tmp_path), "update")] == [12, 12]


def test_starved_neurons_are_counted_over_all_matrices(tmp_path: Path) -> None:
    record(tmp_path / "a.h5", {"x": starving(10, 4), "y": starving(90, 1)})
    (row,) = headlines_of(entries(tmp_path), "update")
    assert row.starved == pytest.approx(5 / 100)


def test_no_verdict_on_updates_that_are_mostly_rounding(tmp_path: Path) -> None:
    lost = {"x": spread(4, 0.5), "y": spread(4, 0.01)}
    record(
        tmp_path / "a.h5",
        lost,
        conditions={"x": 500.0, "y": 2.0},
        dtype="bfloat16",
        weight_norm=1e3,  # 0.4 · 2⁻⁸ · 1000 ≈ 1.6 of rounding, the update's norm is about 2
    )
    (row,) = headlines_of(entries(tmp_path), "update")
    assert row.ill_conditioned == row.imbalanced == Share(0, 0, 2)
    assert said(tmp_path) == []


# -- the findings ----------------------------------------------------------------------------------


def test_each_ailment_is_told_with_its_worst_matrix(tmp_path: Path) -> None:
    halves = np.repeat([1.0, 5.0], 100)
    record(
        tmp_path / "AdamW.h5",
        {"a": spread(8, 0.1), "b": spread(8, 0.1), "c": spread(8, 0.1)},
        conditions={"a": 101.0, "b": 5120.0, "c": 99.0},
    )
    record(tmp_path / "Muon.h5", {"a": spread(8, 0.3), "b": halves, "c": spread(8, 0.149)})
    record(tmp_path / "Lion.h5", {"a": starving(200, 37), "b": starving(400, 4), "c": halves / 3})
    record(
        tmp_path / "NorMuon.h5",
        {"a": spread(8, 0.14), "b": spread(8, 0.1)},
        conditions={"a": 99.0, "b": 1.5},
    )
    found = told(tmp_path)
    assert [(f.kind, f.run, f.matrix, f.step) for f in found] == [
        ("condition", "AdamW", "b", None),
        ("imbalance", "Lion", "c", None),
        ("imbalance", "Muon", "b", None),
        ("starved", "Lion", "a", None),
        ("healthy", "NorMuon", None, None),
    ]
    assert list(map(text, found)) == [
        "AdamW steps unevenly in 2 of 3 matrices: in b the strongest direction gets 5,120 times "
        "what the weakest gets.",
        "Lion moves its neurons unevenly in 2 of 3 matrices: in c the busiest 1 % of neurons move "
        "at least 5.00x as far as the quietest 1 %.",
        "Muon moves its neurons unevenly in 2 of 3 matrices: in b the busiest 1 % of neurons move "
        "at least 5.00x as far as the quietest 1 %.",
        "Lion starves neurons in 2 of 3 matrices: in a 37 of 200 move less than a tenth of the "
        "mean.",
        "NorMuon is well conditioned and moves its neurons evenly in all 2 matrices.",
    ]
    assert ("run", "AdamW") in found[0].parts
    assert ("matrix", "b") in found[0].parts
    assert ("figure", "5,120 times") in found[0].parts


def test_few_neurons_are_not_told_by_the_hundred(tmp_path: Path) -> None:
    record(tmp_path / "Muon.h5", {"a": spread(8, 0.5), "b": spread(8, 0.01)})
    assert said(tmp_path) == [
        "Muon moves its neurons unevenly in 1 of 2 matrices: in a the busiest neuron moves "
        "at least 3.00x as far as the quietest."
    ]


@pytest.mark.parametrize(
    ("norms", "quietest"),
    [
        (np.repeat([0.0, 1.0], [100, 100]), "the quietest 1 % do not move at all"),
        (np.repeat([0.0, 1.0], [199, 1]), "the quietest 1 % do not move at all"),
        (np.repeat([0.0, 1.0], [5, 5]), "the quietest neuron does not move at all"),
    ],
)
def test_neurons_at_rest_are_told_without_a_ratio(
    norms: np.ndarray, quietest: str, tmp_path: Path
) -> None:
    record(tmp_path / "Lion.h5", {"a": norms}, void=[25])
    uneven = said(tmp_path)[0]
    assert uneven == f"Lion moves its neurons unevenly in its one matrix: in a {quietest}."


def test_a_bound_is_at_least_and_no_verdict_where_it_is_harmless(tmp_path: Path) -> None:
    record(
        tmp_path / "AdamW.h5",
        {"a": spread(8, 0.1), "b": spread(8, 0.1)},
        conditions={"a": 1e9, "b": 2.0},
        floor=1 / 700,
    )
    record(
        tmp_path / "Muon.h5",
        {"a": spread(8, 0.1), "b": spread(8, 0.1)},
        conditions={"a": 90.0, "b": 2.0},
        floor=1 / 50,
    )
    assert said(tmp_path) == [
        "AdamW steps unevenly in 1 of 2 matrices: in a the strongest direction gets at least 700 "
        "times what the weakest gets.",
        "Muon is well conditioned in 1 of 2 matrices and moves its neurons evenly in all 2 "
        "matrices; of the rest too little is known.",
    ]


def test_first_steps_are_said_to_be_those(tmp_path: Path) -> None:
    record(
        tmp_path / "AdamW.h5", {"a": spread(8, 0.4)}, conditions={"a": 200.0}, steps=range(1, 13)
    )
    record(tmp_path / "NorMuon.h5", {"a": spread(8, 0.1)}, conditions={"a": 2.0}, steps=[1])
    condition, imbalance, healthy = said(tmp_path)
    assert condition.endswith("what the weakest gets (first 12 steps only).")
    assert imbalance.endswith("as far as the quietest (first 12 steps only).")
    assert healthy == (
        "NorMuon is well conditioned and moves its neurons evenly in its one matrix "
        "(first step only)."
    )


def test_nothing_is_said_of_what_was_not_recorded(tmp_path: Path) -> None:
    record(tmp_path / "a.h5", {"x": spread(8, 0.1), "y": spread(8, 0.1)})
    assert said(tmp_path) == ["a moves its neurons evenly in all 2 matrices."]
    assert said(tmp_path, "momentum") == []
    assert findings([], "update", {}) == []


def test_void_steps_only_say_nothing(tmp_path: Path) -> None:
    record(tmp_path / "a.h5", {"x": spread(8, 0.1)}, conditions={"x": 2.0}, void=STEPS)
    assert said(tmp_path) == []


def test_another_stage_is_named(tmp_path: Path) -> None:
    record(tmp_path / "Muon.h5", {"x": spread(8, 0.1)}, stage="momentum")
    assert said(tmp_path, "momentum") == [
        "Muon (momentum) moves its neurons evenly in its one matrix."
    ]


def test_what_was_not_finite_comes_first(tmp_path: Path) -> None:
    def one(step: int, row: np.ndarray) -> np.ndarray:
        return np.where(np.arange(16) == 9, np.inf, row) if step in (12, 14, 20) else row

    def everything(step: int, row: np.ndarray) -> np.ndarray:
        return row if step < 18 else row * np.inf

    uneven = {"x": spread(8, 0.5), "y": spread(8, 0.5)}
    record(tmp_path / "a.h5", uneven, at=one)
    record(tmp_path / "b.h5", uneven, at=everything)
    record(tmp_path / "c.h5", uneven, at=lambda step, row: row * np.inf if step == 30 else row)
    found = told(tmp_path)
    assert [(f.kind, f.run, f.matrix, f.step) for f in found[:3]] == [
        ("not finite", "a", "y", 12),
        ("not finite", "b", "x", 18),
        ("not finite", "c", "x", 30),
    ]
    assert [text(f) for f in found[:3]] == [
        "y under a was not finite at step 12 and 2 more.",
        "b was not finite in all 2 matrices: first in x, at step 18 and 12 more.",
        "c was not finite in all 2 matrices: first in x, at step 30.",
    ]
    # Of b no settled step is known.
    assert [(f.kind, f.run) for f in found[3:]] == [("imbalance", "a"), ("imbalance", "c")]


def test_a_run_that_never_was_finite_has_no_other_finding(tmp_path: Path) -> None:
    record(tmp_path / "a.h5", {"x": np.full(8, np.inf)}, conditions={"x": float("nan")})
    assert said(tmp_path) == ["x under a was not finite at step 1 and 29 more."]
    (row,) = headlines_of(entries(tmp_path), "update")
    assert np.isnan([row.condition, row.imbalance, row.starved]).all()


def test_losses_are_stated_in_order(tmp_path: Path) -> None:
    for name, loss in {"NorMuon": 1.7161, "AdamW": 1.95, "Muon": 1.7239, "Lion": 12.0}.items():
        record(tmp_path / f"{name}.h5", {"x": spread(8, 0.1)}, loss=lambda step, to=loss: to)
    found = told(tmp_path)
    assert (found[-1].kind, found[-1].run, found[-1].step) == ("loss", "", 30)
    # To three digits two are the same: which is ahead is not for so few digits to say.
    assert text(found[-1]) == (
        "At step 30 NorMuon and Muon have the lowest loss, 1.72; AdamW 1.95, Lion 12.0."
    )
    store = entries(tmp_path)
    labels = {entry.id: entry.id for entry in store}
    assert "loss" not in {f.kind for f in findings(store[:1], "update", labels)}
    same = [entry for entry in store if entry.id in ("Muon", "NorMuon")]
    assert text(findings(same, "update", labels)[-1]) == (
        "At step 30 NorMuon and Muon have the same loss, 1.72."
    )


def test_many_runs_are_told_in_few_sentences(tmp_path: Path) -> None:
    for i in range(7):
        record(
            tmp_path / f"r{i}.h5",
            {"x": np.append(starving(48, 24), 9.0)},
            conditions={"x": 300.0},
            loss=lambda step, to=i: 1.0 + to,
        )
    found = told(tmp_path)
    assert len(found) == MOST
    assert [f.kind for f in found] == ["condition"] * 7 + ["loss"]
    assert text(found[-1]).endswith("; r1 2.00, r2 3.00, r3 4.00, r4 5.00 and 2 more.")
    assert len({(f.kind, f.run) for f in found}) == len(found)


def test_a_hundred_matrices_are_one_sentence(tmp_path: Path) -> None:
    norms = {f"blocks.{i}": spread(6, 0.2 + i / 1000) for i in range(100)}
    record(tmp_path / "Muon.h5", norms, steps=[21, 22])
    assert len(overview(entries(tmp_path), "update")) == 100
    (finding,) = told(tmp_path)
    assert finding.matrix == "blocks.99"
    assert "all 100 matrices" in text(finding)


def test_names_stay_plain_text(tmp_path: Path) -> None:
    record(tmp_path / "a.h5", {"<b>\n&amp;": spread(8, 0.5)})
    (finding,) = told(tmp_path)
    assert ("matrix", "<b>?&amp;") in finding.parts
