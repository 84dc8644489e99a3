"""Checksums of the numbers in a file, block by block: HDF5 has them for its structure only.

A flipped byte in a dataset would be read as just another number. So each file carries the CRC-32
of every block of rows in ``/digests``. Ordinary reading does not look at them; checking and
packing do, and merging, before anything is copied.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import h5py
import numpy as np

from normuon_lens.runfile.guard import reason_of
from normuon_lens.runfile.schema import fixed_strings, plain_strings

GROUP = "digests"
COLUMNS = ("path", "rows", "crc32")
BLOCK_BYTES = 128
"""A block is as many whole rows as fit in here, or one longer row: it is what a flip costs,
so that in the numbers of the steps it costs sixteen of them at most."""
MAX_BLOCK_ROWS = 1 << 16
"""Beyond this, a file of whatever version is lying."""
PIECE_BYTES = 32 << 20
"""Bytes read at a time."""


class Wrong(NamedTuple):
    """Rows from `start` until before `stop` that are not what was written, and why."""

    start: int
    stop: int
    reason: str


class Sums(NamedTuple):
    """Checksums of one dataset: rows of a block, and the CRC-32 of each block, uint32."""

    rows: int
    crc32: np.ndarray


CHANGED = "its checksum says otherwise"


def block_rows(array: Any) -> int:
    """Return how many rows of an array-like one block has."""
    return max(1, BLOCK_BYTES // max(1, _row_bytes(array)))


class Digests:
    """Checksums of datasets that are written piece by piece, in the order of their rows."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._sums: dict[str, list[int]] = {}
        self._filled: dict[str, int] = {}

    def add(self, dataset: str, piece: np.ndarray) -> None:
        """Count in the next rows of a dataset, in the dtype in which they are stored."""
        self._rows.setdefault(dataset, block_rows(piece))
        sums = self._sums.setdefault(dataset, [])
        data = _bytes_of(piece)
        block = self._rows[dataset] * max(1, len(data) // max(1, len(piece)))
        filled = self._filled.get(dataset, 0)
        at = 0
        while at < len(data):
            if not filled:
                sums.append(0)
            take = min(block - filled, len(data) - at)
            sums[-1] = zlib.crc32(data[at : at + take], sums[-1])
            at, filled = at + take, (filled + take) % block
        self._filled[dataset] = filled

    def write(self, file: h5py.File, filters: Mapping[str, Any]) -> None:
        """Write all checksums into ``/digests``, through these filters of h5py."""
        group = file.create_group(GROUP)
        table: tuple[np.ndarray, ...] = (
            fixed_strings(list(self._sums)),
            np.array(list(self._rows.values()), dtype=np.int64),
            np.array([crc for sums in self._sums.values() for crc in sums], dtype=np.uint32),
        )
        for name, column in zip(COLUMNS, table, strict=True):
            group.create_dataset(name, data=column, **(filters if column.size else {}))
        group.attrs["crc32"] = _crc_of(table)


def read_digests(file: h5py.File, datasets: Collection[str]) -> dict[str, Sums] | None:
    """Return the checksums of an open file.

    Parameters
    ----------
    file : h5py.File
    datasets : collection of str
        Those that may have some.

    Returns
    -------
    dict of str to Sums or None
        By dataset; None if the file was written before there were checksums.

    Raises
    ------
    ValueError
        If they are damaged themselves.
    """
    if GROUP not in file:
        return None
    table = [file[GROUP][name][()] for name in COLUMNS]
    if int(file[GROUP].attrs["crc32"]) != _crc_of(table):
        raise ValueError("they contradict themselves, so that none can be relied on")
    found: dict[str, Sums] = {}
    at = 0
    for path, rows in zip(plain_strings(table[0]), table[1].tolist(), strict=True):
        if path in found or path not in datasets or not 1 <= rows <= MAX_BLOCK_ROWS:
            raise ValueError("they are of other numbers")
        count = -(-len(file[path]) // rows) if file[path].nbytes else 0
        found[path] = Sums(rows, table[2][at : at + count])
        at += count
    if at != len(table[2]):
        raise ValueError("they are of other numbers")
    return found


def find_wrong(
    dataset: h5py.Dataset, sums: Sums | None, progress: Callable[[int], None] | None = None
) -> Iterator[Wrong]:
    """Read a dataset from end to end and yield what is wrong with it, neighbouring rows as one.

    Parameters
    ----------
    dataset : h5py.Dataset
    sums : Sums or None
        Its own, as :func:`read_digests` returned them; None: only what HDF5 itself checks.
    progress : callable, optional
        Called with the bytes that were read, piece by piece.
    """
    rows = sums.rows if sums else block_rows(dataset)
    current: Wrong | None = None
    for start, stop in _spans(dataset, rows):
        for flaw in _flaws_between(dataset, start, stop, rows, sums):
            if current and (current.stop, current.reason) == (flaw.start, flaw.reason):
                current = current._replace(stop=flaw.stop)
                continue
            if current:
                yield current
            current = flaw
        if progress:
            progress((stop - start) * _row_bytes(dataset))
    if current:
        yield current


def _flaws_between(
    dataset: h5py.Dataset, start: int, stop: int, rows: int, sums: Sums | None
) -> Iterator[Wrong]:
    """Yield the flawed blocks of one piece, which begins where a block does."""
    try:
        found = _read_sums(dataset, start, stop, rows)
    except Exception as error:  # HDF5 raises whatever it likes of damaged chunks
        if stop - start > rows:
            for at in range(start, stop, rows):
                yield from _flaws_between(dataset, at, min(at + rows, stop), rows, sums)
        else:
            yield Wrong(start, stop, reason_of(error))
        return
    if sums is None:
        return
    written = sums.crc32[start // rows : start // rows + len(found)]
    for block in np.flatnonzero(found != written).tolist():
        at = start + block * rows
        yield Wrong(at, min(at + rows, stop), CHANGED)


def _spans(dataset: h5py.Dataset, rows: int) -> Iterator[tuple[int, int]]:
    """Cut a dataset into pieces of whole blocks and, where it has chunks, of whole chunks."""
    chunk = dataset.chunks[0] if dataset.chunks else 1
    whole = math.lcm(rows, chunk) if rows > 1 else chunk
    count = max(1, PIECE_BYTES // max(1, whole * _row_bytes(dataset))) * whole
    for start in range(0, len(dataset) if dataset.nbytes else 0, count):
        yield start, min(start + count, len(dataset))


def _read_sums(dataset: h5py.Dataset, start: int, stop: int, rows: int) -> np.ndarray:
    """Read rows and return the checksums of their blocks; long rows a part at a time."""
    count = -(-(stop - start) // rows)
    found = [0] * count
    if rows > 1 or dataset.ndim == 1:
        data = _bytes_of(dataset[start:stop])
        block = rows * _row_bytes(dataset)
        found = [zlib.crc32(data[i * block : (i + 1) * block]) for i in range(count)]
        return np.array(found, dtype=np.uint32)
    width = dataset.shape[1]
    column_bytes = max(1, (stop - start) * _row_bytes(dataset) // width)
    chunk = dataset.chunks[1] if dataset.chunks else 1
    part = max(chunk, PIECE_BYTES // column_bytes // chunk * chunk)
    for low in range(0, width, part):
        piece = np.ascontiguousarray(dataset[start:stop, low : low + part])
        for i, row in enumerate(piece):
            found[i] = zlib.crc32(_bytes_of(row), found[i])
    return np.array(found, dtype=np.uint32)


def _row_bytes(array: Any) -> int:
    return int(math.prod(array.shape[1:]) * array.dtype.itemsize)


def _bytes_of(array: np.ndarray) -> memoryview:
    """Return an array's bytes in C order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _crc_of(table: Sequence[np.ndarray]) -> int:
    crc = 0
    for column in table:
        crc = zlib.crc32(_bytes_of(column), crc)
    return crc
