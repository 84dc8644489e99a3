"""Panel F: what it is all for."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .frame import Curve, Figure, Marks, layout, line_trace, meaning
from .palette import faded
from .shapes import cursor, dimmed, marks_together

TITLE = "Loss"
READING = "Training loss: smoothed, over the raw values."


class Loss(NamedTuple):
    """A run's smoothed loss, and the raw values (T,) at the same steps behind it."""

    smooth: Curve
    raw: np.ndarray


def loss_figure(
    losses: Sequence[Loss],
    *,
    marks: Sequence[Marks] = (),
    until: int = 0,
    step: int | None = None,
    legend: bool = True,
    dark: bool = False,
) -> Figure:
    """Return the losses of all runs over steps, smoothed lines over faint raw ones.

    Parameters
    ----------
    losses : sequence of Loss
    marks : sequence of Marks
        One a run, or none.
    until : int
        Last of the steps to veil.
    step : int, optional
        Where the cursor stands.
    legend : bool
        False where the names stand beside the picture.
    dark : bool
        Theme.
    """
    base = layout(dark, x="optimizer step", y="loss")
    base["showlegend"] = legend
    if not legend:
        base["margin"] |= {"t": 8}
    colours = [loss.smooth.style.colour for loss in losses]
    base["shapes"] = [
        *cursor(step, dark),
        *dimmed(until, dark),
        *marks_together(marks, colours, dark),
    ]
    raw = [
        line_trace(
            smooth._replace(y=values),
            line={"color": faded(smooth.style.colour, 0.3), "width": 1},
            showlegend=False,
            hoverinfo="skip",
            meta=_what("raw"),
        )
        for smooth, values in losses
    ]
    lines = [
        line_trace(loss.smooth, hovertemplate="%{y:.3f}", meta=_what("smoothed")) for loss in losses
    ]
    return {"data": raw + lines, "layout": base}


def _what(series: str) -> Figure:
    return meaning("optimizer step", "loss", series=series)
