"""Whatever goes wrong with the recording: the training does not notice, and what was kept is true.

Every test trains a twin that is not recorded and compares their weights bit by bit; what was
recorded is compared with what was done, and what was lost with what was said to be lost.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import threading
import warnings
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import torch
from test_kill import RATE, committing_every, expect_exact, expect_true, helpers_of, update_of
from test_kill import wait_for as wait_until

import normuon_lens.hooks
from normuon_lens.errors import AttachError
from normuon_lens.hooks import Recorder, attach, feed, recorder
from normuon_lens.hooks.feed import Feed, FeedLost
from normuon_lens.hooks.track import Track
from normuon_lens.runfile import open_run, wire
from normuon_lens.runfile.schema import parts_of

Caught = list[warnings.WarningMessage]


class Training:
    """A training whose every update is known, recorded if it is given a path."""

    def __init__(self, path: Path | None = None, **options: Any) -> None:
        model = torch.nn.Linear(6, 4, bias=False)
        torch.nn.init.zeros_(model.weight)
        self.weight = model.weight
        self.optimizer = torch.optim.SGD(model.parameters(), RATE)
        self.step = 0
        self.lens: Recorder | None = None
        if path:
            options = {"every": 2, "quiet": True, **options}
            self.lens = attach(model, self.optimizer, path, **options)

    def take(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.weight.grad = torch.from_numpy(-update_of(self.step + 1) / np.float32(RATE))
            self.optimizer.step()
            self.step += 1
            self.log()

    def log(self) -> None:
        if self.lens:
            self.lens.log(loss=self.step)

    def expect_undisturbed(self) -> None:
        twin = Training()
        twin.take(self.step)
        assert torch.equal(self.weight, twin.weight)

    @property
    def recorder(self) -> Recorder:
        assert self.lens
        return self.lens

    @property
    def helper(self) -> int:
        assert self.recorder._feed
        return self.recorder._feed.pid


@pytest.fixture(autouse=True)
def no_orphans() -> Iterator[None]:
    """Fail if a helper process outlives the test that started it, and end it."""
    yield
    try:
        wait_until(lambda: not helpers_of(os.getpid()))
    finally:
        for helper in helpers_of(os.getpid()):
            os.kill(helper, signal.SIGKILL)


@pytest.fixture
def caught() -> Iterator[Caught]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


class Said(NamedTuple):
    """What a warning says: the reason, the step at which it came, and what is kept and lost."""

    reason: str
    at: int
    kept: int
    lost: int


def the_only_warning(caught: Caught) -> Said:
    assert [warning.category for warning in caught] == [RuntimeWarning]
    text = str(caught[0].message)
    found = re.fullmatch(
        r"normuon-lens: recording of \S+ stopped at step (\d+), training goes on: (.+)\. "
        r"(?:Steps up to (\d+) are kept in \S+|Nothing is kept); (\d+) later steps are lost"
        r"(?:, unless it goes on and finishes)?\.",
        text,
    )
    assert found, text
    at, reason, kept, lost = found.groups(default="0")
    return Said(reason, int(at), int(kept), int(lost))


# -- the disk ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "normuon-lens-test", folder],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> None:
    with suppress(OSError), (folder / "filler").open("wb", 0) as file:
        while True:
            file.write(bytes(4096))


def notice_by_flush(training: Training) -> None:
    training.recorder.flush()


def notice_by_step(training: Training) -> None:
    while training.recorder.active:
        training.take()
        assert training.step < 1_000_000


def notice_by_close(training: Training) -> None:
    training.recorder.close()


NOTICE = [notice_by_flush, notice_by_step, notice_by_close]


def fail_after_20_of_30(training: Training, sabotage: Callable[[], None]) -> None:
    training.take(20)
    training.recorder.flush()
    sabotage()
    training.take(10)


@pytest.mark.parametrize("notice", NOTICE)
def test_full_disk(
    notice: Callable[[Training], None],
    small_disk: Path,
    caught: Caught,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Feed, "ask", committing_every(0.5))
    path = small_disk / "x.h5"
    training = Training(path, on_full="wait")
    fail_after_20_of_30(training, lambda: fill(small_disk))
    notice(training)
    training.take(10)
    training.recorder.close()
    training.expect_undisturbed()
    said = the_only_warning(caught)
    assert said.reason == "No space left on device"
    assert (said.kept, said.lost) == (20, said.at - 20)
    run = open_run(path)
    assert len(run.steps) == 20
    expect_exact(run, 20)
    lost = re.fullmatch(
        r"stopped at step 20: No space left on device; (\d+) steps after it are lost", run.status
    )
    assert lost
    assert int(lost[1]) == said.lost or notice is notice_by_step
    (small_disk / "filler").unlink()
    training = Training(path, resume=True)
    assert training.recorder.steps == 20
    training.recorder.close()


def test_disk_that_is_full_from_the_start(small_disk: Path) -> None:
    fill(small_disk)
    with pytest.raises(AttachError, match="No space left on device"):
        Training(small_disk / "x.h5")
    assert [file.name for file in small_disk.iterdir()] == ["filler"]


def test_disk_too_small_to_pack(small_disk: Path, caught: Caught) -> None:
    path = small_disk / "x.h5"
    training = Training(path)
    training.take(20)
    training.recorder.close()
    training.expect_undisturbed()
    assert not caught
    assert "kept in parts: packing needs 0 MiB" in training.recorder.summary
    run = open_run(path)
    assert run.status == "finished"
    expect_exact(run, 20)


@pytest.mark.parametrize("notice", NOTICE)
def test_files_that_may_not_grow(
    notice: Callable[[Training], None],
    tmp_path: Path,
    caught: Caught,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Feed, "ask", committing_every(0.5))
    path = tmp_path / "x.h5"
    training = Training(path, on_full="wait")
    fail_after_20_of_30(training, lambda: limit_files_of(training.helper, 4096))
    notice(training)
    training.take(10)
    training.recorder.close()
    training.expect_undisturbed()
    said = the_only_warning(caught)
    assert said.reason == "File too large"
    assert (said.kept, said.lost) == (20, said.at - 20)
    run = open_run(path)
    assert len(run.steps) == 20
    expect_exact(run, 20)
    assert run.status.startswith("stopped at step 20: File too large; ")


def test_disk_that_refuses_the_packed_file(tmp_path: Path, caught: Caught) -> None:
    path = tmp_path / "x.h5"
    training = Training(path)
    for _ in range(8):
        training.take(20)
        training.recorder.flush()
    # Room for any of the segments, not for all of them in one: HDF5 then crashes.
    limit_files_of(training.helper, 20_000)
    training.recorder.close()
    training.expect_undisturbed()
    assert not caught
    assert "kept in parts: the packed file could not be written" in training.recorder.summary
    run = open_run(path)
    assert run.status == "finished"
    expect_exact(run, 160)
    assert not [file for file in parts_of(path).iterdir() if file.suffix == ".tmp"]


def limit_files_of(process: int, size: int) -> None:
    resource.prlimit(process, resource.RLIMIT_FSIZE, (size, size))


# -- the folder ----------------------------------------------------------------------------------


def remove(folder: Path) -> None:
    """Remove a folder that a helper may still write to."""
    folder.rename(folder.with_name("removed"))
    shutil.rmtree(folder.with_name("removed"))


def replace_by_a_file(parts: Path) -> None:
    parts.rename(parts.with_name("elsewhere"))
    parts.write_text("in the way")


@pytest.mark.parametrize("notice", NOTICE)
def test_removed_folder(
    notice: Callable[[Training], None],
    tmp_path: Path,
    caught: Caught,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Feed, "ask", committing_every(0.5))
    training = Training(tmp_path / "runs" / "x.h5", on_full="wait")
    fail_after_20_of_30(training, lambda: remove(tmp_path / "runs"))
    notice(training)
    training.take(10)
    training.recorder.close()
    training.expect_undisturbed()
    said = the_only_warning(caught)
    assert said.reason == "No such file or directory"
    assert (said.kept, said.lost) == (0, said.at)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("replace", [False, True])
def test_folder_that_was_moved(replace: bool, tmp_path: Path, caught: Caught) -> None:
    runs = tmp_path / "runs"
    training = Training(runs / "x.h5")
    moved = tmp_path / "elsewhere"

    def sabotage() -> None:
        runs.rename(moved)
        if replace:
            runs.write_text("in the way")

    fail_after_20_of_30(training, sabotage)
    training.recorder.flush()
    training.take(10)
    training.recorder.close()
    training.expect_undisturbed()
    said = the_only_warning(caught)
    assert said.reason == ("Not a directory" if replace else "No such file or directory")
    assert said.lost == 30 - said.kept
    run = open_run(moved / "x.h5")
    assert run.status == "interrupted"
    assert len(run.steps) == 20
    expect_exact(run, 20)


@pytest.mark.parametrize("notice", NOTICE)
def test_lost_permission(
    notice: Callable[[Training], None],
    tmp_path: Path,
    caught: Caught,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may write everywhere, and there is no setpriv to forbid it")
        powers = "-dac_override,-dac_read_search"
        powerless = ("setpriv", f"--bounding-set={powers}", f"--inh-caps={powers}", "--")
        monkeypatch.setattr(feed, "HELPER", (*powerless, *feed.HELPER))
    monkeypatch.setattr(Feed, "ask", committing_every(0.5))
    path = tmp_path / "x.h5"
    training = Training(path, on_full="wait")
    fail_after_20_of_30(training, lambda: parts_of(path).chmod(0o500))
    notice(training)
    training.take(10)
    training.recorder.close()
    parts_of(path).chmod(0o700)
    training.expect_undisturbed()
    said = the_only_warning(caught)
    assert said.reason == "Permission denied"
    assert (said.kept, said.lost) == (20, said.at - 20)
    run = open_run(path)
    assert run.status == "interrupted", "nothing could be written there, its status neither"
    assert len(run.steps) == 20
    expect_exact(run, 20)


def test_failure_of_a_shadow_ends_its_recording_too(tmp_path: Path, caught: Caught) -> None:
    path = tmp_path / "x.h5"
    training = Training(path, shadow="muon")
    (other,) = set(tmp_path.glob("*.parts")) - {parts_of(path)}
    fail_after_20_of_30(training, lambda: replace_by_a_file(other))
    training.recorder.flush()
    training.take(10)
    training.recorder.close()
    training.expect_undisturbed()
    said = the_only_warning(caught)
    assert said.reason == "Not a directory"
    run = open_run(path)
    expect_exact(run, 20)
    # It was flushed first.
    assert said.kept == len(run.steps) == 30
    assert run.status == "stopped at step 30: Not a directory"


# -- the helper ----------------------------------------------------------------------------------


@pytest.mark.parametrize("notice", NOTICE)
def test_killed_helper(notice: Callable[[Training], None], tmp_path: Path, caught: Caught) -> None:
    path = tmp_path / "x.h5"
    training = Training(path)
    fail_after_20_of_30(training, lambda: os.kill(training.helper, signal.SIGKILL))
    notice(training)
    training.take(10)
    training.recorder.close()
    training.expect_undisturbed()
    said = the_only_warning(caught)
    assert said.reason == "the helper process ended with exit code -9"
    assert (said.kept, said.lost) == (20, said.at - 20)
    run = open_run(path)
    assert run.status == "interrupted"
    assert len(run.steps) == 20
    expect_exact(run, 20)


def test_stopped_helper_costs_samples_and_no_time(
    tmp_path: Path, caught: Caught, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.h5"
    training = Training(path)
    training.take(5)
    os.kill(training.helper, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(Feed, "_wait_for_answer", _never)
        while training.recorder.dropped < 200:
            training.take()
            assert training.step < 1_000_000
    os.kill(training.helper, signal.SIGCONT)
    training.recorder.close()
    training.expect_undisturbed()
    assert not caught
    run = open_run(path)
    assert run.status == "finished"
    expect_true(run)
    assert run.dropped == training.recorder.dropped >= 200
    assert f"{run.dropped} samples dropped" in training.recorder.summary
    assert run.steps[:5].tolist() == [1, 2, 3, 4, 5]
    assert len(run.steps) < training.step


def test_drops_are_counted_in_events_as_soon_as_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    training = Training(path)
    os.kill(training.helper, signal.SIGSTOP)
    while training.recorder.dropped < 50:
        training.take()
    os.kill(training.helper, signal.SIGCONT)
    training.recorder.flush()
    training.take(2)
    training.recorder.close()
    run = open_run(path)
    (event,) = [event for event in run.events if event.kind == "dropped"]
    assert f"{run.dropped} samples" in event.text


def test_helper_that_does_not_answer_is_left_to_finish_alone(
    tmp_path: Path, caught: Caught, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "CLOSE_SECONDS", 0.2)
    path = tmp_path / "x.h5"
    training = Training(path)
    training.take(20)
    helper = training.helper
    os.kill(helper, signal.SIGSTOP)
    training.recorder.close()
    training.take(10)
    training.expect_undisturbed()
    assert "did not answer within 0 s" in the_only_warning(caught).reason
    assert "lost, unless it goes on and finishes." in str(caught[0].message)
    os.kill(helper, signal.SIGCONT)
    wait_until(lambda: not helpers_of(os.getpid()))
    expect_exact(open_run(path), 20)


def test_death_of_the_helper_frees_a_training_that_waits_for_it(
    tmp_path: Path, caught: Caught, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.h5"
    training = Training(path, on_full="wait")
    training.take(20)
    training.recorder.flush()
    os.kill(training.helper, signal.SIGSTOP)
    wait, waits = Feed._wait_for_answer, 0

    def wait_and_kill(self: Feed, **options: Any) -> None:
        nonlocal waits
        waits += 1
        os.kill(training.helper, signal.SIGKILL)
        wait(self, **options)

    monkeypatch.setattr(Feed, "_wait_for_answer", wait_and_kill)
    notice_by_step(training)
    training.take(10)
    training.expect_undisturbed()
    assert waits > 0
    said = the_only_warning(caught)
    assert (said.kept, said.lost) == (20, said.at - 20)
    expect_exact(open_run(path), 20)


def test_many_open_files(tmp_path: Path, caught: Caught) -> None:
    path = tmp_path / "x.h5"
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    opened: list[int] = []
    try:
        while not opened or opened[-1] < 1024:
            opened.append(os.dup(0))
        training = Training(path)
        training.take(20)
        training.recorder.close()
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    training.expect_undisturbed()
    assert not caught
    expect_exact(open_run(path), 20)


def _never(*_: object, **__: object) -> None:
    raise AssertionError("the training waits for the helper")


# -- the hooks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "name", "error"),
    [
        (Track, "begin", RuntimeError("out of luck")),
        (Track, "take", MemoryError()),
        (Track, "collect", RuntimeError("out of luck")),
        (Track, "end", RuntimeError("out of luck")),
        (Feed, "send", MemoryError()),
        (torch.linalg, "vector_norm", torch.OutOfMemoryError("out of memory")),
    ],
)
def test_error_in_a_hook_is_one_warning(
    where: object,
    name: str,
    error: Exception,
    tmp_path: Path,
    caught: Caught,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "x.h5"
    failing = False
    work = getattr(where, name)

    def work_or_fail(*given: Any, **named: Any) -> object:
        if failing:
            raise error
        return work(*given, **named)

    monkeypatch.setattr(where, name, work_or_fail)
    training = Training(path)
    training.take(20)
    failing = True
    training.take(10)
    training.recorder.close()
    training.expect_undisturbed()
    said = the_only_warning(caught)
    assert said.reason == str(error) or type(error).__name__
    wait_until(lambda: not helpers_of(os.getpid()))
    run = open_run(path)
    assert len(run.steps) >= said.kept >= (0 if name == "send" else 19)
    assert said.lost == said.at - said.kept
    expect_exact(run, said.kept)
    if name == "send":  # so the helper could not be told either
        assert run.status == "interrupted"
    else:
        assert run.status == f"stopped at step {said.at}: {said.reason}"


# -- Ctrl-C and exceptions -----------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, SystemExit])
def test_error_in_the_training_passes_and_everything_is_kept(
    error: type[BaseException], tmp_path: Path, caught: Caught
) -> None:
    path = tmp_path / "x.h5"
    training = Training(path)

    def train() -> None:
        with training.recorder:
            training.take(20)
            if error is KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)
            raise error

    with pytest.raises(error):
        train()
    training.take(5)
    training.expect_undisturbed()
    assert not caught
    run = open_run(path)
    assert run.status == f"interrupted: {error.__name__}"
    assert len(run.steps) == 20
    expect_exact(run, 20)


def test_ctrl_c_ends_a_script_that_closes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from normuon_lens.hooks import attach\n"
        "model = torch.nn.Linear(6, 4)\n"
        "optimizer = torch.optim.SGD(model.parameters(), 0.1)\n"
        f"attach(model, optimizer, {str(path)!r})\n"
        "step = 0\n"
        "while True:\n"
        "    model(torch.ones(1, 6)).sum().backward()\n"
        "    optimizer.step()\n"
        "    step += 1\n"
        "    print(step, flush=True)\n"
    )
    with (
        (tmp_path / "stderr").open("w") as errors,
        subprocess.Popen(
            [sys.executable, script], stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            assert process.stdout
            while int(process.stdout.readline()) < 20:
                pass
            process.send_signal(signal.SIGINT)
            # Not by communicate(), which misses what readline() has buffered.
            stdout = process.stdout.read()
        finally:
            process.kill()
    stderr = (tmp_path / "stderr").read_text()
    assert "KeyboardInterrupt" in stderr
    assert "Warning" not in stderr
    assert not helpers_of(process.pid)
    run = open_run(path)
    assert run.status == "interrupted: KeyboardInterrupt"
    last = int((stdout.split() or ["20"])[-1])
    assert last <= len(run.steps) <= last + 1


@contextmanager
def at_opcode(count: int, act: Callable[[], None], folder: str) -> Iterator[list[int]]:
    """Do `act` before the `count`-th opcode that runs in the files of `folder`.

    Yields
    ------
    list of int
        How many opcodes ran, as its only element.
    """
    seen = [0]

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(folder):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            seen[0] += 1
            if seen[0] == count:
                act()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(before)


HOOKS = str(Path(normuon_lens.hooks.__file__).parent)


def test_ctrl_c_at_any_moment_of_a_hook(tmp_path: Path, caught: Caught) -> None:
    path = tmp_path / "x.h5"
    training = Training(path, on_full="wait")
    training.take(3)
    with at_opcode(0, lambda: None, HOOKS) as opcodes:
        training.take()
    moments = list(range(1, opcodes[0], 7))
    random.Random(0).shuffle(moments)
    arrived = 0
    for moment in moments:
        step, before = training.step, training.weight.detach().clone()
        try:
            with at_opcode(moment, lambda: signal.raise_signal(signal.SIGINT), HOOKS):
                training.take()
        except KeyboardInterrupt:
            arrived += 1
            # The training goes on, with this step again if it was cut short.
            if not training.recorder._stepped:
                with torch.no_grad():
                    training.weight.copy_(before)
            training.step = step + (not training.weight.equal(before))
            if training.step > step:
                training.log()
    assert arrived > len(moments) / 2
    training.recorder.close()
    training.expect_undisturbed()
    assert not caught
    run = open_run(path)
    assert run.status == "finished"
    assert len(run.steps) == training.step
    expect_exact(run, training.step)


class Stub:
    """A helper that is a thread: it takes every message as it comes, and keeps it."""

    def __init__(self, command: list[str], *, pass_fds: tuple[int], **_: Any) -> None:
        self._memory = mmap.mmap(pass_fds[0], int(command[-1]))
        self._orders, to = os.pipe()
        of, self._answers = os.pipe()
        self.stdin, self.stdout = os.fdopen(to, "wb", 0), os.fdopen(of, "rb", 0)
        self.pid = self.returncode = 0
        self.taken: list[wire.Message] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while place := os.read(self._orders, wire.PLACE.size):
            offset, length, position = wire.PLACE.unpack(place)
            answer = {"ack": position}
            if length:
                self.taken.append(wire.read_message(self._memory, offset))
                answer |= self.taken[-1].header
            self.answer(**answer)
            if "last" in answer:
                break
        os.close(self._orders)
        os.close(self._answers)

    def answer(self, **answer: Any) -> None:
        os.write(self._answers, json.dumps(answer).encode() + b"\n")

    def wait(self, timeout: float) -> int:
        self._thread.join()
        return 0


def _ctrl_c(*_: object) -> None:
    raise KeyboardInterrupt


SOURCE = Feed.__init__.__code__.co_filename


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Feed, Stub]]:
    monkeypatch.setattr(feed.subprocess, "Popen", Stub)
    sender = Feed(1 << 13)
    stub = sender._process
    assert isinstance(stub, Stub)
    yield sender, stub
    sender.close()


def test_ctrl_c_between_any_two_opcodes_loses_no_answer(stub: tuple[Feed, Stub]) -> None:
    sender, helper = stub
    opcode, reached = 0, True
    while reached:
        opcode += 1
        helper.answer(number=opcode)
        with suppress(KeyboardInterrupt), at_opcode(opcode, _ctrl_c, SOURCE) as opcodes:
            sender.poll()
        reached = opcodes[0] >= opcode
        sender.poll()
        assert sender.answers == {"number": opcode}
    assert opcode > 100


def test_a_last_answer_counts_that_comes_with_the_helpers_end(
    stub: tuple[Feed, Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, helper = stub
    send = sender._send

    def send_and_see_it_end(*message: Any) -> bool:
        sent = send(*message)
        helper._thread.join()
        return sent

    monkeypatch.setattr(sender, "_send", send_and_see_it_end)
    assert sender.ask("close", {"packed": "x.h5", "last": True}, "packed", 5.0) == "x.h5"
    with pytest.raises(FeedLost, match="ended with exit code 0"):
        sender.poll()


def test_as_many_answers_as_a_pipe_holds_are_heard(stub: tuple[Feed, Stub]) -> None:
    sender, helper = stub
    lines = "".join(f'{{"number": {number}}}\n' for number in range(5000)).encode()
    saying = threading.Thread(target=lambda: os.write(helper._answers, lines))
    saying.start()
    waiting = array("i", [0])

    def full() -> bool:
        fcntl.ioctl(sender._from, termios.FIONREAD, waiting)
        return waiting[0] == fcntl.fcntl(sender._from, fcntl.F_GETPIPE_SZ)

    wait_until(full)
    sender.poll()
    saying.join()
    sender.poll()
    assert sender.answers == {"number": 4999}


def test_ctrl_c_between_any_two_opcodes_breaks_no_message(stub: tuple[Feed, Stub]) -> None:
    sender, helper = stub
    number, opcode = 0, 0
    handed = set()

    def send(size: int) -> None:
        nonlocal number
        number += 1
        values = np.full(size, number % 256, np.uint8)
        wait_until(lambda: sender.send("x", {"number": number}, {"values": values}))
        handed.add(number)

    reached = True
    while reached:
        opcode += 1
        with suppress(KeyboardInterrupt), at_opcode(opcode, _ctrl_c, SOURCE) as opcodes:
            send(10)
            send(1500)
            number += 1
            assert sender.ask("y", {"number": number}, "number", 60) == number
            handed.add(number)
        reached = opcodes[0] >= opcode
        # Nothing of the ring is lost: what fills all of it still fits.
        if opcode % 20 == 0:
            send((1 << 13) - 200)
    sender.close()
    assert opcode > 500
    numbers = [message.header["number"] for message in helper.taken]
    assert numbers == sorted(set(numbers)), "in order, and none twice"
    assert handed <= set(numbers)
    for message in helper.taken:
        for values in message.arrays.values():
            assert (values == message.header["number"] % 256).all()


def test_ctrl_c_while_closing_leaves_the_rest_to_the_helper(
    tmp_path: Path, caught: Caught, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.h5"
    training = Training(path)
    training.take(20)
    with monkeypatch.context() as patch:
        patch.setattr(Feed, "_wait_for_answer", _ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            training.recorder.close()
    training.recorder.close()
    training.take(5)
    training.expect_undisturbed()
    assert not caught
    wait_until(lambda: not helpers_of(os.getpid()))
    run = open_run(path)
    assert run.status == "finished"
    expect_exact(run, 20)


def test_ctrl_c_while_attaching_leaves_nothing(
    tmp_path: Path, caught: Caught, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.h5"
    with monkeypatch.context() as patch:
        patch.setattr(Feed, "_wait_for_answer", _ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            Training(path)
    wait_until(lambda: not helpers_of(os.getpid()))
    assert list(tmp_path.iterdir()) == []
    training = Training(path)
    training.take(20)
    training.recorder.close()
    training.expect_undisturbed()
    assert not caught
    expect_exact(open_run(path), 20)


# -- processes -----------------------------------------------------------------------------------


def test_fork_that_trains_on_is_not_recorded(tmp_path: Path, caught: Caught) -> None:
    path = tmp_path / "x.h5"
    training = Training(path)
    training.take(10)
    child = os.fork()
    if child == 0:
        try:
            training.take(1000)
            training.recorder.flush()
            training.recorder.close()
        finally:
            os._exit(not training.recorder.active and training.step == 1010)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    training.take(10)
    training.recorder.close()
    training.expect_undisturbed()
    assert not [warning for warning in caught if warning.category is RuntimeWarning]
    run = open_run(path)
    assert (run.status, len(run.steps)) == ("finished", 20)
    expect_exact(run, 20)


def test_training_process_never_touches_a_file_by_hdf5(
    tmp_path: Path, caught: Caught, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("HDF5 in the training process")

    path = tmp_path / "x.h5"
    training = Training(path)
    with monkeypatch.context() as patch:
        patch.setattr(h5py, "File", refuse)
        for name in ("create", "open"):
            patch.setattr(h5py.h5f, name, refuse)
        training.take(20)
        training.recorder.flush()
        training.take(10)
        training.recorder.close()
    training.expect_undisturbed()
    assert not caught
    expect_exact(open_run(path), 30)
