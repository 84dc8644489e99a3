"""The names in a run file, and the table of matrices that gives every column its meaning.

One concatenated block per quantity: the row norms of all matrices stand side by side in one
``(steps, Σm)`` dataset, their singular values in one ``(steps, Σk)``. The table says which
columns belong to which matrix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from normuon_lens.errors import RunError

FORMAT = "normuon-lens"
SCHEMA = 1
LIBVER = ("v110", "v110")
"""HDF5 1.10's format: ``'latest'`` would be unreadable for HDF5 1.12 and 1.14."""

STAGES = ("gradient", "momentum", "orthogonalized", "normalized", "update")
"""Where along the optimizer a matrix is taken, in the order in which it passes through them."""

MAX_JSON = 60_000
"""Bytes of one JSON attribute: HDF5 keeps attributes up to 64 KiB in the object header."""


HOLE = "hole"
"""Kind of the events by which a packed file says what its ranks did not record."""


class Event(NamedTuple):
    """Something that happened to the recording: a dropped sample, a failure, a resumption."""

    step: int
    kind: str
    text: str


@dataclass(frozen=True)
class Matrix:
    """One recorded weight matrix of shape (m, n); its m neurons are its rows.

    Attributes
    ----------
    name : str
        The parameter's name in the model, without a trailing ``.weight``.
    m, n : int
        Rows (output neurons) and columns; a convolution counts as (out_channels, rest).
    dtype : str
        The weight's dtype in the training, such as ``"float32"``.
    group : int
        Index of its parameter group, counted through all optimizers.
    """

    name: str
    m: int
    n: int
    dtype: str = "float32"
    group: int = 0

    @property
    def k(self) -> int:
        """Number of singular values, min(m, n)."""
        return min(self.m, self.n)


class Matrices(Sequence[Matrix]):
    """The table of matrices of a run, in model order, with the columns of each."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self._matrices = tuple(matrices)
        self._index = {matrix.name: i for i, matrix in enumerate(self._matrices)}
        if len(self._index) != len(self._matrices):
            raise RunError("two matrices of one run carry the same name")
        self._rows = np.cumsum([0, *(matrix.m for matrix in self._matrices)])
        self.widths = np.array([matrix.k for matrix in self._matrices], dtype=np.int64)
        """(M,) int64: how many singular values each has."""
        self._sigmas = np.cumsum([0, *self.widths])

    def __getitem__(self, i: Any) -> Any:
        return self._matrices[i]

    def __len__(self) -> int:
        return len(self._matrices)

    def __iter__(self) -> Iterator[Matrix]:
        return iter(self._matrices)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Matrices) and self._matrices == other._matrices

    def __hash__(self) -> int:
        return hash(self._matrices)

    @cached_property
    def names(self) -> list[str]:
        """The names, in model order."""
        return [matrix.name for matrix in self._matrices]

    @property
    def total_rows(self) -> int:
        """Σm: columns of a ``/neurons`` block."""
        return int(self._rows[-1])

    @property
    def total_sigmas(self) -> int:
        """Σk: columns of a ``/spectra`` block."""
        return int(self._sigmas[-1])

    def index(self, name: object, start: int = 0, stop: int | None = None) -> int:
        """Return the position of the matrix called `name`; KeyError if there is none."""
        return self._index[str(name)]

    def rows(self, i: int) -> slice:
        """Columns of matrix `i` in a ``/neurons`` block."""
        return slice(int(self._rows[i]), int(self._rows[i + 1]))

    def sigmas(self, i: int) -> slice:
        """Columns of matrix `i` in a ``/spectra`` block."""
        return slice(int(self._sigmas[i]), int(self._sigmas[i + 1]))


@dataclass(frozen=True)
class Shard:
    """What one rank records of a training's matrices.

    Attributes
    ----------
    rank : int
        Its global rank, the number in its folder's name.
    ranks : tuple of int
        All ranks that record this attempt, ascending; the first one is the lead.
    attempt : int or None
        The how many-th start of this recording, from 0; None: the writer is to choose, which only
        the lead's may.
    rows : dict of str to tuple of (int, int, int)
        By stage, for each matrix (start, stop, parts): this rank records the norms of the neurons
        start…stop, of none if the two are equal. With parts > 1 it records the norm over its own
        inputs only: so many ranks do, and the whole norm is the root of the sum of their squares.
    """

    rank: int
    ranks: tuple[int, ...]
    attempt: int | None
    rows: dict[str, tuple[tuple[int, int, int], ...]]

    @property
    def lead(self) -> bool:
        """Whether this is the rank that decides for all."""
        return self.rank == self.ranks[0]

    @property
    def folder(self) -> str:
        """Name of its folder within the parts; of attempt 0 while none is chosen."""
        return rank_folder(self.rank, self.attempt or 0)

    def columns(self, stage: str, i: int) -> slice:
        """Columns of matrix `i` in this rank's ``/neurons`` block; KeyError for another stage."""
        bounds = self._bounds[stage]
        return slice(int(bounds[i]), int(bounds[i + 1]))

    def total(self, stage: str) -> int:
        """Columns of this rank's ``/neurons`` block; KeyError for another stage."""
        return int(self._bounds[stage][-1])

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` makes the same shard of."""
        return {
            "rank": self.rank,
            "ranks": list(self.ranks),
            "attempt": self.attempt,
            "rows": {stage: [list(row) for row in rows] for stage, rows in self.rows.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Shard:
        """Undo :meth:`to_json`."""
        rows = {
            stage: tuple((int(start), int(stop), int(parts)) for start, stop, parts in of_stage)
            for stage, of_stage in content["rows"].items()
        }
        return cls(content["rank"], tuple(content["ranks"]), content["attempt"], rows)

    @cached_property
    def _bounds(self) -> dict[str, np.ndarray]:
        return {
            stage: np.cumsum([0, *(stop - start for start, stop, _ in rows)])
            for stage, rows in self.rows.items()
        }


RANK_FOLDER = re.compile(r"rank(\d{5,7})(?:\.attempt([1-9]\d{0,5}))?", re.ASCII)


def rank_folder(rank: int, attempt: int) -> str:
    """Return the name of the folder in which a rank records one attempt."""
    return f"rank{rank:05d}" + (f".attempt{attempt}" if attempt else "")


def parts_of(path: Path) -> Path:
    """Return the folder of segments that belongs to the recording at `path`."""
    return path.with_name(path.name + ".parts")


def rank_folders(parts: Path) -> dict[int, dict[int, Path]]:
    """Return the folders of ranks in `parts`: by attempt, then by rank, both ascending.

    Only what lies in `parts` itself: links are told apart by whoever opens them.
    """
    found: dict[int, dict[int, Path]] = {}
    names = sorted(path.name for path in parts.iterdir()) if parts.is_dir() else []
    for name in names:
        match = RANK_FOLDER.fullmatch(name)
        if match and name == rank_folder(rank := int(match[1]), attempt := int(match[2] or 0)):
            found.setdefault(attempt, {})[rank] = parts / name
    return {attempt: dict(sorted(found[attempt].items())) for attempt in sorted(found)}


def to_json(metadata: Mapping[str, Any]) -> bytes:
    """Serialise run metadata for an attribute; RunError when it exceeds :data:`MAX_JSON`."""
    text = json.dumps(metadata, default=str, separators=(",", ":")).encode()
    if len(text) > MAX_JSON:
        raise RunError(
            f"run metadata takes {len(text)} bytes, the limit is {MAX_JSON}: shorten the notes"
        )
    return text


def fixed_strings(texts: Sequence[str]) -> np.ndarray:
    """Return UTF-8 fixed-length strings: nothing variable-length is stored in a run file."""
    encoded = [text.encode() for text in texts]
    width = max((len(text) for text in encoded), default=1) or 1
    return np.array(encoded, dtype=f"S{width}")


def plain_strings(stored: np.ndarray) -> list[str]:
    """Undo :func:`fixed_strings`; undecodable bytes are shown, not raised."""
    return [printable(bytes(text).decode(errors="replace")) for text in stored]


def printable(text: str) -> str:
    """Return a text with "?" for what would command a terminal or turn its neighbours round."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)
