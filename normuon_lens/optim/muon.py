"""Muon: the momentum of each matrix, orthogonalized."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
from normuon_lens.optim.orthogonalize import orthogonalize
from normuon_lens.optim.scaling import step_size

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def muon_update(
    mean: Tensor,
    *,
    lr: float,
    scale: str,
    ns_steps: int | str,
    ns_dtype: torch.dtype | None,
    ns_coefficients: str,
) -> MatrixUpdate:
    """Muon's update of a whole matrix, without weight decay.

    Parameters
    ----------
    mean : Tensor of shape (m, n), or (batch, m, n)
        Momentum M, or Nesterov's look-ahead of it; left as it is.
    lr, scale, ns_steps, ns_dtype, ns_coefficients
        As in `Muon`.

    Returns
    -------
    MatrixUpdate
        η̂ O, to be subtracted from the weight, and the stages it went through.
    """
    O = orthogonalize(mean, ns_steps, dtype=ns_dtype, coefficients=ns_coefficients)
    stages = {"momentum": mean, "orthogonalized": O}
    return MatrixUpdate(step_size(O, O, lr, scale) * O, stages)


def muon_settings(group: Group) -> dict[str, Any]:
    """Return what `muon_update` takes from a parameter group, and NorMuon's update too."""
    names = ("scale", "ns_steps", "ns_dtype", "ns_coefficients")
    return {"lr": float(group["lr"])} | {name: group[name] for name in names}


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
    ns_steps : int or "exact"
        Newton-Schulz iterations, or the exact polar factor by a singular value decomposition, for
        studies: see `normuon_lens.optim.orthogonalize` for the band that each choice produces.
    scale : {"match_rms", "preserve_norm"}
        ``"match_rms"``: every update has root mean square 0.2 η, as AdamW's typically has.
        ``"preserve_norm"``: η √max(1, m/n) · O, the original form, which is what
        `torch.optim.Muon` calls ``adjust_lr_fn="original"``. Learning rates of the two do not
        transfer.
    ns_dtype : torch.dtype or None
        Precision of Newton-Schulz: bfloat16, float32 or float64. None: what the machine does
        fastest, see `normuon_lens.optim.orthogonalize`; fix it for results that agree between
        machines.
    ns_coefficients : {"quintic", "polar_express"}
        Which polynomials Newton-Schulz takes; the paper's are ``"quintic"``.
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
        ``"orthogonalized"`` and ``"update"``: what is about to be subtracted,
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
    State: m·n elements per matrix, ``"momentum_buffer"``, sharded as the weight is; in float32
    (float64 for float64 weights), made at construction. Weights narrower than float32 are updated
    in float32 and rounded once.

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
        ns_steps: int | str = 5,
        scale: str = "match_rms",
        *,
        ns_dtype: torch.dtype | None = None,
        ns_coefficients: str = "quintic",
        wire_dtype: torch.dtype | None = None,
        process_group: ProcessGroup | None = None,
        owners: str = "round_robin",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "scale": scale,
            "ns_dtype": ns_dtype,
            "ns_coefficients": ns_coefficients,
            "wire_dtype": wire_dtype,
        }
        super().__init__(params, defaults, process_group, owners)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        refuse_unless(0 <= group["momentum"] < 1, "momentum", group["momentum"], "in [0, 1)")

    def _beta(self, group: Group) -> float:
        beta: float = group["momentum"]
        return beta

    def _update(self, mean: Tensor, state: State, group: Group) -> MatrixUpdate:
        return muon_update(mean, **muon_settings(group))
