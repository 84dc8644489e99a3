"""One matrix, one owner: orthogonalizing matrices whose rows are spread over ranks.

Newton-Schulz needs a matrix whole. Instead of gathering every matrix everywhere, each is gathered
by one rank, its owner, which sends the rows of the result back, so the work is done once and split
over the ranks [1]_. Matrices are dealt to the owners in rounds, largest first; a round is one
exchange there and one back, and the exchanges of the next rounds run while this one computes.

What travels is rows, whole ones, and an owner computes what a single process would: the result
does not depend on the number of ranks.

.. [1] NorMuon, Algorithm 2, https://arxiv.org/abs/2510.05491
"""

from __future__ import annotations

import hashlib
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from normuon_lens.errors import LensError
from normuon_lens.optim.owners import row_range

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Facts: TypeAlias = list[tuple[str, str]]

ADVICE = {
    "setting": "Give every rank the same settings.",
    "parameter": "Give every rank the same parameters in the same order.",
    "gradient": "Give a parameter a gradient on all ranks or on none: what only some ranks use "
    "needs a zero gradient on the others.",
}
"""What to do about ranks that say different things, by what they say it of."""

ROUNDS_IN_FLIGHT = 2
"""Rounds whose rows are on their way to the owners while another is being computed."""


def as_dtensor(tensor: Tensor | None) -> DTensor | None:
    """Return the tensor if it is a DTensor, else None."""
    # Importing it takes a second; as long as nobody did, there is none.
    module = sys.modules.get("torch.distributed.tensor")
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, sharing its memory."""
    sharded = as_dtensor(tensor)
    if sharded is None:
        return tensor
    part: Tensor = sharded.to_local()
    return part


def refusal(parameter: Tensor) -> str | None:
    """Say why a parameter cannot be orthogonalized by owners, and what to do; None if it can.

    Parameters
    ----------
    parameter : Tensor
        A DTensor may be sharded along its rows over one dimension of its mesh, as FSDP2's
        `fully_shard` does, and replicated over the others (HSDP), or replicated over all.

    Returns
    -------
    str or None
        Continues "the parameter ...".
    """
    if getattr(parameter, "_fsdp_flattened", False) or type(parameter).__name__ == "FlatParameter":
        return (
            "was flattened by FSDP1, which leaves no matrix to orthogonalize. "
            "Shard the model with torch.distributed.fsdp.fully_shard (FSDP2) instead."
        )
    sharded = as_dtensor(parameter)
    if sharded is None:
        return None
    from torch.distributed.tensor import Shard

    split = _split(sharded)
    if len(split) > 1:
        return (
            f"is sharded along more than one mesh dimension, {sharded.placements}. Shard it over "
            "one, such as a flattened mesh, and replicate it over the others; give a parameter "
            "under tensor parallelism to AdamW."
        )
    # By exact type: a strided shard, of tensor parallelism below FSDP2, is a Shard too.
    if any(type(p) is not Shard or p.dim != 0 for p in split.values()):
        return (
            f"is placed as {sharded.placements}; only whole rows can be sharded, by Shard(0), as "
            "fully_shard does. Give a parameter under tensor parallelism to AdamW."
        )
    # torch deals rows by the order of ranks in a group, which ascends, but counts them by the mesh.
    if split and bool((sharded.device_mesh.mesh.diff(dim=next(iter(split))) < 0).any()):
        return (
            f"is sharded over ranks {sharded.device_mesh.mesh.tolist()}, which do not ascend. Make "
            "the mesh of ranks in ascending order."
        )
    return None


def missing_rows(sharded: DTensor) -> str | None:
    """Say if this rank's rows are not those that `torch.chunk` deals it; None if they are.

    What `refusal` cannot say, for other ranks may hold what they should: they would wait for this
    one. Continues "the parameter ..." or "its gradient ...".
    """
    held, start, stop = len(sharded.to_local()), 0, sharded.shape[0]
    for split in _split(sharded):
        mesh = sharded.device_mesh
        start, stop = row_range(stop, mesh.size(split), mesh.get_local_rank(split))
    if held == stop - start:
        return None
    return (
        f"has {held} of its {sharded.shape[0]} rows here, where torch.chunk puts {stop - start}. "
        "Shard it by fully_shard or distribute_tensor."
    )


def _split(sharded: DTensor) -> dict[int, Any]:
    """Return by mesh dimension, if it has more than one rank, any placement but Replicate."""
    placed = zip(sharded.device_mesh.shape, sharded.placements, strict=True)
    return {d: p for d, (size, p) in enumerate(placed) if size > 1 and not p.is_replicate()}


@dataclass(frozen=True)
class Holding:
    """Which rows of one matrix every rank of a group holds.

    Attributes
    ----------
    rows : int
        Of the whole matrix.
    spans : tuple of (start, stop)
        By rank in the group; ``start == stop`` for none.
    replicas : tuple of tuple of int
        By rank in the group: ranks of the same replica hold the matrix exactly once together.
    """

    rows: int
    spans: tuple[tuple[int, int], ...]
    replicas: tuple[tuple[int, ...], ...]

    @classmethod
    def everywhere(cls, rows: int, ranks: int) -> Holding:
        """Every one of some ranks holds all rows, as under DistributedDataParallel."""
        return cls(rows, ((0, rows),) * ranks, tuple((rank,) for rank in range(ranks)))

    @classmethod
    def of(cls, sharded: DTensor, ranks: Sequence[int]) -> Holding:
        """Read off the placement of a DTensor over the (global) ranks of its mesh, in order."""
        mesh, m = sharded.device_mesh, sharded.shape[0]
        split = next(iter(_split(sharded)), None)
        spans: list[tuple[int, int]] = []
        replicas: list[tuple[int, ...]] = []
        for coordinates in _coordinates(mesh, tuple(ranks)):
            place = list(coordinates)
            if split is None:
                spans.append((0, m))
            else:
                spans.append(row_range(m, mesh.size(split), place.pop(split)))
            replicas.append(tuple(place))
        return cls(m, tuple(spans), tuple(replicas))

    def senders(self, owner: int) -> list[int]:
        """Return the ranks of the group that send their rows to an owner, itself among them."""
        return [r for r, replica in enumerate(self.replicas) if replica == self.replicas[owner]]


@lru_cache(maxsize=8)  # DeviceMesh.mesh is computed anew, for a millisecond, whenever it is read
def _coordinates(mesh: DeviceMesh, ranks: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return where in a mesh each of some (global) ranks is."""
    layout = mesh.mesh
    return [tuple((layout == rank).nonzero()[0].tolist()) for rank in ranks]


class Column(NamedTuple):
    """One tensor that travels, by its rows: how many entries a row has, of which dtype."""

    width: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of one row."""
        return self.width * self.dtype.itemsize


@dataclass(frozen=True)
class Job:
    """One matrix to be computed by its owner.

    Attributes
    ----------
    holding : Holding
        Where its rows are.
    columns : list of Column
        What a message holds; there and back alike.
    send : callable() -> list of Tensor
        This rank's rows, one tensor of shape (rows, width) a column. Called when the rows leave.
    compute : callable(list of Tensor) -> list of Tensor
        From whole tensors of shape (m, width) to whole tensors of the same shapes; on the owner.
    receive : callable(list of Tensor) -> None
        Takes this rank's rows of the result.
    """

    holding: Holding
    columns: list[Column]
    send: Callable[[], list[Tensor]]
    compute: Callable[[list[Tensor]], list[Tensor]]
    receive: Callable[[list[Tensor]], None]

    @property
    def row_bytes(self) -> int:
        """Of one row of a message."""
        return sum(column.bytes for column in self.columns)


class InFlight(NamedTuple):
    """An exchange under way."""

    dealt: list[int | None]
    work: Work
    received: Tensor
    sent: Tensor  # kept until it has been sent


class Rounds:
    """Carries out jobs over the ranks of a group.

    Parameters
    ----------
    group : ProcessGroup
        Every rank of it must carry out the same jobs in the same order.
    device : torch.device
        Where the group's backend communicates, and the owner computes.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._rank = group.rank()
        self._ranks = group.size()
        self._problem: Exception | None = None

    def carry_out(self, jobs: Mapping[int, Job], dealt: Sequence[Sequence[int | None]]) -> None:
        """Carry out all jobs; returns when this rank has received all its rows.

        Parameters
        ----------
        jobs : mapping of int to Job
            By number.
        dealt : sequence of sequence of (int or None)
            Rounds: the number that each rank has, as `normuon_lens.optim.owners.assign_owners`
            deals them. Numbers without a job are passed over.

        Raises
        ------
        Exception
            The first that a job raised on this rank, after all rounds: the other ranks do not wait
            in vain. For a matrix that its owner could not compute they got a zero update.
        """
        at_hand = ([i if i in jobs else None for i in numbers] for numbers in dealt)
        rounds = (numbers for numbers in at_hand if set(numbers) != {None})
        there = deque(self._gather(jobs, numbers) for numbers in islice(rounds, ROUNDS_IN_FLIGHT))
        back: deque[InFlight] = deque()
        while there:
            arriving = there.popleft()
            there.extend(self._gather(jobs, numbers) for numbers in islice(rounds, 1))
            back.append(self._compute(jobs, arriving))
            if len(back) > ROUNDS_IN_FLIGHT:
                self._take(jobs, back.popleft())
        while back:
            self._take(jobs, back.popleft())
        if self._problem is not None:
            raise self._problem

    def _gather(self, jobs: Mapping[int, Job], dealt: list[int | None]) -> InFlight:
        """Send this rank's rows of a round to their owners."""
        sent: list[Tensor] = []
        send_sizes = [0] * self._ranks
        for owner, index in enumerate(dealt):
            if index is not None:
                rows = jobs[index].send()  # also if another replica sends: the momentum advances
                if self._rank in jobs[index].holding.senders(owner):
                    sent += self._message(jobs[index], rows)
                    send_sizes[owner] = _bytes(jobs[index], self._rank)
        receive_sizes = [0] * self._ranks
        own = dealt[self._rank]
        if own is not None:
            for sender in jobs[own].holding.senders(self._rank):
                receive_sizes[sender] = _bytes(jobs[own], sender)
        return self._exchange(dealt, sent, send_sizes, receive_sizes)

    def _compute(self, jobs: Mapping[int, Job], arriving: InFlight) -> InFlight:
        """Compute the matrix that this rank owns and send every rank its rows."""
        arriving.work.wait()
        sent: list[Tensor] = []
        send_sizes = [0] * self._ranks
        own = arriving.dealt[self._rank]
        if own is not None:
            job = jobs[own]
            whole = self._whole(job, arriving.received)
            try:
                result = job.compute(whole)
            except Exception as problem:
                self._problem = self._problem or problem
                result = [torch.zeros_like(whole[0]), *whole[1:]]
            for start, stop in job.holding.spans:
                sent += self._message(job, [tensor[start:stop] for tensor in result])
            send_sizes = [_bytes(job, rank) for rank in range(self._ranks)]
        receive_sizes = [
            0 if index is None else _bytes(jobs[index], self._rank) for index in arriving.dealt
        ]
        return self._exchange(arriving.dealt, sent, send_sizes, receive_sizes)

    def _take(self, jobs: Mapping[int, Job], arriving: InFlight) -> None:
        """Hand out this rank's rows of the results of a round."""
        arriving.work.wait()
        at = 0
        for index in arriving.dealt:
            if index is not None:
                job = jobs[index]
                start, stop = job.holding.spans[self._rank]
                try:
                    job.receive(_rows(job, arriving.received, at, stop - start))
                except Exception as problem:
                    self._problem = self._problem or problem
                at += _bytes(job, self._rank)

    def _whole(self, job: Job, received: Tensor) -> list[Tensor]:
        whole = [
            torch.empty(job.holding.rows, width, dtype=dtype, device=self._device)
            for width, dtype in job.columns
        ]
        at = 0
        for sender in job.holding.senders(self._rank):
            start, stop = job.holding.spans[sender]
            for tensor, part in zip(whole, _rows(job, received, at, stop - start), strict=True):
                tensor[start:stop] = part
            at += _bytes(job, sender)
        return whole

    def _message(self, job: Job, rows: list[Tensor]) -> list[Tensor]:
        """Lay rows out as bytes, column by column."""
        return [
            tensor.to(self._device, column.dtype).reshape(-1).view(torch.uint8)
            for tensor, column in zip(rows, job.columns, strict=True)
        ]

    def _exchange(
        self,
        dealt: list[int | None],
        sent: list[Tensor],
        send_sizes: list[int],
        receive_sizes: list[int],
    ) -> InFlight:
        from torch.distributed import all_to_all_single

        empty = torch.empty(0, dtype=torch.uint8, device=self._device)
        message = torch.cat([empty, *sent])
        received = empty.new_empty(sum(receive_sizes))
        work = all_to_all_single(
            received, message, receive_sizes, send_sizes, group=self._group, async_op=True
        )
        return InFlight(dealt, work, received, message)


def _bytes(job: Job, rank: int) -> int:
    """Length of the message with one rank's rows."""
    start, stop = job.holding.spans[rank]
    return (stop - start) * job.row_bytes


def _rows(job: Job, message: Tensor, at: int, rows: int) -> list[Tensor]:
    """Read a message that begins at a byte: the inverse of laying it out."""
    tensors = []
    for column in job.columns:
        part = message[at : at + rows * column.bytes]
        if at % column.dtype.itemsize:  # a wider dtype than its neighbours': not aligned
            part = part.clone()
        tensors.append(part.view(column.dtype).view(rows, column.width))
        at += rows * column.bytes
    return tensors


def members_of(parameter: Tensor, group: ProcessGroup | None) -> list[int]:
    """Return the (global) ranks that share the work on a parameter; none if it is not shared.

    Parameters
    ----------
    parameter : Tensor
        A DTensor is shared by all ranks of its mesh, any other by those of the group.
    group : ProcessGroup or None
    """
    import torch.distributed as dist

    sharded = as_dtensor(parameter)
    if sharded is not None:
        members: list[int] = sharded.device_mesh.mesh.flatten().tolist()
        return members
    return [] if group is None else dist.get_process_group_ranks(group)


class Ranks:
    """The ranks that share the work, and the groups through which they talk.

    Parameters
    ----------
    group : ProcessGroup
        For the rows of matrices.
    device : torch.device
        Where its backend communicates.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        import torch.distributed as dist

        self.group = group
        self.device = device
        self.members = dist.get_process_group_ranks(group)
        # Agreeing is for the processors: on a GPU it would wait for all that is queued there.
        self._control = group
        if device.type != "cpu":
            self._control = dist.new_group(
                self.members, backend="gloo", use_local_synchronization=True
            )

    @classmethod
    def of_mesh(cls, sharded: DTensor) -> Ranks:
        """Take all ranks of the mesh of a DTensor. Collective over them."""
        import torch.distributed as dist

        mesh = sharded.device_mesh
        members = members_of(sharded, None)
        group: ProcessGroup | None
        if mesh.ndim == 1:
            group = mesh.get_group()
        elif len(members) == dist.get_world_size():
            group = dist.group.WORLD  # a communicator less
        else:
            group = dist.new_group(members, use_local_synchronization=True)
        assert group is not None  # as in a process that is not of the group
        return cls(group, _device(mesh.device_type))

    @classmethod
    def of_group(cls, group: ProcessGroup, parameter: Tensor) -> Ranks:
        """Take the ranks of a group that hold equal parameters. Collective on GPUs."""
        return cls(group, parameter.device)

    def agree(self, who: str, facts: Facts, faults: Facts) -> None:
        """Make sure that all ranks are about to do the same, before any of them waits for another.

        Parameters
        ----------
        who : str
            Begins the message.
        facts : list of (str, str)
            Of what, a key of `ADVICE`, and what this rank says of it.
        faults : list of (str, str)
            Of what, and why this rank cannot go on with it.

        Raises
        ------
        LensError
            The same on every rank, if there is a fault on any, or if they say different things:
            names the first, and who says what.
        """
        import torch.distributed as dist

        said = (facts, faults)
        digest = hashlib.blake2b(repr(said).encode(), digest_size=8).digest()
        mine = torch.tensor([int.from_bytes(digest, signed=True)])
        everyones = [torch.empty_like(mine) for _ in self.members]
        dist.all_gather(everyones, mine, group=self._control)
        if not faults and all(torch.equal(other, mine) for other in everyones):
            return
        all_said = [said] * len(self.members)
        dist.all_gather_object(all_said, said, group=self._control)
        trouble = _trouble(dict(zip(self.members, all_said, strict=True)))
        raise LensError(f"{who}: {trouble}")


def _device(device_type: str) -> torch.device:
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, torch.get_device_module(device_type).current_device())


def _trouble(said: dict[int, tuple[Facts, Facts]]) -> str:
    """Name the first fault, or else the first thing that ranks say differently."""
    faulty = {rank: " ".join(faults[0]) for rank, (_, faults) in said.items() if faults}
    for text in faulty.values():
        return f"on {_ranks([rank for rank in faulty if faulty[rank] == text])}, {text}"
    for number in range(max(len(facts) for facts, _ in said.values())):
        versions: dict[str, list[int]] = {}
        for rank, (facts, _) in said.items():
            nothing = "parameter", "there are no more parameters"
            kind, text = facts[number] if number < len(facts) else nothing
            versions.setdefault(text, []).append(rank)
        if len(versions) > 1:
            break
    told = "; ".join(f"on {_ranks(ranks)}, {text}" for text, ranks in versions.items())
    return f"the ranks are not about to take the same step: {told}. {ADVICE[kind]}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
