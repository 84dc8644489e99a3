"""How figures are printed: short, aligned, and honest about what is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import click
import rich.box
from rich.console import Console
from rich.table import Table

WIDTH_WHEN_PIPED = 120
"""Columns when standard output is no terminal."""


def figure(value: float) -> str:
    """Return three significant digits; a dash for what was not measured."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    if abs(value) < 1000:
        value = float(f"{value:.3g}")  # first, lest 99.96 become 100.0
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}"


def factor(ratio: float) -> str:
    """Return a ratio as a person says it: ``×1.5``, ``÷118``."""
    if math.isnan(ratio) or ratio <= 0:
        return ""
    return f"×{figure(ratio)}" if ratio >= 1 else f"÷{figure(1 / ratio)}"


def new_table(title: str, columns: Sequence[str], *, text_columns: int = 1) -> Table:
    """Return an empty table; the first `text_columns` are aligned left, figures right."""
    table = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        text = i < text_columns
        table.add_column(column, justify="left" if text else "right", no_wrap=text)
    return table


def console() -> Console:
    """Return the console for standard output, wide enough when piped.

    Markup is off: names come from files, and what looks like markup in them is text.
    """
    plain = Console(highlight=False, markup=False)
    if plain.is_terminal:
        return plain
    return Console(highlight=False, markup=False, width=WIDTH_WHEN_PIPED)


def print_json(content: Any) -> None:
    """Print `content` as strict JSON: a missing figure is null, for JSON knows no NaN."""
    click.echo(json.dumps(_without_nan(content), indent=2, ensure_ascii=False))


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
