"""The processes of one training, its ranks: this one alone, or all that torchrun started.

The first rank decides and speaks; the others follow and are silent.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from rich.console import Console

from normuon_lens.cli.tables import console
from normuon_lens.errors import LensError

T = TypeVar("T")


def rank() -> int:
    """Return this process's number among those of the training, from 0."""
    return dist.get_rank() if _grouped() else 0


def ranks() -> int:
    """Return how many processes train together, 1 if this one is alone."""
    return dist.get_world_size() if _grouped() else 1


@contextmanager
def joined() -> Iterator[None]:
    """Train together with the other processes that torchrun started, if it started this one.

    They speak by gloo: the models here train on CPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    # Nothing written in Python interrupts the wait for the others, so Ctrl-C must not be.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        dist.init_process_group("gloo")
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """Do what may be refused on some ranks; then it is refused on all.

    Raises
    ------
    LensError
        On the first rank: what the first of those ranks was refused for.
    SystemExit
        On the others, with code 0: torchrun kills all ranks as soon as one of them fails, and the
        first has yet to say why.
    """
    refused: LensError | None = None
    try:
        yield
    except LensError as error:
        refused = error
    if ranks() > 1:
        reasons: list[str | None] = [None] * ranks()
        dist.all_gather_object(reasons, str(refused) if refused else None)
        reason = next(filter(None, reasons), None)
        if reason and rank() > 0:
            sys.exit(0)
        refused = refused or (LensError(reason) if reason else None)
    if refused:
        raise refused


def decided_by_first(decide: Callable[[], T]) -> T:
    """Return on every rank what `decide` returns on the first, where alone it is called.

    If it raises a LensError there, the ranks end as under :func:`together`.
    """
    decision: list[T | None] = [None]
    with together():
        if rank() == 0:
            decision = [decide()]
    if ranks() > 1:
        dist.broadcast_object_list(decision)
    return cast(T, decision[0])


def mean(value: torch.Tensor) -> float:
    """Return the mean over the ranks of a scalar tensor, the same number on all of them."""
    if ranks() == 1:
        return value.item()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total.item() / ranks()


def first_console() -> Console:
    """Return the console for standard output, on all ranks but the first a mute one."""
    return console() if rank() == 0 else Console(quiet=True, force_terminal=False)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM end this process as an exception does, with code 143.

    Otherwise Python ends at once: recordings would stay unfinished, and the page behind. Not for
    :func:`joined`, which has nothing to finish.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
