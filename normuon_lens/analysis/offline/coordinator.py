"""Metrics from stored matrices, of whole runs: what is missing is computed, what is done is kept.

One process, the one that asks, knows what is to be done and writes the results; others compute. So
it may be interrupted at any moment, and goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from normuon_lens.analysis.offline.cluster import spread_over_dask
from normuon_lens.analysis.offline.engine import spread, usable_cores
from normuon_lens.analysis.offline.stored import Answer, Batch, identity, obtainable
from normuon_lens.analysis.results import Found, Kept, Results, frame, is_computed, results_path
from normuon_lens.analysis.table import labels, opened
from normuon_lens.errors import LensError
from normuon_lens.metrics import CATALOGUE, describe
from normuon_lens.runfile import STAGES, Matrix, Run

if TYPE_CHECKING:
    import pandas as pd

BATCH_WORK = 6e8
"""Multiplications of a batch, a fifth of a second of one core: little is lost when one ends."""
BATCH_STEPS = 64
OVERHEAD = 4e6
"""What reading a matrix and all its metrics take beside its spectrum, in the same unit."""


class Progress(NamedTuple):
    """How far an analysis is.

    Attributes
    ----------
    done, total : int
        Kept matrices, each at one step; those of an earlier analysis among them.
    before : int
        Those of an earlier analysis.
    share : float
        Of the work of this analysis, large matrices counting for more: 0 to 1.
    """

    done: int
    total: int
    before: int
    share: float


class Failure(NamedTuple):
    """A kept matrix that could not be analysed, and why."""

    path: Path
    stage: str
    matrix: str
    step: int
    reason: str

    @property
    def text(self) -> str:
        """The failure in one line."""
        return f"{self.path.name}: {self.matrix}, {self.stage} of step {self.step}: {self.reason}"


class Selection(NamedTuple):
    """What is to be analysed.

    Attributes
    ----------
    metrics, stages : tuple of str
        All that can be had if empty.
    matrices : str or None
        A pattern such as ``"*.mlp.*"``; all if None.
    steps : frozenset of int or None
        All that were kept if None.
    """

    metrics: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    matrices: str | None = None
    steps: frozenset[int] | None = None


def analyze(
    runs: Run | str | Path | Iterable[Run | str | Path],
    metrics: str | Sequence[str] | None = None,
    *,
    stages: str | Sequence[str] | None = None,
    matrices: str | None = None,
    steps: Iterable[int] | None = None,
    workers: int | None = None,
    dask: str | None = None,
    folder: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> pd.DataFrame:
    """Compute metrics from the full matrices that runs kept, in parallel; what is done is kept.

    Results go to ``x.h5.analysis.jsonl`` beside each recording ``x.h5``, which itself is only
    read. Called again, also after an interruption, only what is missing is computed. Of a
    recording that is still being made, what is there.

    Parameters
    ----------
    runs : Run, path, or several of them
        A path is a run file or a folder of them.
    metrics : str or sequence of str, optional
        Names of :data:`normuon_lens.metrics.CATALOGUE`; by default all that stored matrices give.
    stages : str or sequence of str, optional
        By default all of which matrices were kept.
    matrices : str, optional
        Only matrices whose names match this pattern, such as ``"*.mlp.*"``.
    steps : iterable of int, optional
        Only these steps.
    workers : int, optional
        Processes, with one BLAS thread each; by default one a core that this process may use.
    dask : str, optional
        Address of the scheduler of a Dask cluster that is to compute instead.
    folder : path, optional
        Write the results there.
    progress : callable, optional
        Called with a :class:`Progress` now and then.

    Returns
    -------
    pandas.DataFrame
        Columns run, step, matrix, stage, metric, value of all that was asked for, as of
        :func:`normuon_lens.table`: a row a number, none where a metric is undefined.

    Raises
    ------
    LensError
        If there is nothing to analyse, or a metric is asked for that the runs do not give; at the
        end, if single matrices could not be analysed: all others are then done and kept.
    """
    selection = Selection(
        _several(metrics), _several(stages), matrices, None if steps is None else frozenset(steps)
    )
    with Analysis(opened(runs), selection, folder) as analysis:
        analysis.work(workers=workers, dask=dask, progress=progress)
        if analysis.failures:
            raise LensError(analysis.failed)
        return analysis.frame()


class Analysis:
    """What is asked of some runs, and what of it is done; a context manager.

    Parameters
    ----------
    runs : sequence of Run
    selection : Selection
    folder : path, optional
        Where results are written, if not beside the recordings.

    Attributes
    ----------
    runs : list of Run
        Those that kept something of what is asked for.
    paths : list of Path
        The files of their results.
    without : list of Run
        Those that kept nothing of it.
    failures : list of Failure
        What could not be analysed.

    Raises
    ------
    LensError
        If there is nothing to analyse, or results cannot be written.
    """

    def __init__(
        self, runs: Sequence[Run], selection: Selection, folder: str | Path | None = None
    ) -> None:
        _check(runs, selection)
        called = zip(runs, labels(runs), strict=True)
        parts = [_Part(run, label, _wanted(run, selection)) for run, label in called]
        self._parts = [part for part in parts if part.wanted]
        self.runs = [part.run for part in self._parts]
        self.without = [part.run for part in parts if not part.wanted]
        if not self._parts:
            raise LensError(_nothing(runs))
        self._metrics = selection.metrics or tuple(CATALOGUE)
        self.failures: list[Failure] = []
        self.paths = [results_path(part.run, folder) for part in self._parts]
        if twice := [path for path in self.paths if self.paths.count(path) > 1]:
            raise LensError(f"{twice[0]}: two recordings would have their results there")
        self._results: list[Results] = []
        with ExitStack() as opened:
            for part in self._parts:
                self._results.append(Results(part.run, folder))
                opened.callback(self._results[-1].close)
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Make all results durable, and let others write them."""
        self._opened.close()

    def work(
        self,
        *,
        workers: int | None = None,
        dask: str | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """Compute what is missing; parameters as of :func:`analyze`."""
        if workers is not None and workers < 1:
            raise LensError(f"workers is {workers}: at least one process has to compute")
        missing = [
            (part.cost(batch), batch)
            for part, results in zip(self._parts, self._results, strict=True)
            for batch in part.batches(results.found)
        ]
        # The dearest first: no worker is left alone with a long one at the end.
        missing.sort(key=lambda one: one[0] / len(one[1].steps), reverse=True)
        total = sum(len(part.wanted) for part in self._parts)
        before = done = total - sum(len(batch.steps) for _, batch in missing)
        work, spent = sum(cost for cost, _ in missing), 0.0
        batches = [batch for _, batch in missing]
        tell = progress or (lambda _: None)
        tell(Progress(done, total, before, 0.0 if work else 1.0))
        with closing(
            spread_over_dask(batches, dask) if dask else spread(batches, workers or usable_cores())
        ) as answers:
            for one in answers:
                if one:
                    done += self._keep(*one)
                    spent += self._part_of(one[0]).cost(one[0])
                for results in self._results:
                    results.tick()
                tell(Progress(done, total, before, spent / work))

    def frame(self) -> pd.DataFrame:
        """Return all that was asked for and is done, as one long table."""
        parts = [
            (part.run, part.label, {kept: found[kept] for kept in part.wanted if kept in found})
            for part, found in zip(self._parts, (x.found for x in self._results), strict=True)
        ]
        return frame(parts, self._metrics)

    @property
    def failed(self) -> str:
        """What could not be analysed, in one line; empty if all could."""
        if not self.failures:
            return ""
        more = len(self.failures) - 1
        return f"{self.failures[0].text}{f'; and {more} more' if more else ''}; the rest is kept"

    def _part_of(self, batch: Batch) -> _Part:
        return next(part for part in self._parts if part.path == batch.path)

    def _keep(self, batch: Batch, answer: Answer) -> int:
        """Write an answer down; returns of how many steps there are metrics."""
        part = self._part_of(batch)
        results = self._results[self._parts.index(part)]
        matrix, done = part.run.table.index(batch.matrix), 0
        for step, values in zip(batch.steps, answer, strict=True):
            if isinstance(values, str):
                named = (part.run.path, batch.stage, batch.matrix, step)
                self.failures.append(Failure(*named, values.removeprefix(f"{batch.path}: ")))
            else:
                results.add(Kept(batch.stage, matrix, step), values)
                done += 1
        return done


class _Part:
    """One run, and what is asked of it: metrics by kept matrix."""

    def __init__(self, run: Run, label: str, wanted: Mapping[Kept, tuple[str, ...]]) -> None:
        self.run, self.label, self.wanted = run, label, wanted
        self.path = str(run.path.absolute())

    def batches(self, found: Mapping[Kept, Found]) -> Iterator[Batch]:
        """Yield what is missing: some steps of one matrix, of which the same metrics are."""
        recording = identity(self.run)
        missing = [
            (kept, tuple(name for name in metrics if not is_computed(found.get(kept), name)))
            for kept, metrics in self.wanted.items()
        ]
        for (stage, matrix, metrics), of in groupby(
            missing, lambda one: (one[0].stage, one[0].matrix, one[1])
        ):
            if not metrics:
                continue
            steps = [kept.step for kept, _ in of]
            shape = self.run.table[matrix]
            size = max(1, min(BATCH_STEPS, int(BATCH_WORK / _work_of(shape))))
            for start in range(0, len(steps), size):
                some = tuple(steps[start : start + size])
                yield Batch(self.path, recording, stage, shape.name, some, metrics)

    def cost(self, batch: Batch) -> float:
        """Return how much work a batch is, roughly."""
        return len(batch.steps) * _work_of(self.run.table[self.run.table.index(batch.matrix)])


def _work_of(matrix: Matrix) -> float:
    return OVERHEAD + float(matrix.m * matrix.n * matrix.k)


def _wanted(run: Run, selection: Selection) -> dict[Kept, tuple[str, ...]]:
    """Return the metrics that are asked of a run's kept matrices, step after step of each."""
    wanted: dict[Kept, tuple[str, ...]] = {}
    for stage in selection.stages or STAGES:
        names = obtainable(run, stage)
        metrics = tuple(x for x in names if x in (selection.metrics or names))
        for i, matrix in enumerate(run.matrices if metrics else []):
            if selection.matrices is None or fnmatchcase(matrix, selection.matrices):
                for step in run.update_steps(matrix, stage).tolist():
                    if selection.steps is None or step in selection.steps:
                        wanted[Kept(stage, i, step)] = metrics
    return wanted


def _check(runs: Sequence[Run], selection: Selection) -> None:
    """Refuse what no run can give."""
    for stage in selection.stages:
        if stage not in STAGES:
            raise LensError(f"no stage is called {stage!r}: there are {', '.join(STAGES)}")
    kept = [run for run in runs if _kept_stages(run)]
    if not kept:
        raise LensError(_nothing(runs))
    for metric in selection.metrics:
        needs = describe(metric).needs
        given = any(
            metric in obtainable(run, stage)
            for run in kept
            for stage in selection.stages or _kept_stages(run)
        )
        if not given and "weight" in needs:
            raise LensError(
                f"{metric} is of the weight too, which is in no recording; with a checkpoint's "
                f"weight: normuon_lens.metrics.{metric}"
            )
        if not given:
            raise LensError(
                f"{metric} takes kept matrices of update and {needs[0]} at one step; "
                f"{kept[0].path.name} keeps {' and '.join(_kept_stages(kept[0]))}: record with "
                "stages=True"
            )
    names = list(dict.fromkeys(name for run in kept for name in run.matrices))
    pattern = selection.matrices
    if pattern is not None and not any(fnmatchcase(name, pattern) for name in names):
        close = ", ".join(get_close_matches(pattern, names, 3, 0.0))
        raise LensError(f"no matrix matches {pattern!r}: the closest are {close}")


def _kept_stages(run: Run) -> list[str]:
    return [x for x in STAGES if any(len(run.update_steps(name, x)) for name in run.matrices)]


def _nothing(runs: Sequence[Run]) -> str:
    """Return why there is nothing to analyse."""
    if not any(map(_kept_stages, runs)):
        names = ", ".join(run.path.name for run in runs[:3]) + ", …" * (len(runs) > 3)
        return (
            f"{names}: no full matrix was kept, so there is nothing to analyse; record with "
            "matrices_every=100, or see what was measured meanwhile: normuon-lens summary"
        )
    kept = "; ".join(
        f"{run.path.name} keeps {', '.join(stages)} at {_span(run, stages)}"
        for run in runs[:2]
        if (stages := _kept_stages(run))
    )
    return f"no kept matrix is among what was asked for: {kept}"


def _span(run: Run, stages: Sequence[str]) -> str:
    steps = sorted(
        {step for x in stages for name in run.matrices for step in run.update_steps(name, x)}
    )
    return f"steps {', '.join(map(str, steps[:3]))}{f', … {steps[-1]}' if len(steps) > 3 else ''}"


def _several(given: str | Sequence[str] | None) -> tuple[str, ...]:
    if given is None:
        return ()
    return (given,) if isinstance(given, str) else tuple(given)
