"""The page as it stands before any number is in it, and the parts that are filled in later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import dcc, html

from normuon_lens.analysis.remarks import remarks
from normuon_lens.analysis.settled import SKIP

from .figures.palette import Style
from .findings import Finding
from .headline import BALANCED, EVEN, Headline, Share
from .panels import BY_ID, Panel
from .store import Entry, Store
from .words import NONE, percent, shown

LIVE_EVERY, WATCH_EVERY = 1500, 5000
"""Milliseconds between two looks: while a run is recorded, and while a folder is only watched."""

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
    ("Space", "play through the steps, pause"),
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
            _taking(),
            html.Div(id="lost", className="lost", hidden=True, role="alert"),
            html.Div(id="said", className="said", role="status"),
        ],
    )


def run_list(store: Store) -> list[Any]:
    """Return one line a run: a tick, its swatch, its name, and how it fares."""
    return [_run(store, entry) for entry in store.entries]


def headlines(
    store: Store, entries: Sequence[Entry], figures: Sequence[Headline], told: Sequence[Finding]
) -> list[Any]:
    """Return one card a run, with its figures and what was found in it, and then the rest."""
    cards = [
        _card(store.label(entry), entry.style, row, [f for f in told if f.run == entry.id])
        for entry, row in zip(entries, figures, strict=True)
    ]
    ids = {entry.id for entry in entries}
    rest = [_finding(found) for found in told if found.run not in ids]
    cards = [html.Div(cards, className="headlines")] if cards else []
    return [*cards, *([html.Ul(rest, className="findings apart")] if rest else [])]


def swatch(style: Style) -> str:
    """Return the CSS background that shows a run's colour and dash."""
    drawn, left = DASHES[style.dash]
    return (
        f"repeating-linear-gradient(90deg,{style.colour} 0 {drawn}px,"
        f"transparent {drawn}px {drawn + left}px)"
    )


def waiting_text(store: Store) -> list[Any]:
    """Return what the page says while there is no run at all."""
    places = ", ".join(str(folder) for folder in store.folders)
    return [
        html.H2(f"Waiting for the first recording in {places}"),
        html.P("It appears here by itself. Record one from your training script:"),
        html.Pre(
            "from normuon_lens.hooks import attach\n\n"
            f'with attach(model, optimizer, "{places}/run.h5"):\n'
            "    ...  # your training loop, unchanged",
            tabIndex=0,
        ),
        html.P(["or make three with ", html.Code(f"normuon-lens demo -o {places}")]),
    ]


# -- parts ---------------------------------------------------------------------------------------


def _memory() -> list[Any]:
    """Return what the browser remembers between callbacks; nothing of it is seen."""
    return [
        dcc.Store("news"),  # version of the runs last shown
        dcc.Store("known"),  # ids of the runs ever shown
        dcc.Store("recorded"),  # steps for the arrow keys
        dcc.Store("link"),  # the query with which the page was opened
        dcc.Store("theme"),
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
                    [
                        html.Span("Step", id="step-label"),
                        html.Span(id="step-reading"),
                        html.Button(
                            "▶",
                            id="play",
                            title="Play through the steps (Space)",
                            className="play",
                            **_attributes(aria_label="Play", aria_pressed="false"),
                        ),
                    ],
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
                _icon("Link", "copy-link", "Copy the link to this view"),
                _icon("◐", "theme-button", "Light or dark"),
                _icon("?", "help-button", "Keys and help (?)"),
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
        _panel(BY_ID["loss"]),
    ]


def _icon(sign: str, id: str, title: str) -> Any:
    return html.Button(sign, id=id, title=title, className="icon", **_attributes(aria_label=title))


def _content() -> list[Any]:
    return [
        html.Div(id="headline", **_attributes(aria_live="off")),
        html.P(
            f"Medians over matrices and steps. High: a condition number above {EVEN:g}, an "
            f"imbalance (CV of the neuron norms) above {BALANCED:g}. The first {SKIP} steps are "
            "left out, and veiled below.",
            className="footnote",
        ),
        html.Div(
            [_panel(BY_ID["condition"]), _panel(BY_ID["imbalance"], *_map_or_table())],
            className="row overview",
        ),
        html.H2(id="chosen"),
        html.Div(
            [_panel(BY_ID[name]) for name in ("spectrum", "neurons", "timeline")],
            className="row detail",
        ),
        html.Div([_panel(BY_ID[name]) for name in ("matrix", "stages")], className="row inside"),
    ]


def _map_or_table() -> tuple[Any, Any]:
    """Return the switch between the two views of all matrices, and the place of the table."""
    switch = html.Div(
        [
            html.Button(text, **_attributes(data_view=text.lower(), aria_pressed=pressed))
            for text, pressed in (("Map", "true"), ("Table", "false"))
        ],
        className="switch",
        role="group",
        **_attributes(aria_label="All matrices as"),
    )
    table = html.Div(
        id="overview",
        className="overview-table",
        hidden=True,
        tabIndex=0,
        role="region",
        **_attributes(aria_label="All matrices"),
    )
    return switch, table


def _waiting() -> Any:
    return html.Div(id="waiting", className="waiting", hidden=True)


def _attributes(**values: str) -> dict[str, Any]:
    """Return HTML attributes whose names have hyphens, such as ``aria-label``."""
    return {name.replace("_", "-"): value for name, value in values.items()}


def _panel(panel: Panel, switch: Any = None, other: Any = None) -> Any:
    """Return a panel's card; lens.js draws into the innermost element of its graph."""
    title, notes, summary = (f"{panel.id}-{part}" for part in ("title", "notes", "summary"))
    takes = f"Numbers and downloads: {panel.title}"
    kind = "graph" if panel.moments else "graph over-steps"
    zooms = {"data_zooms": "yes"} if panel.zooms else {}
    return html.Section(
        [
            html.Div(
                [
                    html.H3(panel.title, id=title),
                    switch,
                    html.Button(
                        "⤓",
                        className="take",
                        title=takes,
                        **_attributes(data_panel=panel.id, aria_label=takes),
                    ),
                ],
                className="card-head",
            ),
            html.P(panel.reading, className="reading"),
            html.Div(
                html.Div(className="plot"), id=panel.id, className=kind, **_attributes(**zooms)
            ),
            other,
            html.P(id=notes, className="notes"),
            html.P(id=summary, className="unseen"),
        ],
        className=f"card {panel.id}-card",
        **_attributes(aria_labelledby=title, aria_describedby=summary),
    )


def _run(store: Store, entry: Entry) -> Any:
    if entry.run is None:
        trouble = html.Div(entry.error, className="trouble", role="alert")
        return html.Div([html.Div(entry.name, className="run-name"), trouble], className="run")
    line = html.Span(className="swatch", style={"backgroundImage": swatch(entry.style)})
    name = html.Span([line, html.Span(store.label(entry), className="run-name")])
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


def _card(name: str, style: Style, figures: Headline, told: Sequence[Finding]) -> Any:
    note = " (first steps only)" if figures.early else ""
    return html.Div(
        [
            html.Div(
                [
                    html.Span(className="swatch", style={"backgroundImage": swatch(style)}),
                    html.Span(name + note, className="run-name"),
                ],
                className="headline-name",
            ),
            html.Div(
                [
                    _figure(
                        "condition",
                        figures.condition,
                        _verdict(figures.ill_conditioned),
                        at_least=figures.is_lower_bound,
                    ),
                    _figure(
                        "imbalance",
                        figures.imbalance,
                        _verdict(figures.imbalanced),
                    ),
                    _figure("starved", figures.starved, [], share=True),
                    _figure(_loss_label(figures), figures.loss, []),
                ],
                className="headline-figures",
            ),
            html.Ul([_finding(found) for found in told], className="findings"),
        ],
        className="card headline",
        style={"borderTopColor": style.colour},
    )


def _loss_label(figures: Headline) -> str:
    return f"loss @ {figures.loss_step}" if figures.loss_step else "loss"


def _finding(found: Finding) -> Any:
    """Return one sentence; one that is about a matrix leads there."""
    words = [html.Span(text, className=f"is-{kind}") for kind, text in found.parts]
    if found.matrix is None:
        return html.Li(words, className=f"finding {_slug(found.kind)}")
    place = {"data_matrix": found.matrix}
    if found.step is not None:
        place["data_step"] = str(found.step)
    leads = html.Button(words, className="leads", title="Look at it", **_attributes(**place))
    return html.Li(leads, className=f"finding {_slug(found.kind)}")


def _slug(kind: str) -> str:
    return kind.replace(" ", "-")


def _figure(
    label: str, value: float, verdict: list[Any], *, at_least: bool = False, share: bool = False
) -> Any:
    said = percent(value) if share else shown(value)
    said = NONE if math.isnan(value) else "≥\N{NO-BREAK SPACE}" * at_least + said
    return html.Div(
        [html.Div(label, className="label"), html.Div(said, className="value"), *verdict],
        className="figure",
    )


def _verdict(share: Share) -> list[Any]:
    total = share.of + share.unknown
    if not total:
        return []
    if not share.of:
        return [html.Div("lost in rounding", className="verdict unknown")]
    if not share.bad:
        count = f"{share.of} of {total}" if share.unknown else "all"
        return [html.Div(f"{count} healthy", className="verdict good")]
    count = f"all {total}" if share.bad == total else f"{share.bad} of {total}"
    return [html.Div(f"{count} high", className="verdict bad")]


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
            html.Button("Close", className="close"),
        ],
        id="help",
        **_attributes(aria_label="Help"),
    )


def _taking() -> Any:
    """Return the dialog of what can be taken away from a panel; take.js fills it."""
    ways = (
        ("png", "PNG"),
        ("svg", "SVG"),
        ("csv", "CSV"),
        ("python", "Copy Python"),
        ("link", "Copy link"),
    )
    buttons = [html.Button(text, **_attributes(data_take=way)) for way, text in ways]
    return html.Dialog(
        [
            html.H2(className="taking-title"),
            html.P(className="taking-summary"),
            html.Div([*buttons, html.Button("Close", className="close")], className="ways"),
            html.H3("The same numbers in a notebook"),
            html.Pre(className="taking-python", tabIndex=0),
            html.H3("Numbers"),
            html.Div(
                className="taking-table",
                tabIndex=0,
                role="region",
                **_attributes(aria_label="Numbers"),
            ),
        ],
        id="taking",
        **_attributes(aria_label="Numbers and downloads"),
    )
