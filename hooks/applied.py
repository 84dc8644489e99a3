"""What a step did to the weights: the difference around it, without the decoupled decay.

The generic way, for every optimizer: keep a copy of W from before the step and subtract it
afterwards. In float32 its error is that of the optimizer's own rounding of W.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from normuon_lens.optim import Muon, NorMuon

from .selection import Watched, matrix_view

DECOUPLED = (torch.optim.Muon, Muon, NorMuon)
"""Optimizers that always decay W itself by lr·wd; the others say so in their groups."""


def decoupled_decay(optimizer: torch.optim.Optimizer, group: int) -> float:
    """Return lr·wd where a parameter group's weight decay is decoupled from its gradient, else 0.

    Known rules: ``torch.optim.Muon``, our own, and every optimizer whose groups carry a true
    ``decoupled_weight_decay`` (torch's AdamW, and Adam, NAdam and RAdam when asked).
    """
    values = optimizer.param_groups[group]
    if isinstance(optimizer, DECOUPLED) or values.get("decoupled_weight_decay"):
        return float(values["lr"]) * float(values["weight_decay"])
    return 0.0


class AppliedUpdate:
    """The update of one optimizer's matrices, taken around one of its steps.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    watched : sequence of Watched
        Its recorded parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, watched: Sequence[Watched]) -> None:
        self.optimizer = optimizer
        self._watched = watched
        self._buffers: list[torch.Tensor] = []

    def before(self) -> None:
        """Keep the weights; called just before the step."""
        weights = [matrix_view(item.parameter) for item in self._watched]
        if not self._buffers:
            # float32 at least: a difference of bfloat16 numbers is exact in float32.
            self._buffers = [
                torch.empty(w.shape, dtype=torch.promote_types(w.dtype, torch.float32)).to(w.device)
                for w in weights
            ]
        torch._foreach_copy_(self._buffers, weights)
        self.decay = [decoupled_decay(self.optimizer, item.group) for item in self._watched]

    def weight_norms(self) -> list[float]:
        """Frobenius norms of the weights before the step; to be called between the two."""
        norms: list[float] = torch.stack(torch._foreach_norm(self._buffers)).tolist()
        return norms

    def after(self) -> list[torch.Tensor]:
        """Return W_after - (1 - lr·wd)·W_before of every matrix; called just after the step.

        Returns
        -------
        list of Tensor of shape (m, n), float32 (float64 for float64 weights)
            Valid until the next call of :meth:`before`.
        """
        # The optimizer multiplies W by the same number in the same precision, so in float32 the
        # decay is taken out without an error of its own.
        torch._foreach_mul_(self._buffers, [decay - 1.0 for decay in self.decay])
        for buffer, item in zip(self._buffers, self._watched, strict=True):
            buffer.add_(matrix_view(item.parameter))
        return self._buffers
