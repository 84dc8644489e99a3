"""Which parameters are recorded: the weight matrices that the optimizers train, by name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from normuon_lens.errors import AttachError
from normuon_lens.optim.groups import is_matrix
from normuon_lens.optim.sharded import local
from normuon_lens.runfile import Matrices, Matrix

WRAPPED_AS = ("module", "_orig_mod")
"""The only child of DistributedDataParallel, of torch.compile's module, and of their like."""

TRANSPOSED = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)
GPT2_CONV1D = "transformers.pytorch_utils.Conv1D"
"""Modules that store (inputs, outputs, ...). The second is what GPT-2's linear layers are."""


@dataclass(frozen=True)
class Watched:
    """One recorded parameter: where it stands in the table, and whose it is.

    Attributes
    ----------
    parameter : torch.nn.Parameter
    index : int
        Its row in the table of matrices.
    optimizer, group : int
        Which optimizer updates it, in which of that optimizer's parameter groups.
    inputs_first : bool
        Whether its axis 0 is the layer's inputs, as in transposed convolutions, so that its
        neurons are along axis 1.
    """

    parameter: torch.nn.Parameter
    index: int
    optimizer: int
    group: int
    inputs_first: bool = False

    @property
    def stored(self) -> tuple[int, int]:
        """Rows and width of the whole parameter, as it is stored."""
        rows, *rest = self.parameter.shape
        return rows, math.prod(rest)

    @property
    def shape(self) -> tuple[int, int]:
        """Neurons and inputs of the whole matrix, (m, n)."""
        if not self.inputs_first:
            return self.stored
        m = self.parameter.shape[1]
        return m, self.parameter.numel() // m

    def by_neurons(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows of the parameter, as they are stored, with one row a neuron.

        Parameters
        ----------
        rows : Tensor of shape (rows, width)
            All of them, or those that this rank holds.

        Returns
        -------
        Tensor
            The same, unless inputs come first: then (m, ...), of these inputs.
        """
        if not self.inputs_first:
            return rows
        return rows.reshape(len(rows), *self.parameter.shape[1:]).transpose(0, 1).flatten(1)


def leaf_optimizers(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return the optimizers that really step inside wrappers and containers; itself if none.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Possibly one that holds another as ``.optimizer`` (Accelerate, Lightning) or several as
        ``.optimizers``. Recording both would record every step twice.

    Returns
    -------
    list of torch.optim.Optimizer
    """
    inner = getattr(optimizer, "optimizers", None) or getattr(optimizer, "optimizer", None)
    held = list(inner) if isinstance(inner, list | tuple) else [inner]
    nested = [o for o in held if isinstance(o, torch.optim.Optimizer) and o is not optimizer]
    if not nested:
        return [optimizer]
    return list(dict.fromkeys(leaf for each in nested for leaf in leaf_optimizers(each)))


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside wrappers that hold nothing but it.

    Parameters
    ----------
    model : torch.nn.Module
        Possibly wrapped by DistributedDataParallel, torch.compile or their like.

    Returns
    -------
    torch.nn.Module
        Its parameters have the names that they have without the wrapper.
    """
    while len(children := dict(model.named_children())) == 1:
        name, child = children.popitem()
        if name not in WRAPPED_AS or next(model.parameters(recurse=False), None) is not None:
            break
        model = child
    return model


def select(
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> tuple[Matrices, list[Watched]]:
    """Find the weight matrices of `model` that `optimizers` train.

    Parameters
    ----------
    model : torch.nn.Module
    optimizers : sequence of torch.optim.Optimizer
    include, exclude : str or iterable of str, optional
        Glob patterns on parameter names, with or without a trailing ``.weight``.

    Returns
    -------
    Matrices
        In model order.
    list of Watched
        One for each.

    Raises
    ------
    AttachError
        If the optimizers train no matrix of the model, or the patterns leave none.
    """
    model = unwrapped(model)
    owners: dict[int, tuple[int, int, int]] = {}
    group_count = 0
    for i, optimizer in enumerate(optimizers):
        for j, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                owners[id(parameter)] = i, j, group_count + j
        group_count += len(optimizer.param_groups)
    named = [(n, p) for n, p in model.named_parameters() if id(p) in owners]
    candidates = [(_display_name(n), p) for n, p in named if _is_recordable(p)]
    if not candidates:
        kinds = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise AttachError(
            f"{kinds}: trains {len(owners)} parameters, but no weight matrix of this "
            f"{type(model).__name__}; pass the model and the optimizer that belong together"
        )
    chosen = [(n, p) for n, p in candidates if _wanted(n, _patterns(include), _patterns(exclude))]
    if not chosen:
        names = [name for name, _ in candidates]
        asked = f"include={include!r}" + (f", exclude={exclude!r}" if exclude else "")
        close = [
            name
            for pattern in _patterns(include) or []
            for name in difflib.get_close_matches(pattern, names, 3, 0.2)
        ]
        raise AttachError(
            f"{asked} matches none of {len(names)} matrices; the closest: "
            f"{', '.join(dict.fromkeys(close or names[:3]))}"
        )
    inputs_first = _with_inputs_first(model)
    matrices, watched = [], []
    for index, (name, parameter) in enumerate(chosen):
        i, j, number = owners[id(parameter)]
        item = Watched(parameter, index, i, j, id(parameter) in inputs_first)
        dtype = str(parameter.dtype).removeprefix("torch.")
        matrices.append(Matrix(name, *item.shape, dtype, number))
        watched.append(item)
    return Matrices(matrices), watched


def _with_inputs_first(model: torch.nn.Module) -> set[int]:
    """Ids of the parameters whose axis 0 is inputs: known by their modules, never by a shape."""
    return {
        id(parameter)
        for module in model.modules()
        if isinstance(module, TRANSPOSED) or GPT2_CONV1D in map(_full_name, type(module).__mro__)
        for parameter in module.parameters(recurse=False)
    }


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def matrix_view(parameter: torch.Tensor) -> torch.Tensor:
    """Return the rows of a parameter that this rank holds, as (rows, width).

    A convolution's row is all that belongs to one entry of its first axis. There may be no rows.
    """
    return local(parameter).detach().flatten(1)


def _is_recordable(parameter: torch.Tensor) -> bool:
    dense = parameter.is_floating_point() and parameter.layout == torch.strided
    return dense and is_matrix(parameter)


def _display_name(name: str) -> str:
    # torch.compile puts its own module in between; it is not part of the model's names.
    return name.replace("_orig_mod.", "").removesuffix(".weight")


def _patterns(given: str | Iterable[str] | None) -> list[str] | None:
    if given is None:
        return None
    return [given] if isinstance(given, str) else list(given)


def _wanted(name: str, include: list[str] | None, exclude: list[str] | None) -> bool:
    def matches(patterns: list[str]) -> bool:
        return any(fnmatchcase(n, p) for n in (name, f"{name}.weight") for p in patterns)

    return (include is None or matches(include)) and not (exclude and matches(exclude))
