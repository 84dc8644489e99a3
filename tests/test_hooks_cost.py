"""What recording costs a training: bounded memory, a measured share of time, a budget kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from normuon_lens.hooks import Recorder, applied, attach, opening
from normuon_lens.hooks.tap import Look
from normuon_lens.hooks.track import Track
from normuon_lens.optim import NorMuon
from normuon_lens.runfile import Run, open_run

SECONDS = 120.0
"""A bound that only a hang reaches, also on a busy machine."""

# -- memory --------------------------------------------------------------------------------------

PREPARE = """
import json, os
import torch
from torch import nn
from normuon_lens.hooks import attach, opening
from normuon_lens.optim import NorMuon

torch.set_num_threads(1)
PAGE = os.sysconf("SC_PAGE_SIZE")

def memory():
    "Resident bytes of this process: its own, and those it shares (the ring, libraries)."
    with open("/proc/self/statm") as file:
        resident, shared = map(int, file.read().split()[1:3])
    return (resident - shared) * PAGE, shared * PAGE

def make(count, m, n, rule):
    torch.manual_seed(0)
    model = nn.ParameterList(torch.randn(m, n) for _ in range(count))
    optimizer = {
        "SGD": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9),
        "AdamW": lambda p: torch.optim.AdamW(p, 1e-3),
        "NorMuon": lambda p: NorMuon(p, 1e-3),
    }[rule](model.parameters())
    for parameter in model:
        parameter.grad = torch.randn(m, n)
    return model, optimizer
"""

STEADY = """
model, optimizer = make(2, ROWS, 16, RULE)
lens = attach(
    model, optimizer, "x.h5", every=20, on_full="wait", quiet=True, on_error="raise", **OPTIONS
)
own = []
for step in range(1, 2501):
    model[0].grad.mul_(-1.0)
    optimizer.step()
    lens.log(loss=model[0].detach().square().mean(), step=step)
    if step >= 500 and step % 100 == 0:
        own.append(memory()[0])
lens.close()
print(json.dumps(own))
"""


def run_script(script: str, folder: Path) -> Any:
    """Run a script to its end and return what it printed as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        # Whatever is larger is given back when it is freed, so what stays resident is in use.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="memory is read from /proc"
)


@needs_proc
@pytest.mark.parametrize(
    ("rule", "rows", "options"),
    [
        ("SGD", 512, {}),
        ("AdamW", 512, {"stages": True, "budget": 0.5}),
        ("NorMuon", 256, {"stages": True, "shadow": ["muon"]}),
    ],
    ids=["SGD", "AdamW with a budget", "NorMuon with stages and a shadow"],
)
def test_memory_does_not_grow_with_the_steps(
    rule: str, rows: int, options: dict[str, Any], tmp_path: Path
) -> None:
    script = f"{PREPARE}\nRULE, ROWS, OPTIONS = {rule!r}, {rows}, {options!r}\n{STEADY}"
    own = run_script(script, tmp_path)
    assert open_run(tmp_path / "x.h5").steps.tolist() == list(range(1, 2501))
    # 200 bytes a step, over 2,000 steps: less than an empty dict and a number in it. A row of
    # norms would show as 4 MB. Without a leak it grows by three pages of 4 KB.
    assert own[-1] - own[0] < 4e5


ATTACHED = """
model, optimizer = make(2, 4096, 256, RULE)
small = make(1, 8, 8, RULE)
# Warm-up: all code is loaded, the optimizer has its state.
with attach(*small, "small.h5", quiet=True, stages=STAGES):
    small[1].step()
for _ in range(3):
    optimizer.step()
before = memory()
lens = attach(
    model, optimizer, "x.h5", every=5, matrices_every=0, stages=STAGES, quiet=True, on_error="raise"
)
after = []
for _ in range(6):
    optimizer.step()
    after.append(memory())
lens.close()
print(json.dumps([max(now[i] - before[i] for now in after) for i in (0, 1)]))
"""


@needs_proc
@pytest.mark.parametrize(
    ("rule", "stages", "copies"), [("SGD", False, 1), ("AdamW", True, 1), ("NorMuon", True, 0)]
)
def test_memory_of_attaching(rule: str, stages: bool, copies: int, tmp_path: Path) -> None:
    """One copy of the recorded weights where updates are differences of them, else none."""
    script = f"{PREPARE}\nRULE, STAGES = {rule!r}, {stages!r}\n{ATTACHED}"
    own, shared = run_script(script, tmp_path)
    weights = 2 * 4096 * 256 * 4
    ring = opening.SAMPLES_IN_FLIGHT * weights * (4 if stages else 1)
    assert opening.RING_BYTES[0] <= ring <= opening.RING_BYTES[1]
    # An eighth of room for what is small: row norms, headers, the ends of pipes.
    assert copies * weights <= own <= (copies + 0.125) * weights
    assert weights <= shared <= ring + 0.125 * weights


# -- time ----------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when somebody says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def hooks_take(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        before: float = 0.0,
        norms: float = 0.0,
        sample: float = 0.0,
    ) -> None:
        """Let a step's hooks take that long."""
        taken_before, taken_after = applied.Difference.before, applied.Difference.after

        def slow_before(tap: applied.Difference, look: Look) -> None:
            self.now += before
            taken_before(tap, look)

        def slow_after(tap: applied.Difference, look: Look) -> None:
            self.now += norms + (sample if look.sampled else 0.0)
            taken_after(tap, look)

        monkeypatch.setattr(applied.Difference, "before", slow_before)
        monkeypatch.setattr(applied.Difference, "after", slow_after)


class Slow(torch.optim.Optimizer):
    """Gradient descent whose step takes a second."""

    def __init__(self, weight: nn.Parameter, clock: Clock) -> None:
        self.clock = clock
        super().__init__([weight], {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.clock.now += 1.0
        for weight in self.param_groups[0]["params"]:
            weight.sub_(weight.grad, alpha=0.1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def train(optimizer: Slow, steps: int) -> None:
    weight: Tensor = optimizer.param_groups[0]["params"][0]
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()


def begin(clock: Clock, path: Path, **options: Any) -> tuple[Slow, Recorder]:
    weight = nn.Parameter(torch.zeros(4, 3))
    optimizer = Slow(weight, clock)
    model = nn.ParameterDict({"w": weight})
    return optimizer, attach(model, optimizer, path, on_full="wait", quiet=True, **options)


def test_overhead_is_what_the_hooks_took(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock.hooks_take(monkeypatch, before=0.02, norms=0.03, sample=0.5)
    optimizer, lens = begin(clock, tmp_path / "x.h5", every=10)
    clock.now += 77.0  # until the first step it is not the training's time
    train(optimizer, 40)
    samples = 5  # 1, 10, 20, 30, 40
    hooks = 40 * 0.05 + samples * 0.5
    assert lens.seconds == pytest.approx(hooks)
    assert lens.overhead == pytest.approx(hooks / 40)
    clock.now += 60.0  # a validation between steps is part of the training once it goes on
    train(optimizer, 1)
    assert lens.overhead == pytest.approx((hooks + 0.05) / (41 + 60))
    assert f"overhead {(hooks + 0.05) / 101:.1%}" in lens.summary
    lens.close()
    assert f"overhead {(hooks + 0.05) / 101:.1%}" in lens.summary


def test_overhead_counts_what_is_taken_in_the_midst_of_a_step(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Our own optimizers show their matrices while they step."""

    class SlowNorMuon(NorMuon):
        def _update(self, gradient: Tensor, state: Any, group: Any) -> Any:
            clock.now += 1.0
            return super()._update(gradient, state, group)

    taken = Track.take

    def slow_take(track: Track, *given: Any, **more: Any) -> None:
        clock.now += 0.05
        taken(track, *given, **more)

    monkeypatch.setattr(Track, "take", slow_take)
    weight = nn.Parameter(torch.zeros(4, 3))
    optimizer = SlowNorMuon([weight], 0.1)
    with attach(nn.ParameterDict({"w": weight}), optimizer, tmp_path / "x.h5", quiet=True) as lens:
        for _ in range(20):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        assert lens.seconds == pytest.approx(20 * 0.05)
        assert lens.overhead == pytest.approx(0.05)


def test_overhead_without_a_second_step_is_unknown(clock: Clock, tmp_path: Path) -> None:
    _, lens = begin(clock, tmp_path / "x.h5")
    assert np.isnan(lens.overhead)
    lens.close()


def cost_between(lens: Recorder, clock: Clock, optimizer: Slow, steps: int) -> float:
    """Train on; returns the hooks' time relative to the rest."""
    seconds, began = lens.seconds, clock.now
    train(optimizer, steps)
    hooks = lens.seconds - seconds
    return hooks / (clock.now - began - hooks)


def schedule_events(run: Run) -> list[str]:
    return [event.text for event in run.events if event.kind == "schedule"]


@pytest.mark.parametrize(
    ("norms", "sample", "norms_thin"),
    [(0.01, 2.0, False), (0.3, 0.0, True), (0.2, 5.0, True)],
    ids=["dear samples", "dear norms", "both"],
)
def test_budget_thins_the_schedule_and_says_so(
    norms: float,
    sample: float,
    norms_thin: bool,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    clock.hooks_take(monkeypatch, norms=norms, sample=sample)
    optimizer, lens = begin(clock, tmp_path / "x.h5", every=10, budget=0.05)
    first = cost_between(lens, clock, optimizer, 50)
    assert first > 0.15, "else there is nothing to keep within"
    train(optimizer, 100)
    settled = cost_between(lens, clock, optimizer, 2000)
    lens.close()
    assert settled <= 0.05 * 1.02  # whole steps do not divide the time evenly
    assert settled > 0.02, "it is to use what it may"
    run = open_run(tmp_path / "x.h5")
    events = schedule_events(run)
    assert events
    assert "5.0%" in events[0]
    assert len(events) <= 4, "it goes to and fro"
    taken = np.flatnonzero(np.isfinite(run.neuron_norms("w")[:, 0]))
    gaps = np.diff(run.steps[taken][-50:])
    assert gaps.mean() > 2 if norms_thin else (gaps == 1).all()
    sampled = np.diff(run.spectrum_steps()[-2:])
    assert sampled > 10 if sample else sampled >= 10
    assert len(run.steps) == 2150, "every step has its row, with its scalars"


def test_budget_that_is_not_needed_changes_nothing(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock.hooks_take(monkeypatch, norms=0.01, sample=0.1)
    optimizer, lens = begin(clock, tmp_path / "x.h5", every=10, budget=0.05)
    train(optimizer, 300)
    lens.close()
    run = open_run(tmp_path / "x.h5")
    assert schedule_events(run) == []
    assert run.spectrum_steps().tolist() == [1, *range(10, 301, 10)]
    assert np.isfinite(run.neuron_norms("w")).all()


def test_budget_returns_to_what_was_asked_for(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Something else kept the machine busy for a while."""
    optimizer, lens = begin(clock, tmp_path / "x.h5", every=10, budget=0.05)
    with monkeypatch.context() as busy:
        clock.hooks_take(busy, norms=0.2, sample=3.0)
        train(optimizer, 600)
    train(optimizer, 3000)
    lens.close()
    run = open_run(tmp_path / "x.h5")
    assert len(schedule_events(run)) >= 2
    assert np.isfinite(run.neuron_norms("w")[-100:]).all()
    assert np.diff(run.spectrum_steps()[-5:]).tolist() == [10, 10, 10, 10]
