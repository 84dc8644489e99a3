"""The names in a run file, and the table of matrices that gives every column its meaning.

One concatenated block per quantity: the row norms of all matrices stand side by side in one
``(steps, Σm)`` dataset, their singular values in one ``(steps, Σk)``. The table says which
columns belong to which matrix.
"""

from __future__ import annotations

import json
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
        self._sigmas = np.cumsum([0, *(matrix.k for matrix in self._matrices)])

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


def parts_of(path: Path) -> Path:
    """Return the folder of segments that belongs to the recording at `path`."""
    return path.with_name(path.name + ".parts")


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
    return [bytes(text).decode(errors="replace") for text in stored]
