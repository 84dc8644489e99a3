"""Results beside a recording: read back exactly, appended, locked, and never believed blindly."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from normuon_lens.analysis.results import Kept, Results, results_of, results_path
from normuon_lens.errors import LensError
from normuon_lens.metrics import CATALOGUE
from normuon_lens.runfile import Matrices, Matrix, Run, Writer, made_up_run, open_run

SHAPES = {"blocks.0.ü[b].w": (4, 3)}
VALUES = {"condition_number": 0.1 + 0.2, "neuron_cv": math.nan, "spread_p90": math.inf}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "x.h5"
    return made_up_run(path, steps=3, every=1, shapes=SHAPES).path


@pytest.fixture
def run(recorded: Path, tmp_path: Path) -> Run:
    return open_run(shutil.copy(recorded, tmp_path))


def fill(run: Run) -> Path:
    results = Results(run)
    results.add(Kept("update", 0, 1), VALUES)
    results.add(Kept("update", 0, 3), {"sigma_max": -math.inf})
    results.close()
    return results.path


def test_numbers_come_back_exactly_and_strict_parsers_read_them(run: Run) -> None:
    assert results_of(run) is None
    path = fill(run)
    assert path == run.path.with_name("x.h5.analysis.jsonl")

    def refuse(constant: str) -> float:
        raise ValueError(constant)

    head, first, second = [
        json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()
    ]
    assert (head["format"], head["version"]) == ("normuon-lens analysis", 1)
    assert (first["neuron_cv"], first["spread_p90"]) == (None, "Infinity")
    assert second["time"] == run.times[2]
    frame = results_of(str(run.path))
    assert frame is not None
    assert list(frame) == ["run", "step", "matrix", "stage", "metric", "value"]
    assert frame.astype(object).values.tolist() == [
        ["x", 1, "blocks.0.ü[b].w", "update", "condition_number", 0.1 + 0.2],
        ["x", 1, "blocks.0.ü[b].w", "update", "spread_p90", math.inf],
        ["x", 3, "blocks.0.ü[b].w", "update", "sigma_max", -math.inf],
    ]


def test_a_line_that_was_cut_off_is_ignored_and_overwritten(run: Run) -> None:
    path = fill(run)
    whole = path.read_bytes()
    for cut in (20, 1):
        path.write_bytes(whole[:-cut])
        frame = results_of(run)
        assert frame is not None
        assert frame["step"].tolist() == [1, 1]
    results = Results(run)
    assert set(results.found) == {Kept("update", 0, 1)}
    results.add(Kept("update", 0, 2), {"resolved": 1.0})  # a shorter line
    results.close()
    first, rest = whole.splitlines()[:2], path.read_bytes().splitlines()
    assert rest[:2] == first
    assert [json.loads(line)["step"] for line in rest[1:]] == [1, 2]


def test_later_lines_add_to_earlier_ones(run: Run) -> None:
    fill(run)
    results = Results(run)
    results.add(Kept("update", 0, 1), {"resolved": 2.0})
    results.close()
    again = Results(run)
    found = again.found[Kept("update", 0, 1)]
    again.close()
    known = {name: value for name, value in zip(CATALOGUE, found.values, strict=True) if value > 0}
    assert known == {"condition_number": 0.1 + 0.2, "spread_p90": math.inf, "resolved": 2.0}
    names = [name for i, name in enumerate(CATALOGUE) if found.computed >> i & 1]
    assert set(names) == {*VALUES, "resolved"}, "the undefined is known too"


def test_only_one_analysis_at_a_time(run: Run) -> None:
    results = Results(run)
    with pytest.raises(LensError, match="another analysis is at work on it"):
        Results(run)
    results.close()
    Results(run).close()


def test_results_of_another_recording_are_refused(run: Run, tmp_path: Path) -> None:
    path = fill(run)
    other = made_up_run(tmp_path / "other" / "x.h5", steps=3, every=1, shapes={"w": (4, 3)})
    path.rename(results_path(other))
    for read in (lambda: results_of(other), lambda: Results(other)):
        with pytest.raises(LensError, match=r"results of another recording.*delete the file"):
            read()


def test_a_step_that_was_recorded_again_counts_as_not_analysed(tmp_path: Path) -> None:
    table = Matrices([Matrix("w", 2, 2)])
    for first, times in ((1, 10.0), (3, 20.0)):
        writer = Writer(tmp_path / "x.h5", {"optimizer": "SGD"}, table, resume=first > 1)
        for step in range(first, 5):
            writer.step(step, times + step, scalars={}, norms={"update": np.ones(2)})
            writer.matrix("update", 0, step, np.eye(2))
        writer.close(pack=False)
        run = open_run(tmp_path / "x.h5")
        results = Results(run)
        if first == 1:
            for step in range(1, 5):
                results.add(Kept("update", 0, step), {"sigma_max": 1.0})
        else:
            assert sorted(kept.step for kept in results.found) == [1, 2]
        results.close()


LINE = {"stage": "update", "matrix": "blocks.0.ü[b].w", "step": 1, "time": 1700000001.0}


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 5000,
        b"{}",
        b"nonsense",
        b"\xff\xfe",
        b"null",
        json.dumps(LINE | {"step": True}).encode(),
        json.dumps(LINE | {"stage": ["update"]}).encode(),
        json.dumps(LINE | {"sigma_max": {}}).encode(),
        json.dumps(LINE | {"sigma_max": "NaN"}).encode(),
        json.dumps(LINE | {"sigma_max": 10**400}).encode(),
        b'{"stage": ' + b"9" * 5000 + b"}",
        b" " * (1 << 20),
    ],
)
def test_what_is_no_result_is_refused_by_its_line(line: bytes, run: Run) -> None:
    path = fill(run)
    with path.open("ab") as file:
        file.write(line + b"\n")
    for read in (results_of, Results):
        with pytest.raises(LensError, match=r"x\.h5\.analysis\.jsonl: .*(line 4|too long).*delete"):
            read(run)


def test_what_the_recording_does_not_have_does_not_count(run: Run) -> None:
    path = fill(run)
    unknown: list[dict[str, object]] = [{"matrix": "v"}, {"step": 9}, {"stage": "?"}, {"time": 5.0}]
    with path.open("a") as file:
        for other in unknown:
            file.write(json.dumps(LINE | other | {"resolved": 1.0}) + "\n")
        file.write(json.dumps(LINE | {"of_a_later_version": 1.0}) + "\n")
    frame = results_of(run)
    assert frame is not None
    assert len(frame) == 3


def test_neither_links_nor_pipes_nor_other_files_are_touched(run: Run, tmp_path: Path) -> None:
    path = results_path(run)
    other = tmp_path / "precious"
    other.write_text("precious\n")
    path.symlink_to(other)
    with pytest.raises(LensError, match="is a link"):
        Results(run)
    with pytest.raises(LensError, match="is a link"):
        results_of(run)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(LensError, match="not a plain file"):
        results_of(run)
    path.unlink()
    other.rename(path)
    for content in ("precious\n", "precious", "{}\n", "[" * 5000):
        path.write_text(content)
        for read in (results_of, Results):
            with pytest.raises(LensError, match=r"not a file of results.*move it away"):
                read(run)
        assert path.read_text() == content
    path.write_bytes(b"")
    os.truncate(path, 1 << 40)
    with pytest.raises(LensError, match="larger than results"):
        results_of(run)


def test_a_disk_that_refuses_is_told_in_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(run)
    results.add(Kept("update", 0, 1), VALUES)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(LensError, match="No space left on device; what is done is kept"):
            results.sync()
        with pytest.raises(LensError, match="No space left on device"):
            results.close()
    Results(run).close()  # it let go of the lock
    with pytest.raises(LensError, match="Not a directory"):
        Results(run, run.path / "folder")
