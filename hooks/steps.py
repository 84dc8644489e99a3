"""What kind of step is at hand: a real one, one that a scaler skips, or one that is none at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def steps_taken(optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Return how many steps the optimizers have taken, as far as their state says; else 0."""
    taken = [
        int(state["step"])
        for optimizer in optimizers
        for state in optimizer.state.values()
        if isinstance(state, dict) and "step" in state
    ]
    return max(taken, default=0)


def is_phantom(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether a step only makes an optimizer create its state: no rate, no gradient.

    ``torch.distributed.checkpoint`` takes such a step when it asks for the state of an optimizer
    that has none.
    """
    if optimizer.state or any(float(group.get("lr", 1.0)) for group in optimizer.param_groups):
        return False
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    return bool(gradients) and not any(bool(gradient.any()) for gradient in gradients)


def is_capturing() -> bool:
    """Tell whether a CUDA graph is being captured: nothing may be copied to the CPU then."""
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started and torch.cuda.is_current_stream_capturing()


def found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether a fused optimizer is about to skip its step: a scaler's gradients overflowed."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
