"""What is drawn beside the data: the cursor, the veil, what is healthy, and marked steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .frame import Figure, Marks, theme
from .palette import faded

SPANS = 150
"""Spans of steps marked for each kind and run."""
TICK = 5
"""Height of a tick in pixels, without its border."""
EDGE = 2
"""Half the width of a tick of one step, in pixels; half of this is left of a hollow one's."""
TICK_ROWS = 4
"""Runs whose ticks stand one above the other; further ones start over."""


def cursor(step: int | None, dark: bool, panels: int = 1) -> list[Figure]:
    """Return one vertical line a panel at the chosen step; none where none is chosen."""
    if step is None:
        return []
    line = {"color": theme(dark).ink, "width": 1.25}
    return [_across(panel, "line", step, step, line=line) for panel in range(panels)]


def dimmed(until: int, dark: bool, panels: int = 1) -> list[Figure]:
    """Return a veil over the steps up to `until`, which say little about an optimizer."""
    veil = {"fillcolor": faded(theme(dark).paper, 0.62), "line": {"width": 0}}
    return [_across(panel, "rect", 0.5, until + 0.5, **veil) for panel in range(panels)]


def band(low: float, high: float, dark: bool, y: str = "y") -> Figure:
    """Return the healthy range of a y axis, behind the data."""
    return {
        "type": "rect",
        "xref": "x domain",
        "x0": 0,
        "x1": 1,
        "yref": y,
        "y0": low,
        "y1": high,
        "layer": "below",
        "fillcolor": theme(dark).healthy,
        "line": {"width": 0},
    }


def level(y: float, dark: bool) -> Figure:
    """Return a thin line at a y that means something."""
    return {
        "type": "line",
        "xref": "x domain",
        "x0": 0,
        "x1": 1,
        "yref": "y",
        "y0": y,
        "y1": y,
        "layer": "below",
        "line": {"color": theme(dark).soft, "width": 1, "dash": "2px,3px"},
    }


def remark(text: str, dark: bool, **place: Any) -> Figure:
    """Return a small text in the picture, such as what its band means."""
    return {
        "text": text,
        "showarrow": False,
        "font": {"size": 10.5, "color": theme(dark).soft},
        **place,
    }


def _across(panel: int, kind: str, left: float, right: float, **more: Any) -> Figure:
    number = "" if panel == 0 else str(panel + 1)
    return {
        "type": kind,
        "xref": f"x{number}",
        "x0": left,
        "x1": right,
        "yref": f"y{number} domain",
        "y0": 0,
        "y1": 1,
        **more,
    }


# -- marked steps --------------------------------------------------------------------------------


def spans(steps: np.ndarray, limit: int = SPANS) -> list[tuple[int, int]]:
    """Return the first and last step of every stretch of consecutive steps.

    Parameters
    ----------
    steps : ndarray of int64
        In any order.
    limit : int
        With more stretches than this, the nearest are joined.
    """
    ordered = np.unique(steps)
    if not len(ordered):
        return []
    gaps = np.diff(ordered)
    least = 1
    if (gaps > least).sum() >= limit:
        # Gaps as wide as the first one too many go too: all of a regular pattern, or none.
        least = int(np.sort(gaps)[-limit])
    breaks = np.flatnonzero(gaps > least)
    firsts = ordered[np.concatenate([[0], breaks + 1])]
    lasts = ordered[np.concatenate([breaks, [len(ordered) - 1]])]
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


def marks_together(marks: Sequence[Marks], colours: Sequence[str], dark: bool) -> list[Figure]:
    """Return the marked steps of runs that share one picture, each in its run's colour.

    Parameters
    ----------
    marks : sequence of Marks
    colours : sequence of str
        As many, unless there are no marks.
    """
    return [
        shape
        for run, (given, colour) in enumerate(zip(marks, colours, strict=bool(marks)))
        for shape in _marked(given, colour, dark, row=run % TICK_ROWS)
    ]


def marks_apart(marks: Sequence[Marks], dark: bool) -> list[Figure]:
    """Return the marked steps of runs that each have their own subplot, in ink."""
    return [
        shape
        for panel, given in enumerate(marks)
        for shape in _marked(given, theme(dark).ink, dark, panel=panel)
    ]


def _marked(marks: Marks, colour: str, dark: bool, *, panel: int = 0, row: int = 0) -> list[Figure]:
    """Place and shape tell the three kinds apart, not colour alone.

    All spans of a kind are one path: a shape takes Plotly 0.2 ms, wherever it comes from.
    """
    void, dropped, walls = spans(marks.void), spans(marks.dropped), spans(marks.not_finite)
    offset = EDGE + row * (TICK + 3 * EDGE)
    solid, hollow = _look(colour, 2 * EDGE), _look(theme(dark).paper, EDGE)
    lasting = [span for span in walls if span[0] < span[1]]
    dashed = {"line": {"color": colour, "width": 1.25, "dash": "4px,3px"}}
    tinted = {"line": {"width": 0}, "fillcolor": faded(colour, 0.12)}
    return [
        *_ticks(panel, void, 0, offset, solid),
        *_ticks(panel, void, 0, offset, hollow),
        *_ticks(panel, dropped, 1, -offset - TICK, solid),
        *_path(panel, [_box(span, 0, 1) for span in lasting], tinted),
        *_path(panel, [_wall(span) for span in walls], dashed),
    ]


def _look(colour: str, width: float) -> Figure:
    """Return a fill with a border of its colour: a box of no width is as wide as its border."""
    return {"fillcolor": colour, "line": {"color": colour, "width": width}}


def _ticks(
    panel: int, found: Sequence[tuple[int, int]], edge: int, bottom: float, look: Figure
) -> list[Figure]:
    """Return small boxes at the lower (0) or upper (1) edge, heights in pixels from there."""
    boxes = [_box(span, bottom, bottom + TICK) for span in found]
    return _path(panel, boxes, {"ysizemode": "pixel", "yanchor": edge, **look})


def _box(span: tuple[int, int], bottom: float, top: float) -> str:
    left, right = span[0] - 0.5, span[1] + 0.5
    return f"M{left},{bottom}L{left},{top}L{right},{top}L{right},{bottom}Z"


def _wall(span: tuple[int, int]) -> str:
    """Return a line at the first and one at the last step."""
    return "".join(f"M{step},0L{step},1" for step in dict.fromkeys(span))


def _path(panel: int, parts: Sequence[str], look: Figure) -> list[Figure]:
    number = "" if panel == 0 else str(panel + 1)
    place = {"xref": f"x{number}", "yref": f"y{number} domain"}
    return [{"type": "path", "path": "".join(parts), **place, **look}] if parts else []
