"""Panel A: the shape of an update's spectrum, from its strongest direction to its weakest."""

from collections.abc import Sequence

from normuon_lens.metrics.spectrum import NEWTON_SCHULZ_BAND

from .frame import Curve, Figure, inner_legend, layout, line_trace, log_axis, meaning
from .shapes import band, remark

TITLE = "Spectrum"
READING = (
    "Singular values over the largest: flat means that every direction moves equally far, steep "
    "that a few take the whole step."
)

HEALTHY = (NEWTON_SCHULZ_BAND[0] / NEWTON_SCHULZ_BAND[1], 1.0)
"""The Newton-Schulz band [0.68, 1.15] in units of its upper end, where σ₁ then lies."""


def spectrum_figure(curves: Sequence[Curve], *, dark: bool = False) -> Figure:
    """Return the sorted spectra of one matrix, one line a run.

    Parameters
    ----------
    curves : sequence of Curve
        x: index from 1, y: σᵢ/σ₁ descending.
    dark : bool
        Theme.
    """
    base = layout(dark, x="singular value, sorted", y="σ / σ₁")
    base["yaxis"] = log_axis(dark, "σ / σ₁", *(curve.y for curve in curves))
    # Sorted values fall from the top left: the bottom left is free.
    base["margin"] |= {"t": 18}
    base["legend"] = inner_legend(dark, x=0.01, y=0.01)
    base["shapes"] = [band(*HEALTHY, dark)]
    base["annotations"] = [
        remark(
            "Newton–Schulz band",
            dark,
            xref="x domain",
            x=1,
            xanchor="right",
            yref="y domain",
            y=1,
            yanchor="bottom",
        )
    ]
    more = {"hovertemplate": "%{y:.3g}", "meta": meaning("singular value, sorted", "σ / σ₁")}
    return {"data": [line_trace(curve, **more) for curve in curves], "layout": base}
