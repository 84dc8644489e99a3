"""What one rank records of matrices that several hold together, and how it goes along with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from normuon_lens.errors import AttachError
from normuon_lens.runfile import Matrices
from normuon_lens.runfile.schema import Shard

from .company import Company
from .exchange import Exchange, ExchangeLost, Weight, Whole
from .portions import Portion, portions_of, recorded_rows
from .schedule import Schedule
from .selection import Watched

OpenPart = Callable[[Shard, str | None], dict[str, Any]]
"""Opens a rank's part of the recording, at the path that the first rank names; what was opened:
its ``path``, ``attempt`` and ``last_step``."""


class Share:
    """One rank's share in a recording that several ranks make together.

    Parameters
    ----------
    company : Company
    shard : Shard
    portions : sequence of Portion
    exchange : Exchange

    Attributes
    ----------
    company : Company
        The ranks.
    shard : Shard
        Of which neurons this rank records the norms.
    exchange : Exchange
        Brings whole matrices together.
    """

    def __init__(
        self, company: Company, shard: Shard, portions: Sequence[Portion], exchange: Exchange
    ) -> None:
        self.company, self.shard, self.exchange = company, shard, exchange
        self._portions = portions

    def is_whole(self, item: Watched, stage: str) -> bool:
        """Whether this stage is taken whole, by the owner alone."""
        return self._portions[item.index].is_whole(stage)

    def shown(self, watched: Sequence[Watched]) -> tuple[list[Watched], list[Watched]]:
        """Return what each owner alone is shown of, and what of it this rank is."""
        handed = [item for item in watched if self.is_whole(item, "update")]
        place = self.company.place
        return handed, [item for item in handed if self._portions[item.index].owner == place]

    def meet(self, step: int, wanted: Schedule, *, failed: bool) -> Schedule:
        """Come by at a sampled step, as all ranks do, and let this rank's rows set out.

        Parameters
        ----------
        step : int
        wanted : Schedule
            That this rank can afford.
        failed : bool
            Whether it can record no more.

        Returns
        -------
        Schedule
            To go on with, the same on all ranks.

        Raises
        ------
        ExchangeLost
            If a rank records no more; says which and why.
        """
        if self.company.parted():
            raise ExchangeLost(self._why())
        try:
            agreed, alike = self.exchange.agree(step, wanted, failed=failed)
        except ExchangeLost as error:
            raise ExchangeLost(self._why() or str(error)) from None
        try:
            if alike:
                self.exchange.send()
        except Exception as error:  # the others count on this rank's rows
            self.exchange.close()
            raise ExchangeLost(str(error) or type(error).__name__) from None
        return agreed

    def is_phantom(self, gradients_vanish: bool) -> bool:
        """Tell whether a step that may be none is none: no rank has a gradient."""
        return self.exchange.everywhere(gradients_vanish)

    def part(self) -> None:
        """Come by no more."""
        self.company.part("its recording has ended")
        self.exchange.close()

    def receive(self) -> Iterator[Whole | Weight]:
        """Wait for what set out last, and put together what this rank owns of it."""
        try:
            yield from self.exchange.receive()
        except ExchangeLost as error:
            raise ExchangeLost(self._why() or str(error)) from None

    def _why(self) -> str:
        """Say which rank records no more, and why; nothing if none has said so."""
        return self.company.failed() or self.company.parted()


def join(
    ranks: Sequence[int],
    facts: Mapping[str, str],
    matrices: Matrices,
    watched: Sequence[Watched],
    optimizers: Sequence[torch.optim.Optimizer],
    open_part: OpenPart,
    patience: float,
) -> tuple[Share, dict[str, Any]]:
    """Begin to record together with other ranks, which call this too.

    The first rank opens the recording; the others then open their parts of it.

    Parameters
    ----------
    ranks : sequence of int
        Their global ranks, ascending.
    facts : mapping of str to str
        What they must have in common, and what this rank says of it.
    matrices : Matrices
    watched : sequence of Watched
    optimizers : sequence of torch.optim.Optimizer
    open_part : callable
        See :data:`OpenPart`.
    patience : float
        Seconds to wait for the others to come.

    Returns
    -------
    Share
    dict
        What the first rank opened.

    Raises
    ------
    AttachError
        On all ranks, if their facts differ or any of them cannot open its part.
    NobodyCame
        If not all ranks are there in time.
    """
    company = Company(ranks, facts, patience)
    portions = portions_of(watched, optimizers, ranks)
    rows = recorded_rows(portions, matrices, company.place)
    shard = Shard(company.rank, tuple(ranks), None, rows)
    opened: dict[str, Any] = {}
    problem = ""
    try:
        if company.leads:
            try:
                opened = open_part(shard, None)
            finally:
                company.tell("opened", opened)
        elif opened := company.hear("opened", company.lead):
            shard = replace(shard, attempt=opened["attempt"])
            open_part(shard, opened["path"])
    except AttachError as error:
        problem = str(error)
    company.settle(problem)
    exchange = Exchange(company.connect(), company.place, len(ranks), watched, portions, matrices)
    return Share(company, shard, portions, exchange), opened
