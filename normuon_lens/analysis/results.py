"""What an analysis found, kept beside the recording: one line a matrix and step, appended.

``runs/x.h5.analysis.jsonl`` opens with a line that says which recording it is about; each line
after it holds the metrics of one kept matrix at one step. A last line that was cut off does not
count. What is undefined is null, infinity the text ``"Infinity"``: every JSON parser reads both.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from normuon_lens.errors import LensError, RunError
from normuon_lens.metrics import CATALOGUE
from normuon_lens.runfile import STAGES, Run, open_run

if TYPE_CHECKING:
    import pandas as pd

SUFFIX = ".analysis.jsonl"
FORMAT = "normuon-lens analysis"
VERSION = 1

SYNC_SECONDS = 1.0
"""What a crash of the machine may cost."""

MAX_LINE = 1 << 20
MAX_BYTES_A_MATRIX = 64 << 10
"""All lines of a kept matrix and step, from several analyses: each takes about 1.5 kB."""
SMALL = 16 << 20

INFINITIES = {"Infinity": math.inf, "-Infinity": -math.inf}

NUMBERS = {name: number for number, name in enumerate(CATALOGUE)}
"""Where in a row of values a metric stands."""


class Kept(NamedTuple):
    """One kept matrix: its stage, its number in the run's table, and its step."""

    stage: str
    matrix: int
    step: int


class Found(NamedTuple):
    """What is known of a kept matrix.

    Attributes
    ----------
    computed : int
        Bit i is set if the i-th metric of the catalogue was computed, be it undefined.
    values : ndarray of float64
        One a metric of the catalogue; NaN where it is undefined or was not computed.
    """

    computed: int
    values: np.ndarray


def is_computed(found: Found | None, metric: str) -> bool:
    """Tell whether a metric of a kept matrix is known, be it undefined."""
    return found is not None and bool(found.computed >> NUMBERS[metric] & 1)


def results_path(run: Run, folder: str | Path | None = None) -> Path:
    """Return where the results of a recording lie: beside it, or in a folder."""
    return (Path(folder) if folder else run.path.parent) / (run.path.name + SUFFIX)


def results_of(run: Run | str | Path, folder: str | Path | None = None) -> pd.DataFrame | None:
    """Return what was analysed of a recording so far; an analysis may be at work on it.

    Parameters
    ----------
    run : Run or path
    folder : path, optional
        Where the results were written, if not beside the recording.

    Returns
    -------
    pandas.DataFrame or None
        Columns run, step, matrix, stage, metric, value, as of :func:`normuon_lens.table`: one row
        a number, none where a metric is undefined. None if there are no results.

    Raises
    ------
    LensError
        If what lies there is not, or not of this recording, or the recording cannot be opened.
    """
    run = run if isinstance(run, Run) else open_run(run)
    path = results_path(run, folder)
    try:
        with _opened(path, os.O_RDONLY) as file:
            return frame([(run, run.name, _read(file, path, run)[0])])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _refused(path, error) from None


def fingerprint(run: Run) -> dict[str, Any]:
    """Return what tells a recording from another of the same name: its matrices, its beginning."""
    matrices = [[x.name, x.m, x.n, x.dtype, x.group] for x in run.table]
    digest = hashlib.sha256(json.dumps(matrices).encode()).hexdigest()[:16]
    step, at = (int(run.steps[0]), float(run.times[0])) if len(run.steps) else (None, math.nan)
    return {"matrices": digest, "first_step": step, "first_time": _spelled(at)}


def times_of(run: Run) -> dict[int, float]:
    """Return when each recorded step ended: a step that was recorded again is another."""
    return dict(zip(run.steps.tolist(), run.times.tolist(), strict=True))


class Results:
    """The results of one recording, open for adding to them; one analysis at a time.

    Parameters
    ----------
    run : Run
    folder : path, optional
        Where to write, if not beside the recording; made if there is none.

    Attributes
    ----------
    path : Path
    found : dict of Kept to Found
        What counts: what was computed of a step that was recorded again since is left out.

    Raises
    ------
    LensError
        If another analysis is at work on it, it is another recording's, or it cannot be written.
    """

    def __init__(self, run: Run, folder: str | Path | None = None) -> None:
        self.path = results_path(run, folder)
        self._run, self._times = run, times_of(run)
        self._synced = time.monotonic()
        try:
            if folder:
                Path(folder).mkdir(parents=True, exist_ok=True)
            self._file = _opened(self.path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise _refused(self.path, error) from None
        try:
            self._lock()
            self.found, end = _read(self._file, self.path, run)
            self._file.seek(end)
            self._file.truncate()  # a line that was cut off
            if end == 0:
                self._file.write(_head(run))
        except BaseException:
            self._file.close()
            raise

    def add(self, kept: Kept, values: Mapping[str, float]) -> None:
        """Add metrics of one kept matrix; LensError when the disk refuses."""
        self.found[kept] = _joined(self.found.get(kept), values.items())
        line = {
            "stage": kept.stage,
            "matrix": self._run.table[kept.matrix].name,
            "step": kept.step,
            "time": _spelled(self._times.get(kept.step, math.nan)),
        }
        self._write(line | {name: _spelled(value) for name, value in values.items()})

    def tick(self) -> None:
        """Make what was added durable, if it is time; call it often."""
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Make what was added durable."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _refused(self.path, error) from None
        self._synced = time.monotonic()

    def close(self) -> None:
        """Make all durable and let others write."""
        try:
            self.sync()
        finally:
            # What the disk refused once stays in the buffer, and is refused once more.
            with suppress(OSError):
                self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LensError(
                f"{self.path}: another analysis is at work on it; wait for its end"
            ) from None
        except OSError as error:
            raise _refused(self.path, error) from None

    def _write(self, line: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise _refused(self.path, error) from None


def frame(
    parts: Sequence[tuple[Run, str, Mapping[Kept, Found]]], metrics: Iterable[str] = CATALOGUE
) -> pd.DataFrame:
    """Return results of several recordings as one long table: a row a number.

    Parameters
    ----------
    parts : sequence of (Run, str, mapping of Kept to Found)
        Each with what the run is called.
    metrics : iterable of str
        Which to take.
    """
    import pandas as pd

    wanted = list(metrics)
    columns = [NUMBERS[name] for name in wanted]
    names = list(dict.fromkeys(name for run, _, _ in parts for name in run.matrices))
    number = {name: i for i, name in enumerate(names)}
    labels = list(dict.fromkeys(label for _, label, _ in parts))
    blocks = []
    for run, label, found in parts:
        kept = sorted(found, key=lambda x: (STAGES.index(x.stage), x.step, x.matrix))
        values = np.array([found[x].values for x in kept]).reshape(len(kept), len(CATALOGUE))
        row, column = np.nonzero(~np.isnan(values[:, columns]))
        of = np.array([number[name] for name in run.matrices], dtype=np.int64)
        blocks.append(
            (
                np.full(len(row), labels.index(label)),
                np.array([x.step for x in kept], dtype=np.int64)[row],
                of[np.array([x.matrix for x in kept], dtype=np.int64)[row]],
                np.array([STAGES.index(x.stage) for x in kept], dtype=np.int64)[row],
                column,
                values[:, columns][row, column],
            )
        )
    none = [np.empty(0, np.int64)] * 5 + [np.empty(0)]
    of_run, step, matrix, stage, metric, value = map(
        np.concatenate, zip(none, *blocks, strict=True)
    )
    return pd.DataFrame(
        {
            "run": pd.Categorical.from_codes(of_run, labels),
            "step": step,
            "matrix": pd.Categorical.from_codes(matrix, names),
            "stage": pd.Categorical.from_codes(stage, list(STAGES)),
            "metric": pd.Categorical.from_codes(metric, wanted),
            "value": value,
        }
    )


def _opened(path: Path, flags: int) -> IO[bytes]:
    """Open a plain file: no link to another place, and no pipe that would wait for ever."""
    file = os.fdopen(
        os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666),
        "r+b" if flags & os.O_RDWR else "rb",
    )
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a plain file")
    return file


def _refused(path: Path, error: OSError) -> RunError:
    if error.errno == errno.ELOOP:
        return RunError(f"{path}: is a link; results are kept in plain files")
    advice = {
        errno.ENOSPC: "; what is done is kept: make room and type the same again",
        errno.EDQUOT: "; what is done is kept: make room and type the same again",
        errno.EACCES: "; results can be written elsewhere: -o FOLDER",
        errno.EROFS: "; results can be written elsewhere: -o FOLDER",
    }
    return RunError(f"{path}: {error.strerror}{advice.get(error.errno or 0, '')}")


def _read(file: IO[bytes], path: Path, run: Run) -> tuple[dict[Kept, Found], int]:
    """Return what counts for `run`, and where the last whole line ends."""
    kept = {
        (stage, name): (i, frozenset(run.update_steps(name, stage).tolist()))
        for stage in STAGES
        for i, name in enumerate(run.matrices)
    }
    most = sum(len(steps) for _, steps in kept.values())
    if os.fstat(file.fileno()).st_size > SMALL + MAX_BYTES_A_MATRIX * most:
        raise RunError(f"{path}: larger than results of {run.path.name} can be; delete it")
    times = times_of(run)
    found: dict[Kept, Found] = {}
    end = _check_head(file.readline(MAX_LINE), path, run)
    for number, line in enumerate(_whole_lines(file, path), 2):
        try:
            _take(json.loads(line), kept, times, found)
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
            raise RunError(f"{path}: line {number} is no result; delete the file") from None
        end += len(line)
    return found, end


def _whole_lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    while line := file.readline(MAX_LINE):
        if not line.endswith(b"\n"):
            if len(line) == MAX_LINE:
                raise RunError(f"{path}: has a line that is too long; delete the file")
            return
        yield line


def _head(run: Run) -> bytes:
    head = {"format": FORMAT, "version": VERSION, "recording": fingerprint(run)}
    return json.dumps(head).encode() + b"\n"


def _check_head(line: bytes, path: Path, run: Run) -> int:
    """Return the length of the first line, 0 if it was cut off; what is no result is not ours."""
    if _head(run).startswith(line):
        return len(line) if line.endswith(b"\n") else 0
    try:
        content = json.loads(line)
        if content["format"] != FORMAT:
            raise ValueError
        newer = int(content["version"]) > VERSION
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        text = f"{path}: not a file of results, and in their place; move it away"
        raise RunError(text) from None
    if newer:
        raise RunError(f"{path}: written by a newer normuon-lens: pip install -U normuon-lens")
    raise RunError(
        f"{path}: results of another recording, one that was {run.path.name} before; "
        "delete the file"
    )


def _take(
    content: Any,
    kept: Mapping[tuple[str, str], tuple[int, frozenset[int]]],
    times: Mapping[int, float],
    found: dict[Kept, Found],
) -> None:
    """Note one line; ValueError if it is none. What the recording no longer has does not count."""
    if not isinstance(content, dict):
        raise ValueError
    step, at = content.pop("step"), content.pop("time")
    named = (content.pop("stage"), content.pop("matrix"))
    if type(step) is not int or not all(isinstance(text, str) for text in named):
        raise ValueError
    values = {name: _number(value) for name, value in content.items()}
    number, steps = kept.get(named, (0, frozenset()))
    if step in steps and at == _spelled(times.get(step, math.nan)):
        key = Kept(named[0], number, step)
        found[key] = _joined(found.get(key), values.items())


def _joined(before: Found | None, values: Iterable[tuple[str, float]]) -> Found:
    computed, known = before or (0, np.full(len(CATALOGUE), np.nan))
    for name, value in values:
        if (number := NUMBERS.get(name)) is not None:  # else of a later version
            computed |= 1 << number
            known[number] = value
    return Found(computed, known)


def _spelled(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def _number(spelled: Any) -> float:
    if spelled is None:
        return math.nan
    if isinstance(spelled, str):
        return INFINITIES[spelled]
    if type(spelled) not in (int, float):
        raise ValueError
    return float(spelled)
