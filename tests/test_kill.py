"""Whoever is killed, and whenever: what was committed stays, exactly as it was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from normuon_lens.runfile import Matrices, Matrix, Run, Writer, open_run
from normuon_lens.runfile.manifest import process_lives
from normuon_lens.runfile.schema import parts_of

TABLE = Matrices([Matrix("weight", 4, 6)])
PATTERN = np.outer([1, -2, 4, 0.5], [1, 0, 2, -1, 0, 4]).astype(np.float32)
RATE = 0.125
SESSION = 40
"""Steps after which the killed writer closes its recording and resumes it."""


def update_of(step: int) -> np.ndarray:
    """Return the update of a step: whole powers of two apart, so that float32 makes no error."""
    return PATTERN * np.float32(RATE * step * (-1) ** step)


def expect_exact(run: Run, at_least: int) -> None:
    """Hold every number of `run` against its step; it has all steps from 1 to `at_least`."""
    assert not run.damaged
    assert run.steps.tolist() == list(range(1, len(run.steps) + 1))
    assert len(run.steps) >= at_least
    if not len(run.steps):
        return
    updates = np.stack([update_of(step) for step in run.steps.tolist()])
    norms = np.linalg.norm(updates, axis=2)
    np.testing.assert_allclose(run.neuron_norms("weight"), norms, rtol=1e-6)
    np.testing.assert_array_equal(run.scalars["loss"], run.steps)
    spectra = run.spectra("weight")
    assert set(range(2, at_least + 1, 2)) <= set(spectra.steps.tolist())
    np.testing.assert_allclose(
        spectra.sigma[:, 0], np.linalg.norm(PATTERN) * RATE * spectra.steps, rtol=1e-6
    )
    for step in run.update_steps("weight").tolist():
        np.testing.assert_array_equal(run.update("weight", step), update_of(step))
    assert set(range(2, at_least + 1, 2)) <= set(run.update_steps("weight").tolist())


def record(writer: Writer, step: int) -> None:
    update = update_of(step)
    norms = {"update": np.linalg.norm(update, axis=1)}
    writer.step(step, 1e9 + step, scalars={"loss": float(step)}, norms=norms)
    if step % 2 == 0:
        sigma = np.linalg.svd(update.astype(np.float64), compute_uv=False)
        writer.spectra("update", step, sigma, np.zeros(1))
        writer.matrix("update", 0, step, update)


# -- the processes that are killed ---------------------------------------------------------------


def say(*words: object) -> None:
    os.write(1, " ".join(map(str, words)).encode() + b"\n")


def write_for_ever(path: Path) -> None:
    """Record, commit, merge, pack and resume without end; say every step that is committed."""
    step = 0
    while True:
        writer = Writer(path, {"optimizer": "SGD"}, TABLE, resume=True, commit_seconds=0)
        for _ in range(SESSION):
            step += 1
            record(writer, step)
            writer.tick()
            say(step)
        writer.close()


def train_until_told(path: Path) -> None:
    """Train until the file ``stop`` appears; say the helper's process id, then every step."""
    import torch

    from normuon_lens.hooks import attach

    model = torch.nn.Linear(6, 4, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    step = 0
    with attach(model, optimizer, path, every=2, on_full="wait", quiet=True) as lens:
        assert lens._feed
        say(lens._feed.pid)
        while not path.with_name("stop").exists():
            step += 1
            model.weight.grad = torch.from_numpy(-update_of(step) / np.float32(RATE))
            optimizer.step()
            lens.log(loss=step)
            say(step)
            time.sleep(0.001)


@contextmanager
def running(what: Callable[[Path], None], path: Path) -> Iterator[subprocess.Popen[str]]:
    with path.with_name("stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, __file__, what.__name__, str(path)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        with process:
            yield process
            process.kill()


def stdout_of(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout
    return process.stdout


def wait_for(what: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


# -- the writer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(16))
def test_killed_writer_loses_nothing_that_was_committed(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    rng = random.Random(seed)
    with running(write_for_ever, path) as process:
        stdout_of(process).readline()
        time.sleep(rng.uniform(0, 0.4))
        before = len(open_run(path).steps) if seed % 2 else 0
        process.kill()
        committed = int(stdout_of(process).read().split()[-1])
    run = open_run(path)
    assert not run.live
    expect_exact(run, max(committed, before))
    # At most the step whose commit was not announced yet.
    assert len(run.steps) <= committed + 1
    writer = Writer(path, {"optimizer": "SGD"}, TABLE, resume=True)
    assert writer.last_step == len(run.steps)
    record(writer, writer.last_step + 1)
    assert writer.close().remark == ""
    assert not parts_of(path).exists()
    expect_exact(open_run(path), len(run.steps) + 1)


class Killed(BaseException):
    """Ends the writer where it stands, as far as its files are concerned."""


def test_writer_may_be_killed_before_any_of_its_file_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normuon_lens.runfile.writer.MERGE_FAN_IN", 2)
    monkeypatch.setattr("normuon_lens.runfile.writer.process_lives", lambda pid: False)
    left = 0

    def mortal(operation: Callable[..., object]) -> Callable[..., object]:
        def operate(*given: object, **named: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return operation(*given, **named)

        return operate

    for lifetime in range(1000):
        path = tmp_path / f"{lifetime}.h5"
        left, committed = lifetime, 0
        try:
            with monkeypatch.context() as patch:
                for name in ("fsync", "replace", "unlink", "rmdir"):
                    patch.setattr(os, name, mortal(getattr(os, name)))
                for session in (range(1, 3), range(3, 4)):
                    writer = Writer(path, {}, TABLE, resume=True)
                    for step in session:
                        record(writer, step)
                        writer.commit()
                        committed = step
                    writer.close()
        except Killed:
            pass
        else:
            break
        if path.exists() or (parts_of(path) / "manifest.json").exists():
            run = open_run(path)
            expect_exact(run, committed)
            assert len(run.steps) <= committed + 1
            committed = len(run.steps)
        else:
            assert committed == 0
        writer = Writer(path, {}, TABLE, resume=True)
        assert writer.last_step == committed
        record(writer, committed + 1)
        assert writer.close().remark == ""
        expect_exact(open_run(path), committed + 1)
    assert lifetime > 40


# -- the training --------------------------------------------------------------------------------


def kill_helper(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("seed", range(2))
def test_helper_finishes_the_recording_of_a_killed_trainer(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with running(train_until_told, path) as process:
        helper = int(stdout_of(process).readline())
        stdout_of(process).readline()
        time.sleep(random.Random(seed).uniform(0, 1.0))
        process.kill()
        last = int(stdout_of(process).read().split()[-1])
    try:
        wait_for(lambda: not process_lives(helper))
    finally:
        kill_helper(helper)
    run = open_run(path)
    assert not parts_of(path).exists(), "it is packed"
    assert run.status == "interrupted"
    # A step's row is handed over when the next step begins: the last is the trainer's own.
    expect_exact(run, last - 1)
    assert len(run.steps) <= last + 1


def test_what_was_committed_survives_the_death_of_both(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with running(train_until_told, path) as process:
        helper = int(stdout_of(process).readline())
        wait_for(lambda: len(open_run(path).steps) > 0)
        os.kill(helper, signal.SIGKILL)
        process.kill()
        committed = len(open_run(path).steps)
        last = int(stdout_of(process).read().split()[-1])
    wait_for(lambda: not process_lives(helper))
    run = open_run(path)
    assert run.status == "interrupted"
    assert committed > 0
    expect_exact(run, committed)
    assert len(run.steps) < last


def test_training_goes_on_with_one_warning_when_the_helper_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with running(train_until_told, path) as process:
        helper = int(stdout_of(process).readline())
        wait_for(lambda: len(open_run(path).steps) > 0)
        os.kill(helper, signal.SIGKILL)
        committed = len(open_run(path).steps)
        for _ in range(100):
            last = int(stdout_of(process).readline())
        (tmp_path / "stop").touch()
        wait_for(lambda: process.poll() is not None)
        rest = stdout_of(process).read().split()
    assert process.returncode == 0
    said = (tmp_path / "stderr").read_text()
    assert said.count("RuntimeWarning") == 1
    assert "training goes on" in said
    assert "Traceback" not in said
    run = open_run(path)
    assert run.status == "interrupted"
    expect_exact(run, committed)
    assert len(run.steps) < max([last, *map(int, rest)])


if __name__ == "__main__":
    {"write_for_ever": write_for_ever, "train_until_told": train_until_told}[sys.argv[1]](
        Path(sys.argv[2])
    )
