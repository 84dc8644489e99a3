"""The running mean of gradients that Muon and NorMuon orthogonalize."""

from torch import Tensor


def advance(momentum: Tensor, gradient: Tensor, *, beta: float, nesterov: bool) -> Tensor:
    """Take one gradient into the momentum.

    Entry by entry: a shard of a matrix needs no other.

    Parameters
    ----------
    momentum : Tensor of shape (m, n)
        M, **advanced in place**: M ← β M + (1−β) G. [NorMuon, arXiv 2510.05491, Algorithm 1]
    gradient : Tensor of shape (m, n)
        G, left as it is.
    beta : float
        Decay β in [0, 1).
    nesterov : bool
        Look ahead by the gradient once more.

    Returns
    -------
    Tensor of shape (m, n)
        What is to be orthogonalized: M itself, or with `nesterov` β M + (1−β) G of the new M.
    """
    momentum.lerp_(gradient, 1 - beta)
    return gradient.lerp(momentum, beta) if nesterov else momentum
