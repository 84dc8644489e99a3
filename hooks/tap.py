"""The common shape of everything that looks at an optimizer's matrices around one of its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from normuon_lens.optim.sharded import local

from .selection import Watched, matrix_view


class Look(NamedTuple):
    """What is wanted of the step at hand.

    Attributes
    ----------
    recorded : bool
        Whether the step is recorded at all: its neuron norms are.
    sampled : bool
        Whether whole matrices are taken.
    closure : bool
        Whether the step was given a closure: gradients exist only after it.
    """

    recorded: bool
    sampled: bool
    closure: bool


class Take(Protocol):
    """Takes one matrix of the step: copied or measured at once, never written."""

    def __call__(
        self,
        item: Watched,
        stage: str,
        matrix: torch.Tensor,
        *,
        scale: float = 1.0,
        decay: float = math.nan,
        weight_norm: float = math.nan,
        rounded: str | None = None,
    ) -> None:
        """Take `scale` times a matrix.

        Parameters
        ----------
        item : Watched
        stage : str
        matrix : Tensor of shape (rows, width)
            As the parameter is stored: all rows, or those that this rank holds.
        scale : float
            Spares whoever hands the matrix over a multiplication of its own.
        decay, weight_norm : float
            lr·wd of the step and ‖W‖_F before it, of the same rows; only with an update.
        rounded : str, optional
            The weight's dtype where the matrix is a difference of weights and carries their
            rounding.
        """


class Tap:
    """Looks at one optimizer's matrices around each of its steps.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    watched : sequence of Watched
        Its recorded parameters.
    take : Take
    """

    every_step = False
    """Whether it must see steps that are not recorded, too."""

    seconds = 0.0
    """Time spent in the midst of steps so far, between :meth:`before` and :meth:`after`."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, watched: Sequence[Watched], take: Take
    ) -> None:
        self._optimizer = optimizer
        self._watched = watched
        self._take = take

    def before(self, look: Look) -> None:
        """Look just before the step; the last one may have ended in an exception."""

    def after(self, look: Look) -> None:
        """Look just after the step."""

    def moved(self) -> bool:
        """Tell whether the step that was begun is known to have been taken."""
        return False

    def release(self) -> None:
        """Let go of the optimizer; the step that was begun may never have ended."""


def gradient_of(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> torch.Tensor | None:
    """Return this rank's rows of the gradient that a step works with; None if there is none.

    A fused optimizer under a gradient scaler gets gradients that are still scaled, and the scale
    beside them.
    """
    gradient = parameter.grad
    if gradient is None or gradient.layout != torch.strided:
        return None
    scale = getattr(optimizer, "grad_scale", None)
    return matrix_view(gradient) if scale is None else matrix_view(gradient) / local(scale)


class Gradients(Tap):
    """The gradient: taken before the step, for several optimizers overwrite it."""

    def before(self, look: Look) -> None:
        """Take the gradients, unless a closure is yet to make them."""
        if not look.closure:
            self._take_all()

    def after(self, look: Look) -> None:
        """Take the gradients that a closure made."""
        if look.closure:
            self._take_all()

    def _take_all(self) -> None:
        for item in self._watched:
            gradient = gradient_of(self._optimizer, item.parameter)
            if gradient is not None:
                self._take(item, "gradient", gradient)
