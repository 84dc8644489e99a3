"""How much an optimizer keeps for the matrices that are recorded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from normuon_lens.optim.sharded import local


def state_bytes(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]) -> float:
    """Return the bytes of all tensors in an optimizer's state for these parameters.

    Of sharded state it is what this rank holds. Sizes alone are looked at, so no device is waited
    for. NaN where the state is not kept by parameter.
    """
    try:
        # By `get`: the state is a defaultdict, and asking must not make it grow.
        return float(sum(_bytes_of(optimizer.state.get(each)) for each in parameters))
    except Exception:  # a state of some other kind is a missing figure, not a failed recording
        return math.nan


def _bytes_of(held: Any) -> int:
    if isinstance(held, torch.Tensor):
        part = local(held)
        return part.numel() * part.element_size()
    if isinstance(held, dict):
        return sum(map(_bytes_of, held.values()))
    if isinstance(held, list | tuple):
        return sum(map(_bytes_of, held))
    return 0
