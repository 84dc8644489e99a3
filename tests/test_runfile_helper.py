"""The helper measures what it is sent, and keeps the recording whatever its trainer does."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from normuon_lens.errors import RunError
from normuon_lens.metrics import rounding_noise
from normuon_lens.runfile import Matrices, Matrix, helper, made_up_run, open_run, wire
from normuon_lens.runfile.helper import Helper
from normuon_lens.runfile.schema import parts_of

TABLE = Matrices([Matrix("up", 8, 3), Matrix("down", 3, 8), Matrix("square", 5, 5)])
SIZE = 1 << 20

Send = Callable[..., dict[str, Any]]


class Bench:
    """A helper, its memory, and a hand that puts messages there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        descriptor, self.memory = wire.create_memory(SIZE)
        os.close(descriptor)
        self.helper = Helper(self.memory)

    def send(self, kind: str, header: dict[str, Any], **arrays: np.ndarray) -> dict[str, Any]:
        wire.write_message(self.memory, 0, wire.encode_header(kind, header, arrays), arrays)
        return self.helper.take(0)

    def open(self, *paths: Path, **options: Any) -> dict[str, Any]:
        return self.send("open", open_header(*(paths or (self.path,)), **options))

    def matrix(self, index: int, step: int, values: np.ndarray, **header: Any) -> None:
        default = {"run": 0, "stage": "update", "spectrum": True, "keep": True, "weight_norm": 2.0}
        noise = {"noise_norm": 0.0, "noise_dtype": "float32", "decay": 0.125}
        self.send(
            "matrix", {**default, **noise, "index": index, "step": step, **header}, values=values
        )

    def step(self, step: int, dropped: int = 0, run: int = 0) -> None:
        norms = np.full(TABLE.total_rows, step, np.float32)
        self.send("step", step_header(step, dropped, run), update=norms)

    def close(self, *dropped: int) -> dict[str, Any]:
        return self.send("close", {"status": "finished", "dropped": dropped or (0,)})


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "x.h5")
    yield bench
    bench.memory.close()


def update_of(i: int, step: int, dtype: str = "float32") -> np.ndarray:
    rng = np.random.default_rng([i, step])
    return rng.standard_normal((TABLE[i].m, TABLE[i].n)).astype(dtype) * 1e-3


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_spectra_are_those_of_the_matrices_sent(bench: Bench, dtype: str) -> None:
    assert bench.open() == {"opened": [{"last_step": 0, "attempt": None}]}
    for step in (1, 2):
        for i in range(len(TABLE)):
            bench.matrix(i, step, update_of(i, step, dtype))
        bench.step(step)
    answer = bench.close()
    assert [closed["steps"] for closed in answer["closed"]] == [2]
    run = open_run(bench.path)
    for i, name in enumerate(TABLE.names):
        spectra = run.spectra(name)
        assert spectra.steps.tolist() == [1, 2]
        for row, step in enumerate((1, 2)):
            update = update_of(i, step, dtype).astype(np.float64)
            expected = np.linalg.svd(update, compute_uv=False)
            np.testing.assert_allclose(spectra.sigma[row], expected, rtol=1e-9)
            np.testing.assert_array_equal(run.update(name, step), update.astype(np.float32))
        assert (spectra.floor < spectra.sigma[:, -1]).all()
        assert (spectra.weight_norm == 2).all()
    assert (run.neuron_norms("up")[:, 0] == [1, 2]).all()


def test_noise_of_rounding_raises_the_floor(bench: Bench) -> None:
    bench.open()
    bench.matrix(0, 1, update_of(0, 1), noise_norm=50.0, noise_dtype="bfloat16")
    bench.step(1)
    bench.close()
    expected = rounding_noise((8, 3), 50.0, "bfloat16")
    assert open_run(bench.path).spectra("up").floor[0] == pytest.approx(expected)


def test_matrix_that_was_dropped_is_nan_and_the_others_are_not(bench: Bench) -> None:
    bench.open()
    for i in (0, 2):
        bench.matrix(i, 1, update_of(i, 1))
    bench.step(1, dropped=1)
    bench.close()
    run = open_run(bench.path)
    for name, missing in (("up", False), ("down", True), ("square", False)):
        spectra = run.spectra(name)
        for part in (spectra.sigma, spectra.floor, spectra.weight_norm):
            assert np.isnan(part).all() == missing
        assert run.update_steps(name).tolist() == ([] if missing else [1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_matrix_that_is_not_finite_is_nan_and_kept(bench: Bench, bad: float) -> None:
    bench.open()
    values = update_of(0, 1)
    values[2, 1] = bad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bench.matrix(0, 1, values)
    bench.step(1)
    bench.close()
    run = open_run(bench.path)
    assert np.isnan(run.spectrum("up", 1)).all()
    np.testing.assert_array_equal(run.update("up", 1), values)


def test_spectrum_that_cannot_be_found_is_nan_and_recording_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_convergence(*_: Any, **__: Any) -> None:
        raise np.linalg.LinAlgError("did not converge")

    bench.open()
    with monkeypatch.context() as patch:
        patch.setattr(helper, "singular_values", no_convergence)
        bench.matrix(0, 1, update_of(0, 1))
    bench.matrix(1, 1, update_of(1, 1))
    bench.step(1)
    bench.close()
    run = open_run(bench.path)
    assert np.isnan(run.spectrum("up", 1)).all()
    assert np.isfinite(run.spectrum("down", 1)).all()


def test_only_what_is_asked_for_is_measured_and_kept(bench: Bench) -> None:
    bench.open()
    bench.matrix(0, 1, update_of(0, 1), keep=False)
    bench.matrix(1, 1, update_of(1, 1), spectrum=False)
    bench.step(1)
    bench.close()
    run = open_run(bench.path)
    assert np.isfinite(run.spectrum("up", 1)).all()
    assert np.isnan(run.spectrum("down", 1)).all()
    assert run.update_steps("up").tolist() == []
    assert run.update_steps("down").tolist() == [1]


def test_stages_are_kept_apart(bench: Bench) -> None:
    bench.open()
    bench.matrix(0, 1, update_of(0, 1), stage="momentum")
    bench.matrix(0, 1, 2 * update_of(0, 1))
    bench.step(1)
    bench.close()
    run = open_run(bench.path)
    assert run.stages == ["momentum", "update"]
    np.testing.assert_allclose(
        run.spectrum("up", 1), 2 * run.spectrum("up", 1, "momentum"), rtol=1e-6
    )


def test_sample_whose_step_was_dropped_comes_with_the_next(bench: Bench) -> None:
    bench.open()
    bench.matrix(0, 1, update_of(0, 1))
    bench.step(2)
    bench.matrix(0, 3, update_of(0, 3))
    bench.close()  # without a step of its own
    run = open_run(bench.path)
    assert run.steps.tolist() == [2]
    assert run.spectrum_steps().tolist() == [1, 3]


def test_flush_makes_everything_visible(bench: Bench) -> None:
    bench.open()
    bench.step(1)
    bench.send("event", {"run": 0, "step": 1, "kind": "note", "text": "here"})
    assert open_run(bench.path).steps.tolist() == []
    assert bench.send("flush", {"ticket": 7}) == {"flushed": 7}
    run = open_run(bench.path)
    assert run.steps.tolist() == [1]
    assert run.events[0].text == "here"
    assert run.live


def test_several_recordings_are_kept_apart(bench: Bench, tmp_path: Path) -> None:
    paths = tmp_path / "x.h5", tmp_path / "y.h5"
    assert bench.open(*paths) == {"opened": [{"last_step": 0, "attempt": None}] * 2}
    for step in (1, 2):
        for run in (0, 1):
            bench.matrix(0, step, (run + 1) * update_of(0, step), run=run)
            bench.step(step, run=run)
    bench.send("event", {"run": 1, "step": 2, "kind": "note", "text": "here"})
    bench.step(3, run=1)
    closed = bench.close(0, 5)["closed"]
    assert [(x["path"], x["steps"], x["remark"]) for x in closed] == [
        (str(paths[0]), 2, ""),
        (str(paths[1]), 3, ""),
    ]
    runs = [open_run(path) for path in paths]
    assert [run.dropped for run in runs] == [0, 5]
    assert [[event.text for event in run.events] for run in runs] == [[], ["here"]]
    for run, factor in zip(runs, (1, 2), strict=True):
        np.testing.assert_array_equal(run.update("up", 2), factor * update_of(0, 2))
        expected = factor * np.linalg.svd(update_of(0, 2).astype(float), compute_uv=False)
        np.testing.assert_allclose(run.spectrum("up", 2), expected, rtol=1e-9)


def test_recordings_open_together_or_not_at_all(bench: Bench, tmp_path: Path) -> None:
    taken = tmp_path / "y.h5"
    taken.write_text("precious")
    with pytest.raises(RunError, match=r"y\.h5: exists already"):
        bench.open(bench.path, taken)
    assert list(tmp_path.iterdir()) == [taken]
    with pytest.raises(RunError, match="not open"):
        bench.step(1)
    assert bench.open() == {"opened": [{"last_step": 0, "attempt": None}]}


def test_failure_of_one_recording_ends_all(bench: Bench, tmp_path: Path) -> None:
    other = tmp_path / "y.h5"
    bench.open(bench.path, other)
    for step in (1, 2):
        bench.step(step)
        bench.step(step, run=1)
    parts_of(other).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        bench.send("flush", {"ticket": 1})
    bench.step(3)
    bench.helper.abandon("No such file or directory")
    assert open_run(bench.path).status == (
        "stopped at step 2: No such file or directory; 1 step after it is lost"
    )


def test_finished_recording_stays_so_when_the_next_one_fails(bench: Bench, tmp_path: Path) -> None:
    other = tmp_path / "y.h5"
    bench.open(bench.path, other)
    bench.step(1)
    parts_of(other).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        bench.close(0, 0)
    bench.helper.abandon("No such file or directory")
    run = open_run(bench.path)
    assert (run.status, run.steps.tolist()) == ("finished", [1])
    assert bench.helper.news() == {"committed": 1}


def test_what_is_committed_is_told_once(bench: Bench, tmp_path: Path) -> None:
    assert bench.helper.news() == {}
    bench.open(bench.path, tmp_path / "y.h5")
    assert bench.helper.news() == {"committed": 0}
    bench.step(1)
    bench.step(7, run=1)
    assert bench.helper.news() == {}
    bench.send("flush", {"ticket": 1})
    assert bench.helper.news() == {"committed": 1}
    assert bench.helper.news() == {}
    bench.close(0, 0)
    bench.open(bench.path, resume=True)
    assert bench.helper.news() == {}, "still step 1"


def test_step_before_the_recording_is_open_is_refused(bench: Bench) -> None:
    with pytest.raises(RunError, match="not open"):
        bench.step(1)


# -- of one of several ranks ---------------------------------------------------------------------


def rank_header(path: Path, rank: int, attempt: int | None = None) -> dict[str, Any]:
    """Open a recording of two ranks, of which the second has all neurons but the first one's."""
    rows = [[0, 1, 1] if rank == 0 else [1, matrix.m, 1] for matrix in TABLE]
    shard = {"rank": rank, "ranks": [0, 1], "attempt": attempt, "rows": {"update": rows}}
    header = open_header(path)
    header["recordings"][0]["shard"] = shard
    return header


def weigh(bench: Bench, step: int, index: list[int], decay: float) -> None:
    header = {"run": 0, "step": step, "stage": "update"}
    norms, decays = np.array(index) + step / 8, np.full(len(index), decay)
    bench.send("weights", header, index=np.array(index), norm=norms, decay=decays)


@pytest.mark.parametrize("weights_first", [False, True])
def test_ranks_are_merged_by_the_lead(weights_first: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    benches = Bench(path), Bench(path)
    assert benches[0].send("open", rank_header(path, 0)) == {
        "opened": [{"last_step": 0, "attempt": 0}]
    }
    benches[1].send("open", rank_header(path, 1, 0))
    for step in (1, 2):
        for rank, bench in enumerate(benches):
            # The owner of a matrix does not know its weights, and tells of others that it has not.
            owned = [i for i in range(3) if (i + step) % 2 == rank]
            decay = 0.25 if step == 1 else np.nan
            if weights_first:
                weigh(bench, step, [0, 1, 2], decay)
            for i in owned:
                bench.matrix(i, step, update_of(i, step), weight_norm=float("nan"))
            if not weights_first:
                weigh(bench, step, [0, 1, 2], decay)
            norms = np.full(3 if rank == 0 else TABLE.total_rows - 3, step + rank, np.float32)
            bench.send("step", step_header(step), update=norms)
    closed = benches[1].send("close", {"status": "finished", "dropped": [0]})["closed"][0]
    assert (closed["steps"], closed["remark"]) == (2, "")
    header = {"status": "finished", "dropped": [0], "merge": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork, in Python 3.12
        closed = benches[0].send("close", header)["closed"][0]
    assert (closed["steps"], closed["remark"]) == (2, "")
    assert closed["bytes"] == path.stat().st_size
    assert not parts_of(path).exists()
    run = open_run(path)
    assert (run.status, run.holes) == ("finished", [])
    assert run.neuron_norms("up")[:, :2].tolist() == [[1, 2], [2, 3]]
    for i, name in enumerate(TABLE.names):
        spectra = run.spectra(name)
        for row, step in enumerate((1, 2)):
            expected = np.linalg.svd(update_of(i, step).astype(float), compute_uv=False)
            np.testing.assert_allclose(spectra.sigma[row], expected, rtol=1e-9)
            np.testing.assert_array_equal(run.update(name, step), update_of(i, step))
        assert spectra.weight_norm.tolist() == [i + 0.125, i + 0.25]
    with h5py.File(path, locking=False) as file:
        assert file["spectra/update/decay"][()].tolist() == [[0.25] * 3, [0.125] * 3]


def test_weights_without_a_matrix_are_no_sample(bench: Bench) -> None:
    bench.open()
    weigh(bench, 1, [0, 1], 0.5)
    bench.step(1)
    bench.matrix(0, 2, update_of(0, 2))
    weigh(bench, 2, [0, 1], 0.5)
    bench.step(2)
    bench.close()
    run = open_run(bench.path)
    assert run.spectrum_steps().tolist() == [2]
    assert run.spectra("up").weight_norm.tolist() == [0.25]
    assert np.isnan(run.spectra("down").weight_norm).all()


def test_lead_says_whom_it_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper, "MERGE_SECONDS", 0.2)
    path = tmp_path / "x.h5"
    benches = Bench(path), Bench(path)
    for rank, bench in enumerate(benches):
        bench.send("open", rank_header(path, rank, 0 if rank else None))
        norms = np.ones(3 if rank == 0 else TABLE.total_rows - 3, np.float32)
        bench.send("step", step_header(1), update=norms)
    header = {"status": "finished", "dropped": [0], "merge": True}
    closed = benches[0].send("close", header)["closed"][0]
    assert closed["remark"] == (
        f"kept in parts: rank 1 has not finished; later: normuon-lens pack {path}"
    )
    assert closed["steps"] == 1


# -- as a process --------------------------------------------------------------------------------


def test_process_commits_what_it_had_when_its_trainer_vanishes(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    process, send = start_process()
    send("open", open_header(path))
    send("step", step_header(1, dropped=3))
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 0, stderr
    assert [json.loads(line).get("ack") for line in stdout.splitlines()] == [1, 2]
    run = open_run(path)
    assert run.steps.tolist() == [1]
    assert run.status == "interrupted"
    assert run.dropped == 3
    assert run.events == [
        (
            1,
            "interrupted",
            "the training process ended without closing the recording; "
            "everything handed over until step 1 is kept",
        )
    ]
    assert not parts_of(path).exists()


def test_process_ends_with_its_trainer_though_the_pipes_stay_open(tmp_path: Path) -> None:
    # A trainer that died before we came to ask for our parent: it never was this process.
    process, send = start_process(trainer=2**22 + 1)
    send("open", open_header(tmp_path / "x.h5"))
    send("step", step_header(1))
    assert process.wait(timeout=20) == 0
    process.communicate()
    assert open_run(tmp_path / "x.h5").status == "interrupted"


@pytest.mark.parametrize("resume", [False, True])
def test_process_leaves_nothing_of_a_training_that_ended_before_its_first_step(
    resume: bool, tmp_path: Path
) -> None:
    path = tmp_path / "x.h5"
    if resume:
        made_up_run(path)
    before = [(file.name, file.read_bytes()) for file in tmp_path.iterdir()]
    header = open_header(path, resume=True)
    if resume:
        run = open_run(path)
        header["recordings"][0]["matrices"] = [vars(matrix) for matrix in run.table]
    process, send = start_process()
    send("open", header)
    stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (0, b"")
    assert "opened" in json.loads(stdout.splitlines()[0])
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == before


def test_process_ends_with_its_trainer_though_nobody_reads_its_answers(tmp_path: Path) -> None:
    process, send = start_process(trainer=2**22 + 1)
    assert process.stdin
    assert process.stdout
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
    send("open", open_header(tmp_path / "x.h5"))
    for number in range(1000):
        process.stdin.write(wire.PLACE.pack(0, 0, 1000 + number))
    send("step", step_header(1))
    assert process.wait(timeout=20) == 0
    process.communicate()
    assert open_run(tmp_path / "x.h5").steps.tolist() == [1]


def test_process_leaves_the_signals_of_a_job_to_its_trainer(tmp_path: Path) -> None:
    process, send = start_process()
    send("open", open_header(tmp_path / "x.h5"))
    assert process.stdout
    assert json.loads(process.stdout.readline())["opened"] == [{"last_step": 0, "attempt": None}]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    send("step", step_header(1))
    send("close", {"status": "finished", "dropped": [0]})
    stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (0, b"")
    assert json.loads(stdout.splitlines()[-1])["closed"][0]["steps"] == 1


@pytest.mark.parametrize(
    ("kind", "header", "says"),
    [
        ("nonsense", {"run": 0}, "KeyError: 'nonsense'"),
        ("step", {"run": 5}, "IndexError: list index out of range"),
        ("step", {"run": 0}, "KeyError: 'step'"),
        ("matrix", {"run": "0"}, "TypeError: list indices"),
        (None, {}, "JSONDecodeError: Expecting value"),
        (b"\xff" * 64, {}, "Error: "),
    ],
)
def test_process_says_in_one_line_what_it_cannot_understand(
    kind: Any, header: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.h5"
    process, send = start_process()
    send("open", open_header(path))
    send("step", step_header(1))
    send("flush", {"ticket": 0})
    send("step", step_header(2))
    send(kind, header)
    stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (1, b"")
    answers = [json.loads(line) for line in stdout.splitlines()]
    assert says in answers[-1]["error"]
    assert [answer["committed"] for answer in answers if "committed" in answer] == [0, 1]
    run = open_run(path)
    assert run.steps.tolist() == [1]
    assert run.status == (f"stopped at step 1: {answers[-1]['error']}; 1 step after it is lost")


def test_process_reports_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_text("precious")
    process, send = start_process()
    send("open", open_header(tmp_path / "x.h5"))
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "exists already" in json.loads(stdout)["error"]
    assert stderr == b""
    assert (tmp_path / "x.h5").read_text() == "precious"


def open_header(*paths: Path, **options: Any) -> dict[str, Any]:
    same = {
        "metadata": {"optimizer": "SGD"},
        "matrices": [vars(matrix) for matrix in TABLE],
        "options": options,
    }
    return {"recordings": [{"path": str(path), **same} for path in paths]}


def step_header(step: int, dropped: int = 0, run: int = 0) -> dict[str, Any]:
    header = {"step": step, "time": 1e9, "scalars": {"loss": 1.0}, "void": False}
    return {**header, "run": run, "dropped": dropped}


def start_process(
    trainer: int | None = None,
) -> tuple[subprocess.Popen[bytes], Callable[[Any, dict[str, Any]], None]]:
    """Start a helper process; messages are acknowledged by their number."""
    descriptor, memory = wire.create_memory(SIZE)
    arguments = trainer or os.getpid(), descriptor, SIZE
    process = subprocess.Popen(
        [sys.executable, "-m", "normuon_lens.runfile.helper", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(descriptor,),
    )
    os.close(descriptor)
    numbers = iter(range(1, 100))

    def send(kind: Any, header: dict[str, Any]) -> None:
        """Send a message; instead of its kind, bytes to put in its place, or None for nothing."""
        number = next(numbers)
        offset = 8192 * (number - 1)
        if isinstance(kind, str):
            length = wire.write_message(memory, offset, wire.encode_header(kind, header, {}), {})
        else:
            content = kind or bytes(64)
            memory[offset : offset + len(content)] = content
            length = len(content)
        assert process.stdin
        process.stdin.write(wire.PLACE.pack(offset, length, number))
        process.stdin.flush()

    return process, send
