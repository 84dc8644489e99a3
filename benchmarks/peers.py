"""Our optimizers and everyone else's, set to compute one rule: the rows of the benchmarks.

All of them take Nesterov momentum 0.95, decoupled weight decay 0.1 and, where they leave a choice,
keep the norm of what Newton-Schulz gives. Everything else is as its package has it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor
from torch.nn import Parameter

from normuon_lens.optim import Muon, NorMuon
from normuon_lens.optim.orthogonalize import fast_dtype

LR, MOMENTUM, WEIGHT_DECAY = 1e-2, 0.95, 0.1
NS_STEPS = 5

HOW_TO_INSTALL = {
    "emerging_optimizers": "pip install emerging-optimizers triton, on Python 3.12 or newer",
    "muonium": "pip install muonium triton",
    "optimuon": "pip install optimuon",
    "pytorch_optimizer": "pip install pytorch-optimizer",
}


class Unavailable(Exception):
    """A row cannot be measured here; the message says what would mend it."""


class Steps(Protocol):
    """What a row must be able to do."""

    def step(self) -> Any:
        """Move every matrix that has a gradient."""


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes
    ----------
    key : str
        What ``--only`` calls it.
    name : str
    make : callable
        Makes it from a list of matrices.
    around : callable
        Returns the context in which it takes its steps.
    """

    key: str
    name: str
    make: Callable[[list[Parameter]], Steps]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


def peer(name: str) -> ModuleType:
    """Import somebody else's package, or a module of it.

    Raises
    ------
    Unavailable
        If it, or what it needs, is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as problem:
        package = name.split(".")[0]
        what = "not installed" if problem.name == package else f"failed to import ({problem})"
        raise Unavailable(f"{what}: {HOW_TO_INSTALL[package]}") from problem


@contextmanager
def in_float32() -> Iterator[None]:
    """Let casts to bfloat16 and float16 give float32: what forces them can then run without."""
    to = Tensor.to

    def widened(value: Any) -> Any:
        narrow = isinstance(value, torch.dtype) and value in (torch.bfloat16, torch.float16)
        return torch.float32 if narrow else value

    def cast(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        return to(tensor, *map(widened, args), **{k: widened(v) for k, v in options.items()})

    def bfloat16(tensor: Tensor) -> Tensor:
        # A copy, as the cast would be: torch.optim.Muon writes into it.
        return to(tensor, torch.float32, copy=True)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Tensor, "to", cast))
        stack.enter_context(mock.patch.object(Tensor, "bfloat16", bfloat16))
        yield


class Floor:
    """The matrix products of plain Newton-Schulz and nothing else.

    On a GPU all matrices of one shape in one batch, on a CPU one by one: the faster way on each.
    """

    def __init__(self, matrices: list[Parameter], dtype: torch.dtype) -> None:
        self.matrices, self.dtype = matrices, dtype
        self.buffers: dict[tuple[int, ...], list[Tensor]] = {}

    def step(self) -> None:
        """Multiply as often as a step over the matrices that have a gradient."""
        shapes = [tuple(matrix.shape) for matrix in self.matrices if matrix.grad is not None]
        if self.matrices[0].is_cuda:
            shapes = [(shapes.count(shape), *shape) for shape in dict.fromkeys(shapes)]
        for shape in shapes:
            if shape not in self.buffers:
                self.buffers[shape] = self._buffers(shape)
            X, gram, square, out = self.buffers[shape]
            tall = shape[-2] > shape[-1]
            for _ in range(NS_STEPS):
                torch.matmul(*((X.mT, X) if tall else (X, X.mT)), out=gram)
                torch.matmul(gram, gram, out=square)
                torch.matmul(*((X, square) if tall else (square, X)), out=out)

    def _buffers(self, shape: tuple[int, ...]) -> list[Tensor]:
        *batch, m, n = shape
        make = partial(torch.empty, dtype=self.dtype, device=self.matrices[0].device)
        small = (*batch, min(m, n), min(m, n))
        # Of singular values around one, as an iterate has them: nothing overflows or underflows.
        X = make(shape).normal_(std=max(m, n) ** -0.5)
        return [X, make(small), make(small), make(shape)]


def pytorch_optimizer_normuon(matrices: list[Parameter]) -> Steps:
    """NorMuon of pytorch-optimizer (kozistr): Newton-Schulz always in bfloat16."""
    group = {"params": matrices, "use_muon": True, "lr": LR, "weight_decay": WEIGHT_DECAY}
    optimizer: Steps = peer("pytorch_optimizer").NorMuon([group], momentum=MOMENTUM)
    return optimizer


def optimuon_normuon(matrices: list[Parameter], **options: Any) -> Steps:
    """NorMuon of optimuon: Polar Express on the Gram matrix, by default in float16.

    It normalizes the columns of wide matrices, not their rows.
    """
    optimizer: Steps = peer("optimuon").Muon(
        matrices,
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        cautious_wd=False,
        normuon=True,
        **options,
    )
    return optimizer


def emerging_normuon(matrices: list[Parameter], **options: Any) -> Steps:
    """NorMuon of NVIDIA's emerging-optimizers: coefficients of its own, by default in bfloat16.

    It normalizes the columns of wide matrices, not their rows.
    """
    module = peer("emerging_optimizers.orthogonalized_optimizers")
    optimizer: Steps = module.AdaptiveMuon(
        matrices,
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        nesterov=True,
        moment2_method="normuon",
        **options,
    )
    return optimizer


def muonium_normuon(matrices: list[Parameter]) -> Steps:
    """NorMuon of muonium: Polar Express in bfloat16, compiled, with a Triton kernel."""
    if not matrices[0].is_cuda:
        raise Unavailable("runs on CUDA only")
    group = {"params": matrices, "algorithm": "normuon"}
    optimizer: Steps = peer("muonium").Muon(
        [group], lr=LR, wd=WEIGHT_DECAY, momentum=MOMENTUM, use_cautious_wd=False
    )
    return optimizer


def variants(device: str) -> tuple[Variant, ...]:
    """Return all rows for a device type, ours first."""
    fast = fast_dtype(device)
    forced = torch.bfloat16 if fast == torch.float32 else torch.float32
    ours = {"lr": LR, "nesterov": True, "weight_decay": WEIGHT_DECAY, "scale": "preserve_norm"}
    torch_muon = partial(
        torch.optim.Muon, lr=LR, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    adamw = partial(torch.optim.AdamW, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    betas = (MOMENTUM, 0.95)
    forced_name = str(forced).removeprefix("torch.")
    return (
        Variant("normuon", "NorMuon", partial(NorMuon, betas=betas, **ours)),
        Variant("muon", "Muon", partial(Muon, momentum=MOMENTUM, **ours)),
        Variant(
            "normuon-forced",
            f"NorMuon (ns_dtype={forced_name})",
            partial(NorMuon, betas=betas, ns_dtype=forced, **ours),
        ),
        Variant("torch-muon", "torch.optim.Muon", torch_muon),
        Variant("torch-muon-float32", "torch.optim.Muon (in float32)", torch_muon, in_float32),
        Variant("adamw", "torch.optim.AdamW (fused)", adamw),
        Variant("pytorch-optimizer", "pytorch-optimizer NorMuon", pytorch_optimizer_normuon),
        Variant(
            "pytorch-optimizer-float32",
            "pytorch-optimizer NorMuon (in float32)",
            pytorch_optimizer_normuon,
            in_float32,
        ),
        Variant("optimuon", "optimuon NorMuon", optimuon_normuon),
        Variant(
            "optimuon-float32",
            "optimuon NorMuon (in float32)",
            partial(optimuon_normuon, ns_dtype=torch.float32),
        ),
        Variant("emerging", "emerging-optimizers NorMuon", emerging_normuon),
        Variant(
            "emerging-float32",
            "emerging-optimizers NorMuon (in float32)",
            partial(emerging_normuon, fp32_matmul_prec="highest"),
        ),
        Variant("muonium", "muonium NorMuon", muonium_normuon),
        Variant("floor-float32", "bare products, float32", partial(Floor, dtype=torch.float32)),
        Variant("floor-bfloat16", "bare products, bfloat16", partial(Floor, dtype=torch.bfloat16)),
    )


OTHER_NORMUONS = (
    "pytorch-optimizer",
    "pytorch-optimizer-float32",
    "optimuon",
    "optimuon-float32",
    "emerging",
    "emerging-float32",
    "muonium",
)
"""Keys of the rows that the goal for other people's NorMuons is about."""
