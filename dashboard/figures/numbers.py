"""A picture in numbers and in words: its table, its CSV, and a text for who cannot see it.

All three are read from the figure itself, so they tell what is shown and nothing else. What the
numbers are called stands in every trace's ``meta`` (see `frame.meaning`).
"""

import base64
import csv
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from normuon_lens.analysis.export import FORMULA

from .frame import Figure, numbers

TOLD = 8
"""Runs that a text alternative tells of; nobody listens to more."""
NOTHING = "nothing finite"

Row = dict[str, Any]


def table_of(figure: Figure) -> tuple[list[str], list[list[Any]]]:
    """Return the numbers of a picture in long form, a row a point.

    Parameters
    ----------
    figure : dict
        Of this package.

    Returns
    -------
    columns : list of str
        The run, and what its numbers are called.
    rows : list of list
        None where there is no number.
    """
    points = [point for trace in figure["data"] for point in _points(trace)]
    columns = list(dict.fromkeys(name for point in points for name in point))
    return columns, [[point.get(name) for name in columns] for point in points]


def csv_of(figure: Figure) -> str:
    """Return the table of a picture as comma-separated values.

    Names that a spreadsheet would take for a formula get an apostrophe in front.
    """
    columns, rows = table_of(figure)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_harmless(cell) for cell in row] for row in rows)
    return out.getvalue()


def summary_of(figure: Figure) -> str:
    """Return a picture in a few short sentences: what over what, and where each run lies."""
    if not figure["data"]:
        notes = figure["layout"].get("annotations", ())
        return " ".join(html.unescape(note["text"].replace("<br>", " ")) for note in notes)
    groups: dict[tuple[str, str, str], list[Told]] = {}
    for trace in figure["data"]:
        # What does not answer the mouse is the background of something else.
        if trace.get("hoverinfo") != "skip":
            told = _told(trace)
            groups.setdefault(told[:3], []).append(told)
    return " ".join(_sentences(group) for group in groups.values())


# -- tables --------------------------------------------------------------------------------------


def _points(trace: Figure) -> Iterable[Row]:
    """Yield every point of a trace as column to value."""
    meta = dict(trace["meta"])
    x, y, value = meta.pop("x"), meta.pop("y"), meta.pop("value", None)
    run = html.unescape(trace["name"])
    if value is not None:
        for row, line in zip(trace["y"], _short_floats(_decoded(trace["z"])), strict=True):
            name = _text(row)
            for column, cell in zip(trace["x"], line, strict=True):
                yield {"run": run, y: name, x: column, value: cell}
        return
    constant = {name: text for name, text in meta.items() if isinstance(text, str)}
    varied = {name: many for name, many in meta.items() if isinstance(many, list)}
    for i, (across, up) in enumerate(zip(trace["x"], trace["y"], strict=True)):
        more = {name: many[i] for name, many in varied.items()}
        yield {"run": run, **constant, x: _text(across), y: _text(up), **more}


def _decoded(array: Figure) -> np.ndarray:
    """Return a typed array as it was given: (R, T), float32."""
    raw = np.frombuffer(base64.b64decode(array["bdata"]), f"<{array['dtype']}")
    return raw.reshape([int(side) for side in array["shape"].split(",")])


def _short_floats(values: np.ndarray) -> list[list[float | None]]:
    """Return rows, in as few digits as tell 32 bits apart: 0.1, not 0.10000000149011612."""
    return [numbers(row) for row in values.astype("U16").astype(np.float64)]


def _text(cell: Any) -> Any:
    return html.unescape(cell) if isinstance(cell, str) else cell


def _harmless(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


# -- words ---------------------------------------------------------------------------------------


class Told(NamedTuple):
    """What there is to tell of a trace.

    Attributes
    ----------
    what, over, rows : str
        What its values are, what they run over, and what the rows of a heatmap are.
    run : str
    places : sequence
        What the values stand at.
    sentence : str
        How far they reach.
    """

    what: str
    over: str
    rows: str
    run: str
    places: Sequence[Any]
    sentence: str


def _told(trace: Figure) -> Told:
    meta, run = trace["meta"], html.unescape(trace["name"])
    if "value" in meta:
        reach = _reach_of_rows(meta["y"], trace["y"], _decoded(trace["z"]))
        return Told(meta["value"], meta["x"], meta["y"], run, trace["x"], reach)
    what, over = "y", "x"
    if trace.get("fill") == "tozerox":  # a profile, drawn upright
        what, over = over, what
    values = trace[what]
    reach = _reach(values, meta.get("lower bound", [False] * len(values)))
    return Told(meta[what], meta[over], "", run, trace[over], reach)


def _sentences(group: Sequence[Told]) -> str:
    what, over, rows = group[0][:3]
    places = [place for told in group for place in told.places]
    if all(isinstance(place, int | float) for place in places):
        places.sort()
    by = f" by {rows}" if rows else ""
    ends = dict.fromkeys([places[0], places[-1]]) if places else {}
    span = f", {' to '.join(map(str, ends))}" if ends else ""
    # A capital sigma would be another quantity.
    head = what[0].upper() + what[1:] if what.isascii() else what
    lines = [f"{head}{by} over {over}{span}."]
    lines += [f"{told.run}: {told.sentence}." for told in group[:TOLD]]
    if len(group) > TOLD:
        lines.append(f"And {len(group) - TOLD} more.")
    return " ".join(lines)


def _reach(values: Sequence[float | None], bounds: Sequence[bool]) -> str:
    known = [(v, unsure) for v, unsure in zip(values, bounds, strict=True) if v is not None]
    if not known:
        return NOTHING
    last, unsure = known[-1]
    told = f"{'at least ' * unsure}{_short(last)}"
    if len(known) == 1:
        return told
    return f"last {told}, from {_short(min(known)[0])} to {_short(max(known)[0])}"


def _reach_of_rows(name: str, rows: Sequence[Any], cells: np.ndarray) -> str:
    known = np.isfinite(cells)
    if not known.any():
        return NOTHING
    low, high = float(cells[known].min()), float(cells[known].max())
    row = _text(rows[int(np.where(known, cells, -np.inf).argmax()) // cells.shape[1]])
    return f"from {_short(low)} to {_short(high)}, highest in {name} {row}"


def _short(value: float) -> str:
    """Return a number in three digits, without powers of ten where they can be done without."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:.0f}" if 1000 <= abs(rounded) < 1e6 else f"{value:.3g}"
