"""``analyze`` as it is typed: its table, its Ctrl-C, and what is on disk after either."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from normuon_lens.analysis.results import results_of
from normuon_lens.cli import analyze as verb
from normuon_lens.cli.main import main
from normuon_lens.runfile import Matrices, Matrix, Run, Writer, made_up_run, open_run

STEPS = 8
SIDE = 224


def run_verb(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["analyze", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return made_up_run(tmp_path / "x.h5", steps=30, every=10, condition=50.0)


def test_table_of_medians_by_kind_of_matrix(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_verb(capsys, run.path, "--workers", 1)
    assert (code, err) == (0, "")
    assert "x (medians; first 20 steps left out)" in out
    (row,) = [line.split() for line in out.splitlines() if "blocks.*.mlp.up" in line]
    cv = np.median(
        [
            norms.std() / norms.mean()
            for name in ("blocks.0.mlp.up", "blocks.1.mlp.up")
            for norms in [run.neuron_norms(name)[29].astype(float)]
        ]
    )
    assert row[:3] == ["blocks.*.mlp.up", "2", "50.0"]
    assert float(row[4]) == pytest.approx(cv, rel=0.01)
    assert "24 matrices in " in out
    loads = out.splitlines()[-1]
    assert loads.endswith(f"results_of({str(run.path)!r})")
    assert results_of(run) is not None
    code, out, _ = run_verb(capsys, run.path, "--metric", "condition_number", "--matrix", "*.q")
    assert code == 0
    assert "8 matrices, all done before: " in out


def test_json_says_all_of_it_and_bounds_are_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_up_run(tmp_path / "x.h5", steps=2, every=1, condition=1e9)
    folder = tmp_path / "results"
    options = ("--metric", "condition_number", "--workers", 2, "-o", folder)
    code, out, err = run_verb(capsys, run.path, "--json", *options)
    assert (code, err) == (0, "")
    content = json.loads(out)
    assert content["results"] == [str(folder / "x.h5.analysis.jsonl")]
    assert (content["done"], content["total"], content["before"]) == (12, 12, 0)
    (up,) = [row for row in content["medians"] if row["matrices"] == "blocks.*.mlp.up"]
    assert (up["run"], up["stage"], up["count"]) == ("x", "update", 4)
    assert up["medians"]["condition_is_lower_bound"] == 1.0
    assert up["medians"]["condition_number"] < 1e8
    _, out, _ = run_verb(capsys, run.path, *options)
    assert "≥ " in next(line for line in out.splitlines() if "mlp.up" in line)
    assert f"results_of({str(run.path)!r}, {str(folder)!r})" in out


def test_errors_are_one_line(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, says in [
        ((run.path, "--metric", "conditon"), "the closest are condition"),
        ((run.path, "--workers", 1, "--dask", "tcp://x:1"), "--workers or --dask, not both"),
        ((run.path, "-o", run.path), "File exists"),
        ((tmp_path / "none.h5",), "no such file or folder"),
    ]:
        code, out, err = run_verb(capsys, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert says in err


def test_what_fails_is_told_after_the_table(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["normuon_lens.analysis.offline.coordinator"]

    def spread(batches: list[object], workers: int) -> object:
        from normuon_lens.analysis.offline.stored import measure_batch

        first, *rest = batches
        yield first, ["damaged"] * len(first.steps)  # type: ignore[attr-defined]
        for batch in rest:
            yield batch, measure_batch(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "spread", spread)
    code, out, err = run_verb(capsys, run.path)
    assert code == 2
    assert "20 matrices in" in out
    assert err.startswith("normuon-lens: x.h5: blocks.0.mlp.up, update of step 1: damaged; and 3 ")
    assert err.count("\n") == 1


def test_progress_without_a_terminal_is_a_line_now_and_then(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "PIPED_SECONDS", 0.0)
    code, _, err = run_verb(capsys, run.path, "--workers", 1, "--json")
    assert code == 0
    lines = err.splitlines()
    assert lines[-1].startswith("24 of 24 matrices, ")
    assert any(" to go" in line for line in lines)


def wait_for(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def at_work(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_ctrl_c_and_a_killed_worker_lose_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Matrices([Matrix(f"blocks.{i}.w", SIDE, SIDE) for i in range(6)])
    writer = Writer(tmp_path / "x.h5", {"optimizer": "SGD"}, table)
    rng = np.random.default_rng(0)
    for step in range(1, STEPS + 1):
        writer.step(step, float(step), scalars={}, norms={})
        for i in range(len(table)):
            thin = rng.standard_normal((SIDE, SIDE // 2))  # of deficient rank: the dearer way
            writer.matrix("update", i, step, thin @ thin.T)
    writer.close()
    total = STEPS * len(table)
    results = tmp_path / "x.h5.analysis.jsonl"
    command = [sys.executable, "-m", "normuon_lens", "analyze", str(tmp_path / "x.h5")]
    process = subprocess.Popen(
        [*command, "--workers", "2"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: results.exists() and results.stat().st_size > 4000)
    workers = children(process.pid)
    os.kill(workers[0], signal.SIGKILL)
    wait_for(lambda: children(process.pid) not in (workers, workers[1:]))
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    done = int(err.split()[1])
    assert 0 < done < total
    assert err == (
        f"interrupted: {done} of {total} done and kept in {results}; type the same again to go on\n"
    )
    # One that was just being started may outlive it by the time that it needs to notice.
    wait_for(lambda: not any(map(at_work, workers)))
    code, out, err = run_verb(capsys, tmp_path / "x.h5", "--workers", 2, "--json")
    assert (code, err) == (0, "")
    content = json.loads(out)
    assert (content["done"], content["before"]) == (total, done)
    found = results_of(open_run(tmp_path / "x.h5"))
    assert found is not None
    assert len(found[["matrix", "step"]].drop_duplicates()) == total
    lines = results.read_text().splitlines()[1:]
    assert len(lines) == total, "none was done twice"
