"""Panel E: one matrix over time, every neuron a row."""

from collections.abc import Sequence

from .frame import Figure, Grid, Marks, meaning, theme
from .heat import colour_axis, heatmaps

TITLE = "Neurons over time"
READING = (
    "Norm over the mean of its step: plain is balanced; a lasting warm stripe is a neuron that "
    "always moves too far, a lasting blue one starves."
)

QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)


def timeline_figure(
    grids: Sequence[Grid],
    *,
    marks: Sequence[Marks] = (),
    until: int = 0,
    step: int | None = None,
    dark: bool = False,
) -> Figure:
    """Return norm/mean of every neuron of one matrix, neuron × step, side by side.

    Parameters
    ----------
    grids : sequence of Grid
        At least one; rows are neuron numbers, values norms over the mean of their step.
    marks : sequence of Marks
        One a grid, or none.
    until : int
        Last of the steps to veil.
    step : int, optional
        Where the cursor stands.
    dark : bool
        Theme.
    """
    bar = {"tickvals": [0, 1, 2], "ticktext": ["0", "1", "≥ 2"]}
    scale = list(zip(QUARTERS, theme(dark).balance, strict=True))
    colours = colour_axis(dark, "norm / mean", scale, cmin=0, cmax=2, colorbar=bar)
    return heatmaps(
        grids,
        dark=dark,
        y="neuron",
        hover="%{fullData.name}<br>neuron %{y}<br>step %{x}<br>%{z:.2f} × mean<extra></extra>",
        colours=colours,
        meta=meaning("optimizer step", "neuron", value="norm / mean"),
        marks=marks,
        until=until,
        step=step,
    )
