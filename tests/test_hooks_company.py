"""Ranks that record together, and one of them fails, leaves, is late or dies: training goes on.

Every test trains twins without a recorder and compares the weights that each rank holds bit by
bit; what was recorded is held against the twins' updates, and what is missing against the holes.
"""

from __future__ import annotations

import functools
import gc
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import TESTS, on_ranks
from test_hooks_failures import HOOKS, at_opcode
from test_kill import wait_for
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from normuon_lens.errors import AttachError
from normuon_lens.hooks import Recorder, attach, company, feed, recorder
from normuon_lens.hooks.track import Track
from normuon_lens.optim import NorMuon
from normuon_lens.runfile import Run, helper, open_run
from normuon_lens.runfile.schema import parts_of

STEPS = 16
EVERY = 3
"""Sampled are steps 1, 3, 6, 9, 12 and 15."""
HANG = 15.0
"""Far more seconds than any of these trainings takes, and less than ranks wait for each other."""
NAMES = ("0", "2", "4")
Weights = list[torch.Tensor]


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 9, bias=False),
        torch.nn.GELU(),
        torch.nn.Linear(9, 5),
        torch.nn.GELU(),
        torch.nn.Linear(5, 3, bias=False),
    )


class Training:
    """A sharded training, each rank with data of its own; recorded if it is given a path."""

    def __init__(
        self,
        kind: str = "adamw",
        path: Path | None = None,
        mesh: DeviceMesh | None = None,
        **options: Any,
    ) -> None:
        self.model = network()
        self.place = mesh.get_local_rank() if mesh else dist.get_rank()
        if kind == "ddp":
            self.model = DistributedDataParallel(self.model)
        else:
            for layer in self.model:
                if isinstance(layer, torch.nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        of: dict[int, list[torch.nn.Parameter]] = {2: [], 1: []}
        for parameter in self.model.parameters():
            of[parameter.ndim].append(parameter)
        self.optimizers: list[torch.optim.Optimizer]
        if kind != "normuon":
            groups = [*of[2], *of[1]]
            self.optimizers = [torch.optim.AdamW(groups, lr=1e-2, weight_decay=0)]
        else:
            self.optimizers = [NorMuon(of[2], lr=2e-2, weight_decay=0)]
            self.optimizers += [torch.optim.AdamW(of[1], lr=1e-2, weight_decay=0)]
        self.step = 0
        self.data = 0
        self.lens: Recorder | None = None
        if path:
            options = {"every": EVERY, "quiet": True, "on_full": "wait", **options}
            self.lens = attach(self.model, self.optimizers, path, **options)

    def take(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.forward_and_backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.step += 1
            if self.lens:
                self.lens.log(loss=self.step)

    def forward_and_backward(self) -> None:
        seed = self.data * 10_000 + self.place * 1000 + self.step
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
        self.model(inputs).square().mean().backward()

    @property
    def weights(self) -> Weights:
        """What this rank holds."""
        held = [parameter.detach() for parameter in self.model.parameters()]
        return [x.to_local() if isinstance(x, DTensor) else x for x in held]

    @property
    def recorder(self) -> Recorder:
        assert self.lens
        return self.lens

    @property
    def helper(self) -> int:
        assert self.recorder._feed
        return self.recorder._feed.pid


class Twin(NamedTuple):
    """The same training without a recorder: weights by step, and (T, m, n) whole updates."""

    weights: list[Weights]
    updates: dict[str, np.ndarray]


@functools.cache
def twin(kind: str, mesh: DeviceMesh | None = None, switch: int = STEPS) -> Twin:
    """Train without a recorder; from the step `switch` on with other data."""
    training = Training(kind, mesh=mesh)
    held, whole = [], []
    for step in range(STEPS + 1):
        if step:
            training.data = int(step > switch)
            training.take()
        held.append([weight.clone() for weight in training.weights])
        named = {
            name.removeprefix("module.").removesuffix(".weight"): parameter.detach()
            for name, parameter in training.model.named_parameters()
        }
        whole.append([as_array(named[name]) for name in NAMES])
    updates = {
        name: np.diff(np.stack([of_step[i] for of_step in whole]), axis=0)
        for i, name in enumerate(NAMES)
    }
    return Twin(held, updates)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.double().numpy().copy()


class Told(NamedTuple):
    """What became of a training on one rank."""

    same: bool
    """Whether its weights are bit by bit the twin's."""
    said: list[str]
    """Warnings."""
    slowest: float
    """Seconds of its slowest step."""
    closing: float
    """Seconds that closing took."""
    summary: str


Act = Callable[[Training], object]


def nothing(_: Training) -> None:
    pass


def at(step: int, act: Act, *, on: int | None = None) -> Act:
    """Make something that is done before a step, on one rank or all."""

    def do(training: Training) -> None:
        if training.step == step - 1 and on in (None, dist.get_rank()):
            act(training)

    return do


def flush(training: Training) -> None:
    assert training.lens
    training.lens.flush()


def close(training: Training) -> None:
    assert training.lens
    training.lens.close()


def train(path: Path, *acts: Act, kind: str = "adamw", **options: Any) -> Told:
    """Train all steps, recorded; each of `acts` is called before every step."""
    expected = twin(kind)
    with listening() as said:
        training = Training(kind, path, **options)
        slowest = 0.0
        for _ in range(STEPS):
            for act in acts:
                act(training)
            began = time.monotonic()
            training.take()
            slowest = max(slowest, time.monotonic() - began)
        began = time.monotonic()
        if training.lens:
            training.lens.close()
    closing = time.monotonic() - began
    same = equal(training, expected)
    dist.barrier()
    return Told(same, said, slowest, closing, training.lens.summary if training.lens else "")


def equal(training: Training, expected: Twin) -> bool:
    pairs = zip(training.weights, expected.weights[training.step], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@contextmanager
def listening() -> Iterator[list[str]]:
    """Collect warnings instead of failing at them."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(warning.message) for warning in caught]


# -- what was recorded ---------------------------------------------------------------------------


def expect_true(run: Run, updates: dict[str, np.ndarray]) -> None:
    """Hold all that a run has against the updates; NaN only where a rank has a hole, never zero."""
    steps = run.steps
    lacking = np.zeros(len(steps), bool)
    for hole in run.holes:
        lacking |= (steps >= hole.steps[0]) & (steps <= hole.steps[1])
    for name in NAMES:
        whole = updates[name][steps - 1]
        norms, expected = run.neuron_norms(name), np.linalg.norm(whole, axis=2)
        there = ~np.isnan(norms)
        assert there[~lacking].all(), name
        np.testing.assert_allclose(norms[there], expected[there], rtol=1e-4, atol=1e-7)
        assert (norms[there] > 0).all()
        spectra = run.spectra(name)
        for step, sigma in zip(spectra.steps.tolist(), spectra.sigma, strict=True):
            if not np.isnan(sigma).all():
                real = np.linalg.svd(updates[name][step - 1], compute_uv=False)
                np.testing.assert_allclose(sigma, real, rtol=1e-3, atol=1e-4 * real[0])
        for step in run.update_steps(name).tolist():
            real = updates[name][step - 1]
            np.testing.assert_allclose(
                run.update(name, step), real, rtol=1e-3, atol=1e-4 * np.abs(real).max()
            )


def rows_of(rank: int, ranks: int, m: int) -> list[int]:
    """Return the rows that FSDP2 deals to a rank."""
    chunks = torch.arange(m).chunk(ranks)
    return chunks[rank].tolist() if rank < len(chunks) else []


def expect_holes(run: Run, expected: list[tuple[int, tuple[int, int]]]) -> None:
    """Hold the holes of an AdamW run of two ranks, and which norms are NaN, against those told."""
    assert [(hole.rank, hole.steps) for hole in run.holes] == expected
    for name in NAMES:
        missing = np.isnan(run.neuron_norms(name))
        told = np.zeros_like(missing)
        for rank, (first, last) in expected:
            here = (run.steps >= first) & (run.steps <= last)
            told[np.ix_(here, rows_of(rank, 2, missing.shape[1]))] = True
        np.testing.assert_array_equal(missing, told)


class Expected(NamedTuple):
    """What is to become of a recording of two ranks."""

    said: tuple[str, str]
    """Of each rank's only warning: the step, and the reason as a pattern; empty for silence."""
    steps: int
    """All steps until this one are there."""
    holes: list[tuple[int, tuple[int, int]]]
    status: str


def expect_told(told: list[dict[str, Any]], folder: Path, expected: dict[str, Expected]) -> None:
    """Hold what became of trainings against what was to become of them."""
    for name, (said, steps, holes, status) in expected.items():
        for rank in (0, 1):
            of_rank = told[rank][name]
            assert of_rank.same, (name, rank)
            assert max(of_rank.slowest, of_rank.closing) < HANG, (name, rank, of_rank)
            assert len(of_rank.said) == bool(said[rank]), (name, rank, of_rank.said)
            for text in of_rank.said:
                at_step = rf"stopped at step {said[rank].replace(': ', ', training goes on: ', 1)}"
                assert re.search(rf"normuon-lens: recording of \S+ {at_step}\. ", text), text
        path = folder / f"{name}.h5"
        wait_for(lambda: not open_run(path).live)  # noqa: B023, it is waited for right here
        run = open_run(path)
        assert run.steps.tolist() == list(range(1, steps + 1)), name
        assert not run.damaged
        assert run.status == status, name
        if "normuon" in name:
            assert [(hole.rank, hole.steps) for hole in run.holes] == holes, name
            expect_true(run, told[0]["normuon"])
        else:
            expect_holes(run, holes)
            expect_true(run, told[0]["twins"])
        sampled = [step for step in range(1, steps + 1) if step == 1 or step % EVERY == 0]
        assert set(sampled[:-1]) <= set(run.spectrum_steps().tolist()), name


# -- one rank's helper process, disk or folder fails ----------------------------------------------


def limit_files(training: Training) -> None:
    resource.prlimit(training.helper, resource.RLIMIT_FSIZE, (4096, 4096))


def kill_helper(training: Training) -> None:
    os.kill(training.helper, signal.SIGKILL)
    os.waitid(os.P_PID, training.helper, os.WEXITED | os.WNOWAIT)  # until its end is to be seen


def lose_folder(training: Training) -> None:
    assert training.lens
    folder = parts_of(training.lens.path) / f"rank{dist.get_rank():05d}"
    folder.rename(folder.with_name("removed"))
    shutil.rmtree(folder.with_name("removed"))


def fill_disk(training: Training) -> None:
    assert training.lens
    filler = training.lens.path.parent / f"filler{dist.get_rank()}"
    with suppress(OSError), filler.open("wb", 0) as file:
        while True:
            file.write(bytes(4096))


def losing_helpers(folder: Path, disk: Path | None) -> dict[str, Any]:
    kept = at(7, flush)
    told: dict[str, Any] = {"twins": twin("adamw").updates, "normuon": twin("normuon").updates}
    for name, acts, options in (
        ("limit", [at(7, limit_files, on=1), at(8, flush, on=1)], {}),
        ("limit-first", [at(7, limit_files, on=0), at(8, flush, on=0)], {}),
        ("limit-close", [at(7, limit_files, on=1)], {}),
        ("folder", [at(7, lose_folder, on=1), at(8, flush, on=1)], {}),
        ("kill-unsampled", [at(7, kill_helper, on=1)], {}),
        ("kill-sampled", [at(9, kill_helper, on=1)], {}),
        ("kill-first", [at(8, kill_helper, on=0)], {}),
        ("kill-both", [at(8, kill_helper)], {}),
        ("kill-normuon", [at(9, kill_helper, on=1)], {"kind": "normuon"}),
    ):
        told[name] = train(folder / f"{name}.h5", kept, *acts, **options)
    if disk:
        told["disk"] = train(
            disk / "disk.h5", kept, at(7, fill_disk), at(8, flush, on=1), at(11, flush)
        )
    return told


ENDED = "the helper process ended with exit code -9"
LARGE = "File too large"
GONE = "No such file or directory"
LOST = {
    "limit": Expected(
        (f"9: rank 1: {LARGE}", f"7: {LARGE}"),
        8,
        [(1, (7, 8))],
        f"rank 0: stopped at step 9: rank 1: {LARGE}",
    ),
    "limit-first": Expected(
        (f"7: {LARGE}", ""),
        8,
        [(0, (7, 8))],
        f"rank 0: stopped at step 6: {LARGE}; 1 step after it is lost",
    ),
    "limit-close": Expected(
        ("", f"16: {LARGE}"),
        16,
        [(1, (7, 16))],
        f"rank 1: stopped at step 6: {LARGE}; 10 steps after it are lost",
    ),
    "folder": Expected(
        (f"9: rank 1: {GONE}", f"7: {GONE}"),
        8,
        [(1, (1, 8))],
        f"rank 0: stopped at step 9: rank 1: {GONE}",
    ),
    "kill-unsampled": Expected(
        (f"9: rank 1: {ENDED}", f"7: {ENDED}"),
        8,
        [(1, (7, 8))],
        f"rank 0: stopped at step 9: rank 1: {ENDED}",
    ),
    "kill-sampled": Expected(
        (f"9: rank 1: {ENDED}", f"8: {ENDED}"),
        8,
        [(1, (7, 8))],
        f"rank 0: stopped at step 9: rank 1: {ENDED}",
    ),
    "kill-first": Expected((f"7: {ENDED}", ""), 8, [(0, (7, 8))], "interrupted"),
    "kill-both": Expected((f"7: {ENDED}", f"7: {ENDED}"), 6, [], "interrupted"),
    "kill-normuon": Expected(
        (f"9: rank 1: {ENDED}", f"8: {ENDED}"),
        8,
        [(1, (7, 8))],
        f"rank 0: stopped at step 9: rank 1: {ENDED}",
    ),
}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """Mount a file system of one MiB, where that is permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "normuon-lens-test", folder]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_disk_folder_or_helper_of_one_rank_lost(tmp_path: Path, small_disk: Path | None) -> None:
    told = on_ranks(2, losing_helpers, tmp_path, small_disk, timeout=300)
    expect_told(told, tmp_path, LOST)
    if small_disk:  # both ranks write to it
        for of_rank in told:
            assert of_rank["disk"].same
            assert of_rank["disk"].slowest < HANG
            (text,) = of_rank["disk"].said
            assert "No space left on device" in text
        run = open_run(small_disk / "disk.h5")
        assert 6 <= len(run.steps) <= 8
        assert "No space left on device" in run.status
        expect_true(run, told[0]["twins"])


# -- a hook fails --------------------------------------------------------------------------------


class OutOfLuck(RuntimeError):
    pass


@contextmanager
def failing(where: Any, name: str, step: int, *, on: int) -> Iterator[None]:
    """Have a method of the recorder fail, of the step given, on one rank."""
    work = getattr(where, name)

    def work_or_fail(self: Any, *given: Any, **named: Any) -> object:
        now = given[0] if name == "begin" else self._step
        if now >= step and dist.get_rank() == on:
            raise OutOfLuck("out of luck")
        return work(self, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, work_or_fail)
        yield


def failing_hooks(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = {"twins": twin("adamw").updates, "normuon": twin("normuon").updates}
    for name, method, step, rank, acts, kind in (
        ("take-sampled", "take", 9, 1, [], "adamw"),
        ("take-unsampled", "take", 7, 0, [], "adamw"),
        ("take-normuon", "take", 9, 1, [], "normuon"),
        ("begin-sampled", "begin", 9, 1, [], "adamw"),
        ("end-sampled", "end", 9, 1, [], "adamw"),
        ("collect-first", "collect", 9, 0, [], "adamw"),
        ("closing", "take", 7, 1, [at(8, close, on=1)], "adamw"),
    ):
        with failing(Track, method, step, on=rank):
            told[name] = train(folder / f"{name}.h5", *acts, kind=kind)
    return told


LUCK = "out of luck"
NO_LUCK = Expected(
    (f"9: rank 1: {LUCK}", f"9: {LUCK}"), 8, [], f"rank 0: stopped at step 9: rank 1: {LUCK}"
)
FAILED = {
    "take-sampled": NO_LUCK,
    "take-unsampled": Expected(
        (f"7: {LUCK}", ""), 8, [(0, (7, 8))], f"rank 0: stopped at step 7: {LUCK}"
    ),
    "take-normuon": NO_LUCK,
    "begin-sampled": NO_LUCK,
    "end-sampled": Expected(
        (f"12: rank 1: {LUCK}", f"9: {LUCK}"),
        11,
        [(1, (9, 11))],
        f"rank 0: stopped at step 12: rank 1: {LUCK}",
    ),
    "collect-first": Expected((f"9: {LUCK}", ""), 8, [], f"rank 0: stopped at step 9: {LUCK}"),
    "closing": Expected(
        (f"9: rank 1: {LUCK}", f"7: {LUCK}"),
        8,
        [(1, (7, 8))],
        f"rank 0: stopped at step 9: rank 1: {LUCK}",
    ),
}


def test_error_in_a_hook_of_one_rank_ends_the_recording_of_all(tmp_path: Path) -> None:
    expect_told(on_ranks(2, failing_hooks, tmp_path, timeout=300), tmp_path, FAILED)


# -- a rank leaves, or is not there at a sampled step ---------------------------------------------


def unhook(training: Training) -> None:
    assert training.lens
    training.lens._unhook()


def let_go(training: Training) -> None:
    """Go on with a new optimizer in the same state; the old one and its recorder are garbage."""
    (old,) = training.optimizers
    training.lens = None
    parameters = [p for group in old.param_groups for p in group["params"]]
    new = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0)
    new.load_state_dict(old.state_dict())
    training.optimizers = [new]
    del old
    gc.collect()


def leave_by_exception(training: Training) -> None:
    assert training.lens
    with suppress(OutOfLuck), training.lens:
        raise OutOfLuck


def midway(act: Act) -> Act:
    """Make something that is done in the midst of the next step, before the optimizer's."""

    def plan(training: Training) -> None:
        work = training.forward_and_backward

        def work_and_act() -> None:
            work()
            del training.forward_and_backward
            act(training)

        training.forward_and_backward = work_and_act

    return plan


def sleep_like_a_log(_: Training) -> None:
    """Be stopped for longer than a rank waits for the others where it is told not to."""
    awake = subprocess.Popen(["sh", "-c", f"sleep 2; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    awake.wait()


def stop_helper(training: Training) -> None:
    os.kill(training.helper, signal.SIGSTOP)


@contextmanager
def no_room(*steps: int, on: int) -> Iterator[None]:
    """Have the helper process of one rank too slow for all that is of these steps."""
    send = feed.Feed.send

    def send_or_drop(self: Any, kind: str, header: Any, *rest: Any, **named: Any) -> bool:
        if dist.get_rank() == on and header.get("step") in steps and kind != "event":
            return False
        return send(self, kind, header, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed.Feed, "send", send_or_drop)
        yield


def leaving(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = {"twins": twin("adamw").updates}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helper, "MERGE_SECONDS", 1.0)  # of the helpers too, which are forks
        for name, acts in (
            ("close", [at(8, close, on=1)]),
            ("close-first", [at(8, close, on=0)]),
            ("close-midway", [at(9, midway(close), on=1)]),
            ("exception", [at(8, leave_by_exception, on=1)]),
            ("exception-midway", [at(9, midway(leave_by_exception), on=1)]),
            ("garbage", [at(8, let_go, on=1)]),
            ("flush", [at(7, flush, on=1), at(10, flush, on=0), at(10, flush, on=0)]),
            ("asleep-between", [at(9, sleep_like_a_log, on=1)]),
        ):
            told[name] = train(folder / f"{name}.h5", *acts)
        with no_room(7, 8, 9, on=1):
            told["no-room"] = train(folder / "no-room.h5", on_full="drop")
        patch.setattr(company, "WORD_SECONDS", 1.0)
        told["unhook"] = train(folder / "unhook.h5", at(8, unhook, on=1))
        told["asleep"] = train(folder / "asleep.h5", at(9, midway(sleep_like_a_log), on=1))
        patch.setattr(recorder, "CLOSE_SECONDS", 2.0 if dist.get_rank() else 60.0)
        helpers: list[int] = []
        told["stopped"] = train(
            folder / "stopped.h5",
            at(8, stop_helper, on=1),
            at(16, lambda training: helpers.append(training.helper)),
        )
        if dist.get_rank():
            os.kill(helpers[0], signal.SIGCONT)
    return told


LEFT = "rank 1: its recording has ended"
AWAY = "a rank did not come by in time"
UNDISTURBED = Expected(("", ""), 16, [], "finished")
LEAVING = {
    "close": Expected((f"9: {LEFT}", ""), 8, [(1, (8, 8))], f"rank 0: stopped at step 9: {LEFT}"),
    "close-first": Expected(
        ("", ""),
        8,
        [(0, (8, 8))],
        "rank 1: stopped at step 9: rank 0: its recording has ended",
    ),
    "close-midway": Expected((f"9: {LEFT}", ""), 8, [], f"rank 0: stopped at step 9: {LEFT}"),
    "exception": Expected(
        (f"9: {LEFT}", ""), 8, [(1, (8, 8))], f"rank 0: stopped at step 9: {LEFT}"
    ),
    "exception-midway": Expected((f"9: {LEFT}", ""), 8, [], f"rank 0: stopped at step 9: {LEFT}"),
    "garbage": Expected((f"9: {LEFT}", ""), 8, [(1, (7, 8))], f"rank 0: stopped at step 9: {LEFT}"),
    "flush": UNDISTURBED,
    "asleep-between": UNDISTURBED,
    "no-room": Expected(("", ""), 16, [(1, (7, 9))], "finished"),
    "unhook": Expected((f"9: {AWAY}", ""), 8, [(1, (8, 8))], f"rank 0: stopped at step 9: {AWAY}"),
    "asleep": Expected((f"9: {AWAY}", ""), 8, [], f"rank 0: stopped at step 9: {AWAY}"),
    "stopped": Expected(
        ("", "16: the helper process did not answer within 2 s"), 16, [], "finished"
    ),
}


def test_rank_that_leaves_or_is_away_holds_nobody_up(tmp_path: Path) -> None:
    told = on_ranks(2, leaving, tmp_path, timeout=300)
    expect_told(told, tmp_path, LEAVING)
    assert "kept in parts: rank 1 has not finished" in told[0]["close-first"].summary
    assert "kept in parts: rank 1 has not finished" in told[0]["stopped"].summary
    run = open_run(tmp_path / "no-room.h5")
    assert "samples dropped" in told[1]["no-room"].summary
    lost = [np.isnan(run.spectrum(name, 9)).all() for name in NAMES if has_spectrum(run, name, 9)]
    assert run.dropped == 3 + lost.count(True) + (3 - len(lost))
    assert not all(lost), "of what the other rank owned at step 9 nothing is lost"
    later = [run.spectra(name).sigma[run.spectra(name).steps > 9] for name in NAMES]
    assert all(np.isfinite(sigma).all() and len(sigma) == 2 for sigma in later)


def has_spectrum(run: Run, name: str, step: int) -> bool:
    return step in run.spectra(name).steps


# -- ranks that meet, or do not -------------------------------------------------------------------


def attach_only(on: int | None, path: Path, **options: Any) -> Any:
    """Attach on one rank or all; returns what became of it, and how long it took."""
    began = time.monotonic()
    training = Training()
    with listening() as said:
        lens = error = None
        if on in (None, dist.get_rank()):
            options = {"every": EVERY, "quiet": True, **options}
            try:
                lens = attach(training.model, training.optimizers, path, **options)
            except AttachError as refused:
                error = str(refused)
            training.lens = lens
            took = time.monotonic() - began
        training.take(2)
        summary, active = (lens.summary, lens.active) if lens else ("", False)
        if lens:
            lens.close()
    same = equal(training, twin("adamw"))
    dist.barrier()
    return {
        "same": same,
        "said": said,
        "error": error,
        "active": active,
        "summary": summary,
        "took": took if on in (None, dist.get_rank()) else 0.0,
        "left": sorted(p.name for p in path.parent.glob(path.name + "*")),
    }


def meeting(folder: Path) -> dict[str, Any]:
    rank = dist.get_rank()
    told: dict[str, Any] = {"twins": twin("adamw").updates}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(company, "MEET_SECONDS", 1.0)
        told["alone"] = attach_only(0, folder / "alone.h5")
        told["alone-raise"] = attach_only(0, folder / "alone.h5", on_error="raise")
        told["other-alone"] = attach_only(1, folder / "alone.h5")
        patch.setattr(company, "MEET_SECONDS", 60.0)
        told["together"] = attach_only(None, folder / "together.h5")
        time.sleep(1.5 * rank)
        told["late"] = attach_only(None, folder / "late.h5")
        told["every"] = attach_only(None, folder / "x.h5", every=2 + rank)
        told["include"] = attach_only(None, folder / "x.h5", include=["0", "2", "4"][: 2 + rank])
        told["path"] = attach_only(None, folder / f"path{rank}.h5")
        told["exists"] = attach_only(None, folder / "together.h5")
        with pytest.MonkeyPatch.context() as patch:
            if rank:
                patch.setattr(feed, "HELPER", ("/bin/false",))
            told["helper"] = attach_only(None, folder / "x.h5")
        hear = company.Company.hear

        def hear_and_block(self: Any, word: str, rank: int) -> Any:
            said = hear(self, word, rank)
            if word == "opened" and self.rank == 1:
                (parts_of(folder / "blocked.h5") / "rank00001").write_text("in the way")
            return said

        patch.setattr(company.Company, "hear", hear_and_block)
        told["folder"] = attach_only(None, folder / "blocked.h5")
        patch.undo()
        told["last"] = train(folder / "last.h5")
        # After a restart, new processes may find what the old ones left in the store.
        patch.setattr(company, "MEET_SECONDS", 10.0)
        patch.setenv("TORCHELASTIC_RUN_ID", "job")
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        told["restarted"] = train(folder / "restarted.h5")
    return told


def test_ranks_meet_or_go_on_unrecorded(tmp_path: Path) -> None:
    told = on_ranks(2, meeting, tmp_path, timeout=300)
    ones: list[list[Any]] = [[of[name] for of in told] for name in told[0] if name != "twins"]
    assert all((x.same if isinstance(x, Told) else x["same"]) for of in ones for x in of)
    for name, rank, other in (("alone", 0, 1), ("other-alone", 1, 0)):
        (text,) = told[rank][name]["said"]
        assert re.search(
            rf"nothing is recorded at \S+: attach was not called on rank {other} within 1 s, .*: "
            "call it on every rank",
            text,
        )
        assert not told[other][name]["said"]
        assert not told[rank][name]["active"]
        assert told[rank][name]["left"] == []
        assert told[rank][name]["took"] < HANG
    assert "attach was not called on rank 1" in told[0]["alone-raise"]["error"]
    for name in ("together", "late", "path"):
        assert all(of[name]["active"] and not of[name]["said"] for of in told), name
    assert told[0]["late"]["took"] > 1.4
    assert [of["path"]["left"] for of in told] == [["path0.h5"], []]
    for name, error in (
        ("every", "every differs between ranks: 2 on rank 0, 3 on rank 1"),
        ("include", "the model differs between ranks: 2 matrices .* on rank 0, 3 matrices"),
        ("exists", "together.h5: exists already"),
        ("helper", "rank 1: the helper process ended with exit code 1"),
        ("folder", "rank 1: .*blocked.h5.parts/rank00001"),
    ):
        errors = {of[name]["error"] for of in told}
        assert len(errors) == 1, name
        assert re.search(error, errors.pop() or ""), name
        assert all(of[name]["took"] < HANG for of in told), name
    assert not list(tmp_path.glob("x.h5*"))
    for name in ("together", "late", "path0"):
        run = open_run(tmp_path / f"{name}.h5")
        assert (run.status, len(run.steps)) == ("finished", 2)
        expect_true(run, told[0]["twins"])
    assert [file.name for file in parts_of(tmp_path / "blocked.h5").iterdir()] == ["rank00001"]
    expect_told(told, tmp_path, {"last": UNDISTURBED, "restarted": UNDISTURBED})


# -- the training's own collectives ---------------------------------------------------------------


COLLECTIVES = [
    name
    for name in (*dir(dist), "_allgather_base", "_reduce_scatter_base")
    if re.fullmatch(
        r"_?(all|reduce|gather|scatter|broadcast|barrier|send|recv|isend|irecv).*", name
    )
    and name.islower()
]
OF_GROUPS = [
    name
    for name in dir(dist.ProcessGroup)
    if re.fullmatch(r"_?(all|reduce|gather|scatter|broadcast|barrier|send|recv).*", name)
]


class Counter:
    """Counts calls of collectives while a hook runs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.recorders: list[Recorder] = []
        for where, names in (
            (dist, COLLECTIVES),
            (dist.distributed_c10d, COLLECTIVES),
            (dist.ProcessGroup, OF_GROUPS),
            (DTensor, ["full_tensor", "redistribute"]),
        ):
            for name in names:
                if callable(work := getattr(where, name, None)) and not isinstance(work, type):
                    patch.setattr(where, name, self.counted(f"{where.__name__}.{name}", work))

    def counted(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def count(*given: Any, **named: Any) -> Any:
            if any(lens._in_hook for lens in self.recorders):
                self.calls.append(name)
            return work(*given, **named)

        return count


def sequence_of(group: Any) -> int:
    """Return how many collectives a group has begun, as gloo itself counts them."""
    backend = getattr(group, "_get_backend", lambda _: group)(torch.device("cpu"))
    return int(backend._get_sequence_number_for_group())


def counting(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for kind in ("adamw", "normuon"):
        expected = twin(kind)
        told[kind] = expected.updates
        mine: list[tuple[int, int, int]] = []
        with pytest.MonkeyPatch.context() as patch:
            counter = Counter(patch)
            plain = Training(kind)
            before = sequence_of(dist.group.WORLD)
            plain.take(STEPS)
            unrecorded = sequence_of(dist.group.WORLD) - before
            training = Training(kind, folder / f"count-{kind}.h5")
            assert training.lens
            assert training.lens._share
            counter.recorders.append(training.lens)
            group = training.lens._share.exchange._group
            before = sequence_of(dist.group.WORLD)
            for step in range(1, STEPS + 1):
                of_group = sequence_of(group)
                training.take()
                mine.append((step, sequence_of(group) - of_group, 0))
            recorded = sequence_of(dist.group.WORLD) - before
            # The counter counts: it is not blind to what it is to find.
            training.lens._in_hook = True
            dist.barrier()
            training.model[0].weight.full_tensor()
            training.lens._in_hook = False
            seen = list(counter.calls)
            training.lens.close()
        told[f"count-{kind}"] = {
            "same": equal(training, expected),
            "unrecorded": unrecorded,
            "recorded": recorded,
            "mine": [(step, count) for step, count, _ in mine],
            "calls": seen,
        }
    return told


def test_no_collective_of_the_training_is_used(tmp_path: Path) -> None:
    sampled = [step for step in range(1, STEPS + 1) if step == 1 or step % EVERY == 0]
    told = on_ranks(2, counting, tmp_path)
    for kind in ("adamw", "normuon"):
        for of in told:
            counted = of[f"count-{kind}"]
            assert counted["same"]
            assert counted["recorded"] == counted["unrecorded"] > STEPS
            # One for health, one for the rows.
            assert [step for step, count in counted["mine"] if count] == sampled
            assert all(count in (0, 2) for _, count in counted["mine"])
            assert counted["calls"] == [
                "torch.distributed.barrier",
                "ProcessGroup.barrier",
                "DTensor.full_tensor",
                "DTensor.redistribute",
            ], "only what the test itself called"
        expect_true(open_run(tmp_path / f"count-{kind}.h5"), told[0][kind])


def close_in_a_child(training: Training) -> None:
    """Have a forked process close its copy of the recorder, and let go of it."""
    child = os.fork()
    if child == 0:
        try:
            training.recorder.close()
            training.lens = None
            gc.collect()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def groups_come_and_go(folder: Path) -> dict[str, Any]:
    """More groups and a child after `attach`, two recordings at once, an end before close()."""
    told: dict[str, Any] = {"twins": twin("adamw").updates, "normuon": twin("normuon").updates}
    first = Training("adamw", folder / "first.h5")
    second = Training("normuon", folder / "second-normuon.h5")
    same = []
    for step in range(STEPS):
        first.take()
        second.take()
        if step == 5 and dist.get_rank() == 1:
            close_in_a_child(first)
        if step in (3, 8):
            group = dist.new_group()
            total = torch.ones(3)
            dist.all_reduce(total, group=group)
            same.append(total.tolist() == [2.0, 2.0, 2.0])
            if step == 8:
                dist.destroy_process_group(group)
    same += [equal(first, twin("adamw")), equal(second, twin("normuon"))]
    close(second)
    # At the same time on all ranks: whoever keeps the store leaves last, as after any training.
    dist.barrier()
    dist.destroy_process_group()
    close(first)
    return told | {"same": same}


def test_groups_and_children_may_come_and_go(tmp_path: Path) -> None:
    told = on_ranks(2, groups_come_and_go, tmp_path)
    assert all(of["same"] == [True] * 4 for of in told)
    for name, kind in (("first", "twins"), ("second-normuon", "normuon")):
        run = open_run(tmp_path / f"{name}.h5")
        assert (run.status, len(run.steps), run.holes) == ("finished", STEPS, [])
        expect_true(run, told[0][kind])


# -- a rank dies ---------------------------------------------------------------------------------


PAIRS = ("in-hook", "in-hook-too", "with-its-helper", "ctrl-c")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(folder: Path, seeds: list[int]) -> None:
    """Of every pair of ranks one dies in a hook, or both are interrupted."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    mesh = init_device_mesh("cpu", (len(PAIRS), 2), mesh_dim_names=("pair", "place"))["place"]
    pair, place = divmod(dist.get_rank(), 2)
    expected = twin("adamw", mesh)
    np.savez(folder / "twins.npz", **expected.updates)
    training = Training("adamw", folder / f"{PAIRS[pair]}.h5", mesh)
    other = dist.get_rank() ^ 1
    store = dist.distributed_c10d._get_default_store()
    store.set(f"pid{dist.get_rank()}", str(os.getpid()))
    with open(folder / f"{PAIRS[pair]}.{place}.txt", "w", 1) as log:
        try:
            with training.recorder:
                training.take(6)
                flush(training)
                pid = int(store.get(f"pid{other}"))
                dist.barrier()
                if PAIRS[pair] == "ctrl-c":
                    training.take(4)
                    if place == 0:
                        os.kill(pid, signal.SIGINT)
                        os.kill(os.getpid(), signal.SIGINT)
                elif place == 1:
                    with at_opcode(seeds[pair], die_with(training, pair), HOOKS) as seen:
                        training.take(6)
                    print("not reached", seen, file=log)
                    die_with(training, pair)()
                training.take(STEPS - training.step)
        except BaseException as error:
            print("equal" if equal(training, expected) else "DIFFERENT", file=log)
            print(type(error).__name__, " ".join(str(error).split())[:100], file=log)
            raise


def die_with(training: Training, pair: int) -> Callable[[], None]:
    def act() -> None:
        if PAIRS[pair] == "with-its-helper":
            os.kill(training.helper, signal.SIGKILL)
        die()

    return act


def test_killed_or_interrupted_ranks_leave_a_true_recording(tmp_path: Path) -> None:
    seeds = [random.Random(seed).randrange(500, 9000) for seed in range(len(PAIRS))]
    with pytest.raises(AssertionError, match="no result from ranks"):
        on_ranks(2 * len(PAIRS), dying, tmp_path, seeds)
    with np.load(tmp_path / "twins.npz") as file:
        updates = dict(file)
    for pair, name in enumerate(PAIRS):
        path = tmp_path / f"{name}.h5"
        wait_for(lambda: not open_run(path).live)  # noqa: B023, it is waited for right here
        run = open_run(path)
        expect_true(run, updates)
        assert run.steps.tolist() == list(range(1, len(run.steps) + 1))
        assert 6 <= len(run.steps) <= 13
        assert run.status != "finished"
        assert not run.damaged
        assert run.ranks == (2 * pair, 2 * pair + 1)
        survivor, *error = (tmp_path / f"{name}.0.txt").read_text().splitlines()
        assert survivor == "equal", name
        if name == "ctrl-c":
            assert len(run.steps) >= 9
            assert "KeyboardInterrupt" in run.status
            continue
        # The survivor ends by its own collective, and its recording has all it did.
        assert error[0].startswith("RuntimeError"), name
        assert (tmp_path / f"{name}.1.txt").read_text() == "", name
        assert {hole.rank for hole in run.holes} <= {2 * pair + 1}
        if name == "with-its-helper":
            assert [hole.steps for hole in run.holes] == [(7, len(run.steps))][: len(run.steps) - 6]


# -- torchrun starts it again ---------------------------------------------------------------------


def restarted(folder: Path) -> None:
    """Train sharded and replicated, recorded; rank 1 dies once; go on from step 6."""
    dist.init_process_group("gloo")
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    kinds = ("adamw", "ddp")
    trainings = [Training(kind) for kind in kinds]
    if attempt:  # instead of loading a checkpoint: what it would hold
        for training in trainings:
            training.take(6)
    for kind, training in zip(kinds, trainings, strict=True):
        training.lens = attach(
            training.model, training.optimizers, folder / f"{kind}.h5", every=EVERY
        )
    for step in range(training.step + 1, STEPS + 1):
        for training in trainings:
            training.data = int(attempt > 0)
            training.take()
        if attempt == 0 and step == 10 and dist.get_rank() == 1:
            die()
    for kind, training in zip(kinds, trainings, strict=True):
        assert training.lens
        training.lens.close()
        expected = twin(kind, None, 6)
        assert equal(training, expected)
        if dist.get_rank() == 0:
            np.savez(folder / f"{kind}.npz", **expected.updates)
    dist.destroy_process_group()


def test_restart_by_torchrun_goes_on_with_the_recording(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(TESTS)!r})\n"
        "from test_hooks_company import restarted\n"
        "restarted(Path(sys.argv[1]))\n"
    )
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, *torchrun, script, tmp_path],
        # A store of its own for each attempt: in a shared one torch's own groups may find the
        # addresses of processes that are dead.
        env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    for kind in ("adamw", "ddp"):
        run = open_run(tmp_path / f"{kind}.h5")
        with np.load(tmp_path / f"{kind}.npz") as file:
            expect_true(run, dict(file))
        assert (run.status, run.holes) == ("finished", [])
        assert run.steps.tolist() == list(range(1, STEPS + 1))
        # Step 10 too, if rank 0 met the loss of rank 1 as an error and ended its recording by it.
        assert run.overlaps in (3, 4)
        (resumed,) = [event for event in run.events if event.kind == "resumed"]
        assert resumed.text == "restarted by torchrun: attempt 1"
