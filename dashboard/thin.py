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
        Index of the middle of every block.
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


def _starts(length: int, limit: int) -> np.ndarray:
    """Return where equal blocks begin; unequal ones would show as stripes."""
    return np.arange(0, length, -(-length // limit) or 1)


def _middles(length: int, limit: int) -> np.ndarray:
    starts = _starts(length, limit)
    middles: np.ndarray = (starts + np.append(starts[1:], length) - 1) // 2
    return middles


def _sums(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    for axis, limit in enumerate((rows, columns)):
        if values.shape[axis]:
            values = np.add.reduceat(values, _starts(values.shape[axis], limit), axis=axis)
    return values
