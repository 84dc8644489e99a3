"""``export``: to the last bit what the page shows, in three formats, whole or not at all."""

from __future__ import annotations

import csv
import gc
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest

import normuon_lens as nl
from normuon_lens.analysis.export import CsvWriter, export
from normuon_lens.analysis.measure import measurable
from normuon_lens.cli.main import main
from normuon_lens.dashboard.answers import numbers, view_of
from normuon_lens.dashboard.store import Store
from normuon_lens.metrics import CATALOGUE
from normuon_lens.runfile import STAGES, Matrices, Matrix, Writer, made_up_run, open_run

Rows = list[tuple[str, int, str, str, str, float]]


def rows_of_csv(path: Path) -> Rows:
    with path.open(encoding="utf-8", newline="") as file:
        return [(r, int(s), m, g, k, float(v)) for r, s, m, g, k, v in list(csv.reader(file))[1:]]


def rows_of_json(path: Path) -> Rows:
    def refused(text: str) -> float:
        raise AssertionError(f"{text} is no JSON")

    records = json.loads(path.read_text(encoding="utf-8"), parse_constant=refused)
    return [
        (x["run"], x["step"], x["matrix"] or "", x["stage"] or "", x["metric"], float(x["value"]))
        for x in records
    ]


def rows_of_parquet(path: Path) -> Rows:
    frame = pd.read_parquet(path)
    assert {str(frame[name].dtype) for name in ("run", "matrix", "stage", "metric")} == {"category"}
    assert (frame["step"].dtype, frame["value"].dtype) == (np.int64, np.float64)
    for name in ("matrix", "stage"):
        frame[name] = frame[name].cat.add_categories("").fillna("")
    return list(frame.itertuples(index=False, name=None))


FORMATS: dict[str, Callable[[Path], Rows]] = {
    ".csv": rows_of_csv,
    ".json": rows_of_json,
    ".parquet": rows_of_parquet,
}
EACH = pytest.mark.parametrize("suffix", FORMATS)


def exported(path: Path, *arguments: str | Path) -> Rows:
    assert main(["export", *map(str, arguments), "-o", str(path)]) == 0
    return FORMATS[path.suffix](path)


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of all stages, one step of it void, one infinite loss, and uneven numbers."""
    table = Matrices([Matrix("q", 4, 4), Matrix("up", 6, 3)])
    path = tmp_path_factory.mktemp("staged") / "normuon.h5"
    writer = Writer(path, {"optimizer": "NorMuon"}, table)
    rng = np.random.default_rng(0)
    for step in range(1, 13):
        of_stage = {
            stage: [(step != 7) * rng.standard_normal((x.m, x.n)) for x in table]
            for stage in STAGES
        }
        norms = {
            stage: np.concatenate([np.linalg.norm(x, axis=1) for x in of])
            for stage, of in of_stage.items()
        }
        loss = np.inf if step == 9 else 3 / step
        writer.step(step, float(step), scalars={"loss": loss}, norms=norms, void=step == 7)
        if step in (1, 4, 7, 10):
            for stage, of in of_stage.items():
                sigma = np.concatenate([np.linalg.svd(x, compute_uv=False) for x in of])
                writer.spectra(stage, step, sigma, np.array([1e-9, 0.7]))
                for i, x in enumerate(of):
                    writer.matrix(stage, i, step, x)
    writer.close()
    return path


# -- the numbers ---------------------------------------------------------------------------------


@EACH
def test_the_numbers_are_those_of_the_page(suffix: str, staged: Path, tmp_path: Path) -> None:
    rows = exported(tmp_path / f"x{suffix}", staged)
    known = {row[:-1]: row[-1] for row in rows}
    assert len(known) == len(rows)
    store = Store([staged])
    for step in (1, 4, 10):
        for matrix in ("q", "up"):
            asked = {"runs": ["normuon"], "matrix": matrix, "step": step, "stage": "update"}
            view = view_of(store, asked)
            told = [
                ("normuon", step, matrix, stage, metric, value)
                for _, stage, condition, bound, cv in numbers(store, view, "stages")["rows"]
                for metric, value in (
                    ("condition_number", condition),
                    ("condition_is_lower_bound", bound),
                    ("neuron_cv", cv),
                )
                if value is not None
            ]
            assert len(told) == 3 * len(STAGES)
            for row in told:
                assert known[row[:-1]] == row[-1], row
    view = view_of(store, {"runs": ["normuon"], "matrix": "up", "step": 1, "stage": "update"})
    losses = [row for row in numbers(store, view, "loss")["rows"] if row[1] == "raw"]
    assert len(losses) == 11
    for _, _, step, loss in losses:
        assert known["normuon", step, "", "", "loss"] == loss
    cells = [row for row in numbers(store, view, "imbalance")["rows"] if row[-1] is not None]
    assert len(cells) == 2 * 11
    for _, matrix, step, cv in cells:
        assert np.float32(known["normuon", step, matrix, "update", "neuron_cv"]) == np.float32(cv)


@EACH
def test_all_of_it_is_the_table_and_what_was_logged(
    suffix: str, staged: Path, tmp_path: Path
) -> None:
    rows = exported(tmp_path / f"x{suffix}", staged)
    frame = nl.table(staged, "all", "all").astype({"run": str, "matrix": str, "stage": str})
    frame = frame.astype({"metric": str})
    table = set(frame.itertuples(index=False, name=None))
    run = open_run(staged)
    logged = {
        ("normuon", step, "", "", "loss", loss)
        for step, loss in zip(run.steps.tolist(), run.scalars["loss"].tolist(), strict=True)
    }
    assert set(rows) == table | logged
    assert len(rows) == len(table) + 12
    assert {row[4] for row in table} == set(measurable()) - {"update_to_weight", "update_error"}
    assert ("normuon", 9, "", "", "loss", np.inf) in rows


@EACH
def test_parts_of_it_can_be_asked_for(suffix: str, staged: Path, tmp_path: Path) -> None:
    some = ("--metric", "condition_number", "--metric", "loss", "--stage", "update")
    twice = (staged, staged.parent / ".." / staged.parent.name, "--metric", "loss")
    rows = exported(tmp_path / f"x{suffix}", *twice, *some, "--steps", "1,4-9, 500-900")
    assert [row[1:5] for row in rows] == [
        *((step, "", "", "loss") for step in (1, 4, 5, 6, 7, 8, 9)),
        *((step, name, "update", "condition_number") for step in (1, 4) for name in ("q", "up")),
    ]


@EACH
def test_a_run_that_has_only_begun_is_an_empty_table(suffix: str, tmp_path: Path) -> None:
    table = Matrices([Matrix("q", 4, 4)])
    Writer(tmp_path / "x.h5", {"optimizer": "Muon"}, table).commit()
    assert exported(tmp_path / f"x{suffix}", tmp_path / "x.h5") == []


def test_parquet_says_what_a_metric_means(staged: Path, tmp_path: Path) -> None:
    exported(tmp_path / "x.parquet", staged)
    metadata = pyarrow.parquet.read_metadata(tmp_path / "x.parquet").metadata
    told = json.loads(metadata[b"normuon_lens.metrics"])
    assert list(told) == list(CATALOGUE)
    assert told["neuron_cv"]["formula"] == "std(r) / mean(r)"


def test_several_groups_of_rows_are_one_table(
    staged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = exported(tmp_path / "whole.parquet", staged)
    monkeypatch.setattr(importlib.import_module("normuon_lens.analysis.export"), "ROW_GROUP", 100)
    assert exported(tmp_path / "x.parquet", staged) == whole
    assert pyarrow.parquet.read_metadata(tmp_path / "x.parquet").num_row_groups > 5


@EACH
def test_names_come_back_as_they_were_given(suffix: str, tmp_path: Path) -> None:
    names = ['=HYPERLINK("https://example.org","a")', 'a,"b"', "größe €", "@x", "-1", "plain"]
    table = Matrices([Matrix(name, 3, 2) for name in names])
    writer = Writer(tmp_path / "x.h5", {"optimizer": "Muon", "name": "+1"}, table)
    writer.step(1, 1.0, scalars={"=loss": 2.0}, norms={"update": np.arange(18.0)})
    writer.close()
    rows = exported(tmp_path / f"y{suffix}", tmp_path / "x.h5", "--metric", "neuron_mean")
    harmless = {
        name: f"'{name}" if suffix == ".csv" and name[0] in "=+-@" else name for name in names
    }
    assert [row[2] for row in rows] == list(harmless.values())
    assert {row[0] for row in rows} == {"'+1" if suffix == ".csv" else "+1"}
    (row,) = exported(tmp_path / f"z{suffix}", tmp_path / "x.h5", "--metric", "=loss")
    assert row[4:] == ("'=loss" if suffix == ".csv" else "=loss", 2.0)


# -- the file ------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Return the one line that says why it was refused."""
    assert main(["export", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def test_what_was_written_is_said(
    staged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = exported(tmp_path / "x.csv", staged)
    said = capsys.readouterr()
    size = f"{(tmp_path / 'x.csv').stat().st_size / 1e6:.1f} MB"
    assert said.out == f"{tmp_path / 'x.csv'}: {size}, {len(rows):,} numbers of 1 run\n"
    assert said.err == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-o", "x.xlsx"], "must end in .csv, .parquet, .json"),
        (["-o", "nowhere/x.csv"], "nowhere/x.csv: No such file or directory"),
        (
            ["-o", "x.csv", "--metric", "los"],
            "'los', neither metric nor logged scalar: the closest are loss",
        ),
        (["-o", "x.csv", "--metric", "update_to_weight_spectral"], "which no recording holds"),
        (["-o", "x.csv", "--stage", "updates"], "no stage is called 'updates'"),
        (["-o", "x.csv", "--steps", "99"], "none of these is recorded; there are steps 1 to 12"),
        (["-o", "x.csv", "--steps", "5", "--metric", "resolved"], "no resolved at step 5"),
        (["-o", "x.csv", "--steps", "1-"], "expected steps and ranges, such as 1,100,500-600"),
    ],
)
def test_what_cannot_be_is_one_line_and_no_file(
    arguments: list[str],
    says: str,
    staged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, staged, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_replaced_only_by_force(
    staged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.csv"
    path.write_text("mine")
    assert f"{path} is there already" in refused(capsys, staged, "-o", path)
    assert path.read_text() == "mine"
    assert exported(path, staged, "--force")
    capsys.readouterr()
    folder = tmp_path / "folder.csv"
    folder.mkdir()
    assert "is a folder" in refused(capsys, staged, "-o", folder, "--force")
    assert sorted(tmp_path.iterdir()) == [folder, path]


def test_what_is_interrupted_leaves_what_was_there(staged: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    path = tmp_path / "x.csv"
    path.write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        export([open_run(staged)], path, force=True, progress=interrupt)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line_and_no_file(
    staged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CsvWriter, "write", full)
    path = tmp_path / "x.csv"
    assert refused(capsys, staged, "-o", path) == f"normuon-lens: {path}: No space left on device\n"
    assert list(tmp_path.iterdir()) == []


def test_parquet_without_pyarrow_says_what_to_install(
    staged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr("normuon_lens.extras.import_module", missing)
    path = tmp_path / "x.parquet"
    assert 'pip install "normuon-lens[parquet]"' in refused(capsys, staged, "-o", path)
    assert list(tmp_path.iterdir()) == []


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "x.h5", steps=10, every=5)
    told: list[tuple[int, int]] = []
    export([run], tmp_path / "x.csv", progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]


@pytest.mark.parametrize("suffix", FORMATS)
def test_damage_met_halfway_is_one_line_and_leaves_nothing(
    suffix: str, staged: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "x.h5"
    main(["pack", str(staged), "--compress", "-o", str(run)])
    with h5py.File(run, locking=False) as file:
        offset = file["spectra/update/sigma"].id.get_chunk_info(0).byte_offset
    damaged = bytearray(run.read_bytes())
    damaged[offset : offset + 8] = bytes(8)
    run.write_bytes(damaged)
    capfd.readouterr()
    assert main(["export", str(run), "-o", str(tmp_path / f"out{suffix}")]) == 2
    gc.collect()  # what was not closed complains when it is collected
    said = capfd.readouterr().err
    assert said.startswith("normuon-lens: ")
    assert said.count("\n") == 1
    assert "spectra/update/sigma" in said
    assert "normuon-lens check" in said
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"]
