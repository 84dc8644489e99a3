"""Which part of every matrix each rank holds, and which of it each rank records.

Row norms are taken where the rows are, by one rank each. A matrix that our own sharded optimizers
update is recorded by its owner, who has it whole at every step anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel

from normuon_lens.errors import AttachError
from normuon_lens.optim import Muon, NorMuon
from normuon_lens.optim.sharded import Holding, as_dtensor, members_of, missing_rows, refusal
from normuon_lens.runfile import STAGES, Matrices

from .selection import Watched

GRADIENT = "gradient"
"""The one stage that is not the optimizer's own: every rank has its rows of it."""


@dataclass(frozen=True)
class Portion:
    """How one matrix is spread over the ranks that record it together.

    Attributes
    ----------
    holding : Holding
        Rows of the parameter, as it is stored, by rank.
    owner : int or None
        Place among the ranks of the one that has its update and the stages before it whole, at
        every step; None if every rank has its rows of them.
    inputs_first : bool
        Whether these rows are the layer's inputs, so that each rank has a part of every neuron.
    """

    holding: Holding
    owner: int | None
    inputs_first: bool

    def is_whole(self, stage: str) -> bool:
        """Whether this stage is seen by the owner alone, whole."""
        return self.owner is not None and stage != GRADIENT

    def norms(self, stage: str, index: int, rank: int, m: int) -> tuple[int, int, int]:
        """Say which neurons' norms a rank records.

        Parameters
        ----------
        stage : str
        index, m : int
            Of the matrix: its place in the table, and its neurons.
        rank : int
            Place among the ranks.

        Returns
        -------
        start, stop, parts : int
            As in :class:`normuon_lens.runfile.schema.Shard`.
        """
        if self.is_whole(stage):
            return (0, m, 1) if rank == self.owner else (0, 0, 1)
        # Of equal replicas one is enough; each does its share of the matrices.
        replicas = sorted(set(self.holding.replicas))
        chosen = replicas[index % len(replicas)]
        start, stop = self.holding.spans[rank]
        if self.holding.replicas[rank] != chosen or start == stop:
            return 0, 0, 1
        if not self.inputs_first:
            return start, stop, 1
        spans = zip(self.holding.spans, self.holding.replicas, strict=True)
        return 0, m, sum(a < b for (a, b), replica in spans if replica == chosen)


def shared_by(
    watched: Sequence[Watched],
    names: Sequence[str],
    optimizers: Sequence[torch.optim.Optimizer],
) -> list[int]:
    """Return the (global) ranks that hold the matrices together, ascending.

    Parameters
    ----------
    watched : sequence of Watched
    names : sequence of str
        Of the matrices.
    optimizers : sequence of torch.optim.Optimizer

    Returns
    -------
    list of int
        Empty if they are plain tensors, or live on one rank: this process then has them whole.

    Raises
    ------
    AttachError
        If a matrix is sharded otherwise than by rows over one mesh dimension, or not all are held
        by the same ranks.
    """
    found: dict[tuple[int, ...], str] = {}
    for item in watched:
        optimizer, name = optimizers[item.optimizer], names[item.index]
        sharded = as_dtensor(item.parameter)
        if sharded is not None and (refusal(sharded) or missing_rows(sharded)):
            raise AttachError(
                f"{name} is placed as {sharded.placements} on a mesh of shape "
                f"{tuple(sharded.device_mesh.shape)}; only whole rows over one dimension of "
                "ascending ranks, as fully_shard deals them, can be recorded: leave it out by "
                f"exclude={name!r}"
            )
        if isinstance(optimizer, Muon | NorMuon):  # plain tensors are known to be replicas then
            members = optimizer.sharers()
        else:
            members = members_of(item.parameter, None)
        if len(members) > 1:
            found.setdefault(tuple(sorted(members)), name)
    if len(found) > 1:
        (first, one), (second, other), *_ = found.items()
        raise AttachError(
            f"{one} is held by ranks {_listed(first)}, but {other} by ranks {_listed(second)}: "
            "record them separately, by include= and a path each"
        )
    return list(next(iter(found), ()))


def replicas_of(model: torch.nn.Module) -> list[int]:
    """Return the (global) ranks that train replicas of a model, ascending.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    list of int
        Empty unless it is, or wraps, a DistributedDataParallel of more than one rank: that plain
        tensors are equal on all ranks can be known by nothing else.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            ranks = sorted(torch.distributed.get_process_group_ranks(module.process_group))
            return ranks if len(ranks) > 1 else []
    return []


def portions_of(
    watched: Sequence[Watched],
    optimizers: Sequence[torch.optim.Optimizer],
    ranks: Sequence[int],
) -> list[Portion]:
    """Return how each matrix is spread over some (global) ranks, ascending."""
    owners: dict[torch.nn.Parameter, int] = {}
    for optimizer in optimizers:
        if isinstance(optimizer, Muon | NorMuon):
            owners |= optimizer.owners()
    portions = []
    for item in watched:
        sharded = as_dtensor(item.parameter)
        if sharded is None:
            holding = Holding.everywhere(item.parameter.shape[0], len(ranks))
        else:
            holding = Holding.of(sharded, ranks)
        owner = owners.get(item.parameter)
        place = None if owner is None else ranks.index(owner)
        portions.append(Portion(holding, place, item.inputs_first))
    return portions


def recorded_rows(
    portions: Sequence[Portion], matrices: Matrices, rank: int
) -> dict[str, tuple[tuple[int, int, int], ...]]:
    """Return, by stage, which neurons' norms of each matrix a rank records."""
    return {
        stage: tuple(
            portion.norms(stage, index, rank, matrices[index].m)
            for index, portion in enumerate(portions)
        )
        for stage in STAGES
    }


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
