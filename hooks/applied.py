"""What a step did to the weights, as exactly as its optimizer lets one know.

Subtracting weights works under every optimizer, but carries the rounding of the weights: up to
3e-5 of a float32 update, and easily all of a bfloat16 one. Where the rule is known the update is
taken from what the rule itself used. Decoupled weight decay is never part of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch

from normuon_lens.optim import Muon, NorMuon
from normuon_lens.optim.orthogonalize import frobenius_norm

from .selection import Watched, matrix_view
from .tap import Look, Take, Tap

DECOUPLED = (torch.optim.Muon, Muon, NorMuon)
"""Optimizers that always decay W itself by lr·wd; the others say so in their groups."""

ADAMS = (torch.optim.Adam, torch.optim.AdamW)
"""Exactly these: a subclass may do something else with the same state."""

WIDE = (torch.float32, torch.float64)
"""Weights whose differences are good enough for neuron norms."""


def update_tap(
    optimizer: torch.optim.Optimizer, watched: Sequence[Watched], take: Take, *, stages: bool
) -> Tap:
    """Return the best way to learn the updates of `optimizer`.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    watched : sequence of Watched
        Its recorded parameters.
    take : Take
    stages : bool
        Whether the matrices on the way to the update are taken as well, where they can be seen.
    """
    if isinstance(optimizer, Muon | NorMuon):
        return HandedOver(optimizer, watched, take, stages=stages)
    if type(optimizer) not in ADAMS:
        return Difference(optimizer, watched, take)
    exact = AdamDirection(optimizer, watched, take)
    if any(item.parameter.dtype not in WIDE for item in watched):
        return exact
    return ExactWhenSampled(exact, Difference(optimizer, watched, take))


def is_exact(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether updates of `optimizer` are recorded free of the rounding of its weights."""
    return isinstance(optimizer, Muon | NorMuon) or type(optimizer) in ADAMS


def decoupled_decay(optimizer: torch.optim.Optimizer, group: int) -> float:
    """Return lr·wd where a parameter group's weight decay is decoupled from its gradient, else 0.

    Known rules: ``torch.optim.Muon``, our own, and every optimizer whose groups carry a true
    ``decoupled_weight_decay`` (torch's AdamW, and Adam, NAdam and RAdam when asked).
    """
    values = optimizer.param_groups[group]
    if isinstance(optimizer, DECOUPLED) or values.get("decoupled_weight_decay"):
        return float(values["lr"]) * float(values["weight_decay"])
    return 0.0


class Difference(Tap):
    """W_after − (1 − lr·wd)·W_before: a copy of W from before the step, subtracted after it."""

    _buffers: list[torch.Tensor] | None = None

    def before(self, look: Look) -> None:
        """Keep the weights."""
        weights = [matrix_view(item.parameter) for item in self._watched]
        if self._buffers is None:
            # float32 at least: a difference of bfloat16 numbers is exact in float32.
            self._buffers = [
                torch.empty_like(w, dtype=torch.promote_types(w.dtype, torch.float32))
                for w in weights
            ]
        torch._foreach_copy_(self._buffers, weights)
        self._decay = _decays(self._optimizer, self._watched)
        self._weight_norms = _norms(self._buffers, look)
        self._due = [item.parameter.grad is not None for item in self._watched]

    def moved(self) -> bool:
        """Tell whether every weight that has a gradient is another than before."""
        assert self._buffers is not None
        due = [
            (buffer, matrix_view(item.parameter))
            for buffer, item, due in zip(self._buffers, self._watched, self._due, strict=True)
            if due and len(buffer)  # of a sharded weight there may be no row here
        ]
        return bool(due) and not any(bool((buffer == weight).all()) for buffer, weight in due)

    def after(self, look: Look) -> None:
        """Subtract them."""
        assert self._buffers is not None
        for buffer, item, decay, norm, due in zip(
            self._buffers, self._watched, self._decay, self._weight_norms, self._due, strict=True
        ):
            weight = matrix_view(item.parameter)
            if not due and item.parameter.grad is None:
                decay = 0.0  # nothing was done to it, and nothing is to be taken out
            if decay:
                # The optimizer multiplies W by the same number in the same precision, so in
                # float32 the decay is taken out without an error of its own.
                buffer.mul_(1.0 - decay)
            torch.sub(weight, buffer, out=buffer)
            dtype = str(weight.dtype).removeprefix("torch.")
            self._take(item, "update", buffer, decay=decay, weight_norm=norm, rounded=dtype)


class AdamDirection(Tap):
    """−lr·m̂ / (√v̂ + ε), from the moments that torch's Adam or AdamW leaves behind its step."""

    def before(self, look: Look) -> None:
        """Note what the step is about to use up or move."""
        self._decay = _decays(self._optimizer, self._watched)
        self._rates = [
            float(self._optimizer.param_groups[item.group]["lr"]) for item in self._watched
        ]
        self._weight_norms = _norms([matrix_view(item.parameter) for item in self._watched], look)
        self._steps = self._steps_taken()
        self._due = [item.parameter.grad is not None for item in self._watched]

    def moved(self) -> bool:
        """Tell whether every weight that has a gradient has had its step counted."""
        counted = zip(self._steps, self._steps_taken(), self._due, strict=True)
        due = [after > before for before, after, due in counted if due]
        return bool(due) and all(due)

    def after(self, look: Look) -> None:
        """Compute the step once more, without the weight."""
        for item, step, before, rate, decay, norm in zip(
            self._watched,
            self._steps_taken(),
            self._steps,
            self._rates,
            self._decay,
            self._weight_norms,
            strict=True,
        ):
            if step == before:  # Adam leaves a parameter without a gradient, and its state, alone
                still = torch.zeros_like(matrix_view(item.parameter))
                self._take(item, "update", still, decay=0.0, weight_norm=norm)
                continue
            group = self._optimizer.param_groups[item.group]
            state = self._optimizer.state[item.parameter]
            beta1, beta2 = (float(beta) for beta in group["betas"])
            correction = math.sqrt(1 - beta2**step)
            second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
            dtype = torch.promote_types(second.dtype, torch.float32)
            # ε·√(1−β2ᵗ) instead of √v/√(1−β2ᵗ): one pass over the matrix less.
            ratio = matrix_view(second).to(dtype).sqrt().add_(group["eps"] * correction)
            torch.div(matrix_view(state["exp_avg"]), ratio, out=ratio)
            scale = -rate * correction / (1 - beta1**step)
            self._take(item, "update", ratio, scale=scale, decay=decay, weight_norm=norm)

    def _steps_taken(self) -> list[float]:
        states = [self._optimizer.state.get(item.parameter, {}) for item in self._watched]
        return _numbers([state.get("step", 0.0) for state in states])


class ExactWhenSampled(Tap):
    """The exact update where whole matrices are taken; a difference, at half the cost, elsewhere.

    Between samples only row norms are taken, over which the rounding of single weights averages
    out: a relative error of 3e-5 in the entries is one of about 3e-5/√n in the norm of n of them.
    """

    def __init__(self, exact: Tap, difference: Tap) -> None:
        self._exact = exact
        self._difference = difference
        self._now = exact

    def before(self, look: Look) -> None:
        """Look just before the step, in the way that suits it."""
        self._now = self._exact if look.sampled else self._difference
        self._now.before(look)

    def after(self, look: Look) -> None:
        """Look just after the step, in the same way."""
        self._now.after(look)

    def moved(self) -> bool:
        """Tell whether the step that was begun is known to have been taken."""
        return self._now.moved()


class HandedOver(Tap):
    """What our own optimizers subtract from a weight, which they show as they go."""

    def __init__(
        self,
        optimizer: Muon | NorMuon,
        watched: Sequence[Watched],
        take: Take,
        *,
        stages: bool = False,
    ) -> None:
        super().__init__(optimizer, watched, take)
        self._ours = optimizer
        self._stages = stages
        self._items = {item.parameter: item for item in watched}
        # In a compiled step the graph ends here; without this the compiler would look in too.
        self._observer = torch.compiler.disable(self._observe)  # type: ignore[no-untyped-call]
        self._watching = False
        self._error: Exception | None = None

    def before(self, look: Look) -> None:
        """Begin to watch."""
        self._sampled = look.sampled
        self._seen: set[int] = set()
        if not self._watching:
            self._others = self._ours.stage_observer
            self._ours.stage_observer = self._observer
        self._watching = True
        self._due = {item.index for item in self._watched if item.parameter.grad is not None}

    def moved(self) -> bool:
        """Tell whether every weight that has a gradient has had its update shown."""
        return bool(self._due) and self._due <= self._seen

    def release(self) -> None:
        """Stop watching."""
        if self._watching:
            self._ours.stage_observer = self._others
        self._watching = False

    def after(self, look: Look) -> None:
        """Stop watching.

        Raises
        ------
        Exception
            What went wrong while watching: it must not be raised inside the optimizer's step.
        """
        self.release()
        error, self._error = self._error, None
        if error is not None:
            raise error
        for item in self._watched:
            if item.index not in self._seen:  # it had no gradient
                weight = matrix_view(item.parameter)
                norm = float(_norm(weight)) if look.sampled else math.nan
                still = weight.new_zeros(item.stored)
                self._take(item, "update", still, decay=0.0, weight_norm=norm)

    def _observe(self, parameter: torch.nn.Parameter, stage: str, matrix: torch.Tensor) -> None:
        if self._others is not None:
            self._others(parameter, stage, matrix)
        item = self._items.get(parameter)
        if item is None or self._error is not None:
            return
        began = time.perf_counter()
        try:
            if stage == "update":
                self._seen.add(item.index)
                # The weight has not moved yet.
                norm = float(_norm(matrix_view(parameter))) if self._sampled else math.nan
                decay = decoupled_decay(self._ours, item.group)
                self._take(item, stage, matrix, scale=-1.0, decay=decay, weight_norm=norm)
            elif self._stages:
                self._take(item, stage, matrix)
        except Exception as error:
            self._error = error
        self.seconds += time.perf_counter() - began


class Weights(Tap):
    """The norms of this rank's rows of weights whose update only its owner sees.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    watched : sequence of Watched
    take : Take
        Not called.
    weigh : callable(Watched, float)
        Takes ‖W‖_F of the rows here, before the step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        watched: Sequence[Watched],
        take: Take,
        weigh: Callable[[Watched, float], None],
    ) -> None:
        super().__init__(optimizer, watched, take)
        self._weigh = weigh

    def before(self, look: Look) -> None:
        """Weigh them."""
        norms = _norms([matrix_view(item.parameter) for item in self._watched], look)
        for item, norm in zip(self._watched, norms, strict=True):
            self._weigh(item, norm)


def _decays(optimizer: torch.optim.Optimizer, watched: Sequence[Watched]) -> list[float]:
    """Return lr·wd of every matrix, asking once a group."""
    of_group = {group: decoupled_decay(optimizer, group) for group in {w.group for w in watched}}
    return [of_group[item.group] for item in watched]


def _norm(matrix: torch.Tensor) -> torch.Tensor:
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    return frobenius_norm(wide).squeeze()


def _norms(matrices: list[torch.Tensor], look: Look) -> list[float]:
    """Frobenius norms, when the step is sampled; NaN otherwise."""
    if not look.sampled:
        return [math.nan] * len(matrices)
    return _numbers([_norm(matrix) for matrix in matrices])


def _numbers(scalars: Sequence[torch.Tensor | float]) -> list[float]:
    """Bring numbers that may be tensors to Python, in one transfer where they share a device."""
    tensors = [scalar for scalar in scalars if isinstance(scalar, torch.Tensor)]
    if len(tensors) == len(scalars) and len({tensor.device for tensor in tensors}) == 1:
        numbers: list[float] = torch.stack(tensors).tolist()
        return numbers
    return [float(scalar) for scalar in scalars]
