"""The page comes alive: what the user does and what the runs do, turned into pictures.

Every picture remembers in the browser what it was drawn from. A change then sends the smallest
thing that brings it up to date: nothing, new data, and a whole figure only when it shows something
else. A figure sent whole would throw away the user's zoom. The cursor is the browser's own.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dash
from dash import ClientsideFunction, Input, Output, Patch, State, no_update

from normuon_lens.runfile import STAGES

from . import layout
from .headline import headline
from .link import read_link
from .panels import PANELS, Panel, View
from .store import Entry, Store

ASSETS = Path(__file__).parent / "assets"

KEYBOARD_STEPS = 4000
"""Recorded steps that the arrow keys know of; beyond this they skip some."""


def make_app(store: Store) -> dash.Dash:
    """Return the page over a store of runs, as a Dash app that is not served yet."""
    app = dash.Dash(
        "normuon_lens.dashboard",
        assets_folder=str(ASSETS),
        serve_locally=True,
        title="normuon-lens",
        update_title="",
        enable_mcp=False,
        compress=False,
    )
    app.layout = layout.page
    _follow_the_browser(app)
    _follow_the_runs(app, store)
    _follow_clicks(app)
    for panel in PANELS:
        _draw(app, store, panel)
    return app


def _follow_the_browser(app: dash.Dash) -> None:
    """Theme, address and keyboard need no server: see assets/lens.js."""
    connect: Any = app.clientside_callback

    def browser(name: str, *wires: Any) -> None:
        connect(ClientsideFunction("lens", name), *wires)

    browser("link", Output("link", "data"), Input("link", "id"))
    browser("theme", Output("theme", "data"), Input("theme-button", "n_clicks"))
    browser("scheme", Output("mantine", "forceColorScheme"), Input("theme", "data"))
    browser(
        "remember",
        Output("step-reading", "children"),
        Output("matrix-title", "children"),
        Input("runs", "value"),
        Input("matrix-select", "value"),
        Input("step", "value"),
        Input("stage-select", "value"),
        Input("step", "max"),
        Input("recorded", "data"),
        State("matrix-select", "data"),
    )


def _follow_the_runs(app: dash.Dash, store: Store) -> None:
    @app.callback(
        Output("news", "data"),
        Output("tick", "interval"),
        Output("tick", "max_intervals"),
        Input("tick", "n_intervals"),
        State("news", "data"),
        # An interval shorter than its callback would never get an answer.
        running=[(Output("tick", "disabled"), True, False)],
    )
    def look(_: int, seen: int | None) -> tuple[Any, int, int]:
        store.refresh()
        news = store.version if store.version != seen else no_update
        soon = store.live or not store.entries
        every = layout.LIVE_EVERY if soon else layout.WATCH_EVERY
        return news, every, -1 if store.live or store.folders else 0

    @app.callback(
        Output("run-list", "children"),
        Output("runs", "value"),
        Output("known", "data"),
        Output("matrix-select", "data"),
        Output("matrix-select", "value"),
        Output("stage-select", "data"),
        Output("stage-select", "value"),
        Output("step", "min"),
        Output("step", "max"),
        Output("step", "value"),
        Output("recorded", "data"),
        Output("waiting", "children"),
        Output("waiting", "hidden"),
        Output("content", "hidden"),
        Output("side", "hidden"),
        Input("news", "data"),
        Input("link", "data"),
        State("known", "data"),
        State("runs", "value"),
        State("matrix-select", "value"),
        State("stage-select", "value"),
        State("step", "value"),
        State("step", "max"),
    )
    def steer(
        _: int,
        query: str,
        known: list[str] | None,
        ticked: list[str],
        matrix: str | None,
        stage: str,
        step: int,
        newest: int,
    ) -> tuple[Any, ...]:
        with store.lock:
            if known is None:
                asked = read_link(query)
                now = Controls([], asked.runs, asked.matrix, asked.stage or "update", asked.step)
            else:
                # The step follows the newest until it is moved away, and again once moved back.
                now = Controls(known, ticked, matrix, stage, None if step >= newest else step)
            new = steered(store, now)
            steps = recorded_steps(store)
            empty = not store.entries
            return (
                layout.run_list(store),
                new.ticked if known is None or new.ticked != ticked else no_update,
                new.known,
                _options(store),
                new.matrix if new.matrix != matrix else no_update,
                _stages(store),
                new.stage if new.stage != stage else no_update,
                steps[0],
                max(steps[-1], steps[0] + 1),
                steps[-1] if new.step is None else new.step,
                steps,
                layout.waiting_text(store) if empty else [],
                not empty,
                empty,
                empty,
            )

    @app.callback(
        Output("headline", "children"),
        Input("news", "data"),
        Input("runs", "value"),
        Input("stage-select", "value"),
    )
    def sum_up(_: int, ids: list[str], stage: str) -> list[Any]:
        with store.lock:
            entries = store.chosen(ids or [])
            return layout.headlines(
                [(store.label(entry), entry.style, headline(entry, stage)) for entry in entries]
            )


def _follow_clicks(app: dash.Dash) -> None:
    @app.callback(
        Output("step", "value", allow_duplicate=True),
        Output("matrix-select", "value", allow_duplicate=True),
        *(Input(name, "clickData") for name in ("condition", "imbalance", "timeline", "loss")),
        prevent_initial_call=True,
    )
    def go(*_: Any) -> tuple[Any, Any]:
        point = dash.ctx.triggered[0]["value"]["points"][0]
        matrix: Any = no_update
        if dash.ctx.triggered_id == "imbalance":
            matrix = html.unescape(str(point["y"]))
        return round(point["x"]), matrix


def _draw(app: dash.Dash, store: Store, panel: Panel) -> None:
    @app.callback(
        Output(panel.id, "figure"),
        Output(f"{panel.id}-drawn", "data"),
        Input("runs", "value"),
        Input("matrix-select", "value"),
        # Only a picture of one step is drawn anew for another; in the rest the cursor moves.
        (Input if panel.one_step else State)("step", "value"),
        Input("stage-select", "value"),
        Input("theme", "data"),
        Input("news", "data"),
        State(f"{panel.id}-drawn", "data"),
    )
    def draw(
        ids: list[str] | None,
        matrix: str | None,
        step: int,
        stage: str,
        theme: str,
        _: int,
        drawn: dict[str, Any] | None,
    ) -> tuple[Any, Any]:
        with store.lock:
            runs = store.chosen(ids or [])
            view = View(runs, matrix or "", int(step), stage, theme == "dark")
            return redraw(store, panel, view, drawn)


def redraw(store: Store, panel: Panel, view: View, drawn: dict[str, Any] | None) -> tuple[Any, Any]:
    """Return the least that brings a picture up to date, and what it then was drawn from.

    Parameters
    ----------
    drawn : dict or None
        What this function returned with the picture that the browser shows.

    Returns
    -------
    change
        A whole figure, a `dash.Patch` of one, or `dash.no_update`.
    drawn
        To be handed in next time, or `dash.no_update`.
    """
    # Another subject needs other axes, so its zoom goes; other content keeps them.
    subject = [panel.id, view.dark, view.stage, [entry.id for entry in view.runs]]
    content = [[entry.version, store.label(entry)] for entry in view.runs]
    if panel.one_matrix:
        subject.append(view.matrix)
    elif panel.id == "imbalance":
        content.append([view.matrix])
    if panel.one_step:
        content.append([view.step])
    drawn = drawn or {}
    if drawn.get("subject") == subject and drawn.get("content") == content:
        return no_update, no_update
    figure = panel.draw(store, view)
    now = {"subject": subject, "content": content, "traces": len(figure["data"])}
    if (drawn.get("subject"), drawn.get("traces")) != (subject, now["traces"]):
        return figure, now
    change = Patch()
    change["data"] = figure["data"]
    for part in ("shapes", "annotations", "coloraxis"):
        if part in figure["layout"]:
            change["layout"][part] = figure["layout"][part]
    if "dtick" in figure["layout"].get("yaxis", {}):
        change["layout"]["yaxis"]["dtick"] = figure["layout"]["yaxis"]["dtick"]
    return change, now


class Controls(NamedTuple):
    """State of the page's controls.

    Attributes
    ----------
    known : list of str
        Ids of the runs that the page has offered so far.
    ticked : list of str or None
        Ids of the runs that are shown; None for all.
    matrix : str or None
    stage : str
    step : int or None
        None follows the newest.
    """

    known: list[str]
    ticked: list[str] | None
    matrix: str | None
    stage: str
    step: int | None


def steered(store: Store, now: Controls) -> Controls:
    """Return the controls brought into line with the runs there are; new runs come ticked."""
    entries = [entry for entry in store.entries if entry.run is not None]
    ids = [entry.id for entry in entries]
    if not now.known:
        wanted = [name for name in ids if now.ticked is None or name in now.ticked] or ids
    else:
        wanted = [name for name in ids if name in (now.ticked or []) or name not in now.known]
    names, stages, steps = store.matrices(), _stages(store), recorded_steps(store)
    step = now.step
    if step is not None:
        step = min(max(step, steps[0]), steps[-1])
    return Controls(
        known=list(dict.fromkeys([*now.known, *ids])),
        ticked=wanted,
        matrix=now.matrix if now.matrix in names else most_imbalanced(entries),
        stage=now.stage if now.stage in stages else stages[-1],
        step=step,
    )


def most_imbalanced(entries: Sequence[Entry]) -> str | None:
    """Return the matrix with the highest neuron imbalance of all runs: the one to look at first."""
    worst: tuple[float, str | None] = (-1.0, None)
    for entry in entries:
        assert entry.run is not None
        names = entry.run.matrices
        values = entry.series("neuron_cv", "update").values[-20:]
        for name, column in zip(names, values.T, strict=True):
            known = column[column == column]
            mean = float(known.mean()) if len(known) else 0.0
            worst = max(worst, (mean, name), key=lambda found: found[0])
    return worst[1]


def recorded_steps(store: Store) -> list[int]:
    """Return the steps that any run has recorded, ascending, `KEYBOARD_STEPS` at most."""
    known = sorted({step for e in store.entries if e.run for step in e.run.steps.tolist()}) or [1]
    stride = -(-len(known) // KEYBOARD_STEPS)
    return [*known[:-1:stride], known[-1]]


def _options(store: Store) -> list[dict[str, str]]:
    """Return what the matrix control offers: every name with its shape."""
    shapes: dict[str, str] = {}
    for entry in store.entries:
        for matrix in entry.run.table if entry.run else []:
            shapes.setdefault(matrix.name, f"{matrix.name}  ·  {matrix.m} × {matrix.n}")
    return [{"value": name, "label": label} for name, label in shapes.items()]


def _stages(store: Store) -> list[str]:
    """Return the stages that any run has recorded, in optimizer order."""
    found = {stage for entry in store.entries if entry.run for stage in entry.run.stages}
    return [stage for stage in STAGES if stage in found] or ["update"]
