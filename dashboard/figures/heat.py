"""Heatmaps of several runs: side by side, with one colour axis, and zooming as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .frame import Figure, Grid, Marks, axis, layout, name_of, numbers, theme, typed
from .palette import Style
from .shapes import cursor, dimmed, marks_apart

GAP = 0.022
"""Space between two heatmaps, as a share of the width."""
LETTERS = 40
"""Room for the names above the heatmaps; the whole name shows on hovering."""
TICKS = {1: 6, 2: 5, 3: 4}
"""Labels along each of so few heatmaps; three along more, or they would touch."""


def heatmaps(
    grids: Sequence[Grid],
    *,
    dark: bool,
    y: str,
    hover: str,
    colours: Figure,
    meta: Figure,
    marks: Sequence[Marks],
    until: int,
    step: int | None,
    **yaxis: Any,
) -> Figure:
    """Return one heatmap a run, side by side, with one colour axis and zooming as one.

    Parameters
    ----------
    grids : sequence of Grid
        At least one.
    y : str
        Title of the y axis.
    hover : str
        Plotly hover template.
    colours : dict
        The colour axis.
    meta : dict
        What the numbers are.
    marks : sequence of Marks
        One a grid, or none.
    until : int
        Last of the steps to veil.
    step : int or None
        Where the cursor stands.
    **yaxis
        Further properties of every y axis.
    """
    base = layout(dark, x="optimizer step", y=y, hovermode="closest", coloraxis=colours)
    base["margin"] = {**base["margin"], "t": 26, "r": 4}
    del base["xaxis"], base["yaxis"]
    traces = []
    for i, (grid, domain) in enumerate(zip(grids, side_by_side(len(grids)), strict=True)):
        number = "" if i == 0 else str(i + 1)
        shared: Figure = {"matches": "x"} if i else {}
        base[f"xaxis{number}"] = axis(
            dark,
            "" if i else "optimizer step",
            nticks=nticks(len(grids)),
            autotickangles=[0, 30],
            ticklabeloverflow="hide past domain",
            domain=domain,
            anchor=f"y{number}",
            showgrid=False,
            **shared,
        )
        shared = {"matches": "y", "showticklabels": False} if i else {}
        base[f"yaxis{number}"] = axis(
            dark,
            "" if i else y,
            anchor=f"x{number}",
            autorange="reversed",
            showgrid=False,
            **yaxis,
            **shared,
        )
        traces.append(
            {
                "type": "heatmap",
                "name": name_of(grid.name),
                "x": numbers(grid.steps),
                "y": list(grid.rows),
                "z": typed(grid.values),
                "xaxis": f"x{number}",
                "yaxis": f"y{number}",
                "coloraxis": "coloraxis",
                "hovertemplate": hover,
                "meta": meta,
            }
        )
    base["annotations"] = [
        key(grid.name, grid.style, i, len(grids), dark) for i, grid in enumerate(grids)
    ]
    base["shapes"] = [
        *cursor(step, dark, len(grids)),
        *dimmed(until, dark, len(grids)),
        *marks_apart(marks, dark),
    ]
    return {"data": traces, "layout": base}


def side_by_side(count: int) -> list[list[float]]:
    """Return the x domains of `count` subplots in a row."""
    width = (1 - GAP * (count - 1)) / count
    lefts = [i * (width + GAP) for i in range(count)]
    return [[left, min(left + width, 1.0)] for left in lefts]


def nticks(panels: int) -> int:
    """Return how many labels there is room for along each of some heatmaps in a row."""
    return TICKS.get(panels, 3)


def shortened(text: str, room: int) -> str:
    """Return a text in at most `room` letters; both of its ends stay, names differ there."""
    if len(text) <= room:
        return text
    head = (room - 1) // 2
    return f"{text[:head]}…{text[len(text) - (room - 1 - head) :]}"


def key(
    name: str, style: Style, panel: int, panels: int, dark: bool, x: str | None = None
) -> Figure:
    """Return a run's name and colour, above its heatmap.

    Parameters
    ----------
    panel, panels : int
        Which heatmap, of how many.
    x : str, optional
        Its x axis, where it is not the one of its number.
    """
    own = f"x{panel + 1}" if panel else "x"
    short = shortened(name, LETTERS // panels)
    return {
        "text": f'<span style="color:{style.colour}">▬</span> {name_of(short)}',
        "showarrow": False,
        "xref": f"{x or own} domain",
        "x": 0,
        "xanchor": "left",
        "yref": "paper",
        "y": 1,
        "yanchor": "bottom",
        "font": {"size": 12, "color": theme(dark).ink},
        # Where it is narrow, a name ends at the next one instead of running into it.
        "bgcolor": theme(dark).paper,
    }


def colour_axis(dark: bool, title: str, scale: Sequence[Any], **more: Any) -> Figure:
    """Return a colour axis with a slim bar beside the picture."""
    colours = theme(dark)
    bar = {
        "title": {"text": title, "side": "right", "font": {"size": 11, "color": colours.soft}},
        "thickness": 9,
        "x": 1.01,
        "len": 1.05,
        "outlinewidth": 0,
        "xpad": 2,
        "tickfont": {"size": 11, "color": colours.soft},
        **more.pop("colorbar", {}),
    }
    return {"colorscale": [list(stop) for stop in scale], "colorbar": bar, **more}
