"""The long table as a file: CSV, Parquet or JSON, written as it is computed.

A history may be far larger than memory: no more than one metric of one block of steps is held.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np

from normuon_lens.analysis.measure import measure_pieces, taken_at
from normuon_lens.analysis.table import ALL, COLUMNS, Part, labels, nothing_at, plan
from normuon_lens.errors import LensError
from normuon_lens.extras import require
from normuon_lens.metrics import CATALOGUE
from normuon_lens.runfile import Run

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet would run what begins like this."""

INFINITE = {math.inf: '"Infinity"', -math.inf: '"-Infinity"'}
"""How JSON spells what it has no number for: as texts, which every parser takes."""

ROW_GROUP = 1 << 20
"""Rows of a Parquet file that are compressed together, and until then in memory."""


class Numbers(NamedTuple):
    """One metric at some steps.

    Attributes
    ----------
    run, metric : str
    stage : str or None
        None of a logged scalar, as its only matrix.
    matrices : sequence of (str or None)
    steps : ndarray of shape (T,), int64
    values : ndarray of shape (T, M), float64
        NaN where there is no number, and will be no row.
    """

    run: str
    metric: str
    stage: str | None
    matrices: Sequence[str | None]
    steps: np.ndarray
    values: np.ndarray


class Writer(Protocol):
    """Writes rows to an open file."""

    def write(self, numbers: Numbers) -> None:
        """Write a row for each number."""
        ...

    def close(self) -> None:
        """Write what comes at the end."""
        ...


def export(
    runs: Sequence[Run],
    path: Path,
    metrics: str | Sequence[str] = ALL,
    stages: str | Sequence[str] = ALL,
    steps: np.ndarray | None = None,
    *,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the numbers of :func:`normuon_lens.analysis.table` to a file, and what was logged.

    What the trainings logged, such as the loss, comes first, in rows without matrix and stage.

    Parameters
    ----------
    runs : sequence of Run
    path : Path
        Ends in ``.csv``, ``.parquet`` or ``.json``. It will be complete, or not there at all.
    metrics : str or sequence of str
        Names of the catalogue and of logged scalars, or ``"all"`` that the runs have.
    stages, steps
        As of :func:`normuon_lens.analysis.table.plan`.
    force : bool
        Replace `path` if it exists.
    progress : callable, optional
        Called with how much is done and how much there is in all, again and again.

    Returns
    -------
    int
        How many numbers were written.

    Raises
    ------
    LensError
        If there is nothing to write, or no file can be written there.
    """
    if path.suffix not in WRITERS:
        raise LensError(f"{path}: the name of the file must end in {', '.join(WRITERS)}")
    if path.is_dir():
        raise LensError(f"{path}: is a folder")
    if path.exists() and not force:
        raise LensError(f"{path} is there already: give --force to replace it")
    asked = [metrics] if isinstance(metrics, str) else list(dict.fromkeys(metrics))
    logged = list(dict.fromkeys(name for run in runs for name in run.scalars))
    of_all = asked == [ALL]
    scalars = [name for name in asked if name in logged and name not in CATALOGUE]
    others = asked if of_all else [name for name in asked if name not in scalars]
    if unknown := [name for name in others if name not in {*CATALOGUE, ALL}]:
        known = get_close_matches(unknown[0], [*logged, *CATALOGUE], n=3, cutoff=0.0)
        raise LensError(
            f"nothing is called {unknown[0]!r}, neither metric nor logged scalar: the closest are "
            f"{', '.join(known)}"
        )
    parts = plan(runs, others, stages, steps) if others else []
    total = sum(_length(part, name) for part in parts for name in part.metrics)
    done = written = 0
    with _whole(path) as file, closing(WRITERS[path.suffix](file)) as writer:
        of_scalars = _logged(runs, logged if of_all else scalars, steps)
        for numbers in itertools.chain(of_scalars, _measured(parts)):
            writer.write(numbers)
            written += int(np.count_nonzero(~np.isnan(numbers.values)))
            if progress and numbers.stage:
                done += len(numbers.steps)
                progress(done, total)
        if steps is not None and parts and not written:
            raise LensError(nothing_at(parts, steps))
    return written


def definitions() -> dict[str, dict[str, str]]:
    """Return label, unit, formula and reading of every metric of the catalogue."""
    fields = ("label", "unit", "formula", "reading")
    return {
        name: {field: getattr(metric, field) for field in fields}
        for name, metric in CATALOGUE.items()
    }


def _length(part: Part, metric: str) -> int:
    """Return at how many steps a metric may have been taken."""
    return int(np.isin(taken_at(part.run, metric, part.stage), part.steps).sum())


def _measured(parts: Sequence[Part]) -> Iterator[Numbers]:
    for part in parts:
        matrices = part.run.matrices
        for name, piece in measure_pieces(part.run, part.metrics, part.steps, stage=part.stage):
            yield Numbers(part.label, name, part.stage, matrices, *piece)


def _logged(
    runs: Sequence[Run], names: Sequence[str], steps: np.ndarray | None
) -> Iterator[Numbers]:
    for label, run in zip(labels(runs), runs, strict=True):
        here = np.ones(len(run.steps), bool) if steps is None else np.isin(run.steps, steps)
        for name in names:
            if name in run.scalars:
                values = run.scalars[name][here, None]
                yield Numbers(label, name, None, [None], run.steps[here], values)


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its place at `path` once all of it is written."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("xb") as file:
            yield file
        unfinished.replace(path)
    except OSError as error:
        raise LensError(f"{path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            unfinished.unlink()


class _Records:
    """Rows as texts with something between them."""

    def __init__(self, file: IO[bytes], separator: str, end: str) -> None:
        self._file, self._separator, self._end = file, separator, end
        self._before = ""

    def put(self, records: Sequence[str]) -> None:
        """Write records, and a separator between them and those before."""
        if records:
            text = self._before + self._separator.join(records)
            self._file.write(text.encode(errors="replace"))
            self._before = self._separator

    def close(self) -> None:
        """Write what comes at the end."""
        self._file.write(self._end.encode())


class CsvWriter(_Records):
    """Comma-separated values, infinity as ``inf``, in as many digits as tell 64 bits apart.

    Names that a spreadsheet would take for a formula get an apostrophe in front.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, "\n", "\n")
        self.put([",".join(COLUMNS)])

    def write(self, numbers: Numbers) -> None:
        """Write a line for each number."""
        run, metric, stage = map(_cell, (numbers.run, numbers.metric, numbers.stage))
        tails = [f",{_cell(matrix)},{stage},{metric}," for matrix in numbers.matrices]
        for step, row in zip(numbers.steps.tolist(), numbers.values.tolist(), strict=True):
            start = f"{run},{step}"
            self.put(
                [
                    f"{start}{tail}{value!r}"
                    for tail, value in zip(tails, row, strict=True)
                    if value == value
                ]
            )


class JsonWriter(_Records):
    """One array of records, a line each; infinity is the text ``"Infinity"``."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, ",\n", "\n]\n")
        file.write(b"[\n")

    def write(self, numbers: Numbers) -> None:
        """Write an object for each number."""
        run, metric, stage = map(_quoted, (numbers.run, numbers.metric, numbers.stage))
        tails = [
            f',"matrix":{_quoted(matrix)},"stage":{stage},"metric":{metric},"value":'
            for matrix in numbers.matrices
        ]
        for step, row in zip(numbers.steps.tolist(), numbers.values.tolist(), strict=True):
            start = f'{{"run":{run},"step":{step}'
            self.put(
                [
                    f"{start}{tail}{INFINITE.get(value) or repr(value)}}}"
                    for tail, value in zip(tails, row, strict=True)
                    if value == value
                ]
            )


class ParquetWriter:
    """A table of typed columns, the names as dictionaries; what a metric means goes along.

    Its metadata have, under ``normuon_lens.metrics``, label, unit, formula and reading of every
    metric of the catalogue, as JSON.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._arrow: Any = require("pyarrow", "parquet")
        parquet: Any = require("pyarrow.parquet", "parquet")
        self._name = self._arrow.dictionary(self._arrow.int32(), self._arrow.string())
        types = {"step": self._arrow.int64(), "value": self._arrow.float64()}
        self._schema = self._arrow.schema(
            [(column, types.get(column, self._name)) for column in COLUMNS],
            metadata={"normuon_lens.metrics": json.dumps(definitions(), ensure_ascii=False)},
        )
        self._file = parquet.ParquetWriter(file, self._schema)
        self._waiting: list[Any] = []

    def write(self, numbers: Numbers) -> None:
        """Write a row for each number, once there are enough of them for a group of rows."""
        row, column = np.nonzero(~np.isnan(numbers.values))
        same = np.zeros(len(row), np.int32)
        columns = {
            "run": self._names([numbers.run], same),
            "step": self._arrow.array(numbers.steps[row]),
            "matrix": self._names(numbers.matrices, column.astype(np.int32)),
            "stage": self._names([numbers.stage], same),
            "metric": self._names([numbers.metric], same),
            "value": self._arrow.array(numbers.values[row, column]),
        }
        in_order = [columns[name] for name in COLUMNS]
        self._waiting.append(self._arrow.Table.from_arrays(in_order, schema=self._schema))
        if sum(map(len, self._waiting)) >= ROW_GROUP:
            self._flush()

    def close(self) -> None:
        """Write the last rows and the table of contents."""
        try:
            self._flush()
            self._file.close()
        finally:
            # Else it would try once more when it is collected, and complain of it.
            self._file.is_open = False

    def _names(self, texts: Sequence[str | None], index: np.ndarray) -> Any:
        plain = [text.encode(errors="replace").decode() for text in texts if text is not None]
        if not plain:
            return self._arrow.nulls(len(index), self._name)
        return self._arrow.DictionaryArray.from_arrays(index, plain)

    def _flush(self) -> None:
        if self._waiting:
            self._file.write_table(self._arrow.concat_tables(self._waiting).unify_dictionaries())
            self._waiting = []


WRITERS: dict[str, Callable[[IO[bytes]], Writer]] = {
    ".csv": CsvWriter,
    ".parquet": ParquetWriter,
    ".json": JsonWriter,
}
"""What writes a file, by the end of its name."""


def _cell(text: str | None) -> str:
    """Return a text as a cell of CSV: no formula, and quoted where it must be."""
    safe = f"'{text}" if text and text.startswith(FORMULA) else text or ""
    return '"{}"'.format(safe.replace('"', '""')) if set(safe) & set(',"\n\r') else safe


def _quoted(text: str | None) -> str:
    return json.dumps(text, ensure_ascii=False)
