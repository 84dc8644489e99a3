"""The subjects of study: Muon and NorMuon, complete and readable next to their papers.

This is the one room of the core that needs torch (``pip install "normuon-lens[torch]"``), all but
what counts costs on paper: :mod:`normuon_lens.optim.cost`, ``owners`` and ``presets``.

Examples
--------
>>> import torch
>>> from normuon_lens.optim import NorMuon, split_parameters
>>> model = torch.nn.Sequential(torch.nn.Embedding(64, 8), torch.nn.Linear(8, 16))
>>> matrices, others = split_parameters(model)
>>> optimizers = [NorMuon(matrices, lr=0.01), torch.optim.AdamW(others, lr=0.003)]
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from normuon_lens.extras import require

if TYPE_CHECKING:
    from normuon_lens.optim.groups import split_parameters
    from normuon_lens.optim.muon import Muon
    from normuon_lens.optim.normuon import NorMuon
    from normuon_lens.optim.orthogonalize import orthogonalize

__all__ = ["Muon", "NorMuon", "orthogonalize", "split_parameters"]

_HOMES = {
    "Muon": "normuon_lens.optim.muon",
    "NorMuon": "normuon_lens.optim.normuon",
    "orthogonalize": "normuon_lens.optim.orthogonalize",
    "split_parameters": "normuon_lens.optim.groups",
}


def __getattr__(name: str) -> Any:
    # Loaded when first used: `normuon-lens cost` needs no torch.
    if name in _HOMES:
        require("torch", "torch")
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Face(ModuleType):
    """Lets no module take the place of the function that bears its name, ``orthogonalize``."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Python sets a module that was imported as an attribute of its package.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
