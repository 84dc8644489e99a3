"""Metrics of several runs as one long table: a row a number."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from normuon_lens.analysis.measure import Series, lack, measurable, measure_pieces, taken_at
from normuon_lens.errors import LensError
from normuon_lens.metrics import describe
from normuon_lens.runfile import STAGES, Run, find_runs, open_run

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("run", "step", "matrix", "stage", "metric", "value")

ALL = "all"
"""Asks for all metrics, or all stages, that the runs have."""


class Part(NamedTuple):
    """Metrics of one stage of one run, before they are computed.

    Attributes
    ----------
    label : str
        What the run is called in the table: see :func:`labels`.
    run : Run
    stage : str
    metrics : list of str
        That can be had.
    steps : ndarray of int64
        Recorded steps that are wanted, ascending.
    """

    label: str
    run: Run
    stage: str
    metrics: list[str]
    steps: np.ndarray


def table(
    runs: Run | str | Path | Iterable[Run | str | Path],
    metrics: str | Sequence[str] = ("condition_number", "neuron_cv"),
    stages: str | Sequence[str] = "update",
    steps: int | Iterable[int] | None = None,
) -> pd.DataFrame:
    """Return metrics of several runs as one long frame.

    Only what is asked for is read: with `steps`, the chunks of the files that hold them.

    Parameters
    ----------
    runs : Run, path, or several of them
        A path is a run file or a folder of them. A recording that is named twice counts once.
    metrics : str or sequence of str
        Names of :data:`normuon_lens.metrics.CATALOGUE`, or ``"all"``. What one means and how to
        read it: ``nl.metrics.describe("condition_number")``.
    stages : str or sequence of str
        Of ``gradient``, ``momentum``, ``orthogonalized``, ``normalized``, ``update``, or ``"all"``
        that were recorded.
    steps : int or iterable of int, optional
        Only these steps, where they were recorded.

    Returns
    -------
    pandas.DataFrame
        Columns run, step (int64), matrix, stage, metric (categories, in the order in which they
        were given or recorded) and value (float64). A row is a number: where nothing was taken, or
        there is no such number (the condition number of a step that moved nothing), there is no
        row. Infinity is a number. Runs that share a name are told apart by the ends of their
        paths, see :func:`labels`. A run without a stage or metric that another one has brings no
        rows of it.

    Raises
    ------
    LensError
        If no run has one of the metrics or stages, or none of the steps, or there is none of that
        name; if a path is no recording, or a file cannot be read.
    """
    import pandas as pd

    wanted = None if steps is None else _whole_numbers(steps)
    parts = plan(opened(runs), metrics, stages, wanted)
    found = {part.label: list(part.run.matrices) for part in parts}
    categories = {
        "run": list(found),
        "matrix": list(dict.fromkeys(name for names in found.values() for name in names)),
        "stage": list(dict.fromkeys(part.stage for part in parts)),
        "metric": list(dict.fromkeys(name for part in parts for name in part.metrics)),
    }
    columns = _columns(parts, categories)
    if wanted is not None and parts and not len(columns["value"]):
        raise LensError(nothing_at(parts, wanted))
    return pd.DataFrame(
        {
            name: pd.Categorical.from_codes(columns[name], categories[name])
            if name in categories
            else columns[name]
            for name in COLUMNS
        }
    )


def opened(runs: Run | str | Path | Iterable[Run | str | Path]) -> list[Run]:
    """Return runs that are given as they are or by their paths, each recording once.

    Raises
    ------
    LensError
        If a path is no recording, or one cannot be read.
    """
    given = [runs] if isinstance(runs, Run | str | Path) else list(runs)
    every: list[Run] = []
    for one in given:
        every += [one] if isinstance(one, Run) else map(open_run, find_runs([one]))
    return list({run.path.resolve(): run for run in every}.values())


def labels(runs: Sequence[Run]) -> list[str]:
    """Return what each run is called: its name; runs that share one, as their paths end.

    As much of the path is taken as tells them apart: ``seed1/muon`` and ``seed2/muon``.
    """
    names = [run.name for run in runs]
    paths = [run.path.absolute().with_name(run.path.name.removesuffix(".h5")) for run in runs]
    depth = [0 if names.count(name) == 1 else 1 for name in names]
    while True:
        called = [
            "/".join(path.parts[-n:]) if n else name
            for name, path, n in zip(names, paths, depth, strict=True)
        ]
        clash = [called.count(name) > 1 for name in called]
        longer = [
            n + 1 if again and n < len(path.parts) else n
            for n, again, path in zip(depth, clash, paths, strict=True)
        ]
        if longer == depth:
            return called
        depth = longer


def plan(
    runs: Sequence[Run],
    metrics: str | Sequence[str],
    stages: str | Sequence[str],
    steps: np.ndarray | None = None,
) -> list[Part]:
    """Return what there is to compute of what is asked for.

    Parameters
    ----------
    runs : sequence of Run
    metrics, stages
        As of :func:`table`.
    steps : ndarray of int64, optional
        Only these, where they were recorded.

    Raises
    ------
    LensError
        If no run has one of the metrics or stages, or there is none of that name.
    """
    names, kinds = _several(metrics), _several(stages)
    every_metric, every_stage = names == [ALL], kinds == [ALL]
    names = measurable() if every_metric else [describe(name).name for name in names]
    kinds = list(STAGES) if every_stage else [_known_stage(name) for name in kinds]
    parts: list[Part] = []
    reasons: dict[str, str] = {}
    for label, run in zip(labels(runs), runs, strict=True):
        if not len(run.steps):
            continue  # it has only begun, and may yet have everything
        recorded = run.steps if steps is None else run.steps[np.isin(run.steps, steps)]
        for stage in kinds:
            if stage not in run.stages:
                reasons.setdefault(stage, _no_stage(run, stage))
                continue
            lacks = {name: lack(run, name, stage) for name in names}
            reasons = {**lacks, **reasons}
            if had := [name for name in names if not lacks[name]]:
                parts.append(Part(label, run, stage, had, recorded))
    found = {part.stage for part in parts}.union(*(part.metrics for part in parts))
    for name in ([] if every_stage else kinds) + ([] if every_metric else names):
        if name not in found and reasons.get(name):
            raise LensError(reasons[name])
    return parts


def _columns(parts: Sequence[Part], categories: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """Compute the columns of a table; a category is its number."""
    code = {
        kind: {
            name: np.array(number, dtype=np.min_scalar_type(-1 - len(names)))
            for number, name in enumerate(names)
        }
        for kind, names in categories.items()
    }
    rows: list[dict[str, np.ndarray]] = []
    for part in parts:
        matrix = np.array([code["matrix"][name] for name in part.run.matrices])
        pieces: dict[str, list[Series]] = {name: [] for name in part.metrics}
        for name, piece in measure_pieces(part.run, part.metrics, part.steps, stage=part.stage):
            pieces[name].append(piece)
        for name in part.metrics:
            constant = {"run": part.label, "stage": part.stage, "metric": name}
            for steps, values in pieces.pop(name):
                row, column = np.nonzero(~np.isnan(values))
                rows.append(
                    {
                        "step": steps[row],
                        "matrix": matrix[column],
                        "value": values[row, column],
                        **{
                            kind: np.broadcast_to(code[kind][what], len(row))
                            for kind, what in constant.items()
                        },
                    }
                )
    empty = {"step": np.empty(0, np.int64), "value": np.empty(0)}
    return {
        kind: np.concatenate([empty.get(kind, np.empty(0, np.int8)), *(x.pop(kind) for x in rows)])
        for kind in COLUMNS
    }


def _several(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(dict.fromkeys(given))


def _known_stage(name: str) -> str:
    if name not in STAGES:
        raise LensError(f"no stage is called {name!r}: there are {', '.join(STAGES)}")
    return name


def _no_stage(run: Run, stage: str) -> str:
    has = " and ".join(filter(None, [", ".join(run.stages[:-1]), *run.stages[-1:]]))
    return (
        f"{run.path}: stage {stage!r} is not recorded, only {has or 'no stage'}; attach(…, "
        "stages=True) records those that the optimizer has"
    )


def _whole_numbers(given: int | Iterable[int]) -> np.ndarray:
    try:
        numbers = [operator.index(given)] if not isinstance(given, Iterable) else list(given)
        return np.array([operator.index(number) for number in numbers], dtype=np.int64)
    except (TypeError, OverflowError):
        raise LensError(f"steps are whole numbers, got {given!r}") from None


def nothing_at(parts: Sequence[Part], steps: np.ndarray) -> str:
    """Return what to say when no metric has a number at any of the steps."""
    names = list(dict.fromkeys(name for part in parts for name in part.metrics))
    taken = [taken_at(part.run, name, part.stage) for part in parts for name in part.metrics]
    others = np.setdiff1d(np.concatenate(taken), steps)
    shown = ", ".join(map(str, steps[:3].tolist())) + ", …" * (len(steps) > 3)
    text = f"no {' and no '.join(names[:3])} at step {shown or '(none given)'}"
    if len(steps) and len(others):
        text += f"; the nearest step with one is {others[np.abs(others - steps[0]).argmin()]}"
    return text
