"""Trainings whose weights are spread over ranks in all ways, recorded or not, and what they did.

What a training did is known without the recorder: it gathers its weights before and after every
step by itself. A recording is held against that, in float64.
"""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers.pytorch_utils import Conv1D

from normuon_lens.hooks import attach, budget
from normuon_lens.optim import Muon, NorMuon, split_parameters
from normuon_lens.runfile import Run, open_run

LR, DECAY = 0.02, 0.1
BATCH = 8
EVERY = 2


# --- models --------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Embeddings, of which every batch uses some rows only."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 10, bias=False)
        self.head = nn.Linear(10, 11, bias=False)

    def forward(self, x):
        ids = (x.abs() * 4).long().clamp(max=10)
        return self.head(nn.functional.gelu(self.hidden(self.embedding(ids).mean(1))))


class Idle(nn.Module):
    """A layer that is never used, one that every other step uses, and one that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.seldom = nn.Linear(9, 9, bias=False)
        self.never = nn.Linear(4, 5, bias=False)
        self.frozen = nn.Linear(9, 7, bias=False)
        self.last = nn.Linear(7, 4, bias=False)
        self.frozen.requires_grad_(False)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        hidden = nn.functional.gelu(self.first(x))
        if self.calls % 2:
            hidden = hidden + self.seldom(hidden)
        return self.last(self.frozen(hidden))


class Copied(Conv1D):
    """FSDP2 warns of a layer that returns a view."""

    def forward(self, x):
        return super().forward(x).clone()


INPUTS_FIRST = ("convolutions: 2", "convolutions: 4")
"""The layers here that store inputs before outputs."""

MODELS: dict[str, Callable[[], nn.Module]] = {
    # On four ranks: 3, 3, 3, 0 rows, then 2, 2, 1, 0, then 1, 1, 1, 0; the last rank has nothing.
    "uneven": lambda: nn.Sequential(
        nn.Linear(6, 9, bias=False),
        nn.GELU(),
        nn.Linear(9, 5, bias=False),
        nn.GELU(),
        nn.Linear(5, 3, bias=False),
    ),
    "even": lambda: nn.Sequential(
        nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 12, bias=False), nn.GELU(), nn.Linear(12, 4)
    ),
    "tokens": Tokens,
    "idle": Idle,
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)),
        nn.Conv2d(2, 5, 3),
        nn.ConvTranspose2d(5, 3, 2),
        nn.Flatten(),
        Copied(4, 27),
    ),
}


# --- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes
    ----------
    model, rule, layout : str
        Keys of MODELS and RULES; how the weights are spread, see `spread`.
    twist : str
        What is special about it, see `Training`.
    dtype : str
        Of the weights.
    lr : float
    steps : int
    seed : int
    options : dict
        For `attach`.
    onto : str
        Name of the recording, if it is not that of the case: what it resumes.
    taken : int
        Steps taken before.
    """

    model: str = "uneven"
    rule: str = "AdamW"
    layout: str = "fsdp"
    twist: str = ""
    dtype: str = "float32"
    lr: float = LR
    steps: int = 6
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    onto: str = ""
    taken: int = 0


def adamw(model, case, _):
    return [torch.optim.AdamW(trained(model), case.lr, weight_decay=DECAY)]


def with_adamw(build):
    """Matrices go to one optimizer, the rest to AdamW."""

    def rule(model, case, group):
        matrices, others = split_parameters(model)
        optimizers = [build(matrices, case.lr, group)]
        if others:
            optimizers.append(torch.optim.AdamW(others, case.lr, weight_decay=DECAY))
        return optimizers

    return rule


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


RULES: dict[str, Callable[..., list[torch.optim.Optimizer]]] = {
    "AdamW": adamw,
    "fused AdamW": lambda m, c, _: [
        torch.optim.AdamW(trained(m), c.lr, weight_decay=DECAY, fused=True)
    ],
    "SGD": lambda m, c, _: [torch.optim.SGD(trained(m), c.lr)],
    "SGD with momentum": lambda m, c, _: [
        torch.optim.SGD(trained(m), c.lr, momentum=0.9, weight_decay=DECAY)
    ],
    "torch Muon": with_adamw(lambda p, lr, _: torch.optim.Muon(p, lr, weight_decay=DECAY)),
    "Muon": with_adamw(
        lambda p, lr, group: Muon(
            p, lr, weight_decay=DECAY, ns_dtype=torch.float32, process_group=group
        )
    ),
    "NorMuon": with_adamw(
        lambda p, lr, group: NorMuon(
            p, lr, weight_decay=DECAY, ns_dtype=torch.float32, process_group=group
        )
    ),
    "NorMuon, original scale": with_adamw(
        lambda p, lr, group: NorMuon(
            p,
            lr,
            weight_decay=DECAY,
            ns_dtype=torch.float32,
            scale="preserve_norm",
            process_group=group,
        )
    ),
}


def local_part(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Places:
    """The meshes of a launch, made once by all ranks together."""

    def __init__(self) -> None:
        from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

        self.ranks = dist.get_world_size()
        self.meshes = {
            "fsdp": init_device_mesh("cpu", (self.ranks,)),
            "backwards": DeviceMesh("cpu", list(reversed(range(self.ranks)))),
            "alone each": init_device_mesh(
                "cpu", (self.ranks, 1), mesh_dim_names=("each", "alone")
            )["alone"],
        }
        if self.ranks == 4:
            self.meshes["hsdp"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))
            self.meshes["middle"] = DeviceMesh("cpu", [1, 2])

    def mesh(self, layout):
        return self.meshes.get(layout, self.meshes["fsdp"])

    def takes_part(self, layout):
        return dist.get_rank() in self.mesh(layout).mesh

    def share(self, layout):
        """Return which of how many shares of a batch this rank works on."""
        if layout == "whole":
            return 0, 1
        if layout == "alone each":
            return dist.get_rank(), self.ranks
        members = sorted(self.mesh(layout).mesh.flatten().tolist())
        return members.index(dist.get_rank()), len(members)

    def spread(self, model, layout):
        """Return the model as one trains it, what is averaged by hand, and a group for ours."""
        from torch.distributed._composable.replicate_with_fsdp import replicate
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = self.mesh(layout)
        if layout == "whole":
            return model, [], None
        if layout.startswith("ddp"):
            model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
            return model, [], dist.group.WORLD
        options: dict[str, Any] = {"mesh": mesh}
        plain = []
        if layout == "plain beside":  # the user keeps these equal by hand
            plain = list(next(iter(model.children())).parameters())
            options["ignored_params"] = set(plain)
        if layout == "mixed precision":
            options["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )
        cut = replicate if layout == "replicated" else fully_shard
        for child in model.children():
            inside = [p for p in child.parameters() if not any(p is other for other in plain)]
            if inside and layout != "root only":
                cut(child, **options)
        cut(model, **options)
        return model, plain, None


# --- training ------------------------------------------------------------------------------------

Weights = dict[str, np.ndarray]


class Trained(NamedTuple):
    """What a training did.

    Attributes
    ----------
    losses : list of float
        Of this rank's share; then a random number, for recording must not draw any.
    moves : dict of int to (before, after)
        By step, as counted here: all matrices, float64, of what the recording should have.
    decays : dict of str to float
        lr·wd of each matrix.
    sent : list of int
        Bytes that this rank had sent for the recorder after each step.
    every : int
        The schedule that the recorder ended with.
    """

    losses: list[float]
    moves: dict[int, tuple[Weights, Weights]]
    decays: dict[str, float]
    sent: list[int]
    every: int


class Training:
    """A training of one case; on several ranks each works on its share of every batch."""

    def __init__(self, case: Case, places: Places | None) -> None:
        torch.manual_seed(case.seed)
        self.case = case
        self.model = MODELS[case.model]().to(getattr(torch, case.dtype))
        self.part, self.parts = (0, 1) if places is None else places.share(case.layout)
        self.plain: list[Any] = []
        group = None
        bare = self.model
        if places is not None:
            self.model, self.plain, group = places.spread(self.model, case.layout)
        self.optimizers = RULES[case.rule](bare, case, group)
        self.bare = bare
        self.generator = torch.Generator().manual_seed(case.seed + 1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled="scaler" in case.twist)
        self.step = case.taken
        self.saved: Any = None
        self.optimizers[0].register_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.step += 1

    def weights(self) -> Weights:
        """Gather all trained matrices, one row a neuron, by the names that a run gives them."""
        found = {}
        for name, parameter in self.bare.named_parameters():
            if parameter.ndim < 2 or not parameter.requires_grad:
                continue
            parameter = parameter.detach()
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            array = whole.double().numpy().copy()
            name = name.removesuffix(".weight")
            if f"{self.case.model}: {name}" in INPUTS_FIRST:
                array = array.swapaxes(0, 1)
            found[name] = array.reshape(len(array), -1)
        return found

    def decays(self) -> dict[str, float]:
        of = {
            id(parameter): group["lr"] * group["weight_decay"]
            for optimizer in self.optimizers
            if not isinstance(optimizer, torch.optim.SGD)  # whose decay is part of the update
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        named = self.bare.named_parameters()
        return {n.removesuffix(".weight"): of[id(p)] for n, p in named if id(p) in of}

    def backward(self, at: int) -> torch.Tensor:
        """Compute gradients of the mean over the whole batch."""
        twist, total = self.case.twist, torch.zeros(())
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        pieces = 2 if "accumulate" in twist else 1
        for _ in range(pieces):
            width = 32 if self.case.model == "convolutions" else 6
            x = torch.randn(BATCH, width, generator=self.generator)[self.part :: self.parts]
            target = torch.randn(BATCH, 1, generator=self.generator)[self.part :: self.parts]
            output = self.model(x.to(getattr(torch, self.case.dtype)))
            loss = (output.float() - target).square().mean() / pieces
            if "zero gradient" in twist and at in (0, 2):
                loss = loss * 0.0
            self.scaler.scale(loss).backward()
            total = total + loss.detach()
        if self.plain and self.parts > 1:
            for parameter in self.plain:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.parts
        if "overflow" in twist and at in (0, 3) and self.part == self.parts - 1:
            for parameter in trained(self.bare):  # seen by one rank only
                local_part(parameter.grad)[:1] = float("inf")
        if "first rate 0" in twist and at == 0 and self.part == self.parts - 1:
            for parameter in trained(self.bare):  # as if this rank had rows that no batch uses
                local_part(parameter.grad).zero_()
        if "clip" in twist:
            nn.utils.clip_grad_norm_(trained(self.bare), 0.05)
        return total

    def take(self, at: int) -> torch.Tensor:
        """Take one step."""
        if "closure" in self.case.twist:
            (optimizer,) = self.optimizers
            return optimizer.step(lambda: self.backward(at))
        if "first rate 0" in self.case.twist:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = 0.0 if at == 0 else self.case.lr
        loss = self.backward(at)
        for number, optimizer in enumerate(self.optimizers):
            if number and "seldom" in self.case.twist and at % 2:
                continue
            self.scaler.step(optimizer)
        self.scaler.update()
        return loss

    def reload(self, at: int) -> None:
        """Save after two steps, go back to that after four."""
        if at == 1:
            weights = [p.detach().clone() for p in self.bare.parameters()]
            states = copy.deepcopy([optimizer.state_dict() for optimizer in self.optimizers])
            self.saved = weights, states, self.step
        elif at == 3:
            weights, states, self.step = self.saved
            with torch.no_grad():
                for parameter, weight in zip(self.bare.parameters(), weights, strict=True):
                    parameter.copy_(weight)
            for optimizer, state in zip(self.optimizers, states, strict=True):
                optimizer.load_state_dict(state)


def train(case: Case, path: Path | None, places: Places | None = None, watch=None) -> Trained:
    """Train one case, recorded if there is a path; `watch` is called with the recorder, if any."""
    training = Training(case, places)
    lens = None
    if path is not None:
        options = {"every": EVERY, "on_full": "wait", "on_error": "raise", "quiet": True}
        options |= case.options
        lens = attach(training.model, training.optimizers, path, **options)
        if watch:
            watch(lens)
    if "state asked for first" in case.twist:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        get_optimizer_state_dict(training.bare, training.optimizers)
        training.step = 0
    moves, losses, sent = {}, [], []
    decays = training.decays()
    for at in range(case.steps):
        before, count = training.weights(), training.step
        loss = training.take(at)
        losses.append(loss.item())
        if lens:
            lens.log(loss=loss)
            sent.append(lens._share.exchange.bytes if lens._share else 0)
        if training.step > count:
            moves[training.step] = before, training.weights()
        if "checkpoint" in case.twist:
            training.reload(at)
    losses.append(torch.rand(()).item())
    every = lens._schedule.every if lens else 0
    if lens:
        lens.close()
    return Trained(losses, moves, decays, sent, every)


def train_all(folder: Path, cases: dict[str, Case]) -> dict[str, Trained | str]:
    """Train all cases on this rank, with and without the recorder.

    Returns
    -------
    dict of str to Trained
        What the recorded ones did; a traceback instead if one went wrong, or was not, bit by bit,
        the one that is not recorded.
    """
    torch.set_num_threads(1)
    places = Places()
    told: dict[str, Trained | str] = {}
    for name, case in cases.items():
        if not places.takes_part(case.layout):
            continue
        path = folder / f"{case.onto or name}.h5"
        try:
            plain = train(case, None, places)
            told[name] = train(case, path, places, slow_down if "slow" in case.twist else None)
            expect_same(plain, told[name])
        except Exception:
            told[name] = traceback.format_exc()
    return told


def slow_down(lens) -> None:
    """Make recording dear on the last rank; looks at the cost come soon."""
    budget.WINDOW, budget.WARM_UP = 4, 2
    if dist.get_rank() == dist.get_world_size() - 1:
        (track,) = lens._tracks
        collect = track.collect

        def dear() -> None:
            time.sleep(0.02)
            collect()

        track.collect = dear


def expect_same(plain: Trained, recorded: Trained) -> None:
    """Hold two trainings against each other, bit by bit."""
    assert plain.losses == recorded.losses
    assert plain.moves.keys() == recorded.moves.keys()
    for step, states in plain.moves.items():
        for one, other in zip(states, recorded.moves[step], strict=True):
            for name in one:
                assert np.array_equal(one[name], other[name]), f"{name} differs at step {step}"


# --- what a recording should say -----------------------------------------------------------------


def expect_true(
    path: Path,
    case: Case,
    did: Trained,
    *,
    void: tuple[int, ...] = (),
    sampled: tuple[int, ...] | None = None,
) -> Run:
    """Hold a recording against what the training did, by numpy in float64.

    `void` are the steps that moved nothing, `sampled` those with whole matrices, if not the first
    and every second one.
    """
    run = open_run(path)
    assert (run.status, run.dropped, run.damaged, run.holes) == ("finished", 0, [], [])
    steps = sorted(did.moves)
    if sampled is None:
        sampled = tuple(s for s in steps if s in (1, case.taken + 1) or s % EVERY == 0)
    assert run.steps.tolist() == steps
    assert run.steps[run.void].tolist() == list(void)
    assert np.isfinite(run.scalars["loss"]).all()
    # An update is known from the weights up to their rounding.
    eps = torch.finfo(getattr(torch, case.dtype)).eps
    for name in run.matrices:
        norms, spectra = run.neuron_norms(name), run.spectra(name)
        assert run.update_steps(name).tolist() == list(sampled)
        for row, step in enumerate(steps):
            before, after = (weights[name] for weights in did.moves[step])
            decay = 0.0 if np.array_equal(before, after) else did.decays.get(name, 0.0)
            update = after - (1 - decay) * before
            rounding = eps * np.abs(before).max()
            told = f"{name} at step {step}"
            expected = np.linalg.norm(update, axis=1)
            noise = rounding * np.sqrt(update.shape[1])
            np.testing.assert_allclose(norms[row], expected, rtol=1e-4, atol=noise, err_msg=told)
            if step not in sampled:
                continue
            recorded, largest = run.update(name, step), np.abs(update).max()
            np.testing.assert_allclose(
                recorded, update, rtol=0, atol=max(1e-3 * largest, 2 * rounding), err_msg=told
            )
            (at,) = np.flatnonzero(spectra.steps == step)
            expect_spectrum(spectra.sigma[at], update, rounding, told)
            assert abs(spectra.weight_norm[at] / np.linalg.norm(before) - 1) < 1e-5, told
    return run


def expect_spectrum(sigma: np.ndarray, matrix: np.ndarray, rounding: float, told: str) -> None:
    """Hold singular values against numpy's; relative where they are well above rounding."""
    expected = np.linalg.svd(matrix, compute_uv=False)
    noise = rounding * np.sqrt(max(matrix.shape)) * 2
    np.testing.assert_allclose(
        sigma, expected, rtol=0, atol=max(1e-4 * expected[0], noise), err_msg=told
    )
    clear = expected > 1e4 * noise
    np.testing.assert_allclose(sigma[clear], expected[clear], rtol=1e-4, err_msg=told)


def expect_equal(run: Run, single: Run) -> None:
    """Hold a recording of several ranks against one of a single process, at all stages."""
    assert run.matrices == single.matrices
    assert run.stages == single.stages
    assert run.steps.tolist() == single.steps.tolist()
    for stage in single.stages:
        for name in single.matrices:
            told = f"{name}, {stage}"
            mine, theirs = run.neuron_norms(name, stage), single.neuron_norms(name, stage)
            expect_close(mine, theirs, 1e-4, told)
            ours, other = run.spectra(name, stage), single.spectra(name, stage)
            assert ours.steps.tolist() == other.steps.tolist(), told
            expect_close(ours.sigma, other.sigma, 1e-4, told)
            assert np.array_equal(np.isnan(ours.floor), np.isnan(other.floor)), told
            # A floor is that of the way in which the spectrum was found; it need not be the same.
            clear = other.sigma > 1e4 * np.maximum(ours.floor, other.floor)[:, None]
            ratio = ours.sigma[clear] / other.sigma[clear]
            np.testing.assert_allclose(ratio, 1, rtol=1e-4, err_msg=told)
            if stage == "update":
                np.testing.assert_allclose(ours.weight_norm, other.weight_norm, rtol=1e-5)
            steps = single.update_steps(name, stage).tolist()
            assert run.update_steps(name, stage).tolist() == steps, told
            for step in steps:
                mine, theirs = run.update(name, step, stage), single.update(name, step, stage)
                expect_close(mine.reshape(1, -1), theirs.reshape(1, -1), 1e-3, f"{told} {step}")


def expect_close(mine: np.ndarray, theirs: np.ndarray, share: float, told: str) -> None:
    """Hold rows against each other, within a share of the largest of each; NaN where the other."""
    assert np.array_equal(np.isnan(mine), np.isnan(theirs)), told
    largest = np.abs(np.nan_to_num(theirs)).max(axis=1, keepdims=True)
    assert (np.abs(np.nan_to_num(mine - theirs)) <= share * largest).all(), told
