"""The helper measures what it is sent, and keeps the recording whatever its trainer does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normuon_lens.errors import RunError
from normuon_lens.metrics import rounding_noise
from normuon_lens.runfile import Matrices, Matrix, helper, open_run, wire
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

    def open(self, **options: Any) -> dict[str, Any]:
        matrices = [vars(matrix) for matrix in TABLE]
        header = {"path": str(self.path), "metadata": {"optimizer": "SGD"}, "matrices": matrices}
        return self.send("open", {**header, "options": options})

    def matrix(self, index: int, step: int, values: np.ndarray, **header: Any) -> None:
        default = {"stage": "update", "spectrum": True, "keep": True, "weight_norm": 2.0}
        noise = {"noise_norm": 0.0, "noise_dtype": "float32", "decay": 0.125}
        self.send(
            "matrix", {**default, **noise, "index": index, "step": step, **header}, values=values
        )

    def step(self, step: int, dropped: int = 0) -> None:
        header = {"step": step, "time": 1e9, "scalars": {"loss": 1.0}, "void": False}
        norms = np.full(TABLE.total_rows, step, np.float32)
        self.send("step", {**header, "dropped": dropped}, update=norms)

    def close(self) -> dict[str, Any]:
        return self.send("close", {"status": "finished", "dropped": 0})


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
    assert bench.open() == {"opened": 0}
    for step in (1, 2):
        for i in range(len(TABLE)):
            bench.matrix(i, step, update_of(i, step, dtype))
        bench.step(step)
    answer = bench.close()
    assert answer["closed"]["steps"] == 2
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
    bench.send("event", {"step": 1, "kind": "note", "text": "here"})
    assert open_run(bench.path).steps.tolist() == []
    assert bench.send("flush", {"ticket": 7}) == {"flushed": 7}
    run = open_run(bench.path)
    assert run.steps.tolist() == [1]
    assert run.events[0].text == "here"
    assert run.live


def test_step_before_the_recording_is_open_is_refused(bench: Bench) -> None:
    with pytest.raises(RunError, match="not open"):
        bench.step(1)


# -- as a process --------------------------------------------------------------------------------


def test_process_commits_what_it_had_when_its_trainer_vanishes(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    process, send = start_process()
    send("open", open_header(path))
    send("step", {"step": 1, "time": 0.0, "scalars": {}, "void": False, "dropped": 3})
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 0, stderr
    assert [json.loads(line).get("ack") for line in stdout.splitlines()] == [1, 2]
    run = open_run(path)
    assert run.steps.tolist() == [1]
    assert run.status == "interrupted"
    assert run.dropped == 3
    assert not parts_of(path).exists()


def test_process_reports_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_text("precious")
    process, send = start_process()
    send("open", open_header(tmp_path / "x.h5"))
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "exists already" in json.loads(stdout)["error"]
    assert stderr == b""
    assert (tmp_path / "x.h5").read_text() == "precious"


def open_header(path: Path) -> dict[str, Any]:
    matrices = [vars(matrix) for matrix in TABLE]
    return {"path": str(path), "metadata": {}, "matrices": matrices, "options": {}}


def start_process() -> tuple[subprocess.Popen[bytes], Callable[[str, dict[str, Any]], None]]:
    """Start a helper process; messages are acknowledged by their number."""
    descriptor, memory = wire.create_memory(SIZE)
    process = subprocess.Popen(
        [sys.executable, "-m", "normuon_lens.runfile.helper", str(descriptor), str(SIZE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(descriptor,),
    )
    os.close(descriptor)
    numbers = iter(range(1, 100))

    def send(kind: str, header: dict[str, Any]) -> None:
        number = next(numbers)
        offset = 8192 * (number - 1)
        length = wire.write_message(memory, offset, wire.encode_header(kind, header, {}), {})
        assert process.stdin
        process.stdin.write(wire.PLACE.pack(offset, length, number))
        process.stdin.flush()

    return process, send
