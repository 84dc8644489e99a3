"""The controls of the page, kept in line with the runs there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from normuon_lens.analysis.measure import measure_all
from normuon_lens.analysis.settled import finite_median

from .link import Link
from .store import Entry, Store

NEWEST = 20
"""Recorded steps by which the first matrix to look at is chosen."""


class Controls(NamedTuple):
    """State of the page's controls.

    Attributes
    ----------
    known : list of str
        Ids of the runs that the page has offered so far.
    ticked : list of str or None
        Ids of the runs that are shown; None for all.
    matrix, stage : str or None
        None chooses one.
    step : int or None
        None follows the newest.
    """

    known: list[str]
    ticked: list[str] | None
    matrix: str | None
    stage: str | None
    step: int | None


def start(link: Link) -> Controls:
    """Return the controls as an address asks for them, before any run is known."""
    return Controls([], link.runs, link.matrix, link.stage, link.step)


def steered(store: Store, now: Controls) -> Controls:
    """Return the controls brought into line with the runs there are; new runs come ticked."""
    entries = [entry for entry in store.entries if entry.run is not None]
    ids = [entry.id for entry in entries]
    if not now.known:
        wanted = [name for name in ids if now.ticked is None or name in now.ticked] or ids
    else:
        wanted = [name for name in ids if name in (now.ticked or []) or name not in now.known]
    stages, steps = store.stages(), store.recorded_steps()
    return Controls(
        # A run without a step may yet change what there is to look at first; one that went is new
        # when it comes again.
        known=[e.id for e in store.entries if e.begun or e.id in now.known],
        ticked=wanted,
        matrix=now.matrix if now.matrix in store.matrices() else most_imbalanced(entries),
        stage=now.stage if now.stage in stages else stages[-1],
        step=None if now.step is None else min(max(now.step, steps[0]), steps[-1]),
    )


def most_imbalanced(entries: Sequence[Entry]) -> str | None:
    """Return the matrix whose neurons last moved most unevenly: the one to look at first."""
    found = [pair for entry in entries for pair in entry.once("newest", partial(_newest, entry))]
    return max(found, key=lambda pair: pair[1])[0] if found else None


def _newest(entry: Entry) -> list[tuple[str, float]]:
    """Return the matrices with their imbalance over the newest steps: little need be read."""
    run = entry.run
    assert run is not None
    after = int(run.steps[-NEWEST:][0]) - 1 if len(run.steps) else 0
    found = measure_all(run, ["neuron_cv"], after=after).get("neuron_cv")
    values = found.values.T if found else np.full((len(run.table), 0), np.nan)
    medians = [finite_median(column) for column in values]
    return [
        (name, 0.0 if math.isnan(median) else median)
        for name, median in zip(run.matrices, medians, strict=True)
    ]
