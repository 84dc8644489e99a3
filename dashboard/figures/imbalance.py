"""Panel D: which matrices move their neurons unevenly, and when."""

from collections.abc import Sequence

from normuon_lens.metrics import CATALOGUE

from .frame import Figure, Grid, colour_axis, heatmaps, name_of, theme

TITLE = "Imbalance of the neurons"
READING = (
    "Spread of the neuron norms (CV): faint rows are balanced, in glowing ones a few neurons do "
    "the moving. Click a row to look into it."
)

HEALTHY = CATALOGUE["neuron_cv"].healthy["NorMuon"][1]


def imbalance_figure(
    grids: Sequence[Grid],
    *,
    top: float,
    chosen: str | None = None,
    until: int = 0,
    step: int | None = None,
    dark: bool = False,
) -> Figure:
    """Return the coefficient of variation of the neuron norms, matrix × step, side by side.

    Parameters
    ----------
    grids : sequence of Grid
        At least one; rows are the names of the matrices, the same in every grid.
    top : float
        Where the colour axis ends.
    chosen : str, optional
        Matrix to mark.
    until : int
        Last of the steps to veil.
    step : int, optional
        Where the cursor stands.
    dark : bool
        Theme.
    """
    named = [grid._replace(rows=[name_of(row) for row in grid.rows]) for grid in grids]
    bar = {"tickvals": [0, HEALTHY, top], "ticktext": ["0", f"{HEALTHY:g}", f"{top:.2g}"]}
    # What is healthy stays faint, however far the worst goes.
    page, faint, *glowing = theme(dark).heat
    share = HEALTHY / top
    scale = [(0.0, page), (share, faint)]
    scale += [(share + (1 - share) * (i + 1) / len(glowing), c) for i, c in enumerate(glowing)]
    colours = colour_axis(
        dark, f"CV, healthy below {HEALTHY:g}", scale, cmin=0, cmax=top, colorbar=bar
    )
    figure = heatmaps(
        named,
        dark=dark,
        y="",
        hover="%{fullData.name}<br>%{y}<br>step %{x}<br>CV %{z:.3f}<extra></extra>",
        colours=colours,
        until=until,
        step=step,
        type="category",
    )
    if chosen in grids[0].rows:
        figure["layout"]["shapes"] += _marks(list(grids[0].rows).index(chosen), len(grids), dark)
    return figure


def _marks(row: int, panels: int, dark: bool) -> list[Figure]:
    """Two lines around the chosen row, in every panel."""
    numbers = ["" if panel == 0 else str(panel + 1) for panel in range(panels)]
    return [
        {
            "type": "rect",
            "xref": f"x{number} domain",
            "x0": 0,
            "x1": 1,
            "yref": f"y{number}",
            "y0": row - 0.5,
            "y1": row + 0.5,
            "line": {"color": theme(dark).ink, "width": 1},
        }
        for number in numbers
    ]
