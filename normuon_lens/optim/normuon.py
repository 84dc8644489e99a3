"""NorMuon: Muon whose neurons are normalized, each by a running mean of its own square."""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from normuon_lens.optim._shell import Group, MatrixOptimizer, MatrixUpdate, State, refuse_unless
from normuon_lens.optim.muon import orthogonalized_momentum
from normuon_lens.optim.scaling import step_size


def normuon_update(
    gradient: Tensor,
    momentum: Tensor,
    second_moment: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    nesterov: bool,
    ns_steps: int,
    ns_dtype: torch.dtype | None,
    scale: str,
) -> MatrixUpdate:
    """NorMuon's update of one matrix, without weight decay. [arXiv 2510.05491, Algorithm 1].

    Parameters
    ----------
    gradient : Tensor of shape (m, n)
        G, left as it is.
    momentum : Tensor of shape (m, n)
        M, **advanced in place**.
    second_moment : Tensor of shape (m, 1)
        v, one scalar a neuron, **advanced in place**. It starts at zero and there is no bias
        correction: that would divide all of v by one scalar, and `step_size` divides by the norm
        of the result, so it would cancel (but for `eps`).
    lr, betas, eps, nesterov, ns_steps, ns_dtype, scale
        As in `NorMuon`.

    Returns
    -------
    MatrixUpdate
        η̂ Ô, to be subtracted from the weight, and the stages it went through.
    """
    beta1, beta2 = betas
    stages = orthogonalized_momentum(
        gradient, momentum, beta=beta1, nesterov=nesterov, ns_steps=ns_steps, ns_dtype=ns_dtype
    )
    O = stages["orthogonalized"]
    v = second_moment
    v.lerp_(O.square().mean(dim=1, keepdim=True), 1 - beta2)  # v ← β2 v + (1−β2) mean(O∘O)
    normalized = O / (v.sqrt() + eps)  # Ô
    return MatrixUpdate(
        step_size(normalized, O, lr, scale) * normalized, stages | {"normalized": normalized}
    )


class NorMuon(MatrixOptimizer):
    """NorMuon for matrices: W ← W − ηλW − η̂Ô, neuron-wise normalized Muon.

    Make it after the model is on its device and in its dtype, from the matrices that
    `split_parameters` returns; everything else belongs to AdamW.

    Parameters
    ----------
    params : iterable of Parameter, of (name, Parameter), or of dict
        Matrices of shape (m, n) with m, n ≥ 2; a row is an output neuron. A convolution
        (out_channels, ...) counts as (out_channels, rest). With names, messages name them.
    lr : float
        Learning rate η. What it means depends on `scale`.
    betas : tuple of two floats
        Decays in [0, 1) of the momentum M ← β1 M + (1−β1) G and of the neuron-wise second moment
        v ← β2 v + (1−β2) mean over columns of O∘O. Both start at zero, neither is bias-corrected:
        Newton-Schulz does not see the scale of M, and the step size cancels the scale of v.
    eps : float
        ε > 0 in Ô = O / (√v + ε).
    weight_decay : float
        Decoupled weight decay λ.
    nesterov : bool
        Orthogonalize β1 M + (1−β1) G instead of M: the authors' code; the paper has it not.
    ns_steps : int
        Newton-Schulz iterations.
    scale : {"match_rms", "preserve_norm"}
        ``"match_rms"``, the paper: η̂ = 0.2 η √(mn) / ‖Ô‖_F, every update has root mean square
        0.2 η. ``"preserve_norm"``, the authors' code: Ô ‖O‖_F / ‖Ô‖_F √max(1, m/n), step η.
        Learning rates of the two do not transfer.
    ns_dtype : torch.dtype or None
        Precision of Newton-Schulz: bfloat16, float32 or float64. None: what the machine does
        fastest, see `normuon_lens.optim.orthogonalize`; fix it for results that agree between
        machines.

    Attributes
    ----------
    stage_observer : callable(Parameter, str, Tensor) or None
        Called during `step` with the (m, n) view of each matrix at the stages ``"momentum"``,
        ``"orthogonalized"``, ``"normalized"`` and ``"update"``: what is about to be subtracted,
        without weight decay. Look, copy, never write. Neither saved nor copied.

    Raises
    ------
    LensError
        For a parameter that is not a real, dense matrix, or a hyper-parameter out of range.

    Notes
    -----
    State: m(n + 1) elements per matrix, ``"momentum_buffer"`` of the weight's shape and
    ``"second_moment"`` of shape (m, 1), in float32 (float64 for float64 weights), made at
    construction. Weights narrower than float32 are updated in float32 and rounded once.

    References
    ----------
    [NorMuon, arXiv 2510.05491, Algorithm 1].

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.Linear(4, 8)
    >>> optimizer = NorMuon([layer.weight], lr=0.01)
    >>> layer(torch.ones(4)).sum().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        nesterov: bool = False,
        ns_steps: int = 5,
        scale: str = "match_rms",
        *,
        ns_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "scale": scale,
            "ns_dtype": ns_dtype,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        betas, eps = group["betas"], group["eps"]
        in_range = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
        refuse_unless(in_range, "betas", betas, "two numbers in [0, 1)")
        refuse_unless(eps > 0, "eps", eps, "greater than 0")

    def _new_state(self, parameter: Tensor) -> State:
        state = super()._new_state(parameter)
        momentum = state["momentum_buffer"]
        return state | {"second_moment": momentum.new_zeros(len(momentum), 1)}

    def _update(self, gradient: Tensor, state: State, group: Group) -> MatrixUpdate:
        return normuon_update(
            gradient,
            state["momentum_buffer"].view_as(gradient),
            state["second_moment"],
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            nesterov=group["nesterov"],
            ns_steps=group["ns_steps"],
            ns_dtype=group["ns_dtype"],
            scale=group["scale"],
        )
