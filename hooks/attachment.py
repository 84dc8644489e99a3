"""The two lines of a training script: what is asked for becomes a recorder that rides along."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import normuon_lens
from normuon_lens.errors import AttachError

from .applied import is_exact
from .budget import Budget
from .portions import replicas_of, shared_by
from .recorder import Recorder
from .schedule import Schedule
from .selection import Watched, leaf_optimizers, select
from .shadow import shadow_rules

MAX_GROUPS_JSON = 40_000
"""Bytes for the hyper-parameters in a run's metadata: with one optimizer a parameter there may be
thousands of groups, and an HDF5 attribute has its limit."""


def attach(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    path: str | os.PathLike[str],
    *,
    every: int = 10,
    norms_every: int = 1,
    matrices_every: int | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    stages: bool = False,
    shadow: str | Iterable[str] | Mapping[str, Mapping[str, Any]] = (),
    budget: float | None = None,
    name: str | None = None,
    notes: str | None = None,
    resume: bool = False,
    on_error: Literal["warn", "raise"] = "warn",
    on_full: Literal["drop", "wait"] = "drop",
    step: int | None = None,
    store: Literal["float32", "float16"] = "float32",
    compress: bool = False,
    quiet: bool = False,
) -> Recorder:
    """Record what `optimizer` does to every weight matrix of `model`, from now on.

    Parameters
    ----------
    model : torch.nn.Module
        Whose parameters the optimizer trains; it gives the matrices their names.
    optimizer : torch.optim.Optimizer or sequence of them
        Any optimizer with step hooks, wrapped or not. With several (matrix optimizer + AdamW) a
        step is one round.
    path : str or path-like
        Where the finished recording shall lie, such as ``runs/normuon.h5``.
    every : int
        Spectra on every so many-th step.
    norms_every : int
        Neuron norms on every so many-th step.
    matrices_every : int, optional
        Full matrices on every so many-th step; as `every` if None, never if 0.
    include, exclude : str or iterable of str, optional
        Glob patterns on parameter names, such as ``"blocks.*"``. All matrices if None.
    stages : bool
        Record the matrices on their way too: the gradient under any optimizer; momentum,
        orthogonalized and normalized under ours and torch's Muon. About as much again for each.
    shadow : str, iterable of str, or mapping of str to mapping
        ``("adamw", "muon", "normuon")``: what each rule would do on the same gradients, nothing of
        it applied, recorded beside the run as ``x.shadow-normuon.h5``. With hyper-parameters:
        ``{"normuon": {"betas": (0.9, 0.95)}}``; the learning rate is the real one unless given.
        Costs each rule's state and the time of its step, on the weights' device.
    budget : float, optional
        Share of the training's time that recording may take, such as 0.05: it measures its own
        cost and records less often to stay within, and says so in the run's events.
    name, notes : str, optional
        Shown with the run.
    resume : bool
        Append to the recording at `path`; without it an existing one is refused.
    on_error : {"warn", "raise"}
        Whether a failure while recording is one warning (training goes on) or raised.
    on_full : {"drop", "wait"}
        Whether a sample that the helper process has no room for is dropped and counted, or the
        training waits.
    step : int, optional
        Steps taken before, for optimizers whose state does not say (SGD, Muon). If None: what the
        state says, or else the last step of the recording that is resumed.
    store : {"float32", "float16"}
        How full matrices are kept; float16 with one scale a matrix and step.
    compress : bool
        Compress the finished file (shuffle and gzip).
    quiet : bool
        Say nothing on standard error about what is recorded and where it went.

    Returns
    -------
    Recorder
        Also a context manager. Without ``with``, close it, or leave that to the interpreter's
        exit. Where weights are sharded (FSDP2, HSDP), or our optimizers share the work, every rank
        calls `attach` with the same arguments, and records its part of the one recording at the
        first rank's `path`. So they share the work if `model` is a DistributedDataParallel; if only
        the first rank calls it, or the model inside is given, that one records alone, and the other
        ranks' recorders do nothing.

    Raises
    ------
    AttachError
        If there is no matrix to record, the patterns match none, a number makes no sense, the
        weights are sharded otherwise than by rows, or the recording cannot be made at `path`. Where
        several ranks record together, on all of them, also if their arguments differ.

    Notes
    -----
    It takes the memory of at most one more copy of the recorded weights, beside them (none under
    our own optimizers), and shared memory for four samples (8 MB to 512 MB, or
    one sample of the largest matrix). On sampled steps, a rank that holds rows of sharded weights
    has them twice more in main memory, in float32, until they have been exchanged.
    """
    optimizers = _leaves(optimizer)
    for choice, given, known in (
        ("on_error", on_error, ("warn", "raise")),
        ("on_full", on_full, ("drop", "wait")),
        ("store", store, ("float32", "float16")),
    ):
        if given not in known:
            raise AttachError(f"{choice}={given!r}: expected one of {', '.join(known)}")
    if step is not None and step < 0:
        raise AttachError(f"step={step}: expected the number of steps taken before, 0 or more")
    schedule = Schedule(every, norms_every, every if matrices_every is None else matrices_every)
    limit = None if budget is None else Budget(budget, schedule)
    rules = shadow_rules(shadow)
    matrices, watched = select(model, optimizers, include, exclude)
    ranks = shared_by(watched, matrices.names, optimizers)
    replicas = [] if ranks or rules else replicas_of(model)
    if ranks and rules:
        raise AttachError(
            "a shadow needs whole gradients at every step, but these are spread over "
            f"{len(ranks)} ranks; leave out shadow="
        )
    metadata = _describe(model, optimizers, watched, schedule, name, notes)
    return Recorder(
        Path(path),
        optimizers,
        matrices,
        watched,
        schedule,
        metadata,
        ranks=ranks or replicas,
        replicated=bool(replicas),
        stages=stages,
        shadow=rules,
        budget=limit,
        step=step,
        options={"resume": resume, "store": store, "compress": compress},
        on_error=on_error,
        wait=on_full == "wait",
        quiet=quiet,
    )


def _leaves(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
) -> list[torch.optim.Optimizer]:
    given = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    several = list(given) if isinstance(given, Iterable) else []
    if not several or not all(isinstance(each, torch.optim.Optimizer) for each in several):
        raise AttachError(
            f"attach needs a torch.optim.Optimizer or a list of them, got {optimizer!r}"
        )
    return list(dict.fromkeys(leaf for each in several for leaf in leaf_optimizers(each)))


def _describe(
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    watched: Sequence[Watched],
    schedule: Schedule,
    name: str | None,
    notes: str | None,
) -> dict[str, Any]:
    """Collect what a reader of the run wants to know about the training."""
    main = max(range(len(optimizers)), key=lambda i: sum(w.optimizer == i for w in watched))
    groups = [
        {
            "optimizer": type(optimizer).__name__,
            "update": "exact" if is_exact(optimizer) else "difference",
            **_plain(group),
        }
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    while len(json.dumps(groups)) > MAX_GROUPS_JSON:
        groups = groups[: len(groups) // 2]
    return {
        "optimizer": type(optimizers[main]).__name__,
        "name": name,
        "notes": notes,
        "groups": groups,
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seed": torch.initial_seed(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "job": _job(),
        "schedule": {
            "every": schedule.every,
            "norms_every": schedule.norms_every,
            "matrices_every": schedule.matrices_every,
        },
        "versions": {
            "normuon-lens": normuon_lens.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "created": time.time(),
    }


def _job() -> dict[str, Any] | None:
    """Name the job that torchrun may restart: its next attempt goes on with this recording."""
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    if job is None:
        return None
    return {"id": job, "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))}


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """Keep the hyper-parameters of a parameter group that can be written down."""
    plain: dict[str, Any] = {}
    for key, value in group.items():
        if key == "params":
            continue
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool | int | float | str | None):
            plain[key] = value
        elif isinstance(value, tuple | list) and all(isinstance(v, int | float) for v in value):
            plain[key] = list(value)
    return plain
