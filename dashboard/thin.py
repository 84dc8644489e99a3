"""Fewer points than the screen can show are sent, and none that a reader would miss."""

from itertools import pairwise

import numpy as np

POINTS = 2000
"""Points of a line: twice the pixels of a wide panel."""
COLUMNS, ROWS = 320, 160
"""Cells of a heatmap: about its pixels when three stand side by side."""


def extremes(values: np.ndarray, limit: int = POINTS) -> np.ndarray:
    """Return the indices to draw of a line: the lowest and highest of every block, and both ends.

    Parameters
    ----------
    values : ndarray of shape (T,)
        NaN counts as neither low nor high.
    limit : int
        At most about so many indices; all of them if T is no larger.

    Returns
    -------
    ndarray of int64
        Ascending.
    """
    if len(values) <= limit:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), limit // 2 + 1).astype(int)
    known = np.isfinite(values)
    low = np.where(known, values, np.inf)
    high = np.where(known, values, -np.inf)
    kept = [0, len(values) - 1]
    for start, stop in pairwise(edges.tolist()):
        kept += [start + int(low[start:stop].argmin()), start + int(high[start:stop].argmax())]
    return np.unique(kept)


def blocks(
    values: np.ndarray, rows: int = ROWS, columns: int = COLUMNS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a heatmap of at most `rows` × `columns` cells, each the RMS of its block.

    A mean would average a lone bright cell away, a stride would miss it.

    Parameters
    ----------
    values : ndarray of shape (R, T)
        NaN is left out of its block.

    Returns
    -------
    values : ndarray of shape (R', T'), float32
        As given where it is small enough.
    row, column : ndarray of int64, shapes (R',) and (T',)
        Index near the middle of every block, evenly spaced.
    """
    row, column = _middles(values.shape[0], rows), _middles(values.shape[1], columns)
    if (len(row), len(column)) == values.shape:
        return values.astype(np.float32), row, column
    known = np.isfinite(values)
    squares = np.where(known, values, 0.0) ** 2
    total, count = _sums(squares, rows, columns), _sums(known.astype(np.float64), rows, columns)
    mean = np.full(total.shape, np.nan)
    np.divide(total, count, out=mean, where=count > 0)
    return np.sqrt(mean).astype(np.float32), row, column


def evenly(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a heatmap with a blank column at every step that was left out between others.

    A void step or a dropped sample would else be painted over by its neighbours, and Plotly takes
    three times as long over unevenly spaced columns.

    Parameters
    ----------
    steps : ndarray of int64, shape (T,)
        Ascending.
    values : ndarray of shape (R, T)

    Returns
    -------
    steps, values : ndarray
        As given where they are even already, or where a quarter of the columns would be blank.
    """
    gaps = np.diff(steps)
    every = int(gaps.min()) if len(gaps) else 1
    columns = np.concatenate([[0], gaps.cumsum()]) // every
    total = int(columns[-1]) + 1
    if not len(steps) or (gaps % every).any() or not len(steps) < total <= 1.25 * len(steps):
        return steps, values
    filled = np.full((len(values), total), np.nan, dtype=values.dtype)
    filled[:, columns] = values
    return steps[0] + every * np.arange(total), filled


def blocks_note(
    given: tuple[int, int],
    shown: tuple[int, int],
    names: tuple[str, str] = ("neurons", "steps"),
) -> str:
    """Return a sentence on what a cell of `blocks` stands for; empty where nothing was joined.

    Parameters
    ----------
    given, shown : (int, int)
        Shapes before and after.
    names : (str, str)
        What rows and columns are, in the plural.
    """
    sides = [-(-full // max(few, 1)) for full, few in zip(given, shown, strict=True)]
    joined = [f"{side} {name}" for side, name in zip(sides, names, strict=True) if side > 1]
    if not joined:
        return ""
    return f"Each cell is the RMS of {' × '.join(joined)}; zoom in to see all."


def _starts(length: int, limit: int) -> np.ndarray:
    """Return where equal blocks begin; unequal ones would show as stripes."""
    return np.arange(0, length, -(-length // limit) or 1)


def _middles(length: int, limit: int) -> np.ndarray:
    """Return a place in every block: its middle, or nearer to its start if the last has none.

    Evenly spaced in any case: Plotly takes three times as long over uneven cells.
    """
    starts = _starts(length, limit)
    if not length:
        return starts
    block = int(starts[1]) if len(starts) > 1 else length
    middles: np.ndarray = starts + min((block - 1) // 2, length - 1 - int(starts[-1]))
    return middles


def _sums(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    for axis, limit in enumerate((rows, columns)):
        if values.shape[axis]:
            values = np.add.reduceat(values, _starts(values.shape[axis], limit), axis=axis)
    return values
