"""What the runs at hand hold for the paper's observations, measured once.

Geometry is read from real runs and shadows alike; a shadow never moved the weights, so losses and
times are read from real runs alone. Only matrices count that a run's own optimizer trains, in all
runs of the three: embeddings that Muon leaves to AdamW say nothing of Muon.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np

from normuon_lens.analysis.claims.verdict import Undecided
from normuon_lens.analysis.comparison.comparable import (
    refuse_other_models,
    shared_matrices,
    shared_steps,
)
from normuon_lens.analysis.comparison.variants import groups_of, shadow_of
from normuon_lens.analysis.measure import Series, measure_all
from normuon_lens.analysis.settled import finite_median, is_bound
from normuon_lens.runfile import Matrix, Run

KINDS = {"Adam": ("Adam", "AdamW"), "Muon": ("Muon",), "NorMuon": ("NorMuon",)}
"""Class names of the optimizers that the paper is about."""

PAPERS_FORM = {"granularity": "neuron", "normalize": "after", "only": "all"}
"""NorMuon's settings that its ablations change."""

WORST_ERROR = 0.1
"""Above this rounding error of its updates no figure of a matrix can be trusted."""

MEASURED = (
    "condition_number",
    "condition_is_lower_bound",
    "spread_p95_p5",
    "resolved",
    "neuron_cv",
    "update_rms",
    "update_error",
)


class Figures(NamedTuple):
    """One figure of every matrix.

    Attributes
    ----------
    values : ndarray of shape (M,), float64
        Median over steps, then over runs; NaN where none can be trusted.
    bounds : ndarray of shape (M,), bool
        Whether the value is a lower bound.
    """

    values: np.ndarray
    bounds: np.ndarray

    @property
    def median(self) -> float:
        """Median over the matrices."""
        return finite_median(self.values)

    def where(self, matrices: np.ndarray) -> Figures:
        """Return the figures of some of the matrices."""
        return Figures(self.values[matrices], self.bounds[matrices])


class Geometry(NamedTuple):
    """What the updates of one optimizer are like, matrix by matrix."""

    condition: Figures
    spread: Figures
    cv: Figures

    def where(self, matrices: np.ndarray) -> Geometry:
        """Return that of some of the matrices."""
        return Geometry(*(figures.where(matrices) for figures in self))


class Evidence:
    """Runs by optimizer, and what was measured of them.

    Parameters
    ----------
    runs : sequence of Run
        A recording that is there twice counts once.
    skip : int
        First steps to leave out of medians over steps.

    Attributes
    ----------
    skip : int
    """

    def __init__(self, runs: Sequence[Run], skip: int) -> None:
        self.skip = skip
        self._runs = [run for run in _once(runs) if len(run.steps)]
        self._measure = cache(lambda run: measure_all(run, MEASURED))

    def of(self, kind: str, *, shadows: bool = True) -> list[Run]:
        """Return the runs of one of :data:`KINDS`, those of ablations left out.

        Raises
        ------
        Undecided
            If there is none.
        """
        found = [
            run
            for run in self._runs
            if run.optimizer in KINDS[kind]
            and (shadows or not shadow_of(run))
            and not ablation_of(run)
        ]
        if not found:
            alone = ", its shadows aside," if not shadows else ""
            raise Undecided(f"no recorded step of {kind}{alone} is among these runs")
        return found

    def series(self, run: Run) -> dict[str, Series]:
        """Return those of :data:`MEASURED` that a run holds, of all its matrices."""
        return self._measure(run)

    def ablations(self) -> dict[str, list[Run]]:
        """Return the real runs of NorMuon with parts of it changed, by what was changed."""
        found: dict[str, list[Run]] = {}
        for run in self._runs:
            if (changed := ablation_of(run)) and not shadow_of(run):
                found.setdefault(changed, []).append(run)
        return found

    @cached_property
    def matrices(self) -> list[Matrix]:
        """The matrices that all runs have and their own optimizers train, in model order."""
        names = {name for kind in KINDS.values() for name in kind}
        runs = [run for run in self._runs if run.optimizer in names and "update" in run.stages]
        refuse_other_models(runs)
        shared = shared_matrices(runs)
        trained = [
            matrix
            for name in shared
            for matrix in [runs[0].table[runs[0].table.index(name)]]
            if all(
                trainer_of(run, run.table[run.table.index(name)]) == run.optimizer for run in runs
            )
        ]
        if not trained:
            raise Undecided("no matrix is trained by each run's own optimizer")
        return trained

    @property
    def tall(self) -> np.ndarray:
        """Which of `matrices` have more neurons than inputs, m > n."""
        return np.array([matrix.m > matrix.n for matrix in self.matrices])

    def geometry(self, *kinds: str) -> list[Geometry]:
        """Return the geometry of the updates under each of some optimizers.

        Raises
        ------
        Undecided
            If there is no run of one, or nothing was sampled beyond the first steps.
        LensError
            If the runs are not of one model, or have no step in common.
        """
        runs = {kind: self.of(kind) for kind in kinds}
        first, last = shared_steps([run for of in runs.values() for run in of])
        first = max(first, self.skip + 1)
        if first > last:
            raise Undecided(
                f"no recorded step that these runs have in common lies beyond the first {self.skip}"
            )
        return [_over_runs([self._read(run, first, last) for run in of]) for of in runs.values()]

    def _read(self, run: Run, first: int, last: int) -> Geometry:
        series = self.series(run)
        if "condition_number" not in series or "neuron_cv" not in series:
            raise Undecided(f"{run.path} holds no spectra or no neuron norms of its updates")
        within = {name: _within(found, first, last) for name, found in series.items()}
        if not len(within["condition_number"]):
            raise Undecided(f"{run.path} has no spectrum in steps {first:,} to {last:,}")
        columns = [
            self._read_matrix(run, run.table.index(matrix.name), within) for matrix in self.matrices
        ]
        return Geometry(
            *(Figures(np.array(v), np.array(b)) for v, b in map(_unzip, zip(*columns, strict=True)))
        )

    def _read_matrix(
        self, run: Run, i: int, within: dict[str, np.ndarray]
    ) -> list[tuple[float, bool]]:
        """Return condition number, p95/p5 and CV of a matrix, and whether each is a bound."""
        of = {name: values[:, i] for name, values in within.items()}
        if finite_median(of["update_error"]) > WORST_ERROR:
            return [(np.nan, False)] * 3
        k = min(run.table[i].m, run.table[i].n)
        condition, spread = of["condition_number"], of["spread_p95_p5"]
        return [
            (finite_median(condition), is_bound(condition, of["condition_is_lower_bound"])),
            # Its p5 lies above the noise if 95 % of the singular values do.
            (finite_median(spread), is_bound(spread, of["resolved"] < 0.95 * k)),
            (finite_median(of["neuron_cv"]), False),
        ]


def ablation_of(run: Run) -> str:
    """Return which part of NorMuon a run changed, such as ``normalize=before``; empty if none."""
    if run.optimizer not in KINDS["NorMuon"]:
        return ""
    changed = {
        f"{name}={group[name]}"
        for group in groups_of(run)
        if group.get("optimizer", run.optimizer) == run.optimizer
        for name, usual in PAPERS_FORM.items()
        if group.get(name, usual) != usual
    }
    return ", ".join(sorted(changed))


def group_of(run: Run, matrix: Matrix) -> dict[str, Any]:
    """Return the settings that a matrix is trained with; empty if they were not recorded."""
    groups = groups_of(run)
    return groups[matrix.group] if matrix.group < len(groups) else {}


def trainer_of(run: Run, matrix: Matrix) -> str:
    """Return the class name of the optimizer that trains a matrix, the run's unless recorded."""
    return str(group_of(run, matrix).get("optimizer", run.optimizer))


def _once(runs: Sequence[Run]) -> list[Run]:
    """Leave out what is there again, under the same path or as a copy."""
    kept: dict[object, Run] = {}
    for run in runs:
        created = run.metadata.get("created")
        copy = f"{created} {run.optimizer} {shadow_of(run)}"
        key = run.path.resolve() if created is None else copy
        kept.setdefault(key, run)
    return list(dict.fromkeys(kept.values()))


def _within(series: Series, first: int, last: int) -> np.ndarray:
    return series.values[(series.steps >= first) & (series.steps <= last)]


def _unzip(pairs: Iterable[tuple[float, bool]]) -> tuple[tuple[float, ...], tuple[bool, ...]]:
    values, bounds = zip(*pairs, strict=True)
    return values, bounds


def _over_runs(found: Sequence[Geometry]) -> Geometry:
    """Return the median over runs of one optimizer; a bound in one of them is a bound."""
    merged = []
    for figures in zip(*found, strict=True):
        values = np.array([each.values for each in figures])
        medians = np.array([finite_median(column) for column in values.T])
        merged.append(Figures(medians, np.any([each.bounds for each in figures], axis=0)))
    return Geometry(*merged)
