"""What kept matrices tell: every metric that they, and what was recorded beside them, allow."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from normuon_lens.analysis.measure import roundoff
from normuon_lens.analysis.results import fingerprint
from normuon_lens.errors import RunError
from normuon_lens.metrics import CATALOGUE, rounding_noise, row_norms, singular_values
from normuon_lens.runfile import Matrix, Run, open_run

FROM_ONE = {"norms", "columns", "sigma", "floor"}
"""What a matrix alone gives, of many steps at once."""

FROM_TWO = {"update", "previous"}
"""The matrix itself, and the one kept before it."""

BESIDE = {"weight_norm", "roundoff"}
"""Recorded beside sampled updates."""

OTHER_STAGES = {"gradient", "momentum"}
"""Kept matrices of other stages, to be held against an update of the same step."""

OPEN_RUNS = 4
"""So many recordings stay open in a worker."""


class Batch(NamedTuple):
    """Work for one process, in names and numbers: a path travels, never a handle or an array.

    Attributes
    ----------
    path : str
        Of the recording, absolute.
    recording : str
        Which one it is: :func:`identity`.
    stage, matrix : str
    steps : tuple of int
        At which the matrix was kept, ascending.
    metrics : tuple of str
    """

    path: str
    recording: str
    stage: str
    matrix: str
    steps: tuple[int, ...]
    metrics: tuple[str, ...]


Answer = list[dict[str, float] | str]
"""Of each step of a batch its metrics, or why they could not be computed."""


def obtainable(run: Run, stage: str) -> list[str]:
    """Names of the metrics that kept matrices of a stage give, in catalogue order.

    Only an update is held against the weight and the gradient: the other stages are no movement.
    """
    held = FROM_ONE | FROM_TWO
    if stage == "update":
        kept = {x for x in OTHER_STAGES if any(len(run.update_steps(m, x)) for m in run.matrices)}
        held = held | BESIDE | kept
    return [name for name, row in CATALOGUE.items() if set(row.needs) <= held]


def identity(run: Run) -> str:
    """Return a text that tells a recording from another at the same path."""
    return json.dumps(fingerprint(run))


def measure_batch(batch: Batch) -> Answer:
    """Compute the metrics of a batch; in whichever process, which opens the recording itself.

    Raises
    ------
    RunError
        If the recording is not there, or another one is in its place.
    """
    opened = _opened(batch)
    columns = opened.columns_of(batch)
    answer: Answer = []
    good: list[dict[str, Any]] = []
    for step in batch.steps:
        try:
            good.append(columns.at(step))
            answer.append({})
        except MemoryError:
            answer.append("not enough memory for it")
        except RunError as error:
            answer.append(str(error))
    computed = columns.compute(good)
    for i, found in enumerate(x for x in answer if isinstance(x, dict)):
        found.update({name: float(values[i]) for name, values in computed.items()})
    return answer


class Opened:
    """A recording that stays open between batches, with what is small of it in memory."""

    def __init__(self, path: str) -> None:
        self.run = open_run(path)
        self.identity = identity(self.run)
        self._beside: dict[tuple[str, str], Beside] = {}

    def refresh(self) -> None:
        """Learn of what was recorded since."""
        if self.run.refresh():
            self.identity = identity(self.run)
            self._beside.clear()

    def columns_of(self, batch: Batch) -> Columns:
        """Return what computes a batch."""
        key = (batch.stage, batch.matrix)
        if key not in self._beside:
            self._beside[key] = Beside(self.run, batch.stage, batch.matrix)
        return Columns(self.run, batch, self._beside[key])


class Beside:
    """What the recorder noted of the matrices that it sampled: their noise, and their weights.

    Parameters
    ----------
    run : Run
    stage, name : str
    """

    def __init__(self, run: Run, stage: str, name: str) -> None:
        matrix: Matrix = run.table[run.table.index(name)]
        self._shape, self._dtype = (matrix.m, matrix.n), matrix.dtype
        self._inexact = stage == "update" and roundoff(run, matrix) > 0
        self._steps = np.empty(0, np.int64)
        if len(run.spectrum_steps(stage)):
            spectra = run.spectra(name, stage)
            taken = np.isfinite(spectra.floor)
            self._steps, self._floor = spectra.steps[taken], spectra.floor[taken]
            self._weight_norm = spectra.weight_norm[taken]

    def weight_norm(self, step: int) -> float:
        """Return the norm of the weight before a step; NaN if it was not sampled."""
        at = int(np.searchsorted(self._steps, step))
        sampled = at < len(self._steps) and self._steps[at] == step
        return float(self._weight_norm[at]) if sampled else math.nan

    def noise(self, step: int) -> float:
        """Return the noise that was in the matrix when it was recorded, as far as is known.

        Of a step that was not sampled it is estimated where updates are differences of weights:
        from the weight at the sampled step nearest to it.
        """
        if not len(self._steps):
            return 0.0
        nearest = int(np.abs(self._steps - step).argmin())
        if self._steps[nearest] == step:
            return float(self._floor[nearest])
        norm = float(self._weight_norm[nearest])
        if not self._inexact or not math.isfinite(norm):
            return 0.0
        return rounding_noise(self._shape, norm, self._dtype)


class Columns:
    """The inputs of the metrics of one batch, step by step, and the metrics of all steps at once.

    Parameters
    ----------
    run : Run
    batch : Batch
    beside : Beside
    """

    def __init__(self, run: Run, batch: Batch, beside: Beside) -> None:
        self._run, self._batch, self._beside = run, batch, beside
        self._matrix: Matrix = run.table[run.table.index(batch.matrix)]
        self._rows = [CATALOGUE[name] for name in batch.metrics]
        self._needs = {need for row in self._rows for need in row.needs}
        self._kept = run.update_steps(batch.matrix, batch.stage)
        self._last: tuple[int, np.ndarray] | None = None

    def at(self, step: int) -> dict[str, Any]:
        """Return the inputs at one step, and the metrics that are of whole matrices."""
        values = self._read(step, self._batch.stage)
        norms = row_norms(values)
        found: dict[str, Any] = {"norms": norms}
        if self._needs & {"sigma", "floor"}:
            stored = self._run.stored_dtype(self._batch.matrix, step, self._batch.stage)
            noise = rounding_noise(values.shape, float(np.linalg.norm(norms)), stored)
            found["sigma"], found["floor"] = self._spectrum(
                values, max(noise, self._beside.noise(step))
            )
        if "weight_norm" in self._needs:
            found["weight_norm"] = self._beside.weight_norm(step)
        whole = {"update": values, **self._others(step)}
        for row in self._rows:
            if _is_of_wholes(row.needs):
                known = all(need in whole for need in row.needs)
                inputs = [whole[need] for need in row.needs] if known else []
                found[row.name] = float(row.compute(*inputs)) if known else math.nan
        self._last = (step, values)
        return found

    def compute(self, found: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        """Return the metrics, of the steps whose inputs are given."""
        if not found:
            return {}
        inputs: dict[str, Any] = {x: np.array([one[x] for one in found]) for x in found[0]}
        inputs |= {"columns": self._matrix.n, "roundoff": roundoff(self._run, self._matrix)}
        return {
            row.name: inputs[row.name]
            if _is_of_wholes(row.needs)
            else row.compute(*(inputs[need] for need in row.needs))
            for row in self._rows
        }

    def _others(self, step: int) -> Mapping[str, np.ndarray]:
        """Return the matrices that those of this step are held against, as far as they are kept."""
        others = {}
        at = int(np.searchsorted(self._kept, step))
        if "previous" in self._needs and at > 0:
            before = int(self._kept[at - 1])
            last = self._last
            others["previous"] = (
                last[1] if last and last[0] == before else self._read(before, self._batch.stage)
            )
        for stage in OTHER_STAGES & self._needs:
            if step in self._run.update_steps(self._batch.matrix, stage):
                others[stage] = self._read(step, stage)
        return others

    def _read(self, step: int, stage: str) -> np.ndarray:
        return self._run.update(self._batch.matrix, step, stage)

    def _spectrum(self, values: np.ndarray, noise: float) -> tuple[np.ndarray, float]:
        try:
            return singular_values(values, noise=noise)
        except np.linalg.LinAlgError:  # LAPACK did not find it: it is unknown, as in a recording
            return np.full(self._matrix.k, np.nan), math.nan


def _is_of_wholes(needs: tuple[str, ...]) -> bool:
    return bool(set(needs) & (FROM_TWO | OTHER_STAGES))


_mine = threading.local()
"""Open recordings of this thread: Dask's workers have several, and a run is no one's but one's."""


def _opened(batch: Batch) -> Opened:
    runs: dict[str, Opened] = _mine.__dict__.setdefault("runs", {})
    opened = runs.pop(batch.path, None)
    if opened:
        opened.refresh()
    else:
        opened = Opened(batch.path)
    if opened.identity != batch.recording:
        raise RunError(f"{batch.path}: is another recording here than where the analysis began")
    runs[batch.path] = opened  # the last used comes last
    if len(runs) > OPEN_RUNS:
        del runs[next(iter(runs))]
    return opened
