"""One training: a model, a recipe for its optimizers, one step at a time, on one rank or many."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from normuon_lens.optim import Muon, NorMuon, split_parameters

from .model import GPT, Shape
from .ranks import mean, ranks

BATCH = 16
VALIDATION_BATCH = 256
VALIDATION_EVERY = 50
ADAM_BETAS = (0.9, 0.95)
WARMUP_SHARE = 0.05
FINAL_LR_SHARE = 0.1
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Recipe:
    """How one run of the comparison is optimized.

    Attributes
    ----------
    name : str
        The optimizer of the matrices.
    matrix_lr, other_lr : float
        Peak learning rates of the matrices, and of embeddings, head and norms (always AdamW).
    """

    name: str
    matrix_lr: float
    other_lr: float

    def optimizers(self, model: torch.nn.Module) -> list[Optimizer]:
        """Return the optimizers of `model`, the matrices' first; norms have no weight decay."""
        matrices, others = split_parameters(model)
        rest = {"params": others, "lr": self.other_lr, "weight_decay": 0.0}
        if self.name == "AdamW":
            main = {"params": matrices, "lr": self.matrix_lr, "weight_decay": WEIGHT_DECAY}
            return [AdamW([main, rest], betas=ADAM_BETAS)]
        rule = {"Muon": Muon, "NorMuon": NorMuon}[self.name]
        return [
            rule(matrices, lr=self.matrix_lr, weight_decay=WEIGHT_DECAY),
            AdamW([rest], betas=ADAM_BETAS),
        ]


# Learning rates as benchmarks/learning_rates.py finds them. AdamW has a rate of its own for
# embeddings and head: with one rate for all it loses, and a comparison with an untuned Adam shows
# a saving that is not there.
RECIPES = (
    Recipe("AdamW", matrix_lr=4e-3, other_lr=1.6e-2),
    Recipe("Muon", matrix_lr=1.6e-2, other_lr=3.2e-2),
    Recipe("NorMuon", matrix_lr=1.6e-2, other_lr=3.2e-2),
)


class Training:
    """A model being trained by one recipe, sharded if there are several ranks.

    Parameters
    ----------
    recipe : Recipe
    steps : int
        Length of the learning-rate schedule: warm-up, then linear decay to a tenth.
    seed : int
        Of the initial weights: equal seeds start from equal weights, on any number of ranks.
    shape : Shape, optional

    Attributes
    ----------
    model : GPT
    optimizers : list of torch.optim.Optimizer
        The matrices' first.
    seconds : float
        Time spent in :meth:`step` so far, hooks included.
    """

    def __init__(self, recipe: Recipe, steps: int, seed: int, shape: Shape | None = None) -> None:
        torch.manual_seed(seed)
        self.recipe = recipe
        self.model = GPT(shape)
        if ranks() > 1:
            _shard(self.model)
        self.optimizers = recipe.optimizers(self.model)  # of the shards, so only now
        self.seconds = 0.0
        warmup = max(1, math.ceil(WARMUP_SHARE * steps))

        def rate(step: int) -> float:
            rising = (step + 1) / warmup
            left = (steps - step) / max(1, steps - warmup)
            return min(rising, FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * min(1.0, max(0.0, left)))

        self._schedules = [LambdaLR(optimizer, rate) for optimizer in self.optimizers]

    def step(self, inputs: Tensor, targets: Tensor, weight: float = 1.0) -> float:
        """Train on one batch.

        Parameters
        ----------
        inputs, targets : Tensor of shape (windows, context), int64
            This rank's share of the batch.
        weight : float
            Windows of this share relative to the mean over the ranks.

        Returns
        -------
        float
            The loss of the whole batch in nats a token, the same on all ranks.
        """
        began = time.perf_counter()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        # Gradients become their mean over the ranks in the backward pass.
        loss = weight * self.model.loss(inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, schedule in zip(self.optimizers, self._schedules, strict=True):
            optimizer.step()
            schedule.step()
        self.seconds += time.perf_counter() - began
        return mean(loss)

    @torch.no_grad()
    def validate(self, inputs: Tensor, targets: Tensor, weight: float = 1.0) -> float:
        """Return the loss on held-out text in nats a token; arguments are as of :meth:`step`."""
        return mean(weight * self.model.loss(inputs, targets))


def _shard(model: GPT) -> None:
    """Leave on every rank its share of the rows of each parameter (FSDP2)."""
    # Imports that take seconds, and that one process can do without.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
