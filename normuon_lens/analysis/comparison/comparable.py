"""What may stand side by side: refusals where it may not, remarks where a reader must be warned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from normuon_lens.analysis.comparison.variants import seed_of, shadow_of
from normuon_lens.analysis.crossing import LOSS_WINDOW, smoothed_loss
from normuon_lens.analysis.remarks import remarks
from normuon_lens.errors import LensError
from normuon_lens.runfile import Run

SAME_START = 1e-3
"""First losses that differ by less than this share of them may differ by rounding alone."""

FEW_LOSSES = 5 * LOSS_WINDOW
"""With fewer, the final loss is a mean over a large part of the training."""


def shared_matrices(runs: Sequence[Run]) -> list[str]:
    """Return the matrices that all runs have, in the first run's order.

    Raises
    ------
    LensError
        If there is none, or one of the same name has two shapes.
    """
    first = runs[0]
    shared = list(first.matrices)
    for run in runs[1:]:
        known = set(run.matrices)
        shared = [name for name in shared if name in known]
        if not shared:
            raise LensError(
                f"{first.path} and {run.path} have no matrix in common"
                f"{' with all the others' if len(runs) > 2 else ''}: they are not of one model"
            )
        for name in shared:
            (m, n), (rows, columns) = first.shape(name), run.shape(name)
            if (m, n) != (rows, columns):
                raise LensError(
                    f"{name} is {m} × {n} in {first.path} and {rows} × {columns} in {run.path}: "
                    "they are not of one model"
                )
    if not shared:
        raise LensError(f"{first.path} has no matrix to compare")
    return shared


def shared_steps(runs: Sequence[Run]) -> tuple[int, int]:
    """Return the first and the last step of those that all runs went through.

    Raises
    ------
    LensError
        If a run has no step, or holds no update, or the runs have no step in common.
    """
    for run in runs:
        if not len(run.steps):
            wait = "has no step yet" if run.live else "has no step"
            raise LensError(f"{run.path} {wait}: leave it out of the comparison")
        if "update" not in run.stages:
            has = ", ".join(run.stages) or "no stage"
            raise LensError(
                f"{run.path} holds no updates to compare, only {has}: leave it out of the "
                "comparison"
            )
    latest = max(runs, key=lambda run: int(run.steps[0]))
    shortest = min(runs, key=lambda run: int(run.steps[-1]))
    first, last = int(latest.steps[0]), int(shortest.steps[-1])
    if first > last:
        raise LensError(
            f"{shortest.path} ends at step {last} and {latest.path} begins at step {first}: "
            "they have no step in common"
        )
    return first, last


def refuse_twice(runs: Sequence[Run]) -> None:
    """Refuse a recording that is there twice, by another name or as a copy.

    Raises
    ------
    LensError
    """
    seen: dict[object, Run] = {}
    for run in runs:
        created = run.metadata.get("created")
        known = isinstance(created, int | float)
        recording = (created, run.optimizer, shadow_of(run)) if known else None
        for identity in filter(None, (run.path.resolve(), recording)):
            if identity in seen:
                raise LensError(
                    f"{seen[identity].path} and {run.path} are one recording: a run compared with "
                    "itself says nothing, leave one out"
                )
            seen[identity] = run


def refuse_other_models(runs: Sequence[Run]) -> None:
    """Refuse runs of models that do not have the same number of parameters, where it is known.

    Raises
    ------
    LensError
    """
    known = [run for run in runs if isinstance(run.metadata.get("parameters"), int)]
    for run in known[1:]:
        one, other = known[0].metadata["parameters"], run.metadata["parameters"]
        if one != other:
            raise LensError(
                f"{known[0].path} is of a model with {one:,} parameters and {run.path} of one "
                f"with {other:,}: they are not of one model"
            )


def caveats(
    runs: Sequence[Run], labels: Sequence[str], matrices: Sequence[str], first: int, last: int
) -> list[str]:
    """Return what keeps these runs from being alike in all but their optimizer.

    Parameters
    ----------
    runs : sequence of Run
    labels : sequence of str
        What each is called.
    matrices : sequence of str
        Those that all runs have.
    first, last : int
        Of the steps that all runs went through.

    Returns
    -------
    list of str
        One sentence each, without a full stop.
    """
    named = list(zip(labels, runs, strict=True))
    real = [(label, run) for label, run in named if not shadow_of(run)]
    return [
        *_lengths(named, first, last),
        *_matrices(named, matrices),
        *_schedules(named, first, last),
        *_unlike(named, "models", "model"),
        *_unlike(named, "numbers of ranks", "world_size"),
        *_starts(real),
        *_told_together(
            [*_shadows(named), *_losses(real), *_live(named), *_remarks(named)], len(named)
        ),
    ]


Named = Sequence[tuple[str, Run]]
"""Runs, each with what it is called."""

Said = Iterator[tuple[str, str]]
"""Sentences, each with the run of which it is true."""


def _lengths(named: Named, first: int, last: int) -> Iterator[str]:
    if any((run.steps[0], run.steps[-1]) != (first, last) for _, run in named):
        every = _by_value((label, f"{run.steps[0]:,}–{run.steps[-1]:,}") for label, run in named)
        yield f"compared over steps {first:,}–{last:,}, which all runs went through, of {every}"


def _matrices(named: Named, matrices: Sequence[str]) -> Iterator[str]:
    most = max(len(run.table) for _, run in named)
    if most > len(matrices):
        yield f"compared over the {len(matrices)} matrices that all runs have, of up to {most}"


def _schedules(named: Named, first: int, last: int) -> Iterator[str]:
    for what, taken in (("spectra", Run.spectrum_steps), ("neuron norms", _norm_steps)):
        steps = [(label, taken(run)) for label, run in named]
        counts = [(label, f"{((x >= first) & (x <= last)).sum():,}") for label, x in steps]
        if len({count for _, count in counts}) > 1:
            yield (
                f"{what} were not taken equally often, {_by_value(counts)}: figures are over "
                "each run's own"
            )


def _norm_steps(run: Run) -> np.ndarray:
    """Return the steps at which the first matrix's norms were taken."""
    norms = run.neuron_norms(run.matrices[0])
    taken: np.ndarray = run.steps[~np.isnan(norms).all(axis=1)]
    return taken


def _unlike(named: Named, what: str, key: str) -> Iterator[str]:
    known = [(label, str(run.metadata[key])) for label, run in named if run.metadata.get(key)]
    if len({value for _, value in known}) > 1:
        yield f"{what} are not alike: {_by_value(known)}"


def _starts(named: Named) -> Iterator[str]:
    """Say of runs with equal losses, or with equal seeds, what does not fit together."""
    curves: dict[bytes, list[str]] = {}
    starts: dict[tuple[int, int], list[tuple[str, float]]] = {}
    for label, run in named:
        steps, losses = smoothed_loss(run)
        if len(losses) > 1:
            curves.setdefault(steps.tobytes() + losses.tobytes(), []).append(label)
        seed = seed_of(run)
        if len(losses) and seed is not None:
            starts.setdefault((seed, int(steps[0])), []).append((label, float(losses[0])))
    for labels in curves.values():
        if len(labels) > 1:
            yield f"{', '.join(labels)}: the same loss at every step, as of one training"
    unlike = [(seed, found) for (seed, _), found in starts.items() if _differ(found)]
    for seed, found in unlike[:1]:
        every = _by_value((label, f"{loss:.4g}") for label, loss in found)
        more = f", and so with {len(unlike) - 1} more seeds" if len(unlike) > 1 else ""
        yield f"data or first weights are not the same: seed {seed} begins at loss {every}{more}"


def _differ(starts: Sequence[tuple[str, float]]) -> bool:
    losses = [loss for _, loss in starts]
    return max(losses) - min(losses) > SAME_START * abs(min(losses))


def _shadows(named: Named) -> Said:
    for label, run in named:
        if host := shadow_of(run):
            yield (
                label,
                f"a shadow, which is what its rule would have done to the weights that {host} "
                "trained; it has no loss and no time of its own",
            )


def _losses(named: Named) -> Said:
    """Say whose losses are missing, too few to be averaged, or not finite at the end."""
    for label, run in named:
        steps, _ = smoothed_loss(run)
        if not len(steps):
            yield label, "no loss was logged"
        elif len(steps) < FEW_LOSSES:
            few = f"{len(steps)} losses were logged" if len(steps) > 1 else "one loss was logged"
            yield label, f"{few}, and a loss here is the mean of up to {LOSS_WINDOW}"
        if len(steps) > 1 and run.steps[-1] - steps[-1] > np.diff(steps).max():
            yield label, f"no finite loss was logged after step {steps[-1]:,}"


def _live(named: Named) -> Said:
    for label, run in named:
        if run.live:
            yield label, "still being recorded, so its figures will change"


def _remarks(named: Named) -> Said:
    for label, run in named:
        for text in remarks(run):
            yield label, text


def _told_together(said: Sequence[tuple[str, str]], count: int) -> Iterator[str]:
    """Say once what is true of several of so many runs."""
    labels: dict[str, list[str]] = {}
    for label, text in said:
        labels.setdefault(text, []).append(label)
    for text, of in labels.items():
        yield f"{'all runs' if 1 < len(of) == count else ', '.join(of)}: {text}"


def _by_value(pairs: Iterable[tuple[str, str]]) -> str:
    """Return each value once, and in brackets the runs that have it."""
    labels: dict[str, list[str]] = {}
    for label, value in pairs:
        labels.setdefault(value, []).append(label)
    return ", ".join(f"{value} ({', '.join(of)})" for value, of in labels.items())
