"""What the paper says of whole trainings: the loss they reach, and the time that they take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.special import stdtr

from normuon_lens.analysis.claims.evidence import PAPERS_FORM, Evidence
from normuon_lens.analysis.claims.observation import PAPER, Observation
from normuon_lens.analysis.claims.verdict import (
    CANNOT_TELL,
    NOT_SEEN,
    SEEN,
    Answer,
    Finding,
    Undecided,
)
from normuon_lens.analysis.comparison.comparable import (
    FEW_LOSSES,
    SAME_START,
    refuse_other_models,
    shared_matrices,
    shared_steps,
)
from normuon_lens.analysis.comparison.expense import clocks
from normuon_lens.analysis.comparison.variants import seed_of
from normuon_lens.analysis.crossing import final_loss, smoothed_loss, steps_to
from normuon_lens.errors import LensError
from normuon_lens.runfile import Run

ONE_SEED = 0.05
"""Where there is one seed each, losses that differ by less may differ by their seeds.

Between seeds of a GPT of 135,000 parameters the final loss had a standard deviation of up to 0.011
nats a byte; two seeds differ by less than three times √2 of that.
"""

SIGNIFICANT = 0.05
"""Level of the two-sided t-test where there are several seeds."""

SLOWER = 0.05
"""A step is hardly longer if it takes at most so much more: the paper's 3 %, and room for noise."""

FEW_STEPS = 20
"""With fewer steps in half of a run its median time says little."""

ABLATIONS = ("granularity=coordinate", "normalize=before", "only=tall", "only=wide")

NOISE = (
    f"With several seeds the difference has to pass a t-test at {SIGNIFICANT:g}, paired where the "
    f"seeds are the same; with one seed each it has to exceed {ONE_SEED:g} nats, more than seeds "
    "made of it in small models. Otherwise it cannot be told from seed noise."
)


@dataclass(frozen=True)
class Lead:
    """By how much the final losses of some runs are lower than those of others.

    Attributes
    ----------
    difference : float
        Mean; negative if they are higher.
    real : bool
        Whether it is more than seed noise, by the rule of :data:`NOISE`.
    why : str
        What that rests on.
    """

    difference: float
    real: bool
    why: str


def fewer_steps(evidence: Evidence) -> Answer:
    """Find the steps in which NorMuon reaches Adam's final loss."""
    adam, normuon = (evidence.of(kind, shadows=False) for kind in ("Adam", "NorMuon"))
    lead = _lead(normuon, adam)
    target, steps = _mean(map(final_loss, adam)), int(adam[0].steps[-1])
    needed = _mean(steps_to(run, target) for run in normuon)
    findings = [
        Finding("final loss, Adam", target),
        Finding("final loss, NorMuon", _mean(map(final_loss, normuon))),
        Finding("steps of Adam in all", steps, "steps"),
        Finding("steps to Adam's final loss, NorMuon", needed, "steps"),
    ]
    try:
        muon = evidence.of("Muon", shadows=False)
        _lead(muon, adam)
    except (Undecided, LensError):
        pass
    else:
        reached = _mean(steps_to(run, target) for run in muon)
        findings.append(Finding("steps to Adam's final loss, Muon", reached, "steps"))
    if not lead.real:
        return Answer(CANNOT_TELL, _unclear(lead), tuple(findings))
    if lead.difference < 0:
        said = f"NorMuon ends {-lead.difference:.3f} higher than Adam ({lead.why})"
        return Answer(NOT_SEEN, said, tuple(findings))
    fewer = f"gets there in {1 - needed / steps:.0%} fewer steps than Adam was trained for"
    if math.isnan(needed):
        fewer = "does not get there with every seed"
    said = (
        f"NorMuon {fewer}, and ends {lead.difference:.3f} lower ({lead.why}); but an Adam whose "
        "learning rates were tuned less well would look the same, and no recording tells how they "
        "were tuned"
    )
    return Answer(SEEN, said, tuple(findings))


def step_time(evidence: Evidence) -> Answer:
    """Hold the median time of a step of NorMuon against Adam's."""
    adam, normuon = (evidence.of(kind, shadows=False) for kind in ("Adam", "NorMuon"))
    runs = [*adam, *normuon]
    refuse_other_models(runs)
    first, last = shared_steps(runs)
    first = max(first, evidence.skip + 1)
    source, by_run = clocks(runs)
    if source == "times" and any(_overlap(*pair) for pair in product(adam, normuon)):
        raise Undecided(
            "these trainings went on at the same time, or by turns, and did not log what each took "
            "(a scalar called seconds)"
        )
    middle = (first + last) // 2
    halves = [(first, middle), (middle, last)]
    few = min(np.sum((c.steps >= a) & (c.steps <= b)) for c in by_run for a, b in halves)
    if last <= first or few <= FEW_STEPS:
        raise Undecided(f"there are too few timed steps beyond the first {evidence.skip}")
    times = [
        [_mean(c.a_step(a, b) for c in of) for a, b in ((first, last), *halves)]
        for of in (by_run[: len(adam)], by_run[len(adam) :])
    ]
    ratio, *by_half = np.divide(times[1], times[0])
    overhead = max((x for run in runs if math.isfinite(x := _overhead(run))), default=math.nan)
    findings = [
        Finding("median time of a step, Adam", times[0][0], "s"),
        Finding("median time of a step, NorMuon", times[1][0], "s"),
        Finding("NorMuon relative to Adam", float(ratio), "ratio"),
        Finding("the same in the first half", float(by_half[0]), "ratio"),
        Finding("the same in the second half", float(by_half[1]), "ratio"),
    ]
    if math.isfinite(overhead):
        findings.append(Finding("recording, relative to the rest of the time", overhead))
    if not np.isfinite([ratio, *by_half]).all():
        raise Undecided("the recorded times do not grow", tuple(findings))
    if overhead > SLOWER:
        raise Undecided(
            f"recording itself took {overhead:.0%}, more than what is in question", tuple(findings)
        )
    if len({value <= 1 + SLOWER for value in (ratio, *by_half)}) > 1:
        raise Undecided(
            "the times are not steady: both halves do not say the same", tuple(findings)
        )
    size = runs[0].metadata.get("parameters")
    of_size = f" of {size:,} parameters" if isinstance(size, int) else ""
    said = (
        f"a step of NorMuon takes {ratio:.2f} times as long as one of Adam on this model{of_size}, "
        "if both ran on the same machine"
    )
    return Answer(SEEN if ratio <= 1 + SLOWER else NOT_SEEN, said, tuple(findings))


def ablation_order(evidence: Evidence) -> Answer:
    """Hold NorMuon's final loss against that of each of its ablations."""
    found = evidence.ablations()
    if not found:
        raise Undecided(
            f"no run with a part of NorMuon changed ({', '.join(PAPERS_FORM)}) is among these"
        )
    normuon = evidence.of("NorMuon", shadows=False)
    leads = {changed: _lead(normuon, runs) for changed, runs in found.items()}
    findings = (
        Finding("final loss, NorMuon", _mean(map(final_loss, normuon))),
        *(Finding(f"the same, {x}", _mean(map(final_loss, runs))) for x, runs in found.items()),
    )
    worse = [x for x, lead in leads.items() if lead.real and lead.difference < 0]
    unclear = [x for x, lead in leads.items() if not lead.real]
    missing = [x for x in ABLATIONS if x not in leads]
    if worse:
        return Answer(NOT_SEEN, f"{' and '.join(worse)}: ends lower than NorMuon", findings)
    if unclear:
        said = f"{unclear[0]}: {_unclear(leads[unclear[0]])}"
        return Answer(CANNOT_TELL, said, findings)
    if missing:
        said = f"NorMuon ends lower than what was run, but no run has {' or '.join(missing)}"
        return Answer(CANNOT_TELL, said, findings)
    return Answer(SEEN, f"NorMuon ends lower than all {len(leads)} ablations", findings)


def _lead(ours: Sequence[Run], theirs: Sequence[Run]) -> Lead:
    """Compare final losses of trainings that must be of one model, and of one length."""
    runs = [*theirs, *ours]
    refuse_other_models(runs)
    shared_matrices(runs)
    for run in runs:
        _refuse_unfinished(run)
    lengths = sorted({int(run.steps[-1]) for run in runs})
    if len(lengths) > 1:
        raise Undecided(
            f"the trainings have different lengths, of {lengths[0]:,} to {lengths[-1]:,} steps, "
            "and a final loss goes with the length of a training"
        )
    here, there = _by_seed(ours), _by_seed(theirs)
    common = [seed for seed in here if seed in there]
    for seed in common:
        _refuse_other_starts([*here[seed], *there[seed]])
    a = {seed: _mean(map(final_loss, of)) for seed, of in here.items()}
    b = {seed: _mean(map(final_loss, of)) for seed, of in there.items()}
    if len(common) > 1:
        differences = np.array([b[seed] - a[seed] for seed in common])
        mean, error = float(differences.mean()), _error(differences)
        return _tested(mean, error, len(common) - 1, f"{len(common)} seeds, paired")
    mean = _mean(b.values()) - _mean(a.values())
    if len(a) > 1 and len(b) > 1:
        errors = [_error(np.array([*of.values()])) for of in (a, b)]
        degrees = _welch(errors, (len(a) - 1, len(b) - 1))
        return _tested(mean, math.hypot(*errors), degrees, f"{len(a)} and {len(b)} seeds")
    return Lead(
        mean, abs(mean) > ONE_SEED, "one seed each: what a seed makes of it, these runs do not show"
    )


def _refuse_unfinished(run: Run) -> None:
    if run.live:
        raise Undecided(f"{run.path} is still being recorded")
    steps, _ = smoothed_loss(run)
    if len(steps) < FEW_LOSSES:
        raise Undecided(
            f"{run.path} has logged {len(steps)} losses, and fewer than {FEW_LOSSES} do not tell a "
            "final loss from the way there"
        )
    if run.steps[-1] - steps[-1] > np.diff(steps).max():
        raise Undecided(f"{run.path} has logged no finite loss after step {steps[-1]:,}")


def _refuse_other_starts(runs: Sequence[Run]) -> None:
    """Refuse runs of one seed that began with other losses: of other weights, or other data."""
    firsts = []
    for run in runs:
        known = np.flatnonzero(np.isfinite(run.scalars["loss"]))
        firsts.append((int(run.steps[known[0]]), float(run.scalars["loss"][known[0]])))
    steps, losses = zip(*firsts, strict=True)
    if len(set(steps)) == 1 and max(losses) - min(losses) > SAME_START * abs(max(losses)):
        raise Undecided(
            "runs of one seed began with different losses: they did not train the same weights on "
            "the same batches"
        )


def _by_seed(runs: Sequence[Run]) -> dict[object, list[Run]]:
    """Return runs by seed; one whose seed is not known stands for itself."""
    found: dict[object, list[Run]] = {}
    for run in runs:
        seed = seed_of(run)
        found.setdefault(run.path if seed is None else seed, []).append(run)
    return found


def _tested(mean: float, error: float, degrees: float, why: str) -> Lead:
    if error == 0:
        return Lead(mean, False, f"{why}, without any scatter, which no two trainings have")
    p = 2 * float(stdtr(degrees, -abs(mean / error)))
    return Lead(mean, p < SIGNIFICANT, f"{why}, p = {p:.2g}")


def _error(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _welch(errors: Sequence[float], degrees: Sequence[int]) -> float:
    squares = [error**2 for error in errors]
    below = sum(s**2 / d for s, d in zip(squares, degrees, strict=True))
    return sum(squares) ** 2 / below if below else float(sum(degrees))


def _unclear(lead: Lead) -> str:
    return (
        f"the final losses differ by {abs(lead.difference):.3f} ({lead.why}), which may be seed "
        "noise"
    )


def _overlap(one: Run, other: Run) -> bool:
    return bool(one.times[0] < other.times[-1] and other.times[0] < one.times[-1])


def _overhead(run: Run) -> float:
    told = run.scalars.get("recording_overhead", np.empty(0))
    told = told[np.isfinite(told)]
    return float(told[-1]) if len(told) else math.nan


def _mean(values: Iterable[float]) -> float:
    return float(np.mean([*values]))


TRAINING = (
    Observation(
        "steps-to-adam-loss",
        "NorMuon reaches Adam's final loss in fewer steps: 21.74 % fewer at 1.1 billion "
        "parameters.",
        f"{PAPER}, abstract",
        "NorMuon's final loss (mean of the last logged ones) is lower than Adam's after equally "
        f"many steps, so that it got to Adam's before. {NOISE}",
        fewer_steps,
    ),
    Observation(
        "step-time",
        "A step of NorMuon takes hardly longer than one of Adam: about 3 %.",
        f"{PAPER}, experiments",
        f"The median time of a step is at most {1 + SLOWER:g} times Adam's, in the whole run and "
        f"in each half, in each of which at least {FEW_STEPS} steps were timed. It includes "
        f"recording; if that took more than {SLOWER:.0%} it cannot be told.",
        step_time,
    ),
    Observation(
        "ablation-order",
        "Each part of NorMuon counts: it ends lower than with a second moment for every entry, "
        "than with normalization before orthogonalization, and than if tall or wide matrices alone "
        "are normalized.",
        f"{PAPER}, ablations",
        f"NorMuon's final loss is lower than that of each of {', '.join(ABLATIONS)}. {NOISE}",
        ablation_order,
    ),
)
