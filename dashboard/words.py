"""How numbers, names and settings are said: short, and honest about what is missing."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .figures.heat import shortened

if TYPE_CHECKING:
    from .report_parts import Key
    from .store import Entry

NONE = "–"
"""Stands for what was not measured."""

ROOM = 60
"""Letters of a name from a file, at most; both of its ends stay."""

SETTING = 160
"""Letters of a setting."""

SENTENCE = 400
"""Letters of a sentence with names in it."""

HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Kinds of characters that cannot be seen, or that turn around what follows them."""


def shown(value: float) -> str:
    """Return three significant digits, with commas in a large number."""
    if math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    value = float(f"{value:.3g}")
    if abs(value) >= 1e6 or 0 < abs(value) < 1e-3:
        return f"{value:.2e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}" if value else "0"


def factor(ratio: float) -> str:
    """Return a ratio as a person says it: ``×1.50``, ``÷118``; nothing where there is none."""
    if not math.isfinite(ratio) or ratio <= 0:
        return ""
    return f"×{shown(ratio)}" if ratio >= 1 else f"÷{shown(1 / ratio)}"


def loss(value: float) -> str:
    """Return a loss: four digits, for runs differ in the third."""
    return f"{value:#.4g}" if math.isfinite(value) else shown(value)


def percent(share: float) -> str:
    """Return a share in percent."""
    if math.isnan(share):
        return NONE
    return "none" if share == 0 else "< 0.1 %" if share < 1e-3 else f"{100 * share:.1f} %"


def size(count: float) -> str:
    """Return a number of bytes."""
    if math.isnan(count):
        return NONE
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{shown(count)} TB"


def duration(seconds: float) -> str:
    """Return a time: three digits of the unit in which it is read."""
    if math.isnan(seconds):
        return NONE
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:,.3g} h"


def count(number: int, what: str) -> str:
    """Return how many of something there are."""
    return f"{number:,} {what}" + "s" * (number != 1)


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence lists them."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def inert(text: str) -> str:
    """Return a text in which every character can be seen for what it is."""
    if text.isprintable():
        return text
    return "".join("�" if unicodedata.category(x) in HIDDEN else x for x in " ".join(text.split()))


def told(text: str, entries: Sequence[Entry], keys: Mapping[str, Key]) -> str:
    """Return a sentence about runs, with their names in place of where they lie.

    A path would tell strangers about the machine.
    """
    for entry in entries:
        name = keys[entry.id].name if entry.id in keys else entry.path.name
        text = text.replace(str(entry.path), name)
    return sentence(text)


def sentence(text: str) -> str:
    """Return a sentence with names from files in it, at a length that can be read."""
    return shortened(inert(text), SENTENCE)


def named(name: str, room: int = ROOM) -> str:
    """Return a name from a file in one short line."""
    return shortened(inert(name), room) or "(no name)"


def setting(value: Any) -> str:
    """Return a value from a run's metadata, whatever it is, in one short line."""
    if isinstance(value, float):
        value = float(f"{value:.6g}")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shortened(inert(text), SETTING)


def settings(given: Any) -> dict[str, str]:
    """Return what is a table in a run's metadata as names and values; nothing if it is none."""
    if not isinstance(given, dict):
        return {}
    return {named(key): setting(value) for key, value in given.items() if value is not None}
