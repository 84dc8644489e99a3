"""Every matrix in every run at a glance: which are worst, and since when."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np

from normuon_lens.analysis.settled import is_bound, settled

from .store import Entry

HISTORY = 40
"""Points of a sparkline, at most."""

WIDTH, HEIGHT = 100.0, 20.0
"""The box that a sparkline is drawn in."""

TRUSTED = 0.1
"""Where rounding makes more than this of an update, no figure of it can be trusted."""


class Cell(NamedTuple):
    """One matrix in one run, NaN where there is no such figure.

    Attributes
    ----------
    condition, cv, starved : float
        Medians over the settled steps: condition number, CV of the neuron norms, and how many of
        the m neurons are starved.
    is_bound : bool
        Whether most of its condition numbers are lower bounds, and so is their median.
    history : tuple of float
        The CV over all steps in at most `HISTORY` points, each the highest of its block.
    not_finite : int
        Recorded steps at which the update of a neuron was infinite or not a number.
    trusted : bool
        False where rounding makes more of the update than `TRUSTED`: no verdict on such a matrix.
    """

    condition: float
    is_bound: bool
    cv: float
    starved: float
    history: tuple[float, ...]
    not_finite: int
    trusted: bool


class MatrixRow(NamedTuple):
    """One matrix (m, n) in all runs; None in a run that has no such matrix."""

    name: str
    m: int
    n: int
    cells: tuple[Cell | None, ...]


def overview(entries: Sequence[Entry], stage: str) -> list[MatrixRow]:
    """Return the table of all matrices of some readable runs, in model order.

    Matrices are one where name and shape agree: runs may be of different models.
    """
    tables = [
        {(matrix.name, matrix.m, matrix.n): cell for matrix, cell in zip(*found, strict=True)}
        for found in ((entry.run.table, cells_of(entry, stage)) for entry in entries if entry.run)
    ]
    matrices = dict.fromkeys(matrix for table in tables for matrix in table)
    return [MatrixRow(*matrix, tuple(table.get(matrix) for table in tables)) for matrix in matrices]


def cells_of(entry: Entry, stage: str) -> list[Cell]:
    """Return one cell a matrix of a readable run, in model order."""
    return entry.once(("cells", stage), partial(_measured, entry, stage))


def _measured(entry: Entry, stage: str) -> list[Cell]:
    assert entry.run is not None
    sizes = np.array([matrix.m for matrix in entry.run.table])
    condition = settled(entry.series("condition_number", stage))
    bound = settled(entry.series("condition_is_lower_bound", stage))
    evenness = entry.series("neuron_cv", stage)
    broken = entry.series("neuron_not_finite", stage).values
    of = {
        "condition": medians(condition),
        "cv": medians(settled(evenness)),
        "starved": medians(settled(entry.series("neuron_starved", stage))) * sizes,
        "error": medians(settled(entry.series("update_error", stage))),
    }
    history = thinned(evenness.values)
    return [
        Cell(
            condition=float(of["condition"][i]),
            is_bound=is_bound(condition[:, i], bound[:, i]),
            cv=float(of["cv"][i]),
            starved=float(of["starved"][i]),
            history=tuple(history[:, i].tolist()),
            not_finite=int((broken[:, i] > 0).sum()),
            trusted=not of["error"][i] > TRUSTED,
        )
        for i in range(len(sizes))
    ]


def medians(values: np.ndarray) -> np.ndarray:
    """Return the medians (M,) of what is finite in the columns of values (T, M); NaN of nothing.

    All columns at once, which is several times as fast as one by one.
    """
    if not len(values):
        return np.full(values.shape[1], np.nan)
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    ordered = np.sort(np.where(finite, values, np.inf).T, axis=1)
    every = np.arange(len(count))
    low, high = ordered[every, (count - 1) // 2], ordered[every, count // 2]
    return np.where(count > 0, 0.5 * low + 0.5 * high, np.nan)


def thinned(values: np.ndarray, limit: int = HISTORY) -> np.ndarray:
    """Return the highest values (T', M) of at most `limit` equal blocks of steps (T, M).

    A median would hide the one step that went wrong. NaN only where a whole block is.
    """
    starts = np.unique(np.linspace(0, len(values), limit, endpoint=False).astype(int))
    if not len(values):
        return values
    highest: np.ndarray = np.fmax.reduceat(values, starts, axis=0)
    return highest


def sparkline(values: Sequence[float], *, top: float) -> str:
    """Return the path of an SVG line through values from 0 to `top`, in a box of 100 × 20.

    NaN breaks the line; a value on its own is a dot, which shows if the line's ends are round.
    What exceeds `top` runs along the upper edge.
    """
    heights = np.clip(np.asarray(values, dtype=np.float64) / top, 0.0, 1.0)
    across = np.linspace(0.0, WIDTH, len(heights)) if len(heights) > 1 else [WIDTH / 2]
    points = [
        "" if np.isnan(height) else f"{x:.1f} {HEIGHT * (1.0 - height):.1f}"
        for x, height in zip(across, heights, strict=False)
    ]
    lines = [list(line) for known, line in groupby(points, key=bool) if known]
    return "".join(f"M{line[0]}L{' L'.join(line[1:] or line)}" for line in lines)
