"""Panel C: how unevenly the updates treat directions, over the whole training."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from normuon_lens.metrics import CATALOGUE

from .frame import Band, Figure, Marks, layout, log_axis, meaning, name_of, numbers
from .palette import faded
from .shapes import band as healthy_band
from .shapes import cursor, dimmed, marks_together

TITLE = "Condition number"
READING = (
    "Strongest over weakest direction, median and 10–90 % of the matrices: 1 is perfectly even, "
    "tinted is usual for Muon and NorMuon."
)

HEALTHY = CATALOGUE["condition_number"].healthy["NorMuon"]


def condition_figure(
    bands: Sequence[Band],
    *,
    marks: Sequence[Marks] = (),
    until: int = 0,
    step: int | None = None,
    dark: bool = False,
) -> Figure:
    """Return condition numbers over steps, a median and a band a run, on a log axis.

    Parameters
    ----------
    bands : sequence of Band
        Median, 10th and 90th percentile over the matrices; NaN where there is none.
    marks : sequence of Marks
        One a band, or none.
    until : int
        Last of the steps to veil.
    step : int, optional
        Where the cursor stands.
    dark : bool
        Theme.
    """
    base = layout(dark, x="optimizer step", y="condition number")
    edges = [edge for one in bands for edge in (one.low, one.high)]
    # The axis reaches over the healthy band, wherever the values are.
    base["yaxis"] = log_axis(dark, "condition number", np.array(HEALTHY), *edges)
    colours = [one.style.colour for one in bands]
    base["shapes"] = [
        *cursor(step, dark),
        *dimmed(until, dark),
        healthy_band(*HEALTHY, dark),
        *marks_together(marks, colours, dark),
    ]
    return {"data": [trace for one in bands for trace in _traces(one)], "layout": base}


def _traces(band: Band) -> list[Figure]:
    """Upper edge, lower edge filled up to it, and the median on top."""
    common: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines",
        "x": numbers(band.steps),
        "name": name_of(band.name),
        "legendgroup": name_of(band.name),
    }
    edge = {
        "line": {"width": 0, "color": band.style.colour},
        "showlegend": False,
        "hoverinfo": "skip",
    }
    fill = {"fill": "tonexty", "fillcolor": faded(band.style.colour, 0.16)}
    line = {"color": band.style.colour, "dash": band.style.dash, "width": 2}
    return [
        {**common, **edge, "y": numbers(band.high), "meta": _what("90 %")},
        {**common, **edge, **fill, "y": numbers(band.low), "meta": _what("10 %")},
        {
            **common,
            "y": numbers(band.middle),
            "line": line,
            "hovertemplate": "%{y:,.3~r}",
            "meta": _what("median"),
        },
    ]


def _what(series: str) -> Figure:
    return meaning("optimizer step", "condition number", series=series)
