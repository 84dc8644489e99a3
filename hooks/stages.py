"""Where imbalance enters and leaves torch's own Muon, which shows nothing of itself.

Our optimizers hand every matrix over as they go (:class:`normuon_lens.hooks.applied.HandedOver`).
torch's Muon keeps its momentum only; the same function on the same matrix gives once more what it
orthogonalized, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from normuon_lens.errors import AttachError

from .selection import Watched, matrix_view
from .tap import Look, Take, Tap, gradient_of


class TorchMuonStages(Tap):
    """Momentum and orthogonalized of ``torch.optim.Muon``, computed again after its step.

    Raises
    ------
    AttachError
        If this torch keeps its Newton-Schulz iteration elsewhere.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, watched: Sequence[Watched], take: Take
    ) -> None:
        super().__init__(optimizer, watched, take)
        try:
            # No part of torch's face: where it moves, only these stages are lost.
            from torch.optim._muon import _zeropower_via_newtonschulz
        except ImportError:
            raise AttachError(
                f"torch {torch.__version__} does not show what torch.optim.Muon orthogonalizes; "
                "leave out stages=True, or use normuon_lens.optim.Muon"
            ) from None
        self._orthogonalize = _zeropower_via_newtonschulz

    def before(self, look: Look) -> None:
        """Hold the gradients: a hook of the user's may let them go as soon as the step is done."""
        self._held = [] if look.closure else self._gradients()

    def after(self, look: Look) -> None:
        """Orthogonalize once more what the step orthogonalized."""
        held = self._gradients() if look.closure else self._held
        for item, gradient in zip(self._watched, held, strict=True):
            if gradient is None:
                continue
            group = self._optimizer.param_groups[item.group]
            buffer = matrix_view(self._optimizer.state[item.parameter]["momentum_buffer"])
            momentum = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
            self._take(item, "momentum", momentum)
            if len(momentum) < item.stored[0]:
                continue  # only some of its rows are here, and no rank has all of them
            orthogonalized: torch.Tensor = self._orthogonalize(
                momentum, group["ns_coefficients"], group["ns_steps"], group["eps"]
            )
            self._take(item, "orthogonalized", orthogonalized)
        self._held = []

    def _gradients(self) -> list[torch.Tensor | None]:
        return [gradient_of(self._optimizer, item.parameter) for item in self._watched]
