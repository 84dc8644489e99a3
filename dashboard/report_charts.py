"""The main figures for a report: those of the page, with no more points than a file has room for.

They are drawn in both themes. Only the layouts differ, so that the numbers need be there once.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from .controls import most_imbalanced
from .figures.frame import Figure, numbers, typed
from .figures.numbers import summary_of, table_of
from .overview import Cell as MatrixCell
from .overview import overview
from .panels import BY_ID, Panel, View
from .report_parts import Block, Cell, Chart, Charts, Key, Part, Table
from .store import Entry, Store
from .thin import blocks, extremes
from .words import NONE, inert, named, sentence, shown

ALL = ("loss", "condition", "imbalance")
ONE = ("spectrum", "neurons", "stages")
"""Pictures of all matrices, and of the one whose neurons move most unevenly."""

WIDE = ("imbalance", "stages")
"""Pictures that take the whole width."""

JOINED = ("the lowest and highest of each stretch", "zoom in to see all.")
"""How notes end that tell how many points or cells there are."""

LIVING = ("; zoom in to see all", "; click one to look into it")
"""What only the page does."""

POINTS = 24_000
"""Of all lines of a picture together."""
LEAST_POINTS = 200
CELLS = 160_000
"""Of all heatmaps of a picture together."""
DIGITS = 5
"""Significant digits of a number: what hovering shows has three."""
ROWS = 120
"""Numbers in the table under a picture of lines."""


def chart_blocks(store: Store, entries: Sequence[Entry], keys: dict[str, Key]) -> tuple[Block, ...]:
    """Return the figures of all matrices, then those of one; none where there is no step."""
    if not entries:
        return ()
    matrix = most_imbalanced(entries) or ""
    step = last_common(entries)
    views = [View(entries, matrix, step, "update", dark) for dark in (False, True)]
    title: list[Part] = [("matrix", named(matrix)), ("text", f" at step {step:,}")]
    title.append(("text", ": the matrix whose neurons last moved most unevenly"))
    staged = any(len(entry.run.stages) > 1 for entry in entries if entry.run)
    one = ONE if staged else ONE[:2]
    return (
        Charts((), tuple(_chart(store, BY_ID[name], views, keys) for name in ALL)),
        Charts(tuple(title), tuple(_chart(store, BY_ID[name], views, keys) for name in one)),
    )


def last_common(entries: Sequence[Entry]) -> int:
    """Return the last step that every run has reached: of its spectra, where it has any."""
    last = []
    for entry in entries:
        assert entry.run is not None
        sampled = entry.run.spectrum_steps()
        last.append(int((sampled if len(sampled) else entry.run.steps)[-1]))
    return min(last)


def _chart(store: Store, panel: Panel, views: Sequence[View], keys: dict[str, Key]) -> Chart:
    (light, notes), (dark, _) = (panel.draw(store, view) for view in views)
    entries = views[0].runs
    # Made before thinning: a table has its own points.
    table = _matrices(entries, keys) if panel.id == "imbalance" else _numbers(light, panel.title)
    data = _thinned(light["data"])
    coarser = any(
        len(new["x"]) < len(old["x"]) for new, old in zip(data, light["data"], strict=True)
    )
    said = [_still(note) for note in notes if not (coarser and note.endswith(JOINED))]
    said += ["Drawn coarser here than by normuon-lens dashboard"] * coarser
    legend = light["layout"].get("showlegend", True) or panel.id == "imbalance"
    return Chart(
        id=panel.id,
        title=panel.title,
        reading=_still(panel.reading),
        data=data,
        light=light["layout"],
        dark=dark["layout"],
        summary=inert(summary_of(light)),
        notes=tuple(map(sentence, said)),
        keys=() if legend else tuple(keys[entry.id] for entry in entries),
        numbers=table,
        wide=panel.id in WIDE,
    )


def _still(text: str) -> str:
    """Return a text of the page without what a report cannot do."""
    for more in LIVING:
        text = text.replace(more, "")
    return text


# -- fewer numbers ---------------------------------------------------------------------------------


def _thinned(traces: Sequence[Figure]) -> list[Figure]:
    """Return traces that take no more room than they should."""
    cells = sum(len(trace["y"]) * len(trace["x"]) for trace in traces if "z" in trace)
    limit = max(LEAST_POINTS, POINTS // max(len(traces), 1))
    return [_coarser(trace, cells) if "z" in trace else _fewer(trace, limit) for trace in traces]


def _fewer(trace: Figure, limit: int) -> Figure:
    """Return a line in at most about `limit` points, rounded; the lowest and highest stay."""
    values = np.array([np.nan if y is None else y for y in trace["y"]], dtype=np.float64)
    places = trace["x"]
    if len(values) > limit:
        at = extremes(values, limit)
        values, places = values[at], [places[i] for i in at.tolist()]
    return {**trace, "x": places, "y": [_rounded(y) for y in numbers(values)]}


def _coarser(trace: Figure, cells: int) -> Figure:
    """Return a heatmap with its share of so many cells."""
    if cells <= CELLS:
        return trace
    rows, columns = len(trace["y"]), len(trace["x"])
    raw = np.frombuffer(base64.b64decode(trace["z"]["bdata"]), "<f4").reshape(rows, columns)
    values, _, at = blocks(raw, rows, max(1, columns * CELLS // cells))
    return {**trace, "x": [trace["x"][i] for i in at.tolist()], "z": typed(values)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


# -- tables ----------------------------------------------------------------------------------------


def _numbers(figure: Figure, title: str) -> Table:
    """Return a picture of lines in numbers, some of each line where there are too many."""
    traces = figure["data"]
    each = max(4, ROWS // max(len(traces), 1))
    columns: list[str] = []
    found: list[tuple[list[str], list[list[Any]]]] = []
    total = 0
    for trace in traces:
        names, rows = table_of({"data": [trace]})
        total += len(rows)
        at = np.unique(np.linspace(0, len(rows) - 1, min(each, len(rows))).round().astype(int))
        found.append((names, [rows[i] for i in at.tolist()]))
        columns += [name for name in names if name not in columns]
    told = [dict(zip(names, row, strict=True)) for names, some in found for row in some]
    cells = tuple(
        tuple(_cell(row[name]) if name in row else Cell("") for name in columns) for row in told
    )
    note = f"{len(cells):,} of {total:,} numbers" if len(cells) < total else ""
    texts = sum(isinstance(row, str) for row in told[0].values()) if told else 0
    return Table(f"{title} in numbers", tuple(columns), cells, texts, note)


def _cell(value: Any) -> Cell:
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, float):
        return Cell(shown(value))
    if isinstance(value, int):
        return Cell(f"{value:,}")
    return Cell(NONE if value is None else named(value))


def _matrices(entries: Sequence[Entry], keys: dict[str, Key]) -> Table:
    """Return every matrix in every run: what the heatmap is the history of."""
    names = [keys[entry.id].name for entry in entries]
    columns = ["matrix", "shape"]
    columns += [f"{name}: {what}" for name in names for what in ("condition number", "CV")]
    rows = []
    for row in overview(entries, "update"):
        cells = [Cell(named(row.name)), Cell(f"{row.m} × {row.n}")]
        for cell in row.cells:
            cells += _figures(cell)
        rows.append(tuple(cells))
    note = "Medians over steps"
    if not all(cell.trusted for row in overview(entries, "update") for cell in row.cells if cell):
        note += "; ≈ where the update is mostly rounding"
    return Table("Every matrix in numbers", tuple(columns), tuple(rows), 2, note)


def _figures(cell: MatrixCell | None) -> tuple[Cell, Cell]:
    if cell is None:
        return Cell(NONE), Cell(NONE)
    unsure = "" if cell.trusted else "≈ "
    bound = "≥ " if cell.is_bound else ""
    return Cell(f"{unsure}{bound}{shown(cell.condition)}"), Cell(f"{unsure}{shown(cell.cv)}")
