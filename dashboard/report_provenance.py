"""Where a report comes from: each recording, how it was made, and what is wrong with it."""

from __future__ import annotations

import datetime

import numpy as np

from normuon_lens.analysis.remarks import remarks
from normuon_lens.runfile import Run

from .report_parts import Block, Cell, Facts, Key, Prose, Table
from .store import Entry, Store
from .words import NONE, count, inert, named, percent, sentence, setting, settings, size

OVERHEAD = "recording_overhead"
"""The recorder's own scalar: its time relative to the rest of the training so far."""

UNTOLD = {"optimizer", "name", "notes", "groups", "schedule", "versions", "created", "shadow_of"}
"""Metadata with a place of its own; the rest is told as it is."""

OTHERWISE = {"parameters": "weights", "world_size": "ranks"}
"""What some of it is called where people read it."""

WARNINGS = 12
"""What is told of one run that something is wrong with it, at most."""


def provenance_blocks(store: Store, keys: dict[str, Key]) -> tuple[Block, ...]:
    """Return a table of the recordings, and then each of them with all that is known of it."""
    known = [entry for entry in store.entries if entry.run is not None]
    return (
        Prose(
            "What was recorded, by what, and what is missing of it. Void steps moved nothing; "
            "dropped samples are those that the recorder had to let go so as not to hold up the "
            "training; the overhead is its time relative to the rest."
        ),
        _recordings(known, keys),
        *(_facts(entry, keys[entry.id]) for entry in known),
    )


def _recordings(entries: list[Entry], keys: dict[str, Key]) -> Table:
    columns = ("run", "optimizer", "status", "steps", "sampled", "void", "dropped", "repeated")
    rows = []
    for entry in entries:
        run = entry.run
        assert run is not None
        counts = [len(run.steps), len(run.spectrum_steps()), int(run.void.sum())]
        cells = [Cell(f"{number:,}") for number in (*counts, run.dropped, run.overlaps)]
        texts = [Cell(keys[entry.id].name), Cell(named(run.optimizer)), Cell(sentence(run.status))]
        rows.append((*texts, *cells, Cell(percent(overhead(run)))))
    return Table("Recordings", (*columns, "overhead"), tuple(rows), texts=3)


def overhead(run: Run) -> float:
    """Return the cost of recording as a share of the training's time; NaN if it was not kept."""
    values = run.scalars.get(OVERHEAD, np.empty(0))
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else float("nan")


def _facts(entry: Entry, key: Key) -> Facts:
    run = entry.run
    assert run is not None
    about = run.metadata
    rows = [("file", _file(entry)), ("recorded", _when(run)), ("steps", _steps(run))]
    rows += [("shadow of", setting(about["shadow_of"]))] if about.get("shadow_of") else []
    rows += [
        (OTHERWISE.get(name, name), text)
        for name, text in settings(about).items()
        if name not in UNTOLD
    ]
    rows += [("matrices", _matrices(run)), ("stages", ", ".join(run.stages) or NONE)]
    groups = about.get("groups")
    for number, group in enumerate(groups if isinstance(groups, list) else [], start=1):
        told = settings(group)
        head = told.pop("optimizer", named(run.optimizer))
        rows.append((f"group {number}", f"{head}: {_pairs(told)}" if told else head))
    rows.append(("learning rate", _learning_rate(run)))
    rows.append(("recorded every", _pairs(settings(about.get("schedule"))) or NONE))
    rows.append(("recording overhead", percent(overhead(run))))
    rows.append(("versions", _pairs(settings(about.get("versions")), " ") or NONE))
    rows += [("notes", setting(about["notes"]))] if about.get("notes") else []
    said = [sentence(text) for text in remarks(run, entry.series("update_error", "update"))]
    more = len(said) - WARNINGS
    return Facts(
        key,
        tuple((inert(name), text) for name, text in rows),
        (*said[:WARNINGS], *([f"and {more} more remarks"] if more > 0 else [])),
    )


def _file(entry: Entry) -> str:
    """Return name and size; the folder would tell strangers about the machine it was on."""
    try:
        return f"{named(entry.path.name)}, {size(entry.path.stat().st_size)}"
    except OSError:
        return f"{named(entry.path.name)}, in parts"


def _when(run: Run) -> str:
    created = run.metadata.get("created")
    if not isinstance(created, int | float):
        created = float(run.times[0]) if len(run.times) else None
    try:
        begun = datetime.datetime.fromtimestamp(created or 0, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        return NONE
    return f"{begun:%Y-%m-%d %H:%M} UTC" if created else NONE


def _steps(run: Run) -> str:
    if not len(run.steps):
        return "none"
    span = f"{int(run.steps[0]):,} to {int(run.steps[-1]):,}"
    return f"{span}, spectra at {count(len(run.spectrum_steps()), 'step')}"


def _matrices(run: Run) -> str:
    weights = sum(matrix.m * matrix.n for matrix in run.table)
    dtypes = ", ".join(dict.fromkeys(named(matrix.dtype) for matrix in run.table))
    if not len(run.table):
        return "none"
    return f"{len(run.table):,}, of {weights:,} weights together, {dtypes}"


def _learning_rate(run: Run) -> str:
    values = run.scalars.get("lr", np.empty(0))
    values = values[np.isfinite(values)]
    if not len(values):
        return NONE
    first, top, last = float(values[0]), float(values.max()), float(values[-1])
    if first == top == last:
        return f"{first:.4g}"
    middle = "" if top in (first, last) else f", {top:.4g} at most"
    return f"{first:.4g} at first{middle}, {last:.4g} at last"


def _pairs(given: dict[str, str], between: str = "=") -> str:
    """Return names and values in a line, without what is switched off."""
    return ", ".join(f"{name}{between}{text}" for name, text in given.items() if text != "false")
