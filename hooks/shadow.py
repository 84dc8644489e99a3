"""What other rules would have done to the same matrices on the same gradients; nothing is applied.

A shadow is a real optimizer that trains stand-ins instead of the weights: zeros before its step,
its update afterwards. The gradients belong to the path that the real optimizer takes, so this
compares rules on one stream of gradients, not trainings.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from normuon_lens.errors import AttachError, LensError
from normuon_lens.optim import Muon, NorMuon

from .selection import Watched, matrix_view
from .state import state_bytes
from .tap import Look, Take, Tap, gradient_of

RULES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "muon": Muon,
    "normuon": NorMuon,
}

Hyper = dict[str, Any]


def shadow_rules(shadow: str | Iterable[str] | Mapping[str, Mapping[str, Any]]) -> dict[str, Hyper]:
    """Return rule → hyper-parameters of what a user asked for.

    Parameters
    ----------
    shadow : str, iterable of str, or mapping of str to mapping
        Names of :data:`RULES`, or names with hyper-parameters of the optimizer's constructor.

    Returns
    -------
    dict of str to dict

    Raises
    ------
    AttachError
        For a rule or a hyper-parameter that does not exist, or a value out of range.
    """
    names = [shadow] if isinstance(shadow, str) else shadow
    given = names if isinstance(names, Mapping) else {rule: {} for rule in names}
    for rule, hyper in given.items():
        if rule not in RULES:
            close = difflib.get_close_matches(str(rule), RULES, 1, 0.3)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise AttachError(f"shadow={rule!r}: expected {', '.join(RULES)}{hint}")
        if "weight_decay" in hyper:
            raise AttachError(f"shadow {rule}: weight_decay is no part of an update, leave it out")
        try:
            _build(rule, [{"params": [torch.zeros(2, 2, requires_grad=True)]}], hyper)
        except (LensError, ValueError, TypeError) as error:
            raise AttachError(f"shadow {rule}: {error}") from None
    return {rule: dict(hyper) for rule, hyper in given.items()}


def shadow_name(rule: str) -> str:
    """Class name of the optimizer that a rule stands for."""
    return {"adamw": "AdamW", "muon": "Muon", "normuon": "NorMuon"}[rule]


def shadow_path(path: Path, rule: str) -> Path:
    """Where a shadow's recording lies: ``x.shadow-muon.h5`` beside ``x.h5``."""
    return path.with_name(f"{path.name.removesuffix('.h5')}.shadow-{rule}.h5")


def describe_shadow(metadata: dict[str, Any], rule: str, hyper: dict[str, Any]) -> dict[str, Any]:
    """Turn the description of a run into that of its shadow under `rule`."""
    optimizer = shadow_name(rule)
    groups = [
        {"optimizer": optimizer, "update": "exact", "lr": group.get("lr"), **hyper}
        for group in metadata["groups"]
    ]
    return metadata | {
        "optimizer": optimizer,
        "name": f"{optimizer} (shadow)",
        "groups": groups,
        "shadow_of": metadata["optimizer"],
    }


class Shadow(Tap):
    """One rule in the shadow of one real optimizer.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        The real one: whose gradients, and whose learning rates unless `hyper` names one.
    watched : sequence of Watched
    take : Take
    rule : str
    hyper : dict
        Its hyper-parameters; weight decay would be no part of an update, so there is none.
    stages : bool

    Attributes
    ----------
    rule : str
    """

    every_step = True  # its momentum lives on every gradient

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        watched: Sequence[Watched],
        take: Take,
        *,
        rule: str,
        hyper: Hyper,
        stages: bool,
    ) -> None:
        super().__init__(optimizer, watched, take)
        self.rule = rule
        self._follows_lr = "lr" not in hyper
        groups: dict[int, list[torch.nn.Parameter]] = {}
        self._stand_ins: list[torch.nn.Parameter] = []
        for item in watched:
            weight = matrix_view(item.parameter)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            stand_in = torch.nn.Parameter(torch.zeros_like(weight, dtype=dtype))
            groups.setdefault(item.group, []).append(stand_in)
            self._stand_ins.append(stand_in)
        self._groups = list(groups)
        self._shadow = _build(rule, [{"params": group} for group in groups.values()], hyper)
        # Not through the class's own wrapper, which would call everybody's global step hooks.
        self._step: Callable[[torch.optim.Optimizer], None] = type(self._shadow).step.__wrapped__  # type: ignore[attr-defined]
        self._stages = stages
        self._items = dict(zip(self._stand_ins, watched, strict=True))

    @property
    def state_bytes(self) -> float:
        """Bytes of its own state."""
        return state_bytes(self._shadow, self._stand_ins)

    def before(self, look: Look) -> None:
        """Step on the gradients that the real optimizer is about to use."""
        if not look.closure:
            self._advance(look)

    def after(self, look: Look) -> None:
        """Step on the gradients that a closure made."""
        if look.closure:
            self._advance(look)

    def _advance(self, look: Look) -> None:
        for stand_in, item in self._items.items():
            gradient = gradient_of(self._optimizer, item.parameter)
            stand_in.grad = None if gradient is None else gradient.to(stand_in.dtype)
        if self._follows_lr:
            for group, mine in zip(self._groups, self._shadow.param_groups, strict=True):
                mine["lr"] = float(self._optimizer.param_groups[group].get("lr", 1.0))
        torch._foreach_zero_([stand_in.detach() for stand_in in self._stand_ins])
        if isinstance(self._shadow, Muon | NorMuon):
            self._shadow.stage_observer = self._observe if look.recorded and self._stages else None
        self._step(self._shadow)
        for stand_in, item in self._items.items():
            stand_in.grad = None
            if look.recorded:
                self._take(item, "update", stand_in.detach())

    def _observe(self, stand_in: torch.nn.Parameter, stage: str, matrix: torch.Tensor) -> None:
        if stage != "update":
            self._take(self._items[stand_in], stage, matrix)


def _build(
    rule: str, groups: list[dict[str, Any]], hyper: Mapping[str, Any]
) -> torch.optim.Optimizer:
    return RULES[rule](groups, **{"lr": 0.0, "weight_decay": 0.0, **hyper})
