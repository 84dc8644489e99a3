"""Real text that every Python installation carries: the standard library's own sources."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch

from normuon_lens.errors import LensError

from .ranks import rank, ranks

LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib"}
VALIDATION_SHARE = 20
"""One file in so many is for validation, chosen by a hash of its path: stable and unbiased."""


class Text(NamedTuple):
    """Training and validation text as bytes.

    Attributes
    ----------
    train, validation : Tensor of shape (characters,), uint8
    """

    train: torch.Tensor
    validation: torch.Tensor


def standard_library() -> Text:
    """Read the standard library's ``*.py`` files.

    Raises
    ------
    LensError
        If this Python comes without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    train, validation = bytearray(), bytearray()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if LEFT_OUT.isdisjoint(relative.parts):
            digest = hashlib.sha256(relative.as_posix().encode()).digest()
            target = validation if digest[0] % VALIDATION_SHARE == 0 else train
            target += path.read_bytes()
    if min(len(train), len(validation)) < 100_000:
        raise LensError(f"{root}: this Python has no library sources to train on")
    return Text(
        torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(validation, dtype=torch.uint8)
    )


class Batches:
    """Random windows of a text: the n-th batch is the same for everyone with the same seed.

    With several ranks each has its share of the windows of that same batch.

    Parameters
    ----------
    text : Tensor of shape (characters,), uint8
    batch, context : int
        Windows a batch, characters a window.
    seed : int

    Attributes
    ----------
    weight : float
        Windows of this rank's share relative to the mean over the ranks: 1 if all are equal.

    Raises
    ------
    LensError
        If there are more ranks than windows in a batch.
    """

    def __init__(self, text: torch.Tensor, batch: int, context: int, seed: int) -> None:
        if batch < ranks():
            raise LensError(f"a batch of {batch} windows is too small for {ranks()} processes")
        self._text, self._batch, self._context = text, batch, context
        self._generator = torch.Generator().manual_seed(seed)
        start, stop = (batch * r // ranks() for r in (rank(), rank() + 1))
        self._share = slice(start, stop)
        self.weight = (stop - start) * ranks() / batch

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets (the next characters), int64, each (share, context)."""
        last = len(self._text) - self._context - 1
        starts = torch.randint(last, (self._batch, 1), generator=self._generator)
        windows = self._text[starts[self._share] + torch.arange(self._context + 1)].long()
        return windows[:, :-1], windows[:, 1:]
