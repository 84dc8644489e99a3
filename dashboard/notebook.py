"""The page's pictures in a notebook: the same figures of the same numbers, one a call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from normuon_lens.errors import LensError
from normuon_lens.runfile import Run

from .controls import Controls, steered
from .panels import BY_ID, View
from .store import Store

if TYPE_CHECKING:
    import plotly.graph_objects as go


def draw(
    panel: str,
    runs: Sequence[Run | str | Path],
    *,
    matrix: str | None = None,
    step: int | None = None,
    stage: str = "update",
    dark: bool = False,
) -> go.Figure:
    """Return one of the page's pictures.

    ::

        from normuon_lens.dashboard import draw

        draw("spectrum", ["sample_runs/adamw.h5", "sample_runs/muon.h5"], matrix="blocks.1.mlp.up")

    Parameters
    ----------
    panel : str
        Id of a panel: ``condition``, ``imbalance``, ``spectrum``, ``neurons``, ``timeline``,
        ``matrix``, ``stages`` or ``loss``.
    runs : sequence of Run, str or Path
        Runs, run files, or folders of them.
    matrix : str, optional
        By default the one whose neurons move most unevenly.
    step : int, optional
        By default the newest. Of every run the nearest step that was recorded is shown.
    stage : str
    dark : bool
        Theme.

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    LensError
        If there is no such panel, matrix or stage, or a run cannot be read.
    """
    import plotly.graph_objects as go

    if panel not in BY_ID:
        raise LensError(f"no panel is called {panel!r}: there are {', '.join(BY_ID)}")
    store = Store([run.path if isinstance(run, Run) else Path(run) for run in runs])
    for what, given, there in (
        ("matrix", matrix, store.matrices()),
        ("stage", stage, store.stages()),
    ):
        if given is not None and given not in there:
            raise LensError(f"no {what} {given!r} in these runs: there are {', '.join(there[:12])}")
    now = steered(store, Controls([], None, matrix, stage, step))
    newest = store.recorded_steps()[-1]
    shown = newest if now.step is None else now.step
    view = View(store.chosen(now.known), now.matrix or "", shown, stage, dark)
    return go.Figure(BY_ID[panel].draw(store, view).figure)
