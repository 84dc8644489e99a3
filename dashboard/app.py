"""The page comes alive: the runs behind the controls, and the routes that the pictures come from.

Controls, runs and headline are Dash's. The pictures are not: the page asks for those that changed
in one request (`answers`) and draws them itself, so that a step takes no longer than drawing does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dash
import plotly
from dash import ClientsideFunction, Input, Output, State, no_update
from flask import Response, jsonify, request
from plotly.offline import get_plotlyjs

from . import layout
from .answers import csv, numbers, pictures, view_of
from .controls import Controls, start, steered
from .findings import findings
from .headline import headlines_of
from .link import read_link
from .panels import BY_ID
from .store import Store

ASSETS = Path(__file__).parent / "assets"

KEYBOARD_STEPS = 10_000
"""Recorded steps that the arrow keys know of; beyond this they skip some."""

INDEX = """<!DOCTYPE html>
<html lang="en">
  <head>
    <title>{%title%}</title>
    <meta name="viewport" content="width=device-width, initial-scale=1">
    {%favicon%}
    {%css%}
    <script src="plotly.js?v=PLOTLY" async></script>
  </head>
  <body>
    {%app_entry%}
    {%config%}
    {%scripts%}
    {%renderer%}
  </body>
</html>""".replace("PLOTLY", plotly.__version__)


def make_app(store: Store) -> dash.Dash:
    """Return the page over a store of runs, as a Dash app that is not served yet."""
    app = dash.Dash(
        "normuon_lens.dashboard",
        assets_folder=str(ASSETS),
        serve_locally=True,
        title="normuon-lens",
        update_title="",
        index_string=INDEX,
        enable_mcp=False,
        compress=False,
    )
    app.layout = layout.page
    _follow_the_browser(app)
    _follow_the_runs(app, store)
    _answer(app, store)
    return app


def _answer(app: dash.Dash, store: Store) -> None:
    """Add the routes that lens.js asks; see `answers`."""

    def plotly_js() -> Response:
        answer = Response(get_plotlyjs(), mimetype="text/javascript")
        answer.headers["Cache-Control"] = "private, max-age=31536000, immutable"
        return answer

    def news() -> Response:
        store.refresh()
        soon = store.live or not store.entries
        every = layout.LIVE_EVERY if soon else layout.WATCH_EVERY
        return jsonify(version=store.version, every=every if store.live or store.folders else None)

    def changed() -> Response:
        asked = _asked()
        with store.lock:
            view = view_of(store, asked)
            have = asked.get("have")
            return jsonify(pictures(store, view, have if isinstance(have, dict) else {}))

    def table(panel: str) -> Response:
        with store.lock:
            return jsonify(numbers(store, view_of(store, _asked()), panel))

    def download(panel: str) -> Response:
        with store.lock:
            return Response(csv(store, view_of(store, _asked()), panel), mimetype="text/csv")

    panel = f"<any({', '.join(BY_ID)}):panel>"
    app.server.add_url_rule("/plotly.js", view_func=plotly_js)
    app.server.add_url_rule("/news", view_func=news, methods=["POST"])
    app.server.add_url_rule("/pictures", view_func=changed, methods=["POST"])
    app.server.add_url_rule(f"/numbers/{panel}", view_func=table, methods=["POST"])
    app.server.add_url_rule(f"/csv/{panel}", view_func=download, methods=["POST"])


def _asked() -> dict[str, Any]:
    given = request.get_json(silent=True)
    return given if isinstance(given, dict) else {}


def _follow_the_browser(app: dash.Dash) -> None:
    """Theme, address, keyboard and pictures are the browser's own: see assets/."""
    connect: Any = app.clientside_callback

    def browser(name: str, *wires: Any) -> None:
        connect(ClientsideFunction("lens", name), *wires)

    browser("link", Output("link", "data"), Input("link", "id"))
    browser("theme", Output("theme", "data"), Input("theme-button", "n_clicks"))
    browser("scheme", Output("mantine", "forceColorScheme"), Input("theme", "data"))
    browser(
        "look",
        Output("step-reading", "children"),
        Output("chosen", "children"),
        Input("runs", "value"),
        Input("matrix-select", "value"),
        Input("step", "value"),
        Input("stage-select", "value"),
        Input("recorded", "data"),
        Input("news", "data"),
        Input("theme", "data"),
        State("matrix-select", "data"),
    )


def _follow_the_runs(app: dash.Dash, store: Store) -> None:
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
        State("recorded", "data"),
    )
    def steer(
        _: int,
        query: str,
        known: list[str] | None,
        ticked: list[str],
        matrix: str | None,
        stage: str,
        step: int,
        recorded: list[int] | None,
    ) -> tuple[Any, ...]:
        with store.lock:
            if not known or not recorded:
                now = start(read_link(query))
            else:
                # The step follows the newest until it is moved away, and again once moved back.
                newest = step >= recorded[-1]
                now = Controls(known, ticked, matrix, stage, None if newest else step)
            new = steered(store, now)
            steps = store.recorded_steps()
            stride = -(-len(steps) // KEYBOARD_STEPS)
            empty = not store.entries
            return (
                layout.run_list(store),
                new.ticked if not known or new.ticked != ticked else no_update,
                new.known,
                _options(store),
                new.matrix if new.matrix != matrix else no_update,
                store.stages(),
                new.stage if new.stage != stage else no_update,
                steps[0],
                max(steps[-1], steps[0] + 1),
                steps[-1] if new.step is None else new.step,
                [*steps[:-1:stride], steps[-1]],
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
            labels = {entry.id: store.label(entry) for entry in entries}
            told = findings(entries, stage, labels)
            return layout.headlines(store, entries, headlines_of(entries, stage), told)


def _options(store: Store) -> list[dict[str, str]]:
    """Return what the matrix control offers: every name with its shape."""
    shapes: dict[str, str] = {}
    for entry in store.entries:
        for matrix in entry.run.table if entry.run else []:
            shapes.setdefault(matrix.name, f"{matrix.name}  ·  {matrix.m} × {matrix.n}")
    return [{"value": name, "label": label} for name, label in shapes.items()]
