"""How long a step is: the two scale forms, whose learning rates do not transfer."""

import math

import torch
from torch import Tensor

from normuon_lens.optim.orthogonalize import frobenius_norm

SCALES = ("match_rms", "preserve_norm")

# Typical RMS of an AdamW update in units of its learning rate. [Moonshot, arXiv 2502.16982]
ADAMW_RMS = 0.2


def step_size(direction: Tensor, orthogonalized: Tensor, lr: float, scale: str) -> Tensor:
    """Step size to multiply the direction with, η̂ of the paper.

    Parameters
    ----------
    direction : Tensor of shape (m, n), or (batch, m, n)
        Where to go: Ô for NorMuon, O itself for Muon.
    orthogonalized : Tensor of the same shape
        O, whose norm the authors' form restores.
    lr : float
        Learning rate η.
    scale : {"match_rms", "preserve_norm"}
        ``"match_rms"``: η̂ = 0.2 η √(mn) / ‖Ô‖_F, so the root mean square of the update is exactly
        0.2 η, like AdamW's. [NorMuon, arXiv 2510.05491, Algorithm 1]
        ``"preserve_norm"``: η̂ = η √max(1, m/n) · ‖O‖_F / ‖Ô‖_F, the form of the authors' code and
        of the original Muon.

    Returns
    -------
    Tensor of shape (1, 1), or (batch, 1, 1)
        Zero where the direction is the zero matrix.
    """
    m, n = direction.shape[-2:]
    norm = frobenius_norm(direction)
    target: float | Tensor
    if scale == "match_rms":
        target = ADAMW_RMS * lr * math.sqrt(m * n)
    else:
        target = lr * math.sqrt(max(1, m / n)) * frobenius_norm(orthogonalized)
    return torch.where(norm > 0, target / norm, 0.0)
