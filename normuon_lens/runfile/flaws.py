"""What is wrong with the numbers of a file, found by reading all of them.

Opening a file only shows whether its structure is whole. Here every block is read and held
against its checksum, and what is wrong is told by quantity and step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from normuon_lens.runfile.digests import find_wrong, read_digests
from normuon_lens.runfile.guard import reason_of
from normuon_lens.runfile.schema import Matrices
from normuon_lens.runfile.segment import SCALAR_FIELDS, small_datasets, steps_index

FOR_ALL = ("matrices/", "shard/", SCALAR_FIELDS[0])
"""What these datasets say is said of all steps."""


class Flaw(NamedTuple):
    """Rows of a dataset that can be read no more, or are not what was written.

    Attributes
    ----------
    path : Path
        Of the file.
    dataset : str
        Such as ``neurons/update``; empty for the checksums themselves.
    rows : tuple of (int, int)
        From the first until before the second.
    steps : tuple of (int, int) or None
        Of these rows, where rows have any.
    what : str
        What it is, in words.
    reason : str
    """

    path: Path
    dataset: str
    rows: tuple[int, int]
    steps: tuple[int, int] | None
    what: str
    reason: str

    @property
    def can_go(self) -> bool:
        """Whether the rest means the same without it."""
        return bool(self.dataset) and not self.dataset.startswith(FOR_ALL)

    @property
    def text(self) -> str:
        """The flaw in one line."""
        span = ""
        if self.steps:
            first, last = self.steps
            span = f", step {first}" if first == last else f", steps {first}–{last}"
        elif self.rows[1] > self.rows[0] + 1:
            span = f", rows {self.rows[0]}–{self.rows[1] - 1}"
        elif self.rows[1]:
            span = f", row {self.rows[0]}"
        return f"{self.path.name}: damaged in {self.what}{span}: {self.reason}"


def flaws_of(
    file: h5py.File,
    path: Path,
    datasets: Collection[str],
    matrices: Matrices,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Flaw]:
    """Read every number of an open file once and yield what is wrong with them.

    Parameters
    ----------
    file : h5py.File
    path : Path
        Its own.
    datasets : collection of str
        Those with records.
    matrices : Matrices
        Its table.
    progress : callable, optional
        Called with the bytes that were read, piece by piece.
    """
    known = [*small_datasets(file), *SCALAR_FIELDS, *sorted(datasets)]
    try:
        digests = read_digests(file, known) or {}
    except Exception as error:  # a table that is no table may raise anything
        yield Flaw(path, "", (0, 0), None, "its checksums", reason_of(error))
        digests = {}
    for name in known:
        for start, stop, reason in find_wrong(file[name], digests.get(name), progress):
            steps = _steps_of(file, name, start, stop, matrices)
            yield Flaw(path, name, (start, stop), steps, _in_words(name, matrices), reason)


def size_of(file: h5py.File, datasets: Collection[str]) -> int:
    """Return how many bytes :func:`flaws_of` reads."""
    known = [*small_datasets(file), *SCALAR_FIELDS, *datasets]
    return sum(file[name].nbytes for name in known)


def _steps_of(
    file: h5py.File, name: str, start: int, stop: int, matrices: Matrices
) -> tuple[int, int] | None:
    """Return the first and the last step of some rows; None where they cannot be told."""
    if name.startswith((*FOR_ALL, "events/")) or name == steps_index(name):
        return None
    first, last = start, stop - 1
    try:
        if name.startswith("samples/") and name.endswith("/sigma"):
            of = file[f"{name.rpartition('/')[0]}/matrix"][()]
            ends = np.cumsum(matrices.widths[of])
            first, last = np.searchsorted(ends, (first, last), side="right").tolist()
        steps = file[steps_index(name)]
        return int(steps[first]), int(steps[last])
    except Exception:  # they are damaged too
        return None


def _in_words(name: str, matrices: Matrices) -> str:
    kind, _, rest = name.partition("/")
    if kind == "neurons":
        return f"{name} (row norms)"
    if kind == "updates":
        number = rest.partition("/")[2].partition("_")[0]
        return f"{name} (full matrix {matrices[int(number)].name!r})"
    return name
