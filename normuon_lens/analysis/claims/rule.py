"""What follows from the rules themselves: how much they keep, and how large an update is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from normuon_lens.analysis.claims.evidence import KINDS, WORST_ERROR, Evidence, group_of, trainer_of
from normuon_lens.analysis.claims.observation import PAPER, Observation
from normuon_lens.analysis.claims.verdict import NOT_SEEN, SEEN, Answer, Finding, Undecided
from normuon_lens.analysis.comparison.expense import COUNTED, RECORDED
from normuon_lens.analysis.comparison.variants import shadow_of
from normuon_lens.analysis.settled import finite_median
from normuon_lens.optim.cost import state_elements
from normuon_lens.runfile import Matrix, Run

COUNTER_BYTES = 16
"""What an optimizer may keep of a matrix besides: Adam counts its steps."""

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

RMS = 0.2
"""Root mean square of an update, in units of the learning rate. [NorMuon, Algorithm 1]"""

RMS_TOLERANCE = 0.01
"""Far above the rounding of float32, far below what another rule would leave."""


def state_memory(evidence: Evidence) -> Answer:
    """Hold the recorded bytes of state against the numbers that each rule should keep."""
    findings: list[Finding] = []
    missing, wrong = [], []
    for kind in KINDS:
        told = _told_states(evidence, kind)
        if not told:
            missing.append(kind)
            continue
        run, held = told[0]
        each = held / sum(_numbers(run, matrix) for matrix in run.table)
        findings.append(Finding(f"state of the recorded matrices, {kind}", held, "bytes"))
        findings.append(Finding(f"the same for each number of the rule, {kind}", each, "bytes"))
        if not all(_fits(*each) for each in told):
            wrong.append(kind)
    if wrong:
        said = f"{' and '.join(wrong)} keep another number of bytes than their rules say"
        return Answer(NOT_SEEN, said, tuple(findings))
    if missing:
        raise Undecided(
            f"no run of {' or '.join(missing)} on one rank has recorded its state; counting it "
            "from shapes would be the rule itself",
            tuple(findings),
        )
    return Answer(
        SEEN, "all three keep the numbers that their rules say, and no more", tuple(findings)
    )


def update_rms_is_fixed(evidence: Evidence) -> Answer:
    """Look at NorMuon's update RMS over 0.2·lr, at every recorded step of every matrix."""
    runs = [run for run in evidence.of("NorMuon") if "update" in run.stages]
    if not runs:
        raise Undecided("no run of NorMuon holds its updates")
    matching = [run for run in runs if _scale(run) != {"preserve_norm"}]
    if not matching:
        raise Undecided(
            "these runs take the authors' form, scale=preserve_norm, of which the paper does not "
            "say this"
        )
    found = [ratios for run in matching if (ratios := _rms_ratios(evidence, run)) is not None]
    known = np.concatenate([each[np.isfinite(each)] for each in found]) if found else np.empty(0)
    if not len(known):
        raise Undecided(
            "no learning rate is recorded for the matrices, or their updates are mostly rounding"
        )
    worst = float(np.abs(known - 1).max())
    within = int(np.sum(np.abs(known - 1) <= RMS_TOLERANCE))
    findings = (
        Finding("median of update RMS / (0.2·lr)", float(np.median(known)), "ratio"),
        Finding("largest deviation from 1", worst, "ratio"),
        Finding(f"updates within {RMS_TOLERANCE:.0%}", within, f"of {len(known):,}"),
    )
    if worst <= RMS_TOLERANCE:
        said = f"it holds for all {len(known):,} recorded updates of a matrix, to {worst:.1g}"
        return Answer(SEEN, said, findings)
    if not all(_scale(run) == {"match_rms"} for run in matching):
        raise Undecided("it is not recorded which form of the step size these runs take", findings)
    off = f"{len(known) - within:,} of {len(known):,} updates"
    return Answer(NOT_SEEN, f"{off} are off by more than {RMS_TOLERANCE:.0%}", findings)


def _told_states(evidence: Evidence, kind: str) -> list[tuple[Run, float]]:
    """Return the runs of a kind that have recorded the bytes of their whole state, with these."""
    try:
        runs = evidence.of(kind)
    except Undecided:
        return []
    found = []
    for run in runs:
        told = run.scalars.get(RECORDED, np.empty(0))
        told = told[np.isfinite(told)]
        # On several ranks it is the state of one of them. AMSGrad is another rule.
        whole = run.metadata.get("world_size", 1) == 1
        plain = not any(group_of(run, matrix).get("amsgrad") for matrix in run.table)
        if len(told) and whole and plain:
            found.append((run, float(told[-1])))
    return found


def _numbers(run: Run, matrix: Matrix) -> int:
    kind = trainer_of(run, matrix)
    if kind not in COUNTED:
        raise Undecided(
            f"{matrix.name} of {run.path} is trained by {kind}, whose rule is not among the three"
        )
    return state_elements(COUNTED[kind], matrix.m, matrix.n)


def _fits(run: Run, held: float) -> bool:
    """Tell whether so many bytes are the rule's numbers, in the weights' precision or float32."""

    def bytes_at(size: Callable[[int], int]) -> int:
        return sum(_numbers(run, x) * size(ITEM_BYTES.get(x.dtype, 4)) for x in run.table)

    slack = COUNTER_BYTES * len(run.table)
    sizes = (bytes_at(lambda size: size), bytes_at(lambda size: max(size, 4)))
    return any(0 <= held - expected <= slack for expected in sizes)


def _scale(run: Run) -> set[str]:
    """Return which forms of the step size a run's matrices take; empty if it was not recorded."""
    own = [group_of(run, x) for x in run.table if trainer_of(run, x) == run.optimizer]
    return {str(group["scale"]) for group in own if "scale" in group}


def _rms_ratios(evidence: Evidence, run: Run) -> np.ndarray | None:
    """Return update RMS / (0.2·lr) of the updates whose learning rate is known, flat."""
    lr = run.scalars.get("lr")
    # The recorded rate is that of the first optimizer's first matrix: group numbers go up from
    # optimizer to optimizer.
    lowest = min(run.table, key=lambda x: x.group)
    kind = trainer_of(run, lowest)
    first = next(x for x in run.table if trainer_of(run, x) == kind)
    if lr is None or kind != run.optimizer or group_of(run, first).get("scale") == "preserve_norm":
        return None
    if shadow_of(run) and group_of(run, first).get("lr") != lr[0]:
        return None  # it has a rate of its own, and the recorded one is its host's
    series = evidence.series(run)
    if "update_rms" not in series:
        return None
    steps, values = series["update_rms"]
    rows = np.searchsorted(run.steps, steps)
    errors = series["update_error"].values if "update_error" in series else np.empty((0, 0))
    trusted = [
        x.group == first.group and not (len(errors) and finite_median(errors[:, i]) > WORST_ERROR)
        for i, x in enumerate(run.table)
    ]
    rates = lr[rows, None]
    # In a void step, or without a gradient, a matrix does not move: there is nothing to scale.
    moved = np.where((values > 0) & (rates > 0), values, np.nan)[:, trusted]
    return np.asarray(moved / (RMS * rates)).ravel()


RULE = (
    Observation(
        "state-memory",
        "For an m × n matrix Adam keeps 2mn numbers, Muon mn, and NorMuon m(n + 1), hardly more "
        "than Muon.",
        f"{PAPER}, abstract and Algorithm 1",
        "The recorded bytes of state are those of the rule's numbers, in the precision of the "
        f"weights or in float32, and of at most {COUNTER_BYTES} bytes a matrix besides for "
        "counters of steps. Needs all three optimizers, on one rank.",
        state_memory,
    ),
    Observation(
        "update-rms",
        "Every update of NorMuon has a root mean square of 0.2 times the learning rate.",
        f"{PAPER}, Algorithm 1",
        f"Update RMS / (0.2·lr) is 1 to {RMS_TOLERANCE:.0%} at every recorded step of every "
        "matrix, but for those without motion or not finite. One that is not means not seen.",
        update_rms_is_fixed,
    ),
)
