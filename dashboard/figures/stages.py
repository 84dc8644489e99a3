"""Panel H: the way from the gradient to what was applied."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from normuon_lens.metrics import CATALOGUE
from normuon_lens.runfile import STAGES

from .frame import Figure, axis, layout, log_axis, meaning, name_of, numbers, theme
from .palette import Style, faded
from .shapes import band

TITLE = "Along the optimizer"
READING = "Where conditioning and imbalance arise and leave: from the gradient to what was applied."

LABELS = {"orthogonalized": "orthogo-<br>nalized"}
"""Stages whose names are too long for the narrowest panel."""

EVEN = CATALOGUE["condition_number"].healthy["NorMuon"]
BALANCED = CATALOGUE["neuron_cv"].healthy["NorMuon"]


class Stages(NamedTuple):
    """One run's chosen matrix at the chosen step, stage by stage.

    Attributes
    ----------
    name : str
    style : Style
    stages : sequence of str, S of them
        In the order of the optimizer.
    condition : ndarray of shape (S,)
        Condition number.
    bound : ndarray of bool, shape (S,)
        Whether that is a lower bound.
    cv : ndarray of shape (S,)
        Coefficient of variation of the neuron norms.
    """

    name: str
    style: Style
    stages: Sequence[str]
    condition: np.ndarray
    bound: np.ndarray
    cv: np.ndarray


def stages_figure(
    runs: Sequence[Stages], *, chosen: str | None = None, dark: bool = False
) -> Figure:
    """Return condition number and neuron imbalance at every stage, one chart above the other.

    Parameters
    ----------
    runs : sequence of Stages
    chosen : str, optional
        Stage to mark.
    dark : bool
        Theme.
    """
    met = {stage for run in runs for stage in run.stages}
    stages = [stage for stage in STAGES if stage in met]
    base = layout(dark, x="", y="")
    base["margin"] |= {"l": 56, "t": 28, "b": 36}
    base["xaxis"] = axis(
        dark,
        type="category",
        categoryorder="array",
        categoryarray=stages,
        tickvals=stages,
        ticktext=[LABELS.get(stage, stage) for stage in stages],
        tickangle=0,
        range=[-0.5, len(stages) - 0.5],
        fixedrange=True,
        showgrid=False,
        anchor="y2",
    )
    base["yaxis"] = log_axis(
        dark, "condition no.", np.array(EVEN), *(run.condition for run in runs)
    )
    base["yaxis"]["domain"] = [0.55, 1]
    base["yaxis2"] = axis(dark, "neuron CV", domain=[0, 0.45], rangemode="tozero", nticks=4)
    base["yaxis2"]["autorangeoptions"] = {"include": 2 * BALANCED[1]}
    base["shapes"] = [
        *([_column(stages.index(chosen), dark)] if chosen in stages else []),
        band(*EVEN, dark),
        band(*BALANCED, dark, "y2"),
    ]
    lines = [line for run in runs for line in (_condition(run), _imbalance(run))]
    return {"data": lines, "layout": base}


def _condition(run: Stages) -> Figure:
    bound = run.bound.tolist()
    return _line(
        run,
        run.condition,
        showlegend=False,  # its first marker may be a hollow one
        symbol=["circle-open" if unsure else "circle" for unsure in bound],
        customdata=["≥ " if unsure else "" for unsure in bound],
        hovertemplate="%{customdata}%{y:,.3~r}",
        meta=meaning("stage", "condition number", **{"lower bound": bound}),
    )


def _imbalance(run: Stages) -> Figure:
    return _line(
        run,
        run.cv,
        symbol="circle",
        yaxis="y2",
        hovertemplate="%{y:.3g}",
        meta=meaning("stage", "neuron CV"),
    )


def _line(run: Stages, values: np.ndarray, *, symbol: str | list[str], **more: object) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name_of(run.name),
        "legendgroup": name_of(run.name),
        "x": list(run.stages),
        "y": numbers(values),
        "line": {"color": run.style.colour, "dash": run.style.dash, "width": 2},
        "marker": {"color": run.style.colour, "size": 7, "symbol": symbol},
        **more,
    }


def _column(place: int, dark: bool) -> Figure:
    """Return a faint column at the chosen stage, through both charts."""
    return {
        "type": "rect",
        "xref": "x",
        "x0": place - 0.5,
        "x1": place + 0.5,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "layer": "below",
        "fillcolor": faded(theme(dark).soft, 0.12),
        "line": {"width": 0},
    }
