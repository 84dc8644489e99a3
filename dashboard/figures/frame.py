"""What all pictures share: the two themes, axes, the cursor, and how arrays are written down."""

from __future__ import annotations

import base64
import html
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .palette import Style, faded

Figure = dict[str, Any]

NOTE_WIDTH = 36
"""Characters of a line where nothing else is shown: as many as the narrowest panel has room for."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


class Curve(NamedTuple):
    """One line: its name, its style, and x and y of equal length (NaN breaks the line)."""

    name: str
    style: Style
    x: np.ndarray
    y: np.ndarray


class Band(NamedTuple):
    """A line with a band around it, over steps (T,); low, middle and high are (T,) too."""

    name: str
    style: Style
    steps: np.ndarray
    low: np.ndarray
    middle: np.ndarray
    high: np.ndarray


class Grid(NamedTuple):
    """A heatmap: values (R, T) over steps (T,) and rows, named or numbered (R)."""

    name: str
    style: Style
    steps: np.ndarray
    rows: Sequence[Any]
    values: np.ndarray


class Theme(NamedTuple):
    """Colours of everything that is no data."""

    ink: str
    soft: str
    grid: str
    paper: str
    healthy: str
    heat: tuple[str, ...]
    balance: tuple[str, ...]


LIGHT = Theme(
    ink="#1c2330",
    soft="#5b6575",
    grid="#e8ebf0",
    paper="#ffffff",
    healthy="rgba(0,158,115,0.09)",
    heat=(
        "#eef2f6",
        "#fbe0b5",
        "#f3a152",
        "#cf4a2b",
        "#6d1330",
    ),
    balance=(
        "#0b3c6f",
        "#5d9ccb",
        "#f4f5f7",
        "#ea9a57",
        "#8f2d0c",
    ),
)
DARK = Theme(
    ink="#e6e9ef",
    soft="#9aa4b4",
    grid="#2b323e",
    paper="#181d26",
    healthy="rgba(0,190,140,0.10)",
    heat=(
        "#232a36",
        "#6a2c4f",
        "#c04a36",
        "#f0a04b",
        "#fdf0b8",
    ),
    balance=(
        "#8cc6f5",
        "#35709f",
        "#222833",
        "#b5652b",
        "#ffc48a",
    ),
)
"""Heatmaps begin at the colour of the page, so that what is healthy recedes in both themes."""


def theme(dark: bool) -> Theme:
    """Return the dark or the light theme."""
    return DARK if dark else LIGHT


def layout(dark: bool, *, x: str, y: str, **more: Any) -> Figure:
    """Return the layout that all pictures start from, with titles of the x and the y axis."""
    colours = theme(dark)
    return {
        "font": {"family": FONT, "size": 12, "color": colours.ink},
        "paper_bgcolor": colours.paper,
        "plot_bgcolor": colours.paper,
        "margin": {"l": 52, "r": 10, "t": 24, "b": 40},
        "hovermode": "x unified",
        "hoverlabel": {
            "bgcolor": colours.paper,
            "bordercolor": colours.grid,
            "font": {"family": FONT, "size": 12, "color": colours.ink},
        },
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1.02,
            "yanchor": "bottom",
            "font": {"size": 11.5},
            "itemclick": False,
            "itemdoubleclick": False,
        },
        "xaxis": axis(dark, x),
        "yaxis": axis(dark, y),
        **more,
    }


def axis(dark: bool, title: str = "", **more: Any) -> Figure:
    """Return an axis without ornaments: no zero line, faint grid, quiet title."""
    colours = theme(dark)
    return {
        "title": {"text": title, "font": {"size": 12, "color": colours.soft}, "standoff": 8},
        "gridcolor": colours.grid,
        "linecolor": colours.grid,
        "tickfont": {"size": 11, "color": colours.soft},
        "zeroline": False,
        "ticks": "",
        "automargin": True,
        **more,
    }


def log_axis(dark: bool, title: str, *values: np.ndarray) -> Figure:
    """Return a logarithmic axis for `values` whose labels have room.

    Left to itself, Plotly labels all of 1 to 9 over more than a decade, one over the other.
    """
    known = np.concatenate([np.empty(0), *values])
    known = known[(known > 0) & np.isfinite(known)]
    decades = float(np.log10(known.max() / known.min())) if known.size else 0.0
    dtick: str | int = max(1, round(decades / 4))
    if decades < 2:
        dtick = "D1" if decades < 0.7 else "D2"  # every digit; 1, 2 and 5
    return axis(dark, title, type="log", tickformat="~g", dtick=dtick)


def inner_legend(dark: bool, x: float, y: float) -> Figure:
    """Return a legend inside the picture, in the corner that its data leave free."""
    return {
        "x": x,
        "xanchor": "left" if x < 0.5 else "right",
        "y": y,
        "yanchor": "bottom" if y < 0.5 else "top",
        "bgcolor": faded(theme(dark).paper, 0.6),
        "font": {"size": 11.5},
        "itemclick": False,
        "itemdoubleclick": False,
    }


def empty_figure(text: str, *, dark: bool = False) -> Figure:
    """Return a picture of nothing that says why: `text`, in lines that fit the narrowest panel."""
    colours = theme(dark)
    lines = [line for given in text.splitlines() for line in textwrap.wrap(given, NOTE_WIDTH)]
    note = {
        "text": "<br>".join(html.escape(line, quote=False) for line in lines),
        "x": 0.5,
        "y": 0.5,
        "xref": "paper",
        "yref": "paper",
        "showarrow": False,
        "font": {"size": 13, "color": colours.soft},
    }
    bare = layout(dark, x="", y="", annotations=[note])
    bare["xaxis"] = bare["yaxis"] = {"visible": False}
    return {"data": [], "layout": bare}


def name_of(text: str) -> str:
    """Return a name from a file as inert text: Plotly reads tags and links in what it shows."""
    return html.escape(text, quote=False)


def line_trace(curve: Curve, **more: Any) -> Figure:
    """Return a line trace of a curve."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name_of(curve.name),
        "x": numbers(curve.x),
        "y": numbers(curve.y),
        "line": {"color": curve.style.colour, "dash": curve.style.dash, "width": 2},
        **more,
    }


def numbers(values: np.ndarray) -> list[Any]:
    """Return an array as a plain list, None where not finite: a patch needs plain lists."""
    plain: list[Any] = values.tolist()
    if values.dtype.kind == "f":
        return [value if ok else None for value, ok in zip(plain, np.isfinite(values), strict=True)]
    return plain


def typed(values: np.ndarray) -> Mapping[str, str]:
    """Return an (R, T) array as Plotly's typed array, float32: a fifth of the time of a list.

    A numpy array left in a plain dict would go out as text.
    """
    image = base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()
    return {"dtype": "f4", "bdata": image, "shape": f"{values.shape[0]}, {values.shape[1]}"}


# -- shapes --------------------------------------------------------------------------------------


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


def band(low: float, high: float, dark: bool) -> Figure:
    """Return the healthy range of y, behind the data."""
    return {
        "type": "rect",
        "xref": "x domain",
        "x0": 0,
        "x1": 1,
        "yref": "y",
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


# -- heatmaps side by side -----------------------------------------------------------------------

GAP = 0.022
"""Space between two heatmaps, as a share of the width."""
LETTERS = 60
"""Room for the names above the heatmaps; the whole name shows on hovering."""


def heatmaps(
    grids: Sequence[Grid],
    *,
    dark: bool,
    y: str,
    hover: str,
    colours: Figure,
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
    width = (1 - GAP * (len(grids) - 1)) / len(grids)
    traces, titles = [], []
    for i, grid in enumerate(grids):
        number = "" if i == 0 else str(i + 1)
        left = i * (width + GAP)
        shared: Figure = {"matches": "x"} if i else {}
        base[f"xaxis{number}"] = axis(
            dark,
            "" if i else "optimizer step",
            nticks=5,
            tickangle=0,
            domain=[left, min(left + width, 1.0)],
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
            }
        )
        room = LETTERS // len(grids)
        name = grid.name if len(grid.name) <= room else f"{grid.name[: room - 1]}…"
        key = f'<span style="color:{grid.style.colour}">▬</span> {name_of(name)}'
        titles.append(
            {
                "text": key,
                "showarrow": False,
                "xref": f"x{number} domain",
                "x": 0,
                "xanchor": "left",
                "yref": "paper",
                "y": 1,
                "yanchor": "bottom",
                "font": {"size": 12, "color": theme(dark).ink},
            }
        )
    base["annotations"] = titles
    base["shapes"] = cursor(step, dark, len(grids)) + dimmed(until, dark, len(grids))
    return {"data": traces, "layout": base}


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
