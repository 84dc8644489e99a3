"""What is seen on the way through an optimizer is what went through it, and looking is harmless."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

from normuon_lens.analysis import measure
from normuon_lens.errors import AttachError
from normuon_lens.hooks import attach
from normuon_lens.hooks.track import Track
from normuon_lens.optim import Muon, NorMuon
from normuon_lens.runfile import open_run

pytestmark = pytest.mark.usefixtures("forked_helpers")

LR, BETA = 1e-2, 0.95
STAGES = ["gradient", "momentum", "orthogonalized", "normalized", "update"]

BUILD: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "NorMuon": lambda p: NorMuon(p, LR, weight_decay=0.0, ns_dtype=torch.float32),
    "Muon": lambda p: Muon(p, LR, nesterov=True),
    "torch Muon": lambda p: torch.optim.Muon(p, LR),
    "AdamW": lambda p: torch.optim.AdamW(p, LR),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
}


def train(optimizer: torch.optim.Optimizer, weight: nn.Parameter, steps: int) -> list[Tensor]:
    """Train towards a fixed product; returns the gradient that every step began with."""
    generator = torch.Generator().manual_seed(2)
    x, target = (torch.randn(32, side, generator=generator) for side in (6, 12))
    gradients = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (x @ weight.T - target).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            closure()
            assert weight.grad is not None
            gradients.append(weight.grad.clone())
            optimizer.step()
    return gradients


def new_weight() -> nn.Parameter:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(12, 6))


@pytest.mark.parametrize("name", BUILD)
def test_looking_changes_nothing(name: str, tmp_path: Path) -> None:
    plain, seen = new_weight(), new_weight()
    train(BUILD[name]([plain]), plain, 12)
    optimizer = BUILD[name]([seen])
    with attach(nn.ParameterDict({"w": seen}), optimizer, tmp_path / "x.h5", every=3, stages=True):
        train(optimizer, seen, 12)
    assert torch.equal(plain, seen)
    run = open_run(tmp_path / "x.h5")
    seen_of = {"NorMuon": STAGES[1:4], "Muon": STAGES[1:3], "torch Muon": STAGES[1:3]}
    between = seen_of.get(name, [])
    assert run.stages == ["gradient", *between, "update"]
    for stage in run.stages:
        assert run.spectrum_steps(stage).tolist() == [1, 3, 6, 9, 12]
        assert np.isfinite(run.neuron_norms("w", stage)).all()
        assert np.isfinite(measure(run, "condition_number", stage=stage).values).all()


def test_every_stage_follows_from_the_one_before(tmp_path: Path) -> None:
    """The recorded matrices satisfy NorMuon's equations, one by one, in float64."""
    weight = new_weight()
    optimizer = BUILD["NorMuon"]([weight])
    model = nn.ParameterDict({"w": weight})
    with attach(model, optimizer, tmp_path / "x.h5", every=1, stages=True):
        gradients = train(optimizer, weight, 8)
    run = open_run(tmp_path / "x.h5")
    momentum, v = np.zeros((12, 6)), np.zeros((12, 1))
    for step, gradient in enumerate(gradients, start=1):
        seen = {stage: run.update("w", step, stage).astype(float) for stage in STAGES}
        np.testing.assert_array_equal(seen["gradient"], gradient)
        momentum = BETA * momentum + (1 - BETA) * seen["gradient"]
        np.testing.assert_allclose(seen["momentum"], momentum, rtol=1e-4, atol=1e-7)
        u, _, vt = np.linalg.svd(momentum, full_matrices=False)
        lifted = np.diag(u.T @ seen["orthogonalized"] @ vt.T)
        assert ((lifted > 0.65) & (lifted < 1.21)).all(), "same directions, values near one"
        v = BETA * v + (1 - BETA) * (seen["orthogonalized"] ** 2).mean(axis=1, keepdims=True)
        normalized = seen["orthogonalized"] / np.sqrt(v)
        np.testing.assert_allclose(seen["normalized"], normalized, rtol=1e-4)
        scaled = -0.2 * LR * normalized / np.sqrt((normalized**2).mean())
        # The difference of two weights of size 1 carries 24 bits of them.
        np.testing.assert_allclose(seen["update"], scaled, atol=3e-7)
        np.testing.assert_allclose(
            run.neuron_norms("w", "momentum")[step - 1],
            np.linalg.norm(seen["momentum"], axis=1),
            rtol=1e-6,
        )


def test_a_users_own_observer_keeps_seeing_and_is_put_back(tmp_path: Path) -> None:
    weight = new_weight()
    optimizer = NorMuon([weight], LR)
    seen: list[str] = []

    def mine(parameter: nn.Parameter, stage: str, matrix: Tensor) -> None:
        seen.append(stage)

    optimizer.stage_observer = mine
    with attach(nn.ParameterDict({"w": weight}), optimizer, tmp_path / "x.h5", stages=True):
        train(optimizer, weight, 4)
    assert seen == STAGES[1:] * 4
    assert optimizer.stage_observer is mine


def test_failure_while_looking_is_a_warning_after_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, weight = new_weight(), new_weight()
    train(NorMuon([plain], LR), plain, 6)
    taken = Track.take

    def failing(self: Track, item: object, stage: str, *rest: object, **more: object) -> None:
        if stage == "normalized" and lens.steps == 3:
            raise MemoryError("no room for a look")
        taken(self, item, stage, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Track, "take", failing)
    optimizer = NorMuon([weight], LR)
    lens = attach(nn.ParameterDict({"w": weight}), optimizer, tmp_path / "x.h5", stages=True)
    with pytest.warns(RuntimeWarning, match="stopped at step 3.*no room for a look"):
        train(optimizer, weight, 6)
    assert torch.equal(plain, weight)
    assert optimizer.stage_observer is None
    deadline = time.monotonic() + 60  # that only a hang reaches
    while open_run(tmp_path / "x.h5").live and time.monotonic() < deadline:
        time.sleep(0.01)  # the training does not wait for the helper to pack
    run = open_run(tmp_path / "x.h5")
    assert run.steps.tolist() == [1, 2]
    assert run.status == "stopped at step 3: no room for a look"


def test_without_stages_nobody_looks(tmp_path: Path) -> None:
    weight = new_weight()
    optimizer = NorMuon([weight], LR)
    with attach(nn.ParameterDict({"w": weight}), optimizer, tmp_path / "x.h5"):
        train(optimizer, weight, 3)
    assert open_run(tmp_path / "x.h5").stages == ["update"]


def test_stages_of_torchs_muon_that_cannot_be_had_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = new_weight()
    optimizer = torch.optim.Muon([weight], LR)
    monkeypatch.setitem(sys.modules, "torch.optim._muon", None)
    with pytest.raises(AttachError, match=r"does not show .*leave out stages=True"):
        attach(nn.ParameterDict({"w": weight}), optimizer, tmp_path / "x.h5", stages=True)
    assert not optimizer._optimizer_step_pre_hooks
    gc.collect()
    deadline = time.monotonic() + 60  # that only a hang reaches
    while list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []


def train_shared(path: str, recorded: bool) -> list[Tensor]:
    """Train under DistributedDataParallel, each matrix orthogonalized by one rank."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(1)
    layers = nn.Linear(8, 16, bias=False), nn.Linear(16, 12, bias=False), nn.Linear(12, 6)
    model = DistributedDataParallel(nn.Sequential(*layers))
    named = [(name, p) for name, p in model.named_parameters() if p.ndim == 2]
    optimizer = NorMuon(named, LR, process_group=dist.group.WORLD)
    with contextlib.ExitStack() as stack:
        if recorded:
            stack.enter_context(attach(model, optimizer, path, every=1, stages=True))
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(5, 8)).square().mean().backward()
            optimizer.step()
    return [p.detach().clone() for _, p in named]


def test_where_ranks_share_the_work_each_hands_over_all_stages_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    recorded = on_ranks(2, train_shared, str(path), True)
    plain = on_ranks(2, train_shared, str(path), False)
    for weights in recorded[1], *plain:
        for one, other in zip(recorded[0], weights, strict=True):
            assert torch.equal(one, other)
    run = open_run(path)
    for matrix in run.table:
        for step in (1, 2, 3, 4):
            norms = np.linalg.norm(run.update(matrix.name, step), axis=1)
            assert np.sqrt(np.mean(norms**2) / matrix.n) == pytest.approx(0.2 * LR, rel=1e-4)
            np.testing.assert_allclose(run.neuron_norms(matrix.name)[step - 1], norms, rtol=1e-5)
            for stage in STAGES:
                assert np.isfinite(run.spectrum(matrix.name, step, stage=stage)).all()
    assert run.holes == []
