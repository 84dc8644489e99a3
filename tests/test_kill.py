"""Whoever is killed, and whenever: what was committed stays, exactly as it was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

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
    assert run.steps.tolist() == list(range(1, len(run.steps) + 1))
    assert len(run.steps) >= at_least
    expect_true(run)
    if at_least >= 2:
        assert set(range(2, at_least + 1, 2)) <= set(run.spectra("weight").steps.tolist())
        assert set(range(2, at_least + 1, 2)) <= set(run.update_steps("weight").tolist())


def expect_true(run: Run) -> None:
    """Hold every number of `run` against its step, whichever steps it has."""
    assert not run.damaged
    if not len(run.steps):
        return
    updates = np.stack([update_of(step) for step in run.steps.tolist()])
    norms = np.linalg.norm(updates, axis=2)
    np.testing.assert_allclose(run.neuron_norms("weight"), norms, rtol=1e-6)
    np.testing.assert_array_equal(run.scalars["loss"], run.steps)
    if not len(run.spectrum_steps()):
        return
    spectra = run.spectra("weight")
    np.testing.assert_allclose(
        spectra.sigma[:, 0], np.linalg.norm(PATTERN) * RATE * spectra.steps, rtol=1e-6
    )
    for step in run.update_steps("weight").tolist():
        np.testing.assert_array_equal(run.update("weight", step), update_of(step))


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


def nursery() -> None:
    """Fork a trainer for every line "path steps fork" that comes in; at the end, kill them all.

    So torch is imported once, and a trainer can be killed as soon as it begins to attach.
    """
    import torch

    import normuon_lens.hooks  # noqa: F401, for all children

    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # its first optimizer takes seconds
    children = []
    say("ready")
    for line in sys.stdin:
        path, steps, fork = line.split()
        child = os.fork()
        if child == 0:
            for number, name in ((1, "said"), (2, "stderr")):
                os.dup2(os.open(f"{path}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            train_until_told(Path(path), int(steps), fork=fork == "True")
            os._exit(0)
        children.append(child)
        say(child)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def train_until_told(path: Path, steps: int, *, fork: bool) -> None:
    """Train until the file ``stop`` appears; close and resume the recording every so many steps.

    Says every step, and "closed" at the end. With `fork`, a data loader's worker stays behind.
    """
    import torch

    from normuon_lens.hooks import attach
    from normuon_lens.hooks.feed import Feed

    Feed.ask = committing_every(0.01)  # type: ignore[method-assign]
    model = torch.nn.Linear(6, 4, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    parent, stop = os.getppid(), path.with_name("stop")
    while os.getppid() == parent and not stop.exists():
        with attach(
            model, optimizer, path, every=2, on_full="wait", quiet=True, resume=True
        ) as lens:
            if fork and not os.fork():
                with suppress(AssertionError):
                    wait_for(stop.exists)
                path.with_name("worker ended").touch()
                os._exit(0)
            for step in range(lens.steps + 1, lens.steps + 1 + steps):
                model.weight.grad = torch.from_numpy(-update_of(step) / np.float32(RATE))
                optimizer.step()
                lens.log(loss=step)
                say(step)
                time.sleep(0.001)
                if os.getppid() != parent or stop.exists():
                    break
    say("closed")


def committing_every(seconds: float) -> Callable[..., object]:
    """Return what to put in place of ``Feed.ask`` to have recordings committed so often."""
    from normuon_lens.hooks.feed import Feed

    ask = Feed.ask

    def ask_for_more(self: Feed, kind: str, header: dict[str, Any], *rest: Any) -> object:
        for recording in header.get("recordings", ()):
            recording["options"]["commit_seconds"] = seconds
        return ask(self, kind, header, *rest)

    return ask_for_more


def helpers_of(trainer: int) -> list[int]:
    """Return the process ids of the helpers that a trainer started, whether it lives or not."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"normuon_lens.runfile.helper" in words and str(trainer).encode() in words:
                found.append(int(folder.name))
    return found


class Trainer(NamedTuple):
    """A trainer that a nursery forked."""

    pid: int
    path: Path

    def said(self) -> list[str]:
        text = Path(f"{self.path}.said").read_text()
        return text[: text.rfind("\n") + 1].split()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    @property
    def helper_gone(self) -> bool:
        return not helpers_of(self.pid)


@pytest.fixture(scope="module")
def trainers() -> Iterator[Callable[..., Trainer]]:
    """Start trainers; whatever of them and of their helpers is left at the end is killed."""
    started = []
    with subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "ready\n"

        def start(path: Path, steps: int = 1 << 30, *, fork: bool = False) -> Trainer:
            assert process.stdin
            process.stdin.write(f"{path} {steps} {fork}\n")
            trainer = Trainer(int(stdout_of(process).readline()), path)
            started.append(trainer)
            wait_for(Path(f"{path}.stderr").exists)
            return trainer

        yield start
    for trainer in started:
        for helper in helpers_of(trainer.pid):
            os.kill(helper, signal.SIGKILL)


class Forked(NamedTuple):
    """A writer in a fork of this process: it need not import what this one has."""

    pid: int
    said: IO[str]

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


@contextmanager
def running_writer(path: Path) -> Iterator[Forked]:
    of, to = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(to, 1)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        try:
            write_for_ever(path)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(to)
    with open(of) as said:
        writer = Forked(pid, said)
        try:
            yield writer
        finally:
            writer.kill()
            os.waitpid(pid, 0)


def stdout_of(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout
    return process.stdout


def wait_for(what: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


# -- the writer ----------------------------------------------------------------------------------


# Python 3.12 warns of forks beside threads, which no writer needs.
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("seed", range(16))
def test_killed_writer_loses_nothing_that_was_committed(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    rng = random.Random(seed)
    with running_writer(path) as process:
        process.said.readline()
        time.sleep(rng.uniform(0, 0.4))
        before = len(open_run(path).steps) if seed % 2 else 0
        process.kill()
        committed = int(process.said.read().split()[-1])
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
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the machine does not crash here
    monkeypatch.setattr("normuon_lens.runfile.writer.MERGE_FAN_IN", 2)
    monkeypatch.setattr("normuon_lens.runfile.claim.process_lives", lambda pid: False)
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

AT_ONCE = 4


@pytest.mark.parametrize("seed", range(9))
def test_helper_finishes_the_recording_of_a_killed_trainer(
    seed: int, tmp_path: Path, trainers: Callable[..., Trainer]
) -> None:
    rng = random.Random(seed)
    # Also in the midst of closing and resuming, which is where a recording is packed.
    begun = [
        trainers(tmp_path / f"{i}.h5", *([SESSION] if i == AT_ONCE - 1 else []))
        for i in range(AT_ONCE)
    ]
    lasts = []
    for i, trainer in enumerate(begun):
        if i:  # the first is killed while it attaches
            wait_for(lambda trainer=trainer: bool(trainer.said()))
        time.sleep(rng.uniform(0, 0.4))
        trainer.kill()
        wait_for(lambda trainer=trainer: not process_lives(trainer.pid))
        lasts.append(int((trainer.said() or ["0"])[-1]))
    for trainer, last in zip(begun, lasts, strict=True):
        path = trainer.path
        wait_for(lambda trainer=trainer: trainer.helper_gone)
        if not last and not path.exists():
            assert not parts_of(path).exists()
            continue
        assert not parts_of(path).exists(), "it is packed"
        run = open_run(path)
        # A step's row is handed over when the next step begins: the last is the trainer's own.
        expect_exact(run, last - 1)
        assert len(run.steps) <= last + 1
        assert run.dropped == 0
        if run.status != "finished":  # killed between two sessions
            assert run.status == "interrupted"
            step, kind, text = run.events[-1]
            assert (step, kind) == (len(run.steps), "interrupted")
            assert f"everything handed over until step {step} is kept" in text
        assert Path(f"{path}.stderr").read_text() == ""


def test_helper_ends_though_a_worker_of_its_killed_trainer_lives_on(
    tmp_path: Path, trainers: Callable[..., Trainer]
) -> None:
    trainer = trainers(tmp_path / "x.h5", fork=True)
    try:
        wait_for(lambda: len(trainer.said()) > 20)
        trainer.kill()
        wait_for(lambda: not process_lives(trainer.pid))
        wait_for(lambda: trainer.helper_gone)
        assert not (tmp_path / "worker ended").exists()
    finally:
        (tmp_path / "stop").touch()
    run = open_run(trainer.path)
    assert run.status == "interrupted"
    expect_exact(run, int(trainer.said()[-1]) - 1)
    wait_for((tmp_path / "worker ended").exists)


def test_what_was_committed_survives_the_death_of_both(
    tmp_path: Path, trainers: Callable[..., Trainer]
) -> None:
    trainer = trainers(tmp_path / "x.h5")
    wait_for(lambda: bool(trainer.said()) and len(open_run(trainer.path).steps) > 0)
    (helper,) = helpers_of(trainer.pid)
    os.kill(helper, signal.SIGKILL)
    trainer.kill()
    committed = len(open_run(trainer.path).steps)
    wait_for(lambda: not process_lives(helper))
    run = open_run(trainer.path)
    assert run.status == "interrupted"
    assert committed > 0
    expect_exact(run, committed)
    assert len(run.steps) <= int(trainer.said()[-1])


def test_training_goes_on_with_one_warning_when_the_helper_is_killed(
    tmp_path: Path, trainers: Callable[..., Trainer]
) -> None:
    trainer = trainers(tmp_path / "x.h5")
    wait_for(lambda: bool(trainer.said()) and len(open_run(trainer.path).steps) > 0)
    (helper,) = helpers_of(trainer.pid)
    os.kill(helper, signal.SIGKILL)
    committed = len(open_run(trainer.path).steps)
    last = int(trainer.said()[-1])
    wait_for(lambda: int(trainer.said()[-1]) > last + 100)
    (tmp_path / "stop").touch()
    wait_for(lambda: trainer.said()[-1] == "closed")
    said = Path(f"{trainer.path}.stderr").read_text()
    assert said.count("RuntimeWarning") == 1
    assert "training goes on" in said
    assert "Traceback" not in said
    run = open_run(trainer.path)
    assert run.status == "interrupted"
    expect_exact(run, committed)
    assert len(run.steps) < last + 100


if __name__ == "__main__":
    nursery()
