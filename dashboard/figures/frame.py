"""What all pictures share: the two themes, axes, and how arrays are written down."""

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


class Marks(NamedTuple):
    """Steps of one run, int64, that need a mark on the time axis.

    Attributes
    ----------
    void : ndarray
        Steps that moved nothing.
    dropped : ndarray
        Steps whose sample the recorder had to let go.
    not_finite : ndarray
        Steps with a NaN or an infinity.
    """

    void: np.ndarray
    dropped: np.ndarray
    not_finite: np.ndarray


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
        "yaxis": axis(dark, y, automargin=True),
        **more,
    }


def axis(dark: bool, title: str = "", **more: Any) -> Figure:
    """Return an axis without ornaments: no zero line, faint grid, quiet title.

    Its labels must fit the margin, unless it asks for ``automargin``: that costs another layout.
    """
    colours = theme(dark)
    return {
        "title": {"text": title, "font": {"size": 12, "color": colours.soft}, "standoff": 8},
        "gridcolor": colours.grid,
        "linecolor": colours.grid,
        "tickfont": {"size": 11, "color": colours.soft},
        "zeroline": False,
        "ticks": "",
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
    return axis(dark, title, type="log", tickformat="~g", dtick=dtick, automargin=True)


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


def meaning(x: str, y: str, **more: Any) -> Figure:
    """Return what the numbers of a trace are, for its table and its text alternative.

    Parameters
    ----------
    x, y : str
        Names of the columns.
    **more
        Further columns: a text for the whole trace, such as ``series="median"``, or a list with a
        value a point. A heatmap names its values here: ``value="CV"``.
    """
    return {"x": x, "y": y, **more}


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
