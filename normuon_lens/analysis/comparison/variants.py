"""What a run is a run of: its optimizer and settings, and the seed that tells it from its like."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from normuon_lens.runfile import Run

MOST = 3
"""Settings in a variant's name, at most."""

Setting = tuple[int, str]
"""Number of a parameter group, and the name of a setting in it."""


def variant_names(runs: Sequence[Run]) -> list[str]:
    """Return what each run is one of: runs of the same optimizer and settings share a name.

    The name is the optimizer's, with those settings by which it differs from others here:
    ``AdamW lr=0.004``.
    """
    optimizers = [_optimizer(run) for run in runs]
    settings = [_settings(run) for run in runs]
    names = list(optimizers)
    for optimizer in set(optimizers):
        of = [i for i, name in enumerate(optimizers) if name == optimizer]
        kinds = list({_key(settings[i]): settings[i] for i in of}.values())
        if len(kinds) > 1:
            told = _distinct([_difference(kind, kinds) for kind in kinds])
            known = {_key(kind): text for kind, text in zip(kinds, told, strict=True)}
            for i in of:
                names[i] = f"{optimizer} {known[_key(settings[i])]}".strip()
    return names


def seed_of(run: Run) -> int | None:
    """Return the seed that a run was recorded with, if one was."""
    seed = run.metadata.get("seed")
    return seed if isinstance(seed, int) and not isinstance(seed, bool) else None


def shadow_of(run: Run) -> str:
    """Return the optimizer in whose training a run is a shadow; empty for a real run."""
    return str(run.metadata.get("shadow_of") or "")


def groups_of(run: Run) -> list[dict[str, Any]]:
    """Return the parameter groups with their settings; none where a file holds something else."""
    groups = run.metadata.get("groups")
    return [x for x in groups if isinstance(x, dict)] if isinstance(groups, list) else []


def _optimizer(run: Run) -> str:
    host = shadow_of(run)
    return f"{run.optimizer} (shadow of {host})" if host else run.optimizer


def _settings(run: Run) -> dict[Setting, Any]:
    return {
        (i, name): value
        for i, group in enumerate(groups_of(run))
        for name, value in group.items()
        # A schedule's rate of the first step follows from its peak.
        if not (name == "lr" and "initial_lr" in group)
    }


def _key(settings: dict[Setting, Any]) -> str:
    return json.dumps([[*at, settings[at]] for at in sorted(settings)], default=str)


def _difference(kind: dict[Setting, Any], kinds: Sequence[dict[Setting, Any]]) -> str:
    """Return those settings of a kind that are not the same in all kinds."""
    every = dict.fromkeys(at for settings in kinds for at in settings)
    differing = [at for at in every if len({_text(k, at) for k in kinds}) > 1]
    told = dict.fromkeys(_text(kind, at) for at in differing if at in kind)
    return ", ".join([*told][:MOST]) + (", …" if len(told) > MOST else "")


def _text(settings: dict[Setting, Any], at: Setting) -> str:
    name = "lr" if at[1] == "initial_lr" else at[1]
    return f"{name}={settings.get(at)}"


def _distinct(texts: list[str]) -> list[str]:
    """Append a number to those texts that stand for several kinds."""
    return [
        f"{text} #{texts[: i + 1].count(text)}" if texts.count(text) > 1 else text
        for i, text in enumerate(texts)
    ]
