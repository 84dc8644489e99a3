"""Which model an optimizer trains: found among the objects that are alive, nobody has to say it.

An optimizer knows parameters, not modules. The outermost module that owns them is the model that
a user would hand to :func:`normuon_lens.hooks.attach`, and gives the matrices their names.
"""

from __future__ import annotations

import gc
from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch

from normuon_lens.optim.groups import is_matrix

from .selection import leaf_optimizers, unwrapped

T = TypeVar("T")


class Found(NamedTuple):
    """A model, and the optimizers that train it together.

    Attributes
    ----------
    model : torch.nn.Module
    optimizers : list of torch.optim.Optimizer
        No two of them train the same parameter.
    """

    model: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]


def discover(
    optimizer: torch.optim.Optimizer, known: Container[torch.optim.Optimizer] = ()
) -> Found | None:
    """Find the model that `optimizer` trains and the other optimizers of that model.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        One that is about to step; it comes first.
    known : container of torch.optim.Optimizer
        Optimizers to leave out.

    Returns
    -------
    Found or None
        None if no module owns any of its parameters.
    """
    # One walk over the heap, by type(): isinstance would ask lazy proxies, which then load.
    alive = [o for o in gc.get_objects() if issubclass(type(o), _SOUGHT)]
    modules = [o for o in alive if isinstance(o, torch.nn.Module)]
    model = _outermost(modules, {id(p) for p in parameters_of(optimizer)})
    if model is None:
        return None
    owned = {id(p) for p in model.parameters()}
    taken = {id(p) for p in parameters_of(optimizer)}
    together = [optimizer]
    for other in _leaves(o for o in alive if isinstance(o, torch.optim.Optimizer)):
        trained = owned.intersection(map(id, parameters_of(other)))
        # None twice: an optimizer that was replaced may linger.
        if other not in known and trained and not trained & taken:
            together.append(other)
            taken |= trained
    return Found(unwrapped(model), together)


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yield everything that an optimizer trains."""
    for group in optimizer.param_groups:
        yield from group["params"]


def trains_matrices(optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    """Whether there is a weight matrix among what they train."""
    return any(is_matrix(p) for optimizer in optimizers for p in parameters_of(optimizer))


_SOUGHT = (torch.nn.Module, torch.optim.Optimizer)


def _leaves(optimizers: Iterable[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    # What a half-made optimizer lacks (it may be under construction elsewhere) is param_groups.
    whole = [o for o in optimizers if "param_groups" in vars(o)]
    return list(dict.fromkeys(leaf for each in whole for leaf in leaf_optimizers(each)))


def _outermost(modules: list[torch.nn.Module], wanted: set[int]) -> torch.nn.Module | None:
    """Return the module, inside no other, that owns most of the `wanted` parameters."""
    parents: dict[int, list[torch.nn.Module]] = {}
    reached: dict[int, torch.nn.Module] = {}
    for module in modules:
        for child in _values(module, "_modules"):
            parents.setdefault(id(child), []).append(module)
        if any(id(p) in wanted for p in _values(module, "_parameters")):
            reached[id(module)] = module
    rising = list(reached.values())
    while rising:
        for parent in parents.get(id(rising.pop()), ()):
            if id(parent) not in reached:
                reached[id(parent)] = parent
                rising.append(parent)
    outer = [m for m in reached.values() if id(m) not in parents] or list(reached.values())

    def fit(module: torch.nn.Module) -> tuple[int, int]:
        owned = {id(p) for p in module.parameters()}
        return len(owned & wanted), -len(owned)

    return max(outer, key=fit, default=None)


def _values(module: torch.nn.Module, kind: str) -> Iterator[object]:
    """Yield what is registered in a module; by its dict, for a half-made module has no more."""
    registered = vars(module).get(kind) or {}
    yield from (value for value in registered.values() if value is not None)
