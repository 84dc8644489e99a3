"""Panel B: who moves how far, neuron by neuron."""

from collections.abc import Sequence

from .frame import Curve, Figure, axis, inner_legend, layout, level, line_trace

TITLE = "Neurons"
READING = (
    "Norms of the neurons over their mean, largest first: on the line at 1 all move equally far, "
    "at 0 they starve."
)


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
    # Sorted values fall towards the right: the top right is free.
    base["margin"] |= {"t": 10}
    base["legend"] = inner_legend(dark, x=0.99, y=0.99)
    base["shapes"] = [level(1.0, dark)]
    hover = "%{y:.3g} × mean"
    return {"data": [line_trace(curve, hovertemplate=hover) for curve in curves], "layout": base}
