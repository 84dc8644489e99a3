"""Panel B: who moves how far, neuron by neuron."""

from collections.abc import Sequence

from normuon_lens.metrics import CATALOGUE

from .frame import Curve, Figure, axis, inner_legend, layout, line_trace, meaning
from .shapes import band, level

TITLE = "Neurons"
READING = (
    "Norms of the neurons over their mean, largest first: on the line at 1 all move equally far, "
    "at 0 they starve; tinted is usual for NorMuon."
)

SPREAD = 2 * CATALOGUE["neuron_cv"].healthy["NorMuon"][1]
"""Where the CV is healthy, 19 of 20 neurons lie within two standard deviations of the mean."""


def neurons_figure(curves: Sequence[Curve], *, dark: bool = False) -> Figure:
    """Return the sorted neuron norms of one matrix, one line a run.

    Parameters
    ----------
    curves : sequence of Curve
        x: rank from 1, y: row norm over the mean row norm, descending.
    dark : bool
        Theme.
    """
    base = layout(dark, x="neuron, sorted", y="norm / mean")
    base["yaxis"] = axis(dark, "norm / mean", rangemode="tozero")
    # Room above even neurons, for the band and the legend.
    base["yaxis"]["autorangeoptions"] = {"include": 1 + 2 * SPREAD}
    # Sorted values fall towards the right: the top right is free.
    base["margin"] |= {"t": 10}
    base["legend"] = inner_legend(dark, x=0.99, y=0.99)
    base["shapes"] = [level(1.0, dark), band(1 - SPREAD, 1 + SPREAD, dark)]
    more = {"hovertemplate": "%{y:.3g} × mean", "meta": meaning("neuron, sorted", "norm / mean")}
    return {"data": [line_trace(curve, **more) for curve in curves], "layout": base}
