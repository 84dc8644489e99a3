"""Panel G: one update, entry by entry, with its neuron norms on the edge."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .frame import Figure, axis, layout, meaning, name_of, numbers, theme, typed
from .heat import colour_axis, key, nticks, side_by_side
from .palette import Style, faded

TITLE = "The update itself"
READING = (
    "Size of every entry over the RMS; bright rows are neurons that take the step, the profile on "
    "the edge is their norm over the mean: on the line at 1 all move equally far."
)

TOP = 3
"""Where the colours end: an entry of a normal distribution lies beyond in 3 of 1,000."""
EDGE = 0.15
"""Width of the profile, as a share of what a run has."""
REACH = 2
"""The profile shows norms up to here at least, in units of the mean."""


class Update(NamedTuple):
    """One run's update of the chosen matrix at the chosen step.

    Attributes
    ----------
    name : str
    style : Style
    rows, columns : ndarray of int64, shapes (R,) and (C,)
        Numbers of neurons and inputs.
    values : ndarray of shape (R, C), float32
        Size of every entry over the root mean square of all; NaN where not finite.
    norms : ndarray of shape (R,)
        Norm of the neuron over the mean.
    """

    name: str
    style: Style
    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    norms: np.ndarray


def matrix_figure(updates: Sequence[Update], *, dark: bool = False) -> Figure:
    """Return the entries of an update, neuron × input, side by side, and the neuron norms.

    Parameters
    ----------
    updates : sequence of Update
        One a run.
    dark : bool
        Theme.
    """
    scale = [(i / 4, colour) for i, colour in enumerate(theme(dark).heat)]
    bar = {"tickvals": [0, 1, 2, TOP], "ticktext": ["0", "1", "2", f"≥ {TOP}"]}
    colours = colour_axis(dark, "entry / RMS", scale, cmin=0, cmax=TOP, colorbar=bar)
    base = layout(dark, x="input", y="neuron", hovermode="closest", coloraxis=colours)
    base["margin"] |= {"t": 26, "r": 4}
    base["showlegend"] = False
    # One y axis for all: what is zoomed in one is zoomed in every one, and drawn once.
    base["yaxis"] = axis(dark, "neuron", autorange="reversed", showgrid=False)
    traces: list[Figure] = []
    base["annotations"], base["shapes"] = [], []
    for i, (update, (left, right)) in enumerate(
        zip(updates, side_by_side(len(updates)), strict=True)
    ):
        number = "" if i == 0 else str(2 * i + 1)
        split = right - EDGE * (right - left)
        base[f"xaxis{number}"] = axis(
            dark,
            "" if i else "input",
            domain=[left, split - 0.004],
            nticks=nticks(len(updates)),
            ticklabeloverflow="hide past domain",
            tickangle=0,
            showgrid=False,
            **({"matches": "x"} if i else {}),
        )
        base[f"xaxis{2 * i + 2}"] = _edge(dark, [split, right], first=i == 0)
        traces += [_entries(update, f"x{number}"), _profile(update, f"x{2 * i + 2}")]
        base["annotations"].append(
            key(update.name, update.style, i, len(updates), dark, f"x{number}")
        )
        base["shapes"].append(_even(f"x{2 * i + 2}", dark))
    return {"data": traces, "layout": base}


def _edge(dark: bool, domain: list[float], *, first: bool) -> Figure:
    """Return the x axis of a profile: from zero to the largest norm of all runs, never zoomed."""
    return axis(
        dark,
        domain=domain,
        rangemode="tozero",
        autorangeoptions={"include": REACH},
        fixedrange=True,
        tickvals=[1],
        tickangle=0,
        showgrid=False,
        **({} if first else {"matches": "x2"}),
    )


def _entries(update: Update, x: str) -> Figure:
    return {
        "type": "heatmap",
        "name": name_of(update.name),
        "x": numbers(update.columns),
        "y": numbers(update.rows),
        "z": typed(update.values),
        "xaxis": x,
        "yaxis": "y",
        "coloraxis": "coloraxis",
        "zsmooth": False,
        "hovertemplate": "neuron %{y}, input %{x}<br>%{z:.2f} × RMS<extra></extra>",
        "meta": meaning("input", "neuron", value="entry / RMS"),
    }


def _profile(update: Update, x: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name_of(update.name),
        "x": numbers(update.norms),
        "y": numbers(update.rows),
        "xaxis": x,
        "yaxis": "y",
        "fill": "tozerox",
        "fillcolor": faded(update.style.colour, 0.35),
        "line": {"color": update.style.colour, "width": 1},
        "hovertemplate": "neuron %{y}<br>%{x:.2f} × mean<extra></extra>",
        "meta": meaning("norm / mean", "neuron"),
    }


def _even(x: str, dark: bool) -> dict[str, Any]:
    """Return the line at 1, where all neurons move equally far."""
    return {
        "type": "line",
        "xref": x,
        "x0": 1,
        "x1": 1,
        "yref": "y domain",
        "y0": 0,
        "y1": 1,
        "line": {"color": theme(dark).ink, "width": 1},
    }
