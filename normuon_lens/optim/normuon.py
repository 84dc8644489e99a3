"""NorMuon: Muon whose neurons are normalized, each by a running mean of its own square."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from normuon_lens.optim._shell import (
    Group,
    MatrixOptimizer,
    MatrixUpdate,
    State,
    refuse_unless,
)
from normuon_lens.optim.muon import muon_settings, muon_update
from normuon_lens.optim.orthogonalize import orthogonalize
from normuon_lens.optim.scaling import step_size

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

GRANULARITIES = ("neuron", "coordinate")
PLACES = ("after", "before")
SHAPES = ("all", "tall", "wide")


def normuon_update(
    mean: Tensor,
    second_moment: Tensor,
    *,
    lr: float,
    beta2: float,
    eps: float,
    scale: str,
    ns_steps: int | str,
    ns_dtype: torch.dtype | None,
    ns_coefficients: str,
    normalize: str,
) -> MatrixUpdate:
    """NorMuon's update of a whole matrix, without weight decay. [arXiv 2510.05491, Algorithm 1].

    Parameters
    ----------
    mean : Tensor of shape (m, n), or (batch, m, n)
        Momentum M, or Nesterov's look-ahead of it; left as it is.
    second_moment : Tensor of shape (m, 1), or (batch, m, 1)
        v, one scalar a neuron, **advanced in place**. It starts at zero and there is no bias
        correction: that would divide all of v by one scalar, and `step_size` divides by the norm
        of the result, so it would cancel (but for `eps`). Of the shape of `mean`: one scalar a
        coordinate.
    lr, beta2, eps, scale, ns_steps, ns_dtype, ns_coefficients, normalize
        As in `NorMuon`.

    Returns
    -------
    MatrixUpdate
        η̂ Ô, to be subtracted from the weight, and the stages it went through.
    """

    def normalized(X: Tensor) -> Tensor:
        if second_moment.shape == X.shape:
            square = X.square()
        else:  # mean(X∘X) over a row, without a matrix of squares
            square = torch.linalg.vector_norm(X, dim=-1, keepdim=True).square() / X.shape[-1]
        second_moment.lerp_(square, 1 - beta2)  # v ← β2 v + (1−β2) mean(X∘X)
        return X / (second_moment.sqrt() + eps)

    if normalize == "before":
        M = normalized(mean)
        O = orthogonalize(M, ns_steps, dtype=ns_dtype, coefficients=ns_coefficients)
        stages = {"momentum": mean, "normalized": M, "orthogonalized": O}
        return MatrixUpdate(step_size(O, O, lr, scale) * O, stages)
    O = orthogonalize(mean, ns_steps, dtype=ns_dtype, coefficients=ns_coefficients)
    N = normalized(O)  # Ô
    stages = {"momentum": mean, "orthogonalized": O, "normalized": N}
    return MatrixUpdate(step_size(N, O, lr, scale) * N, stages)


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
        Newton-Schulz does not see the scale of M, and the step size cancels the scale of v. With
        β2 = 0 all neurons move equally far on every step; the nearer β2 is to one, the more v is
        the mean over all steps so far.
    eps : float
        ε > 0 in Ô = O / (√v + ε).
    weight_decay : float
        Decoupled weight decay λ.
    nesterov : bool
        Orthogonalize β1 M + (1−β1) G instead of M: the authors' code; the paper has it not.
    ns_steps : int or "exact"
        Newton-Schulz iterations, or the exact polar factor by a singular value decomposition, for
        studies: see `normuon_lens.optim.orthogonalize` for the band that each choice produces.
    scale : {"match_rms", "preserve_norm"}
        ``"match_rms"``, the paper: η̂ = 0.2 η √(mn) / ‖Ô‖_F, every update has root mean square
        0.2 η. ``"preserve_norm"``, the authors' code: Ô ‖O‖_F / ‖Ô‖_F √max(1, m/n), step η.
        Learning rates of the two do not transfer.
    ns_dtype : torch.dtype or None
        Precision of Newton-Schulz: bfloat16, float32 or float64. None: what the machine does
        fastest, see `normuon_lens.optim.orthogonalize`; fix it for results that agree between
        machines.
    ns_coefficients : {"quintic", "polar_express"}
        Which polynomials Newton-Schulz takes; the paper's are ``"quintic"``.
    granularity : {"neuron", "coordinate"}
        Ablation: one second moment a neuron (m of them), or one a coordinate (m·n), as Adam has
        it. By coordinate, entries are evened out rather than neurons; without memory, β2 = 0,
        their signs are all that is left.
    normalize : {"after", "before"}
        Ablation: divide by √v after orthogonalizing, or before. Before, v is the running mean of
        the momentum's own square. That evens out neurons whose gradients differ in size, but not
        those that share a direction with others, and the update is as well conditioned as Muon's.
    only : {"all", "tall", "wide"}
        Ablation: normalize all matrices, only tall ones (m > n) or only wide ones (m < n). The
        others, and for either of the two the square ones, get Muon's update and keep no second
        moment.
    wire_dtype : torch.dtype or None
        Precision in which momentum and update travel between the ranks of a sharded training.
        None: that of the momentum, so that the result is the one of a single process.
        bfloat16 halves the traffic and rounds both, to 2⁻⁸ of each entry, on any number of ranks.
    process_group : ProcessGroup or None
        For plain parameters that are equal on all ranks of this group, as
        `torch.nn.parallel.DistributedDataParallel` keeps them: each rank orthogonalizes its share
        and sends the others the result. None: every rank does all the work. DTensor parameters
        know their mesh and need none.
    owners : {"round_robin", "snake"}
        In which order the matrices, largest first, are dealt to the ranks that orthogonalize
        them: see `normuon_lens.optim.owners`.

    Attributes
    ----------
    stage_observer : callable(Parameter, str, Tensor) or None
        Called during `step` with the (m, n) view of each matrix at the stages ``"momentum"``,
        ``"orthogonalized"``, ``"normalized"`` and ``"update"``: what is about to be subtracted,
        without weight decay. Look, copy, never write. Neither saved nor copied. Sharded, it is
        called where the matrix is whole: on the rank that orthogonalizes it, and for ``"update"``
        on every rank that holds all its rows.

    Raises
    ------
    LensError
        For a parameter that is not a real, dense matrix, or sharded in a way that
        `normuon_lens.optim.sharded` does not support; for a hyper-parameter out of range.

    Notes
    -----
    State: m(n + 1) elements per matrix, ``"momentum_buffer"`` of the weight's shape and
    ``"second_moment"`` of shape (m, 1), or (m, n) by coordinate, sharded as the weight is; in
    float32 (float64 for float64 weights), made at construction. Weights narrower than float32 are
    updated in float32 and rounded once.

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
        ns_steps: int | str = 5,
        scale: str = "match_rms",
        *,
        ns_dtype: torch.dtype | None = None,
        ns_coefficients: str = "quintic",
        granularity: str = "neuron",
        normalize: str = "after",
        only: str = "all",
        wire_dtype: torch.dtype | None = None,
        process_group: ProcessGroup | None = None,
        owners: str = "round_robin",
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
            "ns_coefficients": ns_coefficients,
            "granularity": granularity,
            "normalize": normalize,
            "only": only,
            "wire_dtype": wire_dtype,
        }
        super().__init__(params, defaults, process_group, owners)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        betas, eps = group["betas"], group["eps"]
        in_range = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
        refuse_unless(in_range, "betas", betas, "two numbers in [0, 1)")
        refuse_unless(eps > 0, "eps", eps, "greater than 0")
        for name, choices in (
            ("granularity", GRANULARITIES),
            ("normalize", PLACES),
            ("only", SHAPES),
        ):
            refuse_unless(group[name] in choices, name, group[name], f"one of {', '.join(choices)}")

    def _state_columns(self, m: int, n: int, group: Group) -> dict[str, int]:
        if {"all": True, "tall": m > n, "wide": m < n}[group["only"]]:
            return {"second_moment": 1 if group["granularity"] == "neuron" else n}
        return {}

    def _beta(self, group: Group) -> float:
        beta: float = group["betas"][0]
        return beta

    def _update(self, mean: Tensor, state: State, group: Group) -> MatrixUpdate:
        if "second_moment" not in state:
            return muon_update(mean, **muon_settings(group))
        return normuon_update(
            mean,
            state["second_moment"],
            beta2=group["betas"][1],
            eps=group["eps"],
            normalize=group["normalize"],
            **muon_settings(group),
        )
