"""Any optimizer, any loop: training stays as it is, each step is recorded once, and is right."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from normuon_lens.analysis import measure
from normuon_lens.hooks import Recorder, attach
from normuon_lens.optim import Muon, NorMuon
from normuon_lens.runfile import Run, open_run

LR, DECAY = 1e-2, 0.1
OTHER_LR = 1e-3

Weights = dict[str, Tensor]
Begin = Callable[[nn.Module, Any], None]
Loop = Callable[[Begin], list[Weights]]
"""Trains, calling `begin` when it is ready, and returns the weights then and after every step."""


pytestmark = pytest.mark.usefixtures("forked_helpers")


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 8), nn.GELU(), nn.Linear(8, 12)]
    return nn.Sequential(*layers).to(dtype)


def inputs(count: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 12, generator=generator) for _ in range(count)]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = (model(x) - x.roll(1, 1)).square().mean()
    return loss


def weights(model: nn.Module) -> Weights:
    named = model.named_parameters()
    return {name.removesuffix(".weight"): p.detach().clone() for name, p in named}


def gradients_of(model: nn.Module, scale: float = 1.0) -> Weights:
    named = model.named_parameters()
    return {n.removesuffix(".weight"): p.grad / scale for n, p in named if p.grad is not None}


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]


def vectors(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim == 1]


def same(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def usual(
    build: Callable[[], tuple[nn.Module, torch.optim.Optimizer]],
    count: int = 4,
    *,
    before_step: Callable[[int, nn.Module, torch.optim.Optimizer], None] = lambda *_: None,
    after_step: Callable[[int, nn.Module, torch.optim.Optimizer], None] = lambda *_: None,
    loss: Callable[[nn.Module, Tensor], Tensor] = loss_of,
) -> Loop:
    """Return the usual loop, with something more to do around its steps, which count from 0."""

    def loop(begin: Begin) -> list[Weights]:
        model, optimizer = build()
        begin(model, optimizer)
        kept = [weights(model)]
        for i, x in enumerate(inputs(count)):
            optimizer.zero_grad()
            loss(model, x).backward()
            before_step(i, model, optimizer)
            optimizer.step()
            after_step(i, model, optimizer)
            kept.append(weights(model))
        return kept

    return loop


def rule_for(model: nn.Module, rule: str, **options: Any) -> torch.optim.Optimizer:
    """Return ours or torch's optimizer over the matrices, with weight decay where decoupled."""
    if decay_of(rule):
        options = {"weight_decay": DECAY, **options}
    cls = NorMuon if rule == "NorMuon" else getattr(torch.optim, rule)
    optimizer: torch.optim.Optimizer = cls(matrices(model), lr=LR, **options)
    return optimizer


def decay_of(rule: str) -> float:
    return DECAY if rule in ("AdamW", "Muon", "NorMuon") else 0.0


def with_and_without(loop: Loop, path: Path, **options: Any) -> tuple[Run, list[Weights]]:
    """Run a loop unrecorded and recorded: the weights after every step must be bitwise equal."""
    attached: list[Recorder] = []

    def begin(model: nn.Module, optimizer: Any) -> None:
        arguments = {"every": 1, "on_full": "wait", "quiet": True, **options}
        attached.append(attach(model, optimizer, path, **arguments))

    plain, recorded = loop(lambda model, optimizer: None), loop(begin)
    attached[0].close()
    assert len(plain) == len(recorded)
    assert all(map(same, plain, recorded))
    assert not same(recorded[0], recorded[-1]), "the loop trains nothing"
    return open_run(path), recorded


def check(
    run: Run,
    kept: list[Weights],
    *,
    lr: float | list[float] = LR,
    decay: float = DECAY,
    skip: tuple[str, ...] = (),
    rtol: float = 3e-5,
) -> None:
    """Hold every recorded step against the weights that were kept by hand.

    The reference is a difference of float32 weights, a hundred times larger than their updates.
    """
    count = len(kept) - 1
    assert run.steps.tolist() == list(range(1, count + 1))
    assert run.status == "finished"
    assert run.dropped == 0
    rates = lr if isinstance(lr, list) else [lr] * count
    for name in set(run.matrices) - set(skip):
        norms = run.neuron_norms(name)
        for i, (before, after) in enumerate(itertools.pairwise(kept)):
            w, moved = before[name].double(), after[name].double()
            still = torch.equal(before[name], after[name])
            update = torch.zeros_like(w) if still else moved - (1 - rates[i] * decay) * w
            noise = 1e-7 * float(w.norm())
            np.testing.assert_allclose(
                norms[i], update.norm(dim=1), rtol=rtol, atol=0.0 if still else noise
            )
            np.testing.assert_allclose(
                run.update(name, i + 1), update, rtol=rtol, atol=0.0 if still else noise
            )
            sigma = torch.linalg.svdvals(update)
            np.testing.assert_allclose(run.spectrum(name, i + 1), sigma, rtol=rtol, atol=noise)


# -- optimizers that are not torch's -------------------------------------------------------------


class Overwriting(torch.optim.Optimizer):
    """Nesterov momentum that is left in the gradient, as KellerJordan's Muon takes it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": LR})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                momentum = state.setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                p.add_(p.grad.lerp_(momentum, 0.95), alpha=-group["lr"])


def test_gradient_is_seen_before_an_optimizer_overwrites_it(tmp_path: Path) -> None:
    gradients: dict[int, Weights] = {}

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_model()
        return model, Overwriting(model.parameters())

    def before_step(i: int, model: nn.Module, _: torch.optim.Optimizer) -> None:
        gradients[i + 1] = gradients_of(model)

    def after_step(i: int, model: nn.Module, _: torch.optim.Optimizer) -> None:
        assert not torch.equal(gradients_of(model)["0"], gradients[i + 1]["0"])

    loop = usual(build, before_step=before_step, after_step=after_step)
    run, kept = with_and_without(loop, tmp_path / "x.h5", stages=True)
    check(run, kept, decay=0.0)
    for step, gradient in gradients.items():
        for name in run.matrices:
            np.testing.assert_array_equal(run.update(name, step, "gradient"), gradient[name])
            norms = run.neuron_norms(name, "gradient")[step - 1]
            np.testing.assert_allclose(norms, gradient[name].norm(dim=1), rtol=1e-6)


class Projecting(torch.optim.AdamW):
    """AdamW with bounded weights: what its step does is not what the inherited step does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.clamp_(-0.2, 0.2)


def test_optimizer_that_inherits_its_step_and_adds_to_it(tmp_path: Path) -> None:
    """The hooks of both steps are called, one within the other; the step is one all the same."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_model()
        rule_for(model, "AdamW")  # the first AdamW of a process is what gives its step hooks
        return model, Projecting(matrices(model), LR, weight_decay=DECAY)

    calls: list[int] = []

    def before_step(i: int, _: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if i == 0:
            calls.clear()
            optimizer.register_step_post_hook(lambda *_: calls.append(1))

    run, kept = with_and_without(usual(build, before_step=before_step), tmp_path / "x.h5")
    assert len(calls) == 8, "torch no longer does"
    check(run, kept)


class Container(torch.optim.Optimizer):
    """Several optimizers behind the face of one, as training frameworks write it."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__([p for group in groups for p in group["params"]], {"lr": LR})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


@pytest.mark.parametrize("nested", [False, True])
def test_container_of_optimizers_is_recorded_once(nested: bool, tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_model()
        main = NorMuon(matrices(model), LR, weight_decay=DECAY)
        container = Container([main, torch.optim.AdamW(vectors(model), OTHER_LR)])
        return model, Container([container]) if nested else container

    run, kept = with_and_without(usual(build), tmp_path / "x.h5")
    check(run, kept)
    assert run.optimizer == "NorMuon"


def test_accelerate_with_accumulation(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def loop(begin: Begin) -> list[Weights]:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
        model = make_model()
        model, optimizer = accelerator.prepare(
            model, torch.optim.AdamW(model.parameters(), LR, weight_decay=DECAY)
        )
        begin(model, optimizer)
        kept = [weights(model)]
        for number, x in enumerate(inputs(12), start=1):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, x))
                optimizer.step()  # steps on every third call only
                optimizer.zero_grad()
            if number % 3 == 0:
                kept.append(weights(model))
        accelerator.state._reset_state(reset_partial_state=True)
        return kept

    run, kept = with_and_without(loop, tmp_path / "x.h5")
    check(run, kept)
    assert run.optimizer == "AdamW"


def test_optimizer_in_backward(tmp_path: Path) -> None:
    """One optimizer a parameter, each stepping as soon as its gradient is there."""

    def loop(begin: Begin) -> list[Weights]:
        model = make_model()
        optimizers = {p: torch.optim.AdamW([p], LR, weight_decay=DECAY) for p in model.parameters()}

        def step(parameter: Tensor) -> None:
            optimizers[parameter].step()  # type: ignore[index]
            optimizers[parameter].zero_grad()  # type: ignore[index]

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        begin(model, list(optimizers.values()))
        kept = [weights(model)]
        for x in inputs(5):
            loss_of(model, x).backward()
            kept.append(weights(model))
        return kept

    run, kept = with_and_without(loop, tmp_path / "x.h5")
    check(run, kept)


# -- loops ---------------------------------------------------------------------------------------


def scaled_loop(
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    overflows: tuple[int, ...],
    gradients: list[Weights],
) -> Loop:
    """Train under a gradient scaler; the loss overflows in some iterations, counted from 0."""

    def loop(begin: Begin) -> list[Weights]:
        model = make_model()
        optimizer = optimizer_of(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        begin(model, optimizer)
        gradients.clear()
        kept = [weights(model)]
        for i, x in enumerate(inputs(6)):
            optimizer.zero_grad()
            loss = loss_of(model, x) * (float("inf") if i in overflows else 1.0)
            scale = scaler.get_scale()
            scaler.scale(loss).backward()
            gradients.append(gradients_of(model, scale))
            scaler.step(optimizer)
            scaler.update()
            kept.append(weights(model))
        return kept

    return loop


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_scaler_that_skips_the_step(cls: Any, tmp_path: Path) -> None:
    decoupled = cls is torch.optim.AdamW
    options = {"weight_decay": DECAY, "foreach": True} if decoupled else {"momentum": 0.9}
    gradients: list[Weights] = []
    loop = scaled_loop(lambda m: cls(m.parameters(), LR, **options), (0, 3), gradients)
    run, kept = with_and_without(loop, tmp_path / "x.h5", stages=True)
    assert same(kept[0], kept[1])
    assert same(kept[3], kept[4])
    del kept[4], kept[1], gradients[3], gradients[0]
    check(run, kept, decay=DECAY if decoupled else 0.0)
    assert not run.void.any()
    for name in run.matrices:
        for i, gradient in enumerate(gradients):
            np.testing.assert_allclose(
                run.update(name, i + 1, "gradient"), gradient[name], rtol=1e-6, atol=1e-12
            )


@pytest.mark.parametrize("overflows", [(3,), (0, 1)])
def test_scaler_under_a_fused_optimizer(overflows: tuple[int, ...], tmp_path: Path) -> None:
    """The step runs on gradients that are still scaled, and moves nothing when they overflow."""
    gradients: list[Weights] = []
    loop = scaled_loop(
        lambda m: torch.optim.AdamW(m.parameters(), LR, weight_decay=DECAY, fused=True),
        overflows,
        gradients,
    )
    run, kept = with_and_without(loop, tmp_path / "x.h5", stages=True, every=4)
    assert run.steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert np.flatnonzero(run.void).tolist() == list(overflows)
    conditions = measure(run, "condition_number")
    for name in run.matrices:
        norms, seen = run.neuron_norms(name), run.neuron_norms(name, "gradient")
        for i, (before, after) in enumerate(itertools.pairwise(kept)):
            if i in overflows:
                assert same(before, after)
                np.testing.assert_array_equal(norms[i], 0.0)
                assert not np.isfinite(seen[i]).any(), "an overflow has no gradient to speak of"
                assert np.isnan(conditions.values[conditions.steps == i + 1]).all()
            else:
                update = after[name].double() - (1 - LR * DECAY) * before[name].double()
                np.testing.assert_allclose(norms[i], update.norm(dim=1), rtol=3e-5)
                np.testing.assert_allclose(seen[i], gradients[i][name].norm(dim=1), rtol=1e-5)
    first = 1 + (len(overflows) if 0 in overflows else 0)
    sampled = run.spectrum_steps("gradient").tolist()
    assert first in sampled, "the first step that moves something is sampled"
    for name in run.matrices:
        np.testing.assert_allclose(
            run.update(name, first, "gradient"), gradients[first - 1][name], rtol=1e-5, atol=1e-9
        )


def test_gradient_accumulation(tmp_path: Path) -> None:
    gradients: list[Weights] = []

    def loop(begin: Begin) -> list[Weights]:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
        begin(model, optimizer)
        gradients.clear()
        kept = [weights(model)]
        for i, x in enumerate(inputs(12), start=1):
            (loss_of(model, x) / 4).backward()
            if i % 4 == 0:
                gradients.append(gradients_of(model))
                optimizer.step()
                optimizer.zero_grad()
                kept.append(weights(model))
        return kept

    run, kept = with_and_without(loop, tmp_path / "x.h5", stages=True)
    check(run, kept, decay=0.0)
    for i, gradient in enumerate(gradients, start=1):
        np.testing.assert_array_equal(run.update("0", i, "gradient"), gradient["0"])


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("rule", ["AdamW", "NorMuon"])
def test_recorded_rate_is_the_one_that_was_used(rule: str, tensor_lr: bool, tmp_path: Path) -> None:
    """Also the scheduler's first rate, which is zero: a step of its own, which moves nothing."""
    used: dict[int, float] = {}
    schedulers: list[torch.optim.lr_scheduler.LRScheduler] = []

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_model()
        optimizer = rule_for(model, rule, **({"foreach": False} if rule == "AdamW" else {}))
        if tensor_lr:
            optimizer.param_groups[0]["lr"] = torch.tensor(LR)
        schedulers[:] = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 3)]
        return model, optimizer

    def before_step(i: int, _: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        used[i] = float(optimizer.param_groups[0]["lr"])

    loop = usual(build, 5, before_step=before_step, after_step=lambda *_: schedulers[0].step())
    run, kept = with_and_without(loop, tmp_path / "x.h5")
    rates = [used[i] for i in range(5)]
    check(run, kept, lr=rates)
    np.testing.assert_allclose(run.scalars["lr"], rates, rtol=1e-6)
    assert rates[0] == 0.0
    assert run.void.tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("rule", ["AdamW", "SGD"])
def test_phantom_step_is_no_step(rule: str, tmp_path: Path) -> None:
    """Asking a fresh optimizer for its state makes it step: without a rate, on zero gradients."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    def loop(begin: Begin) -> list[Weights]:
        model = make_model()
        cls = getattr(torch.optim, rule)
        optimizer = cls(model.parameters(), lr=LR, weight_decay=0.0)
        begin(model, optimizer)
        hooked = []
        optimizer.register_step_pre_hook(lambda *_: hooked.append(1))
        kept = [weights(model)]
        get_optimizer_state_dict(model, optimizer)
        assert hooked, "torch takes no such step any more"
        for x in inputs(3):
            loss_of(model, x).backward()
            optimizer.step()
            kept.append(weights(model))
            optimizer.zero_grad()
            get_optimizer_state_dict(model, optimizer)  # SGD has no state: once more
        return kept

    run, kept = with_and_without(loop, tmp_path / "x.h5")
    check(run, kept, decay=0.0)
    assert not run.void.any()


@pytest.mark.parametrize("rule", ["Adam", "AdamW", "SGD", "Muon", "NorMuon"])
def test_parameter_without_a_gradient_in_some_steps(rule: str, tmp_path: Path) -> None:
    """It stays where it is, decay and momentum notwithstanding, and so does its update."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_model()
        return model, rule_for(model, rule, **({"momentum": 0.9} if rule == "SGD" else {}))

    def before_step(i: int, model: Any, _: torch.optim.Optimizer) -> None:
        if i in (0, 3, 4):
            model[2].weight.grad = None

    loop = usual(build, 6, before_step=before_step)
    run, kept = with_and_without(loop, tmp_path / "x.h5", stages=True)
    check(run, kept, decay=decay_of(rule))
    still = [not row.any() for row in run.neuron_norms("2")]
    assert still == [True, False, False, True, True, False]
    assert not run.void.any()
    assert np.isnan(run.neuron_norms("2", "gradient")[[0, 3, 4]]).all()


@pytest.mark.parametrize("rule", ["AdamW", "NorMuon", "SGD"])
def test_hooks_of_the_users_own(rule: str, tmp_path: Path) -> None:
    """One clears the gradients as soon as the step is done; others come before and after ours."""
    seen: list[str] = []

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_model()
        optimizer = rule_for(model, rule)
        optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
        optimizer.register_step_pre_hook(lambda *_: seen.append("first"))
        return model, optimizer

    def before_step(i: int, _: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if i == 0:
            seen.clear()
            optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
            optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    run, kept = with_and_without(usual(build, before_step=before_step), tmp_path / "x.h5")
    check(run, kept, decay=decay_of(rule))
    assert seen == ["first", "before", "after"] * 4


def test_failing_recorder_beside_hooks_of_the_users_own(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    lens = attach(model, optimizer, tmp_path / "x.h5", quiet=True)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i, x in enumerate(inputs(6)):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            if i == 2:
                assert lens._feed is not None
                os.kill(lens._feed.pid, signal.SIGKILL)
                lens._feed._process.wait()
            optimizer.step()
    assert [str(w.message) for w in caught if "training goes on" in str(w.message)]
    assert len(caught) == 1
    assert seen == ["before", "after"] * 6
    assert not lens.active


def test_step_that_raises_is_taken_again(tmp_path: Path) -> None:
    """The step ends in an exception (out of memory), the user catches it and tries again."""
    failing = [False]

    class Fragile(NorMuon):
        def _update(self, gradient: Tensor, state: Any, group: Any) -> Any:
            if failing[0]:
                raise MemoryError
            return super()._update(gradient, state, group)

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_model()
        return model, Fragile(matrices(model), LR, weight_decay=DECAY)

    def before_step(i: int, _: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if i in (0, 2):
            failing[0] = True
            with pytest.raises(MemoryError):
                optimizer.step()
            failing[0] = False

    loop = usual(build, before_step=before_step)
    run, kept = with_and_without(loop, tmp_path / "x.h5", stages=True)
    check(run, kept)

    model = make_model()
    optimizer = Fragile(matrices(model), LR)
    lens = attach(model, optimizer, tmp_path / "y.h5", quiet=True)
    loss_of(model, inputs(1)[0]).backward()
    failing[0] = True
    with pytest.raises(MemoryError):
        optimizer.step()
    lens.close()
    assert optimizer.stage_observer is None, "closed in between, it must stop watching too"


# -- parameters ----------------------------------------------------------------------------------


def test_sparse_gradients_beside_a_dense_matrix(tmp_path: Path) -> None:
    def loop(begin: Begin) -> list[Weights]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 12, sparse=True), nn.Linear(12, 6))
        optimizers = [
            torch.optim.SparseAdam(model[0].parameters(), OTHER_LR),
            torch.optim.AdamW(model[1].parameters(), OTHER_LR, weight_decay=0.0),
        ]
        begin(model, optimizers)
        kept = [weights(model)]
        for i in range(4):
            for optimizer in optimizers:
                optimizer.zero_grad()
            model(torch.tensor([i, i + 1, 3])).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
            kept.append(weights(model))
        return kept

    run, kept = with_and_without(loop, tmp_path / "x.h5", stages=True)
    assert run.matrices == ["0", "1"]
    check(run, kept, decay=0.0)


def test_frozen_matrix_stands_still_until_it_is_thawed(tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_model()
        model[2].weight.requires_grad_(False)
        return model, rule_for(model, "AdamW")

    def after_step(i: int, model: Any, _: torch.optim.Optimizer) -> None:
        if i == 2:
            model[2].weight.requires_grad_(True)

    run, kept = with_and_without(usual(build, 5, after_step=after_step), tmp_path / "x.h5")
    check(run, kept)
    assert [not row.any() for row in run.neuron_norms("2")] == [True, True, True, False, False]


def test_group_added_later_is_not_recorded_and_does_no_harm(tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_model()
        return model, torch.optim.AdamW(model[:4].parameters(), LR, weight_decay=DECAY)

    def after_step(i: int, model: Any, optimizer: torch.optim.Optimizer) -> None:
        if i == 1:
            optimizer.add_param_group({"params": list(model[4].parameters())})

    run, kept = with_and_without(usual(build, 5, after_step=after_step), tmp_path / "x.h5")
    assert torch.equal(kept[0]["4"], kept[2]["4"])
    assert not torch.equal(kept[2]["4"], kept[3]["4"])
    assert run.matrices == ["0", "2"]
    check(run, kept)


def test_tied_matrix_is_recorded_once(tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        first, last = nn.Linear(12, 12), nn.Linear(12, 12)
        last.weight = first.weight
        model = nn.Sequential(first, nn.GELU(), nn.Linear(12, 12), last)
        return model, torch.optim.AdamW(model.parameters(), LR, weight_decay=DECAY)

    run, kept = with_and_without(usual(build), tmp_path / "x.h5")
    assert run.matrices == ["0", "2"]
    check(run, kept)


# -- compiled, copied, saved, loaded -------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's compiler on itself
def test_compiled_model_keeps_its_names(tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = torch.compile(make_model(), backend="aot_eager")
        return model, torch.optim.AdamW(model.parameters(), LR, weight_decay=DECAY)

    loop = usual(build, 3)

    def stripped(begin: Begin) -> list[Weights]:
        return [{k.removeprefix("_orig_mod."): w for k, w in kept.items()} for kept in loop(begin)]

    run, kept = with_and_without(stripped, tmp_path / "x.h5")
    assert run.matrices == ["0", "2", "4"]
    check(run, kept)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's compiler on itself
@pytest.mark.parametrize("rule", ["AdamW", "SGD", "NorMuon"])
def test_compiled_step_is_not_broken_into_more_graphs(rule: str, tmp_path: Path) -> None:
    from torch._dynamo.testing import CompileCounter

    counters: list[CompileCounter] = []

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch._dynamo.reset()
        counters.append(CompileCounter())
        model = make_model()
        options = {"ns_dtype": torch.float32} if rule == "NorMuon" else {}
        return model, rule_for(model, rule, **options)

    def before_step(i: int, _: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if i == 0:
            optimizer.step = torch.compile(optimizer.step, backend=counters[-1])

    run, kept = with_and_without(usual(build, before_step=before_step), tmp_path / "x.h5")
    check(run, kept, decay=decay_of(rule))
    unrecorded, recorded = (counter.frame_count for counter in counters)
    assert unrecorded == 1
    # Ours show each matrix in the midst of the step, which ends a graph there.
    assert recorded <= (len(run.matrices) if rule == "NorMuon" else 1)


@pytest.mark.parametrize("rule", ["AdamW", "NorMuon"])
def test_copies_are_not_recorded_and_work(rule: str, tmp_path: Path) -> None:
    """Deep copies, pickles and a running average of the weights, all made while attached."""

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, xs: list[Tensor]) -> Weights:
        for x in xs:
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
        return weights(model)

    copies: list[list[Weights]] = []

    def loop(begin: Begin) -> list[Weights]:
        model = make_model()
        optimizer = rule_for(model, rule)
        begin(model, optimizer)
        average = torch.optim.swa_utils.AveragedModel(model)
        kept = [weights(model)]
        others = []
        for x in inputs(4):
            kept.append(steps(model, optimizer, [x]))
            average.update_parameters(model)
        for pair in (
            copy.deepcopy((model, optimizer)),
            pickle.loads(pickle.dumps((model, optimizer))),
        ):
            assert not pair[1]._optimizer_step_pre_hooks
            assert not pair[1]._optimizer_step_post_hooks
            assert getattr(pair[1], "stage_observer", None) is None
            others.append(steps(*pair, inputs(3, seed=2)))
        for x in inputs(2, seed=3):
            kept.append(steps(model, optimizer, [x]))
        copies.append([*others, weights(average)])
        return kept

    run, kept = with_and_without(loop, tmp_path / "x.h5", stages=True)
    check(run, kept)
    assert all(map(same, *copies))
    assert same(copies[0][0], copies[0][1])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, xs: list[Tensor]) -> None:
    for x in xs:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("rule", "given", "steps"),
    [
        ("SGD", 30, [31, 32, 33]),
        ("NorMuon", 30, [31, 32, 33]),
        ("AdamW", 30, [31, 32, 33]),
        ("AdamW", None, [8, 9, 10]),
        ("SGD", None, [1, 2, 3]),
    ],
)
def test_steps_taken_before_attaching(
    rule: str, given: int | None, steps: list[int], tmp_path: Path
) -> None:
    model = make_model()
    optimizer = rule_for(model, rule)
    train(model, optimizer, inputs(7))
    with attach(model, optimizer, tmp_path / "x.h5", every=100, step=given, quiet=True):
        train(model, optimizer, inputs(3))
    run = open_run(tmp_path / "x.h5")
    assert run.steps.tolist() == steps
    assert run.spectrum_steps().tolist() == steps[:1]


def test_checkpoint_loaded_while_attached(tmp_path: Path) -> None:
    """Back to step 3 from step 6: numbers follow, the later attempt counts, both are kept."""
    path = tmp_path / "x.h5"
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=DECAY)
    with attach(model, optimizer, path, every=1, on_full="wait", quiet=True) as lens:
        train(model, optimizer, inputs(3))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(model, optimizer, inputs(3, seed=2))
        lens.log(last=6.0)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        kept = [weights(model)]
        for x in inputs(5, seed=3):
            train(model, optimizer, [x])
            kept.append(weights(model))
    run = open_run(path)
    assert run.steps.tolist() == list(range(1, 9))
    assert run.overlaps == 3
    for i, (before, after) in enumerate(itertools.pairwise(kept)):
        update = after["0"].double() - (1 - LR * DECAY) * before["0"].double()
        np.testing.assert_allclose(run.update("0", 4 + i), update, rtol=3e-5, atol=1e-7)
        np.testing.assert_allclose(run.neuron_norms("0")[3 + i], update.norm(dim=1), rtol=3e-5)
    with h5py.File(path, locking=False) as file:
        assert sorted(file["steps/step"][()].tolist()) == [1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 8]


def test_resuming_from_an_earlier_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=DECAY)
    with attach(model, optimizer, path, every=1, on_full="wait", quiet=True):
        train(model, optimizer, inputs(4))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(model, optimizer, inputs(4, seed=2))
    abandoned = open_run(path).update("0", 6)

    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=DECAY)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    kept = [weights(model)]
    with attach(model, optimizer, path, every=1, on_full="wait", resume=True, quiet=True):
        for x in inputs(6, seed=3):
            train(model, optimizer, [x])
            kept.append(weights(model))
    run = open_run(path)
    assert run.steps.tolist() == list(range(1, 11))
    assert run.overlaps == 4
    for i, (before, after) in enumerate(itertools.pairwise(kept)):
        update = after["0"].double() - (1 - LR * DECAY) * before["0"].double()
        np.testing.assert_allclose(run.update("0", 5 + i), update, rtol=3e-5, atol=1e-7)
        np.testing.assert_allclose(run.neuron_norms("0")[4 + i], update.norm(dim=1), rtol=3e-5)
    with h5py.File(path, locking=False) as file:
        steps = file["steps/step"][()].tolist()
        assert sorted(steps) == sorted([*range(1, 9), *range(5, 11)])
        kept_of_both = file["updates/update/000_step"][()].tolist()
        row = kept_of_both.index(6)
        np.testing.assert_array_equal(file["updates/update/000"][row], abandoned)
        assert kept_of_both.count(6) == 2


# -- exactness -----------------------------------------------------------------------------------

STEPS = 8


def fed(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, path: Path, **options: Any
) -> tuple[Run, list[np.ndarray], list[np.ndarray]]:
    """Feed an optimizer gradients made up; returns the run, the gradients, all weights."""
    generator = torch.Generator().manual_seed(3)
    gradients, kept = [], [weight.detach().clone()]
    model = nn.ParameterDict({"w": weight})
    with attach(model, optimizer, path, every=1, on_full="wait", quiet=True, **options):
        for step in range(STEPS):
            gradient = torch.randn(weight.shape, generator=generator) * (1 + step)
            weight.grad = gradient.to(weight.dtype)
            gradients.append(weight.grad.clone())
            optimizer.step()
            kept.append(weight.detach().clone())
    run = open_run(path)
    assert run.steps.tolist() == list(range(1, STEPS + 1))
    return run, [g.double().numpy() for g in gradients], [w.double().numpy() for w in kept]


def relative(values: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(values - truth) / np.linalg.norm(truth))


def adam_by_hand(
    gradients: list[np.ndarray], *, l2: list[np.ndarray], amsgrad: bool, sign: float
) -> Iterator[np.ndarray]:
    """Kingma and Ba's algorithm, as they print it."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    m = v = largest = np.zeros_like(gradients[0])
    for t, (g, w) in enumerate(zip(gradients, l2, strict=True), start=1):
        g = sign * g + w
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        largest = np.maximum(largest, v)
        second = (largest if amsgrad else v) / (1 - beta2**t)
        yield -OTHER_LR * (m / (1 - beta1**t)) / (np.sqrt(second) + eps)


ADAMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adam with L2": (torch.optim.Adam, {"weight_decay": DECAY}),
    "Adam decoupled": (torch.optim.Adam, {"weight_decay": DECAY, "decoupled_weight_decay": True}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": DECAY}),
    "AdamW fused": (torch.optim.AdamW, {"weight_decay": DECAY, "fused": True}),
    "AdamW single": (torch.optim.AdamW, {"weight_decay": DECAY, "foreach": False}),
    "AdamW amsgrad": (torch.optim.AdamW, {"weight_decay": DECAY, "amsgrad": True}),
    "AdamW maximize": (torch.optim.AdamW, {"weight_decay": DECAY, "maximize": True}),
}


@pytest.mark.parametrize("name", ADAMS)
def test_adam_is_recorded_exactly(name: str, tmp_path: Path) -> None:
    """As a formula in float64 has it; a difference of the float32 weights is ten times further."""
    cls, options = ADAMS[name]
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(24, 12))
    run, gradients, kept = fed(
        cls([weight], lr=OTHER_LR, **options),
        weight,
        tmp_path / "x.h5",
    )
    coupled = name == "Adam with L2"
    decay = 0.0 if coupled else DECAY
    expected = adam_by_hand(
        gradients,
        l2=[DECAY * w if coupled else np.zeros_like(w) for w in kept[:-1]],
        amsgrad=options.get("amsgrad", False),
        sign=-1.0 if options.get("maximize") else 1.0,
    )
    for step, truth in enumerate(expected, start=1):
        assert relative(run.update("w", step), truth) < 1e-6
        norms = run.neuron_norms("w")[step - 1]
        np.testing.assert_allclose(norms, np.linalg.norm(truth, axis=1), rtol=1e-6)
        sigma = np.linalg.svd(truth, compute_uv=False)
        np.testing.assert_allclose(run.spectrum("w", step), sigma, atol=1e-6 * sigma[0])
        difference = kept[step] - (1 - OTHER_LR * decay) * kept[step - 1]
        assert relative(difference, truth) > 1e-5, "else exactness shows nothing here"


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Five steps of Keller Jordan's iteration, on the wide side."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def normuon_by_hand(gradients: list[np.ndarray]) -> Iterator[np.ndarray]:
    """NorMuon's equations, one after the other. [arXiv 2510.05491, Algorithm 1]."""
    momentum, v = np.zeros_like(gradients[0]), np.zeros((len(gradients[0]), 1))
    for g in gradients:
        momentum = 0.95 * momentum + 0.05 * g
        o = newton_schulz(momentum)
        v = 0.95 * v + 0.05 * (o**2).mean(axis=1, keepdims=True)
        normalized = o / (np.sqrt(v) + 1e-8)
        yield -0.2 * OTHER_LR * normalized * np.sqrt(g.size) / np.linalg.norm(normalized)


def muon_by_hand(gradients: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Muon with Nesterov in its original scale."""
    momentum = np.zeros_like(gradients[0])
    for g in gradients:
        momentum = 0.95 * momentum + 0.05 * g
        o = newton_schulz(0.95 * momentum + 0.05 * g)
        yield -OTHER_LR * np.sqrt(max(1, len(g) / len(g.T))) * o


@pytest.mark.parametrize("shape", [(24, 12), (12, 24)])
@pytest.mark.parametrize("rule", ["Muon", "NorMuon"])
def test_our_own_are_recorded_exactly(rule: str, shape: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape))
    common: Any = {"lr": OTHER_LR, "weight_decay": DECAY, "ns_dtype": torch.float64}
    optimizer = (
        NorMuon([weight], **common)
        if rule == "NorMuon"
        else Muon([weight], nesterov=True, scale="preserve_norm", **common)
    )
    run, gradients, kept = fed(optimizer, weight, tmp_path / "x.h5")
    by_hand = normuon_by_hand if rule == "NorMuon" else muon_by_hand
    for step, truth in enumerate(by_hand(gradients), start=1):
        assert relative(run.update("w", step), truth) < 1e-6
        norms = run.neuron_norms("w")[step - 1]
        np.testing.assert_allclose(norms, np.linalg.norm(truth, axis=1), rtol=2e-6)
        difference = kept[step] - (1 - OTHER_LR * DECAY) * kept[step - 1]
        assert relative(difference, truth) > 1e-5, "else exactness shows nothing here"


def test_adamw_is_exact_under_bfloat16_weights(tmp_path: Path) -> None:
    """The direction that the optimizer's own moments say, where a difference is mostly rounding."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(24, 12).bfloat16())
    optimizer = torch.optim.AdamW([weight], OTHER_LR, weight_decay=DECAY)
    directions: list[np.ndarray] = []

    def keep(*_: Any) -> None:
        state = optimizer.state[weight]
        m, v, t = (state[key].double().numpy() for key in ("exp_avg", "exp_avg_sq", "step"))
        denominator = np.sqrt(v / (1 - 0.999**t)) + 1e-8
        directions.append(-OTHER_LR * m / (1 - 0.9**t) / denominator)

    optimizer.register_step_post_hook(keep)
    run, _, kept = fed(optimizer, weight, tmp_path / "x.h5")
    for step, truth in enumerate(directions, start=1):
        assert relative(run.update("w", step), truth) < 1e-6
        difference = kept[step] - (1 - OTHER_LR * DECAY) * kept[step - 1]
        assert relative(difference, truth) > 0.05


@pytest.mark.parametrize("lr", [1e-3, 1e-2, 1e-1])
def test_error_of_a_difference_is_known(lr: float, tmp_path: Path) -> None:
    """Under SGD a bfloat16 weight's update is a difference; the run says how far it is off."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(24, 12).bfloat16())
    optimizer = torch.optim.SGD([weight], lr)
    run, gradients, _ = fed(optimizer, weight, tmp_path / "x.h5")
    steps, errors = measure(run, "update_error")
    assert steps.tolist() == list(range(1, STEPS + 1))
    for step, gradient, said in zip(steps, gradients, errors[:, 0], strict=True):
        off = relative(run.update("w", int(step)), -lr * gradient)
        assert off > 1e-3, "nothing to be known"
        assert off / 3 < said < off * 3


@pytest.mark.parametrize("rule", ["AdamW", "NorMuon"])
def test_error_of_an_exact_update_is_small(rule: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(24, 12).bfloat16())
    cls = NorMuon if rule == "NorMuon" else torch.optim.AdamW
    run, _, _ = fed(cls([weight], lr=OTHER_LR), weight, tmp_path / "x.h5")
    _, errors = measure(run, "update_error")
    assert (errors < 1e-5).all()
