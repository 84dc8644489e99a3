"""What a run is put together from: sources, each a table of records that is read on demand.

A source is one file, or one attempt of several ranks that looks like one file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from normuon_lens.runfile.digests import GROUP
from normuon_lens.runfile.flaws import Flaw, flaws_of, size_of
from normuon_lens.runfile.guard import damage, open_guarded
from normuon_lens.runfile.manifest import FINISHED
from normuon_lens.runfile.schema import HOLE, Event, Matrices
from normuon_lens.runfile.segment import (
    Segment,
    check_layout,
    check_steps,
    read_matrices,
    read_metadata,
    read_segment,
    without_rows,
)


class Damage(NamedTuple):
    """A segment that could not be read: its path, the steps it held, and why."""

    path: Path
    steps: tuple[int, int] | None
    reason: str


class Hole(NamedTuple):
    """Recorded steps, from the first to the last of a range, that lack what one rank recorded.

    Attributes
    ----------
    rank : int
    steps : tuple of (int, int)
        First and last of consecutive recorded steps.
    reason : str
        Such as ``"no files of this rank"``.
    """

    rank: int
    steps: tuple[int, int]
    reason: str

    @property
    def text(self) -> str:
        """The hole in one line."""
        return f"rank {self.rank}: steps {self.steps[0]}–{self.steps[1]}: {self.reason}"


_TEXT = re.compile(r"rank (\d{1,7}): steps (-?\d{1,18})–(-?\d{1,18}): (.*)", re.DOTALL | re.ASCII)


class Lack(NamedTuple):
    """Rows of a source that lack what one rank recorded: (T,) bool, and why."""

    rank: int
    rows: np.ndarray
    reason: str


class Source(Protocol):
    """Records of one file, or of what can be read like one.

    Attributes
    ----------
    path : Path
    metadata : dict
    matrices : Matrices
    events : list of Event
    scalars : dict of str to ndarray of shape (T,)
    paths : set of str
        Of all datasets.
    index : dict of str to ndarray
        The short ones, in memory: never neurons, sigma or matrices.
    later : ndarray of int64
        Steps that a later attempt of several ranks recorded again: samples of them count no more.
    """

    path: Path
    metadata: dict[str, Any]
    matrices: Matrices
    events: list[Event]
    scalars: dict[str, np.ndarray]
    paths: set[str]
    index: dict[str, np.ndarray]
    later: np.ndarray

    @property
    def rows(self) -> int:
        """Recorded steps T."""
        ...

    @property
    def lacks(self) -> Sequence[Lack]:
        """What ranks did not record."""
        ...

    @property
    def size(self) -> int:
        """Bytes that :meth:`flaws` reads."""
        ...

    @property
    def has_digests(self) -> bool:
        """Whether all of it has checksums."""
        ...

    def flaws(self, progress: Callable[[int], None] | None = None) -> Iterator[Flaw]:
        """Read everything once and yield what is wrong."""
        ...

    def read(self, path: str, at: tuple[Any, ...]) -> np.ndarray:
        """Read part of a dataset; RunError when the disk or a file refuses."""
        ...

    def segment(self) -> Segment:
        """Return all records, to be copied piece by piece."""
        ...


class File:
    """One immutable file of a run: its small index in memory, its data read on demand.

    The file stays open, so that it can still be read after it was merged into another.

    Parameters
    ----------
    path : Path

    Attributes
    ----------
    left_out : list of Flaw
        What :meth:`segment` goes without.

    Raises
    ------
    RunError
        If it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_guarded(path)
        with damage(path):
            if "shard" in self._file:
                raise ValueError("it holds what one of several ranks recorded")
            self.metadata = read_metadata(self._file)
            self.matrices = read_matrices(self._file)
            segment = read_segment(self._file)
            check_layout(segment, self.matrices)
            self.status = bytes(self._file.attrs.get("status", FINISHED.encode())).decode()
            self.dropped = int(self._file.attrs.get("dropped", 0))
            self.index = {
                name: array[()]
                for name, array in segment.arrays.items()
                if array.ndim == 1 or name.endswith(("/floor", "/weight_norm", "/decay"))
            }
            check_steps(self.index)
        self.events = segment.events
        self.scalars = segment.scalars
        self.paths = set(segment.arrays)
        self.later = np.empty(0, np.int64)
        self.left_out: list[Flaw] = []

    @property
    def rows(self) -> int:
        """Recorded steps T."""
        return len(self.index["steps/step"])

    @property
    def lacks(self) -> list[Lack]:
        """What ranks had not recorded when this file was packed, as its events say."""
        steps, lacks = self.index["steps/step"], []
        for event in self.events:
            if event.kind == HOLE and (said := _TEXT.fullmatch(event.text)):
                rows = (steps >= int(said[2])) & (steps <= int(said[3]))
                lacks.append(Lack(int(said[1]), rows, said[4]))
        return lacks

    def read(self, path: str, at: tuple[Any, ...]) -> np.ndarray:
        """Read part of a dataset; RunError when the disk or the file refuses."""
        with damage(self.path, path):
            values: np.ndarray = self._file[path][at]
        return values

    @property
    def size(self) -> int:
        """Bytes that :meth:`flaws` reads."""
        return size_of(self._file, self.paths)

    @property
    def has_digests(self) -> bool:
        """Whether it has checksums."""
        return GROUP in self._file

    def flaws(self, progress: Callable[[int], None] | None = None) -> Iterator[Flaw]:
        """Read everything once and yield what is wrong."""
        return flaws_of(self._file, self.path, self.paths, self.matrices, progress)

    def segment(self) -> Segment:
        """Return all records but those left out; arrays are the datasets of the open file."""
        lost: dict[str, np.ndarray] = {}
        for flaw in self.left_out:
            lost[flaw.dataset] = np.union1d(lost.get(flaw.dataset, []), np.arange(*flaw.rows))
        with damage(self.path):
            segment = read_segment(self._file)
            return without_rows(segment, lost) if lost else segment


def holes_of(sources: Sequence[Source], steps: np.ndarray, order: np.ndarray) -> list[Hole]:
    """Return what the ranks lack of the steps that count.

    Parameters
    ----------
    sources : sequence of Source
    steps : ndarray of shape (T,), int64
        Recorded steps, ascending, each once.
    order : ndarray of shape (T,), int64
        Of each step, the row that counts among the rows of all sources one after another.

    Returns
    -------
    list of Hole
        By rank, then by step.
    """
    lacking: dict[tuple[int, str], np.ndarray] = {}
    first = 0
    for source in sources:
        here = np.flatnonzero((order >= first) & (order < first + source.rows))
        for rank, rows, reason in source.lacks:
            lacks = lacking.setdefault((rank, reason), np.zeros(len(steps), dtype=bool))
            lacks[here] |= rows[order[here] - first]
        first += source.rows
    holes = []
    for (rank, reason), lacks in lacking.items():
        edges = np.flatnonzero(np.diff(np.concatenate([[0], lacks.astype(np.int8), [0]])))
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            holes.append(Hole(rank, (int(steps[start]), int(steps[stop - 1])), reason))
    return sorted(holes)
