"""What kind of step is at hand: a real one, one that a scaler skips, or one that is none at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from normuon_lens.optim.sharded import local


def steps_taken(optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Return how many steps the optimizers have taken, as far as their state says; else 0."""
    taken = [
        int(state["step"])
        for optimizer in optimizers
        for state in optimizer.state.values()
        if isinstance(state, dict) and "step" in state
    ]
    return max(taken, default=0)


def may_be_phantom(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether a step may only make an optimizer create its state: no state yet, no rate.

    ``torch.distributed.checkpoint`` takes such a step, with gradients of zero, when it asks for the
    state of an optimizer that has none.
    """
    return not optimizer.state and not any(
        float(group.get("lr", 1.0)) for group in optimizer.param_groups
    )


def gradients_vanish(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether all gradients are zero, as far as this rank has them; not if there are none."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # This rank's part: asking for all of it would be a collective of the training's ranks.
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    return bool(gradients) and not any(bool(gradient.any()) for gradient in gradients)


def is_capturing() -> bool:
    """Tell whether a CUDA graph is being captured: nothing may be copied to the CPU then."""
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started and torch.cuda.is_current_stream_capturing()


def found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether a fused optimizer is about to skip its step: a scaler's gradients overflowed."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
