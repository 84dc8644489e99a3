"""How a recording begins: a helper process that opens it, alone or together with other ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from normuon_lens.errors import AttachError
from normuon_lens.runfile import Matrices
from normuon_lens.runfile.schema import Shard

from .budget import Budget
from .feed import START_SECONDS, Feed, FeedLost
from .schedule import Schedule
from .selection import Watched
from .share import Share, join

LEAVE_SECONDS = 0.2
"""How long the end of a helper is waited for whose recording is not to be."""
SAMPLES_IN_FLIGHT = 4
RING_BYTES = (8 << 20, 512 << 20)
"""Least and most shared memory between the trainer and the helper process."""


class Plan(NamedTuple):
    """What is to be recorded, and where.

    Attributes
    ----------
    paths : list of Path
        Of the recording, and of its shadows.
    metadata : list of dict
        What describes each of them.
    matrices : Matrices
    options : dict
        Further arguments of the writer.
    streams : int
        Matrices taken of each in one sample: its stages and shadows.
    """

    paths: list[Path]
    metadata: list[dict[str, Any]]
    matrices: Matrices
    options: dict[str, Any]
    streams: int


class Opened(NamedTuple):
    """A recording that has begun.

    Attributes
    ----------
    feed : Feed
        Leads to the helper process.
    paths : list of Path
        As planned; with other ranks, as the first of them planned.
    last_step : int
        The last step of the recording that is resumed, or 0.
    share : Share or None
        This rank's, where several record together.
    """

    feed: Feed
    paths: list[Path]
    last_step: int
    share: Share | None = None


def open_alone(plan: Plan) -> Opened:
    """Begin to record in this process alone; AttachError if that is not possible."""
    feed, opened = _open(plan, 1)
    return Opened(feed, plan.paths, opened["last_step"])


def open_together(
    plan: Plan,
    ranks: Sequence[int],
    facts: Mapping[str, str],
    watched: Sequence[Watched],
    optimizers: Sequence[torch.optim.Optimizer],
    patience: float,
) -> Opened:
    """Begin to record on several (global) ranks, which all call this within `patience` seconds.

    Raises
    ------
    AttachError
        On all ranks, if they plan different things or one of them cannot begin.
    NobodyCame
        If not all ranks call this. Nothing is left behind in either case.
    """
    feeds: list[Feed] = []

    def open_part(shard: Shard, path: str | None) -> dict[str, Any]:
        place = plan._replace(paths=[Path(path)]) if path else plan
        feed, opened = _open(place, len(ranks), shard)
        feeds.append(feed)
        return opened | {"path": str(place.paths[0].absolute())}

    try:
        share, opened = join(ranks, facts, plan.matrices, watched, optimizers, open_part, patience)
    except BaseException:
        for feed in feeds:
            feed.close(LEAVE_SECONDS)
        raise
    paths = plan.paths if share.company.leads else [Path(opened["path"])]
    return Opened(feeds[0], paths, opened["last_step"], share)


def facts_of(
    matrices: Matrices,
    schedule: Schedule,
    budget: Budget | None,
    step: int | None,
    **options: Any,
) -> dict[str, str]:
    """Say what all ranks of one recording must have in common."""
    table = repr([vars(matrix) for matrix in matrices]).encode()
    digest = hashlib.blake2b(table, digest_size=4).hexdigest()
    said = {
        "the model": f"{len(matrices)} matrices ({digest})",
        **{name: value for name, value in vars(schedule).items() if name != "first"},
        "budget": budget.share if budget else None,
        "step": step,
        **options,
    }
    return {name: str(value) for name, value in said.items()}


def _open(plan: Plan, ranks: int, shard: Shard | None = None) -> tuple[Feed, dict[str, Any]]:
    """Start a helper process and have it open the plan's recordings; what it says of the first."""
    recordings = [
        {
            "path": str(path.absolute()),
            "metadata": metadata,
            "matrices": [vars(matrix) for matrix in plan.matrices],
            "options": plan.options,
            **({"shard": shard.to_json()} if shard else {}),
        }
        for path, metadata in zip(plan.paths, plan.metadata, strict=True)
    ]
    try:
        feed = Feed(_memory(plan, ranks))
    except FeedLost as error:
        raise AttachError(str(error)) from None
    try:
        opened: list[dict[str, Any]] = feed.ask(
            "open", {"recordings": recordings}, "opened", START_SECONDS
        )
        return feed, opened[0]
    except FeedLost as error:
        feed.close()
        raise AttachError(str(error)) from None
    except BaseException:
        feed.close(LEAVE_SECONDS)
        raise


def _memory(plan: Plan, ranks: int) -> int:
    """Bytes to reserve for samples on their way to the helper process; ranks share each sample."""
    sizes = [x.m * x.n * (8 if x.dtype == "float64" else 4) for x in plan.matrices]
    least, most = RING_BYTES
    wanted = min(most, max(least, SAMPLES_IN_FLIGHT * plan.streams * sum(sizes) // ranks))
    return max(max(sizes) + (1 << 20), wanted)
