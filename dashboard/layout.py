"""The page as it stands before any number is in it, and the parts that are filled in later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import dcc, html

from normuon_lens.analysis.remarks import remarks
from normuon_lens.analysis.settled import SKIP

from .figures import empty_figure
from .figures.palette import Style
from .headline import BALANCED, EVEN, Headline, Share
from .panels import PANELS, Panel
from .store import Entry, Store

LIVE_EVERY, WATCH_EVERY = 1500, 5000
"""Milliseconds between two looks: while a run is recorded, and while a folder is only watched."""

GRAPH: Any = {
    # plotly.js 4 offers by default to upload the chart to a company's server.
    "showSendToCloud": False,
    "displaylogo": False,
    # Dragging zooms and a double click zooms out: only saving a picture needs a button.
    "modeBarButtons": [["toImage"]],
    "doubleClick": "reset",
}

DASHES = {
    "solid": (1, 0),
    "dash": (7, 4),
    "dot": (3, 3),
    "dashdot": (8, 5),
    "longdash": (11, 4),
    "longdashdot": (13, 5),
}
"""Plotly's dashes as pixels drawn and left out, for the swatches."""

KEYS = (
    ("← →", "one recorded step back, forth"),
    ("PgUp PgDn", "ten recorded steps back, forth"),
    ("Home End", "first step; newest step, and follow it"),
    ("[ ]", "previous, next matrix"),
    ("?", "this help"),
)


def page() -> Any:
    """Return the whole page."""
    return dmc.MantineProvider(
        id="mantine",
        theme={"fontFamily": "inherit", "defaultRadius": "sm"},
        children=[
            *_memory(),
            html.Header(_bar(), className="bar"),
            html.Div(
                [
                    html.Aside(_side(), id="side", className="side"),
                    html.Main([_waiting(), html.Div(_content(), id="content")], className="main"),
                ],
                className="columns",
            ),
            _help(),
        ],
    )


def run_list(store: Store) -> list[Any]:
    """Return one line a run: a tick, its swatch, its name, and how it fares."""
    return [_run(store, entry) for entry in store.entries]


def headlines(rows: Sequence[tuple[str, Style, Headline]]) -> list[Any]:
    """Return one card a run with its three figures."""
    return [_card(*row) for row in rows]


def waiting_text(store: Store) -> list[Any]:
    """Return what the page says while there is no run at all."""
    places = ", ".join(str(folder) for folder in store.folders)
    return [
        html.H2(f"Waiting for the first recording in {places}"),
        html.P("It appears here by itself. Record one from your training script:"),
        html.Pre(
            "from normuon_lens.hooks import attach\n\n"
            f'with attach(model, optimizer, "{places}/run.h5"):\n'
            "    ...  # your training loop, unchanged"
        ),
        html.P(["or make three with ", html.Code(f"normuon-lens demo -o {places}")]),
    ]


# -- parts ---------------------------------------------------------------------------------------


def _memory() -> list[Any]:
    """Return what the browser remembers between callbacks; nothing of it is seen."""
    return [
        dcc.Interval("tick", interval=LIVE_EVERY),
        dcc.Store("news"),  # version of the runs last shown
        dcc.Store("known"),  # ids of the runs ever shown
        dcc.Store("recorded"),  # steps for the arrow keys
        dcc.Store("link"),  # the query with which the page was opened
        dcc.Store("theme"),
        *(dcc.Store(f"{panel.id}-drawn") for panel in PANELS),
    ]


def _bar() -> list[Any]:
    return [
        html.Div([html.Span("normuon", className="brand-soft"), "lens"], className="brand"),
        dmc.Select(
            id="matrix-select",
            data=[],
            searchable=True,
            allowDeselect=False,
            nothingFoundMessage="no such matrix",
            size="sm",
            className="control matrix-control",
            label="Matrix",
            maxDropdownHeight=420,
        ),
        html.Div(
            [
                html.Div(
                    [html.Span("Step", id="step-label"), html.Span(id="step-reading")],
                    className="step-head",
                ),
                dmc.Slider(
                    id="step",
                    min=1,
                    max=2,
                    value=1,
                    updatemode="drag",
                    label=None,
                    size=6,
                    color="var(--accent)",
                    thumbLabel="optimizer step",
                ),
            ],
            className="control step-control",
        ),
        dmc.Select(
            id="stage-select",
            data=["update"],
            value="update",
            allowDeselect=False,
            size="sm",
            label="Stage",
            className="control stage-control",
        ),
        html.Div(
            [
                html.Button("?", id="help-button", title="Keys and help (?)", className="icon"),
                html.Button("◐", id="theme-button", title="Light or dark", className="icon"),
            ],
            className="icons",
        ),
    ]


def _side() -> list[Any]:
    return [
        dmc.CheckboxGroup(
            id="runs",
            value=[],
            label="Runs",
            children=html.Div(id="run-list"),
            # Mantine gives the id to no element of its own.
            attributes={"root": {"id": "runs"}},
            className="runs",
        ),
        _panel(_of("loss")),
    ]


def _content() -> list[Any]:
    matrix_row = [_panel(_of(name)) for name in ("spectrum", "neurons", "timeline")]
    return [
        html.Div(id="headline", className="headlines"),
        html.P(
            "Medians over all matrices and steps, and how many matrices are ill-conditioned "
            f"(above {EVEN:g}) or imbalanced (above {BALANCED:g}). The first {SKIP} steps are left "
            "out here and veiled below.",
            className="footnote",
        ),
        html.Div([_panel(_of("condition")), _panel(_of("imbalance"))], className="row overview"),
        html.H2(id="matrix-title"),
        html.Div(matrix_row, className="row detail"),
    ]


def _waiting() -> Any:
    return html.Div(id="waiting", className="waiting", hidden=True)


def _attributes(**values: str) -> dict[str, Any]:
    """Return HTML attributes whose names have hyphens, such as ``aria-label``."""
    return {name.replace("_", "-"): value for name, value in values.items()}


def _of(name: str) -> Panel:
    return next(panel for panel in PANELS if panel.id == name)


def _panel(panel: Panel) -> Any:
    title = f"{panel.id}-title"
    return html.Section(
        [
            html.H3(panel.title, id=title),
            html.P(panel.reading, className="reading"),
            dcc.Graph(
                id=panel.id,
                figure=_BLANK,
                config=GRAPH,
                responsive=True,
                className="graph" if panel.one_step else "graph over-steps",
            ),
        ],
        className=f"card {panel.id}-card",
        **_attributes(aria_labelledby=title),
    )


# Transparent, so that nothing flashes before the first numbers are in.
_BLANK = empty_figure("")
_BLANK["layout"] |= {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}


def _run(store: Store, entry: Entry) -> Any:
    if entry.run is None:
        trouble = html.Div(entry.error, className="trouble", role="alert")
        return html.Div([html.Div(entry.name, className="run-name"), trouble], className="run")
    swatch = html.Span(className="swatch", style={"backgroundImage": _dashes(entry.style)})
    name = html.Span([swatch, html.Span(store.label(entry), className="run-name")])
    return html.Div(
        [
            dmc.Checkbox(
                value=entry.id, label=name, color=entry.style.colour, size="xs", className="tick"
            ),
            html.Div(_status(entry), className="run-status"),
            *_remarks(entry),
        ],
        className="run",
    )


def _status(entry: Entry) -> list[Any]:
    run = entry.run
    assert run is not None
    newest = int(run.steps[-1]) if len(run.steps) else 0
    if not newest:
        return [f"{entry.optimizer or 'run'} · waiting for the first step"]
    if run.live:
        # The age is counted on by the browser, once a second.
        age = html.Span("", **_attributes(data_since=f"{run.times[-1]:.1f}"))
        return [html.Span(className="live-dot"), f"{entry.optimizer} · step {newest}, ", age]
    shadow = f" in the shadow of {of}" if (of := run.metadata.get("shadow_of")) else ""
    return [f"{entry.optimizer}{shadow} · {newest} steps · {run.status}"]


def _remarks(entry: Entry) -> list[Any]:
    run = entry.run
    assert run is not None
    said = remarks(run, entry.series("update_error", "update"))
    return [html.Div(text, className="trouble", role="alert") for text in said]


def _dashes(style: Style) -> str:
    drawn, left = DASHES[style.dash]
    return (
        f"repeating-linear-gradient(90deg,{style.colour} 0 {drawn}px,"
        f"transparent {drawn}px {drawn + left}px)"
    )


def _card(name: str, style: Style, figures: Headline) -> Any:
    note = " (first steps only)" if figures.early else ""
    return html.Div(
        [
            html.Div(
                [
                    html.Span(className="swatch", style={"backgroundImage": _dashes(style)}),
                    html.Span(name + note, className="run-name"),
                ],
                className="headline-name",
            ),
            html.Div(
                [
                    _figure(
                        "condition number",
                        figures.condition,
                        _verdict(figures.ill_conditioned, "ill-conditioned", "well conditioned"),
                        at_least=figures.is_lower_bound,
                    ),
                    _figure(
                        "neuron imbalance",
                        figures.imbalance,
                        _verdict(figures.imbalanced, "imbalanced", "balanced"),
                    ),
                    _figure("loss", figures.loss, []),
                ],
                className="headline-figures",
            ),
        ],
        className="card headline",
        style={"borderTopColor": style.colour},
    )


def _figure(label: str, value: float, verdict: list[Any], *, at_least: bool = False) -> Any:
    shown = "–" if math.isnan(value) else "≥\N{NO-BREAK SPACE}" * at_least + _three_digits(value)
    return html.Div(
        [html.Div(label, className="label"), html.Div(shown, className="value"), *verdict],
        className="figure",
    )


def _verdict(share: Share, bad: str, good: str) -> list[Any]:
    total = share.of + share.unknown
    if not total:
        return []
    if not share.of:
        return [html.Div("lost in rounding", className="verdict unknown")]
    if not share.bad:
        count = f"{share.of} of {total}" if share.unknown else "all"
        return [html.Div(f"{count} {good}", className="verdict good")]
    count = f"all {total}" if share.bad == total else f"{share.bad} of {total}"
    return [html.Div(f"{count} {bad}", className="verdict bad")]


def _three_digits(value: float) -> str:
    if value >= 1e5 or (0 < value < 1e-3):
        return f"{value:.1e}"
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _help() -> Any:
    rows = [html.Tr([html.Th(html.Kbd(keys), scope="row"), html.Td(does)]) for keys, does in KEYS]
    return html.Dialog(
        [
            html.H2("Keys"),
            html.Table(html.Tbody(rows)),
            html.P(
                "Click a point to move the step there; click a row of the imbalance to choose its "
                "matrix. Drag to zoom, double-click to zoom out. The address holds the view: copy "
                "it to show somebody what you see."
            ),
            html.Button("Close", id="help-close"),
        ],
        id="help",
        **_attributes(aria_label="Help"),
    )
