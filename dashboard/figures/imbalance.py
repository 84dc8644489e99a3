"""Panel D: which matrices move their neurons unevenly, and when."""

from collections.abc import Sequence

from normuon_lens.metrics import CATALOGUE

from .frame import Figure, Grid, Marks, meaning, name_of, theme
from .heat import colour_axis, heatmaps

TITLE = "Imbalance of the neurons"
READING = (
    "Spread of the neuron norms (CV): faint rows are balanced, in glowing ones a few neurons do "
    "the moving; click one to look into it."
)

LETTERS = 24
"""Room for the name of a matrix."""

HEALTHY = CATALOGUE["neuron_cv"].healthy["NorMuon"][1]


def imbalance_figure(
    grids: Sequence[Grid],
    *,
    top: float,
    chosen: str | None = None,
    marks: Sequence[Marks] = (),
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
    marks : sequence of Marks
        One a grid, or none.
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
        meta=meaning("optimizer step", "matrix", value="CV"),
        marks=marks,
        until=until,
        step=step,
        type="category",
        automargin=True,
        labelalias=_labels(grids[0].rows),
    )
    if chosen in grids[0].rows:
        figure["layout"]["shapes"] += _around(list(grids[0].rows).index(chosen), len(grids), dark)
    return figure


def _labels(names: Sequence[str]) -> dict[str, str]:
    """Return what stands for names that are too long: their ends, in which matrices differ."""
    labels = {}
    for name in names:
        if len(name) > LETTERS:
            told = name.removesuffix(".weight")  # as nearly all of PyTorch's do
            if len(told) > LETTERS:
                end = told[1 - LETTERS :]
                told = f"…{end.partition('.')[2] or end}"
            labels[name_of(name)] = name_of(told)
    return labels


def _around(row: int, panels: int, dark: bool) -> list[Figure]:
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
