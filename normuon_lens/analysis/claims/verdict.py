"""How these runs answer: seen, not seen, or cannot tell, with the figures that it rests on.

What holds matrix by matrix is put to a vote of the matrices. Where a figure is a lower bound, or
missing, its matrix has no vote; where most have none, or they disagree, nothing is decided.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SEEN, NOT_SEEN, CANNOT_TELL = "seen", "not seen", "cannot tell"

MOST, FEW = 0.75, 0.25
"""An observation is seen if at least so large a share of the matrices shows it; not seen if at most
so small a share does. Between them the matrices disagree."""

SHARES = (
    f"Seen if so in at least {MOST:.0%} of the matrices, not seen if in at most {FEW:.0%}; between "
    "these they disagree."
)


@dataclass(frozen=True)
class Finding:
    """One figure of these runs.

    Attributes
    ----------
    label : str
        What was measured, and of which runs.
    value : float
        NaN where it could not be measured.
    unit : str
        ``"ratio"``, ``"at least"`` for a ratio that is a lower bound, ``"of 12"``, ``"steps"``,
        ``"bytes"``, ``"s"``, or empty.
    """

    label: str
    value: float
    unit: str = ""


@dataclass(frozen=True)
class Answer:
    """A verdict, why, and the figures that it rests on."""

    verdict: str
    reason: str
    findings: tuple[Finding, ...] = ()


class Undecided(Exception):
    """The runs do not hold what a check needs; the message says what, in one sentence."""

    def __init__(self, reason: str, findings: tuple[Finding, ...] = ()) -> None:
        super().__init__(reason)
        self.findings = findings


@dataclass(frozen=True)
class Vote:
    """Whether something holds, matrix by matrix.

    Attributes
    ----------
    yes : ndarray of shape (M,), bool
        Whether it holds.
    known : ndarray of shape (M,), bool
        Whether that can be told.
    """

    yes: np.ndarray
    known: np.ndarray

    def __and__(self, other: Vote) -> Vote:
        """Both hold; known where both are, or where one is known not to hold."""
        refuted = (self.known & ~self.yes) | (other.known & ~other.yes)
        return Vote(self.yes & other.yes, (self.known & other.known) | refuted)

    def decide(self, what: str, findings: tuple[Finding, ...]) -> Answer:
        """Decide by the share of the matrices in which it holds, see :data:`SHARES`.

        Parameters
        ----------
        what : str
            Says what holds, after "12 of 12 matrices ".
        findings : tuple of Finding
        """
        total, voters = len(self.known), int(self.known.sum())
        holds = int((self.yes & self.known).sum())
        findings = (*findings, Finding("matrices in which it holds", holds, f"of {voters}"))
        if 2 * voters <= total:
            reason = (
                f"in {total - voters} of {total} matrices it cannot be told: their figures are "
                "lower bounds, mostly rounding, or missing"
            )
            return Answer(CANNOT_TELL, reason, findings)
        reason = f"{holds} of {voters} matrices {what}"
        if voters < total:
            reason += f"; of {total - voters} more it cannot be told"
        if holds >= MOST * voters:
            return Answer(SEEN, reason, findings)
        if holds <= FEW * voters:
            return Answer(NOT_SEEN, reason, findings)
        return Answer(CANNOT_TELL, f"the matrices disagree: {reason}", findings)
