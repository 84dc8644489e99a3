"""``normuon-lens compare``: what is printed of runs whose answers are known."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from trainings import training

from normuon_lens.analysis import compare
from normuon_lens.analysis.comparison.kinds import Quantiles
from normuon_lens.cli import compare as verb
from normuon_lens.cli.compare import print_comparison
from normuon_lens.cli.main import main
from normuon_lens.runfile import Run, find_runs, made_up_run, open_run

ROOT = Path(__file__).parents[1]
FALL = 1.5 + 4 * np.exp(-0.1 * np.arange(1, 61))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = main(["compare", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = main(["compare", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err


def printed(runs: list[Run], width: int) -> str:
    to = Console(file=StringIO(), width=width, highlight=False, markup=False)
    print_comparison(compare(runs), to)
    assert isinstance(to.file, StringIO)
    return to.file.getvalue()


def tables(text: str) -> list[str]:
    """Return the lines that belong to tables, which a long line of text does not."""
    return [line for line in text.splitlines() if line.startswith(" ")]


def test_the_phenomenon_is_printed(three_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, three_runs).splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip() == "blocks.*.mlp.up")
    # Condition numbers are 200, 1.7 and 2.2 by construction.
    row = r"condition number\s+200 \(200–200\)\s+1\.70 \(1\.70–1\.70\)\s+÷118\s+2\.20 .*÷90\.9"
    assert re.search(row, lines[at + 1])

    content = json.loads(run(capsys, "--json", *sorted(three_runs.iterdir())))
    assert [entry["optimizer"] for entry in content["runs"]] == ["AdamW", "Muon", "NorMuon"]
    assert content["runs"][0]["val_loss"] is None
    rows = {(row["group"], row["metric"]): row["values"] for row in content["rows"]}
    medians = [value["median"] for value in rows["all matrices", "condition_number"]]
    np.testing.assert_allclose(medians, [200, 1.7, 2.2])


def test_recorded_runs_fit_a_hundred_columns() -> None:
    text = printed([open_run(path) for path in find_runs([ROOT / "sample_runs"])], 100)
    assert max(map(len, tables(text))) <= 100
    assert text.count("Updates, steps 21–600: median (10–90 %)") == 1
    assert "…" not in text
    assert re.search(r"AdamW +600 +1\.837 ", text)
    # Closed forms and loops are for tests of the analysis; here the figures only have to be there.
    assert re.search(r"Muon +600 +1\.664 +1\.764 +381 \(−199\)", text)
    assert "steps to 1.837, the final loss of AdamW, count to where" in text
    assert "time: as the trainings logged it" in text
    assert "- one run of each: they cannot tell" in text


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Return four runs of each optimizer."""
    folder = tmp_path_factory.mktemp("seeds")
    better = {"AdamW": 0.0, "Muon": 0.25, "NorMuon": 0.375}
    return [
        training(
            folder / f"{name.lower()}-seed{seed}.h5",
            FALL + seed / 32 - gain * (1 + seed / 16),
            optimizer=name,
            seed=seed,
        )
        for name, gain in better.items()
        for seed in range(4)
    ]


def test_several_seeds_are_told_by_variant(seeds: list[Run]) -> None:
    text = printed(seeds, 100)
    assert max(map(len, tables(text))) <= 100
    # Seeds 0…3 are 1/32 apart, and gains 1/64: the standard deviation of 0…3 is √(5/3).
    assert re.search(r" AdamW +4 of 4 +1\.\d+ ± 0\.040 ", text)
    assert re.search(r" Muon +4 of 4 +1\.\d+ ± 0\.020 +−0\.2734 ± 0\.020 +4 of 4 +0\.125 ", text)
    assert "two-sided, which cannot be below 0.125 with 4 seeds" in text
    assert re.search(r" AdamW +1 of 4 +60  ", text), "only seed 0 gets to its own final loss"
    assert re.search(r"\n matrices +AdamW +Muon +NorMuon +\n", text)
    assert "not reached" in text
    assert "one run of each" not in text
    assert "- all runs: 60 losses were logged" in text


def test_a_narrow_window_gets_several_tables(seeds: list[Run]) -> None:
    text = printed(seeds, 76)
    assert text.count("Updates, steps 21–60") == 2
    assert max(map(len, tables(text.partition("Updates")[2]))) <= 76
    assert re.search(r"\n matrices +NorMuon +\n", text)


def test_another_run_may_be_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [
        training(tmp_path / f"{name}.h5", FALL + i / 4, name=f"run {name}").path
        for i, name in enumerate("abc")
    ]
    paths = [path.with_name(f"{path.name}.parts") for path in paths]
    for wanted in ("run b", "b", paths[1], tmp_path / "b.h5"):
        content = json.loads(run(capsys, "--json", "--baseline", wanted, *paths))
        assert [entry["name"] for entry in content["runs"]] == ["run b", "run a", "run c"]
        assert content["target"]["of"] == "run b"
    said = refused(capsys, "--baseline", "d", *paths)
    assert "--baseline d: no such run, there are run a, run b, run c" in said


def test_a_target_may_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = training(tmp_path / "a.h5", 50 - np.arange(1.0, 61.0)).path
    # The mean of 20 losses lags 9.5 steps behind.
    assert re.search(r" a .* 30 +29\.0 s ", run(capsys, "--target", "29.5", path, "--skip", "0"))
    assert "must be a number, not nan" in refused(capsys, "--target", "nan", path)


def test_runs_of_different_models_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c = (
        made_up_run(tmp_path / f"{i}.h5", steps=2, shapes=shapes).path
        for i, shapes in enumerate([{"up": (8, 4)}, {"down": (4, 8)}, {"up": (16, 4)}])
    )
    assert "no matrix in common" in refused(capsys, a, b)
    assert re.search(r"up is 8 × 4 in .*0\.h5 and 16 × 4 in .*2\.h5", refused(capsys, a, c))


def test_names_are_text_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "[red]evil[/red]"
    shapes = {f"{evil}.up": (6, 3)}
    for name in ("a", "b"):
        training(tmp_path / f"{name}.h5", FALL, name=evil + name, optimizer=evil, shapes=shapes)
    text = run(capsys, tmp_path)
    for told in (f"{evil}a", f"{evil}.up", f"\n- {evil}a, {evil}b: the same loss"):
        assert told in text


def test_bounds_are_printed_as_bounds(tmp_path: Path) -> None:
    known = training(tmp_path / "a.h5", FALL, condition=100)
    lost = training(tmp_path / "b.h5", FALL, optimizer="Muon", condition=1e5, floor=0.001)
    text = printed([known, lost], 100)
    assert re.search(r"condition number +100 .* ≥ [\d,]+ \(.*\) +≥×", text)
    assert "≥: a lower bound, for the smallest singular value is lost in rounding" in text
    assert "≥" not in printed([known], 100)


@pytest.mark.parametrize(
    ("first", "value", "ratio", "says"),
    [
        (False, False, 3.0, "×3.00"),
        (True, False, 0.01, "≥÷100"),
        (True, False, 3.0, ""),  # the first may be larger, and the factor smaller than one
        (False, True, 3.0, "≥×3.00"),
        (False, True, 0.01, ""),
        (True, True, 3.0, ""),
    ],
)
def test_factors_of_bounds(first: bool, value: bool, ratio: float, says: str) -> None:
    values = [Quantiles(1.0, 1.0, 1.0, 1, bound) for bound in (first, value)]
    assert verb._bounded_factor(values[0], values[1], ratio) == says
