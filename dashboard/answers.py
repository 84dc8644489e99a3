"""Answers what the page asks: of the pictures it shows, those that changed, and their numbers.

The page says what it looks at and what each of its pictures was drawn from. What comes back is the
least that brings it up to date: a step moved with the arrow keys costs one request, and only
pictures of that step are drawn anew.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from .controls import Controls, start, steered
from .figures.numbers import csv_of, summary_of, table_of
from .headline import BALANCED, EVEN
from .layout import swatch
from .link import read_link
from .overview import Cell, overview, sparkline
from .panels import BY_ID, Panel, View, Window
from .python import python_of
from .store import Store

OVERVIEW = "overview"
"""Is asked for like a picture: the table of all matrices."""

ROWS = 400
"""Rows of numbers shown on the page; the CSV has all."""


def view_of(store: Store, asked: Mapping[str, Any]) -> View:
    """Return what a request looks at; what it leaves out, or gets wrong, is chosen for it.

    Parameters
    ----------
    asked : mapping
        ``query`` (an address's) or ``runs``, ``matrix``, ``step``, ``stage``; ``dark``;
        ``windows``, of each panel that is zoomed in to [left, right, low, high]. Comes from
        outside and may be anything.
    """
    if isinstance(asked.get("query"), str):
        link = read_link(asked["query"])
        now = start(link)
    else:
        runs, step = asked.get("runs"), asked.get("step")
        ids = [name for name in runs if isinstance(name, str)] if isinstance(runs, list) else []
        now = Controls(
            known=[entry.id for entry in store.entries],
            ticked=ids,
            matrix=_text(asked.get("matrix")),
            stage=_text(asked.get("stage")),
            step=step if isinstance(step, int) else None,
        )
    now = steered(store, now)
    newest = store.recorded_steps()[-1]
    return View(
        runs=store.chosen(now.ticked or []),
        matrix=now.matrix or "",
        step=newest if now.step is None else now.step,
        stage=now.stage or "update",
        dark=asked.get("dark") is True,
        windows=_windows(asked.get("windows")),
    )


def pictures(store: Store, view: View, have: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pictures that differ from what the page has.

    Parameters
    ----------
    have : mapping
        Ids of the pictures that are wanted, each with the ``key`` that came with the one shown,
        or None.

    Returns
    -------
    dict
        By id: ``key``; ``data`` and ``layout`` for Plotly, which keeps the zoom while the layout's
        ``uirevision`` stays; ``notes``, a list of sentences; ``summary``, its text alternative.
        The overview has ``runs`` and ``rows``. A picture that is up to date is left out.
    """
    answer: dict[str, Any] = {}
    for name, key in have.items():
        if name == OVERVIEW:
            new = _digest(["overview", [[e.id, e.version] for e in view.runs], view.stage])
            if new != key:
                answer[name] = {"key": new, **_overview(store, view)}
        elif name in BY_ID:
            panel = BY_ID[name]
            new = _digest(panel.content(store, view))
            if new != key:
                answer[name] = {"key": new, **_picture(store, panel, view)}
    return answer


def numbers(store: Store, view: View, name: str) -> dict[str, Any]:
    """Return what a panel shows as a table, `ROWS` rows of it, and as Python for a notebook."""
    columns, rows = table_of(BY_ID[name].draw(store, view).figure)
    python = python_of(name, view)
    return {"columns": columns, "rows": rows[:ROWS], "total": len(rows), "python": python}


def csv(store: Store, view: View, name: str) -> str:
    """Return what a panel shows as CSV."""
    return csv_of(BY_ID[name].draw(store, view).figure)


def _picture(store: Store, panel: Panel, view: View) -> dict[str, Any]:
    figure, notes = panel.draw(store, view)
    # What says why it is empty has other axes than what takes its place.
    figure["layout"]["uirevision"] = _digest([*panel.subject(view), bool(figure["data"])])
    return {**figure, "notes": list(notes), "summary": summary_of(figure)}


def _overview(store: Store, view: View) -> dict[str, Any]:
    """Return the table of all matrices: the runs, the rows, and beyond what a figure is bad."""
    rows = overview(view.runs, view.stage)
    histories = [cell.history for row in rows for cell in row.cells if cell]
    top = max([2 * BALANCED, *(value for values in histories for value in values)])
    return {
        "runs": [{"name": store.label(e), "swatch": swatch(e.style)} for e in view.runs],
        "rows": [
            {**row._asdict(), "cells": [_cell(cell, top) for cell in row.cells]} for row in rows
        ],
        "limits": {"condition": EVEN, "cv": BALANCED},
    }


def _cell(cell: Cell | None, top: float) -> dict[str, Any] | None:
    if cell is None:
        return None
    return {
        "condition": _number(cell.condition),
        "is_bound": cell.is_bound,
        "cv": _number(cell.cv),
        "not_finite": cell.not_finite,
        "trusted": cell.trusted,
        "sparkline": sparkline(cell.history, top=top),
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _digest(content: object) -> str:
    return hashlib.blake2b(repr(content).encode(), digest_size=12).hexdigest()


def _text(given: Any) -> str | None:
    return given if isinstance(given, str) else None


def _windows(given: Any) -> dict[str, Window]:
    found = {}
    for name, sides in given.items() if isinstance(given, dict) else ():
        numbers = (
            [x for x in sides if isinstance(x, int | float)] if isinstance(sides, list) else []
        )
        if len(numbers) == 4 and all(abs(x) < 1e12 for x in numbers):
            found[name] = Window(*map(float, numbers))
    return found
