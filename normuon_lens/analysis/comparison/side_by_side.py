"""Runs side by side: what each optimizer does to the same kinds of matrices, and what came of it.

All runs are compared over the steps that they all went through, without the first ones, which are
representative of no rule. Matrices of one kind are taken together. Runs that differ in their seed
alone are a variant: its figures scatter, and a difference counts only beyond that scatter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from normuon_lens.analysis.comparison.comparable import (
    caveats,
    refuse_other_models,
    refuse_twice,
    shared_matrices,
    shared_steps,
)
from normuon_lens.analysis.comparison.expense import Clock, clocks, state_bytes
from normuon_lens.analysis.comparison.kinds import Row, rows_of
from normuon_lens.analysis.comparison.seeds import Figure, Variant, caveats_of_seeds, over_seeds
from normuon_lens.analysis.comparison.variants import seed_of, shadow_of, variant_names

# Part of what a comparison says, so they can be had here too.
from normuon_lens.analysis.crossing import final_loss, steps_to
from normuon_lens.analysis.settled import SKIP
from normuon_lens.analysis.table import labels
from normuon_lens.errors import LensError
from normuon_lens.runfile import Run

METRICS = ("condition_number", "spread_p95_p5", "neuron_cv", "neuron_max_min")
"""What is compared: conditioning with and without the smallest values, then imbalance."""


@dataclass(frozen=True)
class RunSummary:
    """One run of a comparison; NaN for what it does not have.

    Attributes
    ----------
    name : str
        What it is called, which is no other's name here.
    path : str
    optimizer : str
    variant : str
        Name of the variant that it is one of.
    shadow_of : str
        Optimizer in whose training it is a shadow, and then it has no loss and no time; empty for
        a real run.
    seed : int or None
    status : str
    steps, last_step, dropped : int
        Recorded steps of the whole run, the last of them, and samples lost.
    loss, val_loss : float
        Mean of the last :data:`LOSS_WINDOW` losses, and the last validation loss, up to the last
        step that all runs have.
    target_step, target_seconds : float
        When its loss first was at the target: see :func:`normuon_lens.analysis.crossing.steps_to`.
    step_seconds, seconds : float
        Median time of a step of those that all runs have, and the time spent by the last of them.
    state_bytes : float
        Size of its optimizer's state for the matrices that all runs have.
    """

    name: str
    path: str
    optimizer: str
    variant: str
    shadow_of: str
    seed: int | None
    status: str
    steps: int
    last_step: int
    dropped: int
    loss: float
    val_loss: float
    target_step: float
    target_seconds: float
    step_seconds: float
    seconds: float
    state_bytes: float


@dataclass(frozen=True)
class Target:
    """The loss that runs are timed to.

    Attributes
    ----------
    loss : float
        NaN if there is none, for the first run has logged no loss.
    of : str
        The run whose final loss it is, at that run's own last step; empty if it was asked for.
    """

    loss: float
    of: str


@dataclass(frozen=True)
class Comparison:
    """Several runs, and what differs between them.

    Attributes
    ----------
    skipped : int
        First steps that were left out of `rows`.
    first_step, last_step : int
        Those of the steps that all runs went through.
    runs : tuple of RunSummary
    rows : tuple of Row
        Group by group, ``"all matrices"`` last.
    target : Target
    clock : {"seconds", "times"}
        Where times are from: see :func:`normuon_lens.analysis.comparison.expense.clocks`.
    state : {"recorded", "counted", ""}
        Where sizes are from: see :func:`normuon_lens.analysis.comparison.expense.state_bytes`.
    variants : tuple of Variant
        Figures over seeds: those of :class:`RunSummary` from `loss` on.
    remarks : tuple of str
        What a reader must know before believing a difference; sentences without a full stop.
    """

    skipped: int
    first_step: int
    last_step: int
    runs: tuple[RunSummary, ...]
    rows: tuple[Row, ...]
    target: Target
    clock: str
    state: str
    variants: tuple[Variant, ...]
    remarks: tuple[str, ...]


FIGURES = (
    "loss",
    "val_loss",
    "target_step",
    "target_seconds",
    "step_seconds",
    "seconds",
    "state_bytes",
)
"""Numbers of a run that are taken over seeds."""

PAIRED = ("loss", "val_loss", "target_step")
"""Those by which one variant is better than another."""


def compare(
    runs: Sequence[Run],
    metrics: Sequence[str] = METRICS,
    *,
    skip: int = SKIP,
    target: float | None = None,
) -> Comparison:
    """Compare runs over the matrices and the steps that they have in common.

    Parameters
    ----------
    runs : sequence of Run
        At least one. The others are compared with the first.
    metrics : sequence of str
        Names of the catalogue.
    skip : int
        Leave out the first so many steps. If no run has a later one, they are taken.
    target : float, optional
        Loss to time the runs to; the first run's final loss if None.

    Returns
    -------
    Comparison

    Raises
    ------
    LensError
        If the runs cannot be compared: they share no matrix or step, one of the same name has two
        shapes, their models have other numbers of parameters, one is there twice, or holds no
        updates, or lacks what a metric needs; if a target was given and none has logged a loss.
    """
    if not runs:
        raise LensError("there is no run to compare")
    refuse_twice(runs)
    first, last = shared_steps(runs)
    matrices = shared_matrices(runs)
    refuse_other_models(runs)
    goal = _target(runs, target)
    called = labels(runs)
    clock, times = clocks(runs)
    state, sizes = state_bytes(runs, matrices)
    parts = zip(runs, called, variant_names(runs), times, sizes, strict=True)
    summaries = tuple(_summary(*part, goal.loss, first, last) for part in parts)
    variants = _variants(summaries)
    return Comparison(
        skipped=skip,
        first_step=first,
        last_step=last,
        runs=summaries,
        rows=tuple(rows_of(runs, metrics, matrices, variants, first, last, skip)),
        target=goal,
        clock=clock,
        state=state,
        variants=variants,
        remarks=(
            *caveats(runs, called, matrices, first, last),
            *caveats_of_seeds(variants),
            *_early(last, skip),
        ),
    )


def _target(runs: Sequence[Run], asked: float | None) -> Target:
    if asked is None:
        first = runs[0]
        return Target(math.nan if shadow_of(first) else final_loss(first), labels(runs)[0])
    if not math.isfinite(asked):
        raise LensError(f"the target loss must be a number, not {asked}")
    if not any(math.isfinite(final_loss(run)) for run in runs if not shadow_of(run)):
        raise LensError(
            f"no run has logged a loss, so none reaches {asked}: log it with lens.log(loss=loss)"
        )
    return Target(asked, "")


def _summary(
    run: Run,
    label: str,
    variant: str,
    clock: Clock,
    size: float,
    target: float,
    first: int,
    last: int,
) -> RunSummary:
    # The losses and the time that stand in a shadow's file, if any do, are those of its host.
    real = not shadow_of(run)
    reached = steps_to(run, target) if real else math.nan
    return RunSummary(
        name=label,
        path=str(run.path),
        optimizer=run.optimizer,
        variant=variant,
        shadow_of=shadow_of(run),
        seed=seed_of(run),
        status=run.status,
        steps=len(run.steps),
        last_step=int(run.steps[-1]),
        dropped=run.dropped,
        loss=final_loss(run, until=last) if real else math.nan,
        val_loss=final_loss(run, "val_loss", window=1, until=last) if real else math.nan,
        target_step=reached,
        target_seconds=clock.at(reached),
        step_seconds=clock.a_step(first, last) if real else math.nan,
        seconds=clock.at(last) if real and first < last else math.nan,
        state_bytes=size,
    )


def _variants(runs: Sequence[RunSummary]) -> tuple[Variant, ...]:
    unknown = [math.nan] * len(runs)
    figures = {
        name: Figure(
            [getattr(run, name) for run in runs],
            [run.last_step for run in runs] if name == "target_step" else unknown,
        )
        for name in FIGURES
    }
    return over_seeds([run.variant for run in runs], [run.seed for run in runs], figures, PAIRED)


def _early(last: int, skip: int) -> Iterator[str]:
    if last <= skip:
        yield f"compared over none but the first {skip} steps, which are like the rest of no run"
