"""Brings sampled matrices together from the rows that ranks hold, each to one rank.

Where a step is sampled, ranks first tell each other in one small exchange that they all are well,
at the same step, and about to send the same. Only then do the rows travel, all of them in one
`all_to_all_single`, while the training goes on; and never through a group of the training's.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from normuon_lens.runfile import Matrices

from .portions import Portion
from .schedule import Schedule
from .selection import Watched

WORD_SECONDS = 20.0
"""How long a rank waits at a sampled step for the others to come by; once, for it then gives up."""
ROWS_SECONDS = 120.0
"""How long the rows may be on their way; a rank that died is noticed at once."""

WELL, FAILED = 0, 1
NO_ROWS = np.empty((0, 0), np.float32)

_in_use: set[Any] = set()
"""Groups that are not hung up: no forked child may end its copy of one, whose threads it lacks."""


class ExchangeLost(Exception):
    """The ranks no longer record together; the text says why."""


class Offer(NamedTuple):
    """Rows of a matrix, and what goes with the whole.

    Attributes
    ----------
    rows : ndarray of shape (rows, width)
        As the parameter is stored; empty if another replica's go to the owner.
    decay, rounded
        As in :class:`normuon_lens.hooks.tap.Take`.
    """

    rows: np.ndarray
    decay: float
    rounded: str | None


class Whole(NamedTuple):
    """A matrix that came together here.

    Attributes
    ----------
    item : Watched
    stage : str
    values : ndarray of shape (m, n)
        One row a neuron.
    weight_norm : float
        ‖W‖_F of the whole weight.
    decay, rounded
        As in :class:`normuon_lens.hooks.tap.Take`.
    """

    item: Watched
    stage: str
    values: np.ndarray
    weight_norm: float
    decay: float
    rounded: str | None


class Weight(NamedTuple):
    """‖W‖_F of a whole weight."""

    item: Watched
    norm: float


@dataclass
class Held:
    """What this rank has of one matrix at a sampled step.

    Attributes
    ----------
    weight : float
        ‖W‖_F of its rows.
    offers : dict of str to Offer
        By stage.
    """

    weight: float = math.nan
    offers: dict[str, Offer] = field(default_factory=dict)


Outbox: TypeAlias = dict[int, Held]


class Parcel(NamedTuple):
    """An exchange of rows under way."""

    owners: dict[int, int]
    outbox: Outbox
    work: Any
    received: torch.Tensor
    sent: torch.Tensor  # kept until it has been sent


class Exchange:
    """One rank's end of the exchange.

    Parameters
    ----------
    group : ProcessGroupGloo
        Of the recorder's own, in which this rank is `rank`.
    rank, ranks : int
        Place of this rank, and how many there are.
    watched : sequence of Watched
        The matrices, in the order of the table.
    portions : sequence of Portion
    matrices : Matrices

    Attributes
    ----------
    bytes : int
        That this rank has sent to others so far.
    """

    def __init__(
        self,
        group: Any,
        rank: int,
        ranks: int,
        watched: Sequence[Watched],
        portions: Sequence[Portion],
        matrices: Matrices,
    ) -> None:
        self.bytes = 0
        _in_use.add(group)
        self._group, self._rank, self._ranks = group, rank, ranks
        self._watched, self._portions, self._matrices = watched, portions, matrices
        self._outbox: Outbox = {}
        self._owners: dict[int, int] = {}
        self._parcel: Parcel | None = None
        self._turn = 0

    def begin(self) -> None:
        """Begin a sampled step; what was offered of one that ended in an exception is forgotten."""
        self._outbox = {}
        self._owners = self._deal()

    def offer(
        self,
        item: Watched,
        stage: str,
        rows: torch.Tensor,
        *,
        scale: float,
        decay: float,
        rounded: str | None,
    ) -> None:
        """Keep `scale` times this rank's rows of a matrix for its owner.

        Parameters
        ----------
        rows : Tensor of shape (rows, width)
            As the parameter is stored. They are copied.
        """
        values = NO_ROWS
        if self._sends(self._rank, item.index):
            scaled = rows if scale == 1.0 else rows * scale
            values = scaled.to("cpu", self._dtype(item.index), copy=True).numpy()
        self._held(item).offers[stage] = Offer(values, decay, rounded)

    def weigh(self, item: Watched, norm: float) -> None:
        """Keep the Frobenius norm of this rank's rows of a weight."""
        self._held(item).weight = norm

    def agree(self, step: int, schedule: Schedule, *, failed: bool) -> tuple[Schedule, bool]:
        """Hear from all ranks at a sampled step. Collective, and bounded in time.

        Parameters
        ----------
        step : int
        schedule : Schedule
            That this rank can afford.
        failed : bool
            Whether it can record no more.

        Returns
        -------
        Schedule
            That all can afford.
        bool
            Whether all are about to send rows of the same matrices.

        Raises
        ------
        ExchangeLost
            If a rank failed, is at another step, or does not answer within WORD_SECONDS.
        """
        pace = (schedule.every, schedule.norms_every, schedule.matrices_every)
        word = torch.tensor([step, FAILED if failed else WELL, *pace, self._digest()])
        heard = self._hear(word)
        if (heard[:, 1] == FAILED).any():
            raise ExchangeLost("a rank can record no more")
        if (heard[:, 0] != step).any():
            raise ExchangeLost(f"the ranks are at different steps: {heard[:, 0].tolist()}")
        every, norms_every, matrices_every = heard[:, 2:5].amax(0).tolist()
        agreed = replace(
            schedule, every=every, norms_every=norms_every, matrices_every=matrices_every
        )
        return agreed, bool((heard[:, 5] == word[5]).all())

    def everywhere(self, holds: bool) -> bool:
        """Tell whether something holds on all ranks. Collective, and bounded in time.

        Raises
        ------
        ExchangeLost
            If a rank does not answer within WORD_SECONDS.
        """
        return bool(self._hear(torch.tensor([int(holds)])).all())

    def close(self) -> None:
        """Hang up: whoever waits for this rank need wait no longer."""
        _in_use.discard(self._group)
        self._group = self._parcel = None

    def _hear(self, word: torch.Tensor) -> torch.Tensor:
        """Tell all ranks something, and hear the same of each: (ranks, ...)."""
        words = [torch.empty_like(word) for _ in range(self._ranks)]
        try:
            self._group.allgather([words], [word]).wait()
        except Exception as error:
            raise ExchangeLost(_short(error)) from None
        self.bytes += word.nbytes * (self._ranks - 1)
        return torch.stack(words)

    def send(self) -> None:
        """Send this rank's rows to the owners of this turn. Collective; does not wait."""
        outbox, self._outbox = self._outbox, {}
        self._turn += 1
        if not outbox:
            return
        messages = [self._message(outbox, owner) for owner in range(self._ranks)]
        sizes = [sum(piece.nbytes for piece in message) for message in messages]
        expected = [self._expected(outbox, sender) for sender in range(self._ranks)]
        pieces = [piece.reshape(-1).view(np.uint8) for message in messages for piece in message]
        sent = torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *pieces]))
        for held in outbox.values():  # one copy of the rows is enough
            held.offers = {s: offer._replace(rows=NO_ROWS) for s, offer in held.offers.items()}
        received = torch.empty(sum(expected), dtype=torch.uint8)
        options = torch.distributed.AllToAllOptions()
        options.timeout = timedelta(seconds=ROWS_SECONDS)
        try:
            work = self._group.alltoall_base(received, sent, expected, sizes, options)
        except Exception as error:
            raise ExchangeLost(_short(error)) from None
        self.bytes += sum(sizes) - sizes[self._rank]
        self._parcel = Parcel(self._owners, outbox, work, received, sent)

    def receive(self) -> Iterator[Whole | Weight]:
        """Wait for the rows that were sent last, and put together what this rank owns.

        Yields
        ------
        Whole
            A matrix that came together.
        Weight
            The norm of a weight whose update this rank had whole.

        Raises
        ------
        ExchangeLost
            If they do not come.
        """
        parcel, self._parcel = self._parcel, None
        if parcel is None:
            return
        try:
            parcel.work.wait()
        except Exception as error:
            raise ExchangeLost(_short(error)) from None
        outbox, message = parcel.outbox, Reader(parcel.received.numpy())
        mine = [index for index in outbox if parcel.owners[index] == self._rank]
        squares = dict.fromkeys(mine, 0.0)
        stored = {index: self._room_for(index, outbox[index]) for index in mine}
        for sender in range(self._ranks):
            for index in mine:
                holding = self._portions[index].holding
                if holding.replicas[sender] != holding.replicas[self._rank]:
                    continue
                squares[index] += float(message.take((1,), np.float64)[0])
                start, stop = holding.spans[sender]
                for whole in stored[index].values():
                    whole[start:stop] = message.take((stop - start, whole.shape[1]), whole.dtype)
        for index in mine:
            item, norm = self._watched[index], math.sqrt(squares[index])
            if self._portions[index].owner is not None:
                yield Weight(item, norm)
            for stage, whole in stored[index].items():
                offer = outbox[index].offers[stage]
                values = item.by_neurons(torch.from_numpy(whole)).contiguous().numpy()
                yield Whole(item, stage, values, norm, offer.decay, offer.rounded)

    def _held(self, item: Watched) -> Held:
        return self._outbox.setdefault(item.index, Held())

    def _room_for(self, index: int, held: Held) -> dict[str, np.ndarray]:
        stored, dtype = self._watched[index].stored, self._dtype(index)
        return {stage: torch.empty(stored, dtype=dtype).numpy() for stage in held.offers}

    def _deal(self) -> dict[int, int]:
        """Give every matrix of this turn to a rank, those that have an owner anyway to that one."""
        loads = [0.0] * self._ranks
        owners: dict[int, int] = {}
        free: dict[int, float] = {}
        for index, (portion, matrix) in enumerate(zip(self._portions, self._matrices, strict=True)):
            cost = float(matrix.m * matrix.n * matrix.k)  # of its spectrum
            if portion.owner is None:
                free[index] = cost
            else:
                owners[index] = portion.owner
                loads[portion.owner] += cost
        return owners | deal(free, loads, self._turn)

    def _sends(self, sender: int, index: int) -> bool:
        """Whether a rank's rows of a matrix go to its owner of this turn: of the same replica."""
        replicas = self._portions[index].holding.replicas
        return replicas[sender] == replicas[self._owners[index]]

    def _message(self, outbox: Outbox, owner: int) -> list[np.ndarray]:
        """Lay out what this rank sends to an owner, matrix by matrix."""
        pieces: list[np.ndarray] = []
        for index, held in outbox.items():
            if self._owners[index] == owner and self._sends(self._rank, index):
                pieces.append(np.array([held.weight**2]))
                pieces += [offer.rows for offer in held.offers.values()]
        return pieces

    def _expected(self, outbox: Outbox, sender: int) -> int:
        """Bytes that this rank gets from another: all offer rows of the same matrices."""
        total = 0
        for index, held in outbox.items():
            if self._owners[index] == self._rank and self._sends(sender, index):
                start, stop = self._portions[index].holding.spans[sender]
                row = self._watched[index].stored[1] * self._dtype(index).itemsize
                total += 8 + (stop - start) * row * len(held.offers)
        return total

    def _dtype(self, index: int) -> torch.dtype:
        return torch.float64 if self._matrices[index].dtype == "float64" else torch.float32

    def _digest(self) -> int:
        """Stand for which matrices, at which stages, this rank has rows of."""
        said = repr([(index, list(held.offers)) for index, held in self._outbox.items()]).encode()
        return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), signed=True)


class Reader:
    """Reads a message from its beginning."""

    def __init__(self, message: np.ndarray) -> None:
        self._message = message.data
        self._at = 0

    def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return the next array; it may not be aligned."""
        count = math.prod(shape)
        array = (
            np.frombuffer(self._message, dtype, count, self._at) if count else np.empty(0, dtype)
        )
        self._at += array.nbytes
        return array.reshape(shape)


def deal(costs: Mapping[int, float], loads: Sequence[float], turn: int) -> dict[int, int]:
    """Give every matrix to a rank: the dearest first, to whoever has the least to do.

    Parameters
    ----------
    costs : mapping of int to float
        By matrix.
    loads : sequence of float
        What each rank has to do anyway.
    turn : int
        Begins with another rank each time, so that no rank has the dearest matrix for ever.

    Returns
    -------
    dict of int to int
        The rank of each matrix.
    """
    ranks = len(loads)
    waiting = [(load, (rank - turn) % ranks) for rank, load in enumerate(loads)]
    heapq.heapify(waiting)
    dealt: dict[int, int] = {}
    for matrix in sorted(costs, key=lambda i: (-costs[i], i)):
        load, place = heapq.heappop(waiting)
        dealt[matrix] = (place + turn) % ranks
        heapq.heappush(waiting, (load + costs[matrix], place))
    return dealt


def _short(error: Exception) -> str:
    """Say in a few words what gloo says in many."""
    text = " ".join(str(error).split())
    if "Timed out" in text or "timed out" in text:
        return "a rank did not come by in time"
    if "Connection" in text:
        return "the connection to another rank broke"
    return text[:200] or type(error).__name__
