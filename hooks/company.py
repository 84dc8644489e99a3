"""Ranks that record one training together: how they meet, stay in touch, and part.

They find each other through the store that the training's processes met at, which is no collective:
a rank that nobody joins waits for a minute at most and trains on unrecorded. What they then say to
each other goes through a gloo group of their own, unknown to torch and to the training.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from normuon_lens.errors import AttachError

from .exchange import WORD_SECONDS

MEET_SECONDS = 60.0
"""How long a rank waits in `attach` for the others to call it too."""
REPLICAS_SECONDS = 5.0
"""The same where each of them has everything, so that the first can record without the others."""
POLL_SECONDS = 0.02

Facts = Mapping[str, str]


class NobodyCame(Exception):
    """Not all ranks called `attach`; the text says who, and what to do."""


class Company:
    """The ranks that record one training together. Made by all of them at about the same time.

    Parameters
    ----------
    members : sequence of int
        Their (global) ranks, ascending. The first leads.
    facts : mapping of str to str
        What the ranks must have in common, and what this rank says of it.
    patience : float
        Seconds to wait for the others to come.

    Attributes
    ----------
    place : int
        Of this rank among the members.
    rank, lead : int
        Global rank of this process and of the first.

    Raises
    ------
    AttachError
        On all ranks, if they say different things: names the first.
    NobodyCame
        If not all ranks are there in time.
    """

    def __init__(self, members: Sequence[int], facts: Facts, patience: float) -> None:
        self.members = list(members)
        self.rank, self.lead = dist.get_rank(), members[0]
        self.place = self.members.index(self.rank)
        # The store that the processes of the training met at. It is not part of torch's face, but
        # the only way to it that works for every way of launching.
        place = PrefixStore(f"normuon-lens/{_short(self.members)}", _get_default_store())
        self._store = PrefixStore(self._assemble(place, patience), place)
        self._gather(facts)

    @property
    def leads(self) -> bool:
        """Whether this rank is the first."""
        return self.place == 0

    def tell(self, word: str, said: Any) -> None:
        """Leave something for the others; it is said once."""
        self._store.set(f"{word}/{self.rank}", json.dumps(said))

    def hear(self, word: str, rank: int) -> Any:
        """Wait for what a rank has to say.

        Raises
        ------
        NobodyCame
            If it says nothing for MEET_SECONDS.
        """
        deadline, key = time.monotonic() + MEET_SECONDS, f"{word}/{rank}"
        while not self._store.check([key]):
            if time.monotonic() > deadline:
                raise NobodyCame(f"rank {rank} did not answer within {MEET_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)
        return json.loads(self._store.get(key))

    def settle(self, problem: str) -> None:
        """Go on together only if no rank has a problem.

        Raises
        ------
        AttachError
            On all ranks alike, if there is one on any.
        """
        self.tell("problem", problem)
        if self.leads:
            said = {rank: self.hear("problem", rank) for rank in self.members}
            faults = [f"rank {rank}: {why}" for rank, why in said.items() if why]
            # Whatever keeps the first from recording is not about ranks.
            self.tell("verdict", said[self.lead] or next(iter(faults), ""))
        if verdict := self.hear("verdict", self.lead):
            raise AttachError(verdict)

    def connect(self) -> Any:
        """Make a gloo group of these ranks' own. Collective, bounded in time.

        Returns
        -------
        ProcessGroupGloo
            Not registered with torch: neither `destroy_process_group` nor the names of other groups
            know of it. Ranks in it are places among the members.

        Raises
        ------
        NobodyCame
            If they cannot reach each other.
        """
        timeout = timedelta(seconds=WORD_SECONDS)
        store = PrefixStore("gloo", self._store)
        try:
            return dist.ProcessGroupGloo(store, self.place, len(self.members), timeout)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise NobodyCame(f"the ranks cannot reach each other by gloo: {reason}") from None

    def explain(self, reason: str) -> None:
        """Say why this rank can record no more; it still comes by once, to say that it cannot."""
        self._leave("failed", reason)

    def part(self, reason: str) -> None:
        """Say that this rank comes by no more."""
        self._leave("parted", reason)

    def failed(self) -> str:
        """Return which rank can record no more, and why; nothing if none has said so."""
        return self._read("failed")

    def parted(self) -> str:
        """Return which rank comes by no more, and why; nothing if all do."""
        return self._read("parted")

    def _leave(self, key: str, reason: str) -> None:
        with suppress(Exception):  # whoever keeps the store may be gone
            self._store.set(key, f"rank {self.rank}: {reason}")

    def _read(self, key: str) -> str:
        text: str = self._store.get(key).decode() if self._store.check([key]) else ""
        return text

    def _assemble(self, place: Store, patience: float) -> str:
        """Wait until all members are at a place; returns a name for this one meeting of theirs.

        What earlier meetings left there, also those of processes that torchrun has replaced by
        these, counts for nothing: every member brings a word of its own, the first calls out all
        that it finds, and only who hears the word just brought answers.
        """
        word, called, deadline = uuid.uuid4().hex, "", time.monotonic() + patience
        place.set(f"hello/{self.rank}", word)
        hellos = [f"hello/{rank}" for rank in self.members]
        answers = [f"answer/{rank}" for rank in self.members]
        while True:
            if self.leads and place.check(hellos):
                said = zip(self.members, place.multi_get(hellos), strict=True)
                call = json.dumps({str(rank): brought.decode() for rank, brought in said})
                if call != called:
                    place.set("call", call)
            else:
                call = place.get("call").decode() if place.check(["call"]) else "{}"
            meeting = _short(call)
            if json.loads(call).get(str(self.rank)) == word:
                if call != called:
                    place.set(f"answer/{self.rank}", meeting)
                if self.leads and _all_say(place, answers, meeting):
                    place.set("begun", meeting)
                    return meeting
                if _all_say(place, ["begun"], meeting):
                    return meeting
            called = call
            if time.monotonic() > deadline:
                others = [rank for rank in self.members if rank != self.rank]
                missing = _missing(place, meeting, others)
                raise NobodyCame(
                    f"attach was not called on rank{'s' * (len(missing) > 1)} "
                    f"{', '.join(map(str, missing))} within {patience:.0f} s, but the weights are "
                    "spread over several: call it on every rank"
                )
            time.sleep(POLL_SECONDS)

    def _gather(self, facts: Facts) -> None:
        self.tell("facts", dict(facts))
        if self.leads:
            said = {rank: self.hear("facts", rank) for rank in self.members}
            self.tell("difference", _difference(said))
        if difference := self.hear("difference", self.lead):
            raise AttachError(difference)


def _all_say(place: Store, keys: Sequence[str], text: str) -> bool:
    there = bool(place.check(list(keys)))
    return there and {said.decode() for said in place.multi_get(list(keys))} == {text}


def _missing(place: Store, meeting: str, others: Sequence[int]) -> list[int]:
    silent = [rank for rank in others if not place.check([f"hello/{rank}"])]
    return silent or [r for r in others if not _all_say(place, [f"answer/{r}"], meeting)]


def _short(said: object) -> str:
    return hashlib.blake2b(repr(said).encode(), digest_size=8).hexdigest()


def _difference(said: Mapping[int, Facts]) -> str:
    """Name the first thing that ranks say differently; nothing if there is none."""
    (first, of_first), *others = said.items()
    for rank, facts in others:
        for what, value in of_first.items():
            if facts.get(what) != value:
                return (
                    f"{what} differs between ranks: {value} on rank {first}, {facts.get(what)} on "
                    f"rank {rank}; call attach with the same arguments on every rank"
                )
    return ""
