"""Where imbalance enters and leaves: the matrices on their way through an optimizer.

The gradient can be seen under any optimizer; momentum, orthogonalized and normalized are shown by
our own, which hand each matrix to an observer as they go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from normuon_lens.optim import Muon, NorMuon

from .selection import Watched, matrix_view

Take = Callable[[Watched, str, torch.Tensor], None]


class StageTap:
    """Looks at one optimizer's matrices during one of its steps at a time.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    watched : sequence of Watched
        Its recorded parameters.
    take : callable
        Gets the parameter's entry, the stage and the (m, n) matrix, which is the optimizer's own:
        to be copied, never written.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, watched: Sequence[Watched], take: Take
    ) -> None:
        self._optimizer = optimizer
        self._watched = {item.parameter: item for item in watched}
        self._take = take
        self._open = False
        self._error: Exception | None = None

    def open(self, *, closure: bool) -> None:
        """Begin to look; called just before the step, with whether the step gets a closure."""
        if not closure:
            self._take_gradients()
        if isinstance(self._optimizer, Muon | NorMuon) and not self._open:
            self._others = self._optimizer.stage_observer
            self._optimizer.stage_observer = self._observe
        self._open = True

    def close(self, *, closure: bool) -> None:
        """Look away; called just after the step.

        Raises
        ------
        Exception
            What went wrong while looking: it must not be raised inside the optimizer's step.
        """
        if isinstance(self._optimizer, Muon | NorMuon) and self._open:
            self._optimizer.stage_observer = self._others
        self._open = False
        error, self._error = self._error, None
        if error is not None:
            raise error
        if closure:
            # Only the closure made them; before the step there were older ones, or none.
            self._take_gradients()

    def _take_gradients(self) -> None:
        for parameter, item in self._watched.items():
            if parameter.grad is not None and parameter.grad.layout == torch.strided:
                self._take(item, "gradient", matrix_view(parameter.grad))

    def _observe(self, parameter: torch.nn.Parameter, stage: str, matrix: torch.Tensor) -> None:
        if self._others is not None:
            self._others(parameter, stage, matrix)
        if parameter in self._watched and self._error is None:
            try:
                self._take(self._watched[parameter], stage, matrix)
            except Exception as error:
                self._error = error
