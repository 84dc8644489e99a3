"""What a reader must know of a recording before believing it, in plain sentences."""

from __future__ import annotations

from normuon_lens.analysis.measure import Series, measure
from normuon_lens.analysis.settled import finite_median, settled
from normuon_lens.runfile import Run

WORTH_SAYING = 0.01
"""Rounding errors of an update below this share are not worth a sentence."""

TOLD = ("schedule", "interrupted", "damaged")
"""Kinds of events that are told; dropped samples are counted instead."""


def remarks(run: Run, errors: Series | None = None) -> list[str]:
    """Return what is missing in a run, or not as it was asked for, or inexact.

    Parameters
    ----------
    run : Run
    errors : Series, optional
        The metric ``update_error`` of the run, if it has been measured already.

    Returns
    -------
    list of str
        One sentence each, without a full stop; empty for a run with nothing to be said.
    """
    said = []
    if run.dropped:
        said.append(f"{run.dropped} samples dropped: recording could not keep up")
    if run.overlaps:
        said.append(f"{run.overlaps} steps recorded more than once; the last record counts")
    # Of a schedule that was changed several times the last word counts.
    told = {event.kind: f"at step {event.step}: {event.text}" for event in run.events}
    said += [text for kind, text in told.items() if kind in TOLD]
    error, dtypes = update_error(run, errors)
    if error > WORTH_SAYING:
        said.append(
            f"updates are differences of {dtypes} weights, of which rounding makes about "
            f"{error:.0%} (median)"
        )
    for damage in run.damaged:
        span = f"steps {damage.steps[0]}–{damage.steps[1]}" if damage.steps else "a part"
        said.append(f"{span} damaged and left out: {damage.reason}")
    said += [f"hole: {hole.text}" for hole in run.holes]
    return said


def update_error(run: Run, errors: Series | None = None) -> tuple[float, str]:
    """Return the median rounding error of the updates that are differences, and of what dtypes.

    Returns
    -------
    error : float
        Relative; 0 if every update was taken before it was added to its weight.
    dtypes : str
        Of the weights in question, such as ``"bfloat16"``.
    """
    if "update" not in run.stages:
        return 0.0, ""
    values = settled(errors or measure(run, "update_error"))
    inexact = [i for i in range(values.shape[1]) if finite_median(values[:, i]) > 0]
    if not inexact:
        return 0.0, ""
    dtypes = dict.fromkeys(run.table[i].dtype for i in inexact)
    return finite_median(values[:, inexact]), " and ".join(dtypes)
