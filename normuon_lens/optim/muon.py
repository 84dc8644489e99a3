"""Muon: the momentum of each matrix, orthogonalized."""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from normuon_lens.optim._shell import Group, MatrixOptimizer, MatrixUpdate, State, refuse_unless
from normuon_lens.optim.orthogonalize import orthogonalize
from normuon_lens.optim.scaling import step_size


def orthogonalized_momentum(
    gradient: Tensor,
    momentum: Tensor,
    *,
    beta: float,
    nesterov: bool,
    ns_steps: int,
    ns_dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Take steps 1 and 2, which Muon and NorMuon share.

    Parameters
    ----------
    gradient : Tensor of shape (m, n)
        G, left as it is.
    momentum : Tensor of shape (m, n)
        M, an exponential mean of the gradients; **advanced in place**.
    beta, nesterov, ns_steps, ns_dtype
        As in `Muon`.

    Returns
    -------
    dict of Tensor of shape (m, n)
        ``"momentum"``: what was orthogonalized (with Nesterov, the look-ahead mean);
        ``"orthogonalized"``: O.
    """
    momentum.lerp_(gradient, 1 - beta)  # M ← β M + (1−β) G
    mean = gradient.lerp(momentum, beta) if nesterov else momentum  # β M + (1−β) G, once more
    O = orthogonalize(mean, ns_steps, dtype=ns_dtype)  # O ← NS5(M)
    return {"momentum": mean, "orthogonalized": O}


def muon_update(
    gradient: Tensor,
    momentum: Tensor,
    *,
    lr: float,
    beta: float,
    nesterov: bool,
    ns_steps: int,
    ns_dtype: torch.dtype | None,
    scale: str,
) -> MatrixUpdate:
    """Muon's update of one matrix, without weight decay.

    Parameters
    ----------
    gradient : Tensor of shape (m, n)
        G, left as it is.
    momentum : Tensor of shape (m, n)
        M, **advanced in place**.
    lr, beta, nesterov, ns_steps, ns_dtype, scale
        As in `Muon`, where `beta` is called momentum.

    Returns
    -------
    MatrixUpdate
        η̂ O, to be subtracted from the weight, and the stages it went through.
    """
    stages = orthogonalized_momentum(
        gradient, momentum, beta=beta, nesterov=nesterov, ns_steps=ns_steps, ns_dtype=ns_dtype
    )
    O = stages["orthogonalized"]
    return MatrixUpdate(step_size(O, O, lr, scale) * O, stages)


class Muon(MatrixOptimizer):
    """Muon for matrices: W ← W − ηλW − η̂ NS5(M).

    Make it after the model is on its device and in its dtype, from the matrices that
    `split_parameters` returns; everything else belongs to AdamW.

    Parameters
    ----------
    params : iterable of Parameter, of (name, Parameter), or of dict
        Matrices of shape (m, n) with m, n ≥ 2; a row is an output neuron. A convolution
        (out_channels, ...) counts as (out_channels, rest). With names, messages name them.
    lr : float
        Learning rate η. What it means depends on `scale`.
    momentum : float
        Decay of the exponential mean M ← μM + (1−μ)G, in [0, 1). M starts at zero; Newton-Schulz
        does not see its scale, so no bias correction is needed.
    weight_decay : float
        Decoupled weight decay λ.
    nesterov : bool
        Orthogonalize μM + (1−μ)G instead of M, as the original code does.
    ns_steps : int
        Newton-Schulz iterations.
    scale : {"match_rms", "preserve_norm"}
        ``"match_rms"``: every update has root mean square 0.2 η, as AdamW's typically has.
        ``"preserve_norm"``: η √max(1, m/n) · O, the original form, which is what
        `torch.optim.Muon` calls ``adjust_lr_fn="original"``. Learning rates of the two do not
        transfer.
    ns_dtype : torch.dtype or None
        Precision of Newton-Schulz: bfloat16, float32 or float64. None: what the machine does
        fastest, see `normuon_lens.optim.orthogonalize`; fix it for results that agree between
        machines.

    Attributes
    ----------
    stage_observer : callable(Parameter, str, Tensor) or None
        Called during `step` with the (m, n) view of each matrix at the stages ``"momentum"``,
        ``"orthogonalized"`` and ``"update"``: what is about to be subtracted, without weight
        decay. Look, copy, never write. Neither saved nor copied.

    Raises
    ------
    LensError
        For a parameter that is not a real, dense matrix, or a hyper-parameter out of range.

    Notes
    -----
    State: m·n elements per matrix, ``"momentum_buffer"``, in float32 (float64 for float64
    weights), made at construction. Weights narrower than float32 are updated in float32 and
    rounded once.

    With ``scale="preserve_norm"``, ``nesterov=True`` and ``ns_dtype=torch.bfloat16`` this is
    `torch.optim.Muon` up to rounding.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.Linear(4, 8)
    >>> optimizer = Muon([layer.weight], lr=0.01)
    >>> layer(torch.ones(4)).sum().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        nesterov: bool = False,
        ns_steps: int = 5,
        scale: str = "match_rms",
        *,
        ns_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "scale": scale,
            "ns_dtype": ns_dtype,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        refuse_unless(0 <= group["momentum"] < 1, "momentum", group["momentum"], "in [0, 1)")

    def _update(self, gradient: Tensor, state: State, group: Group) -> MatrixUpdate:
        return muon_update(
            gradient,
            state["momentum_buffer"].view_as(gradient),
            lr=float(group["lr"]),
            beta=group["momentum"],
            nesterov=group["nesterov"],
            ns_steps=group["ns_steps"],
            ns_dtype=group["ns_dtype"],
            scale=group["scale"],
        )
