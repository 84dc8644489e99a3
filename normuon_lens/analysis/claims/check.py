"""Holds every observation against the runs, and says of each what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from normuon_lens.analysis.claims.evidence import Evidence
from normuon_lens.analysis.claims.geometry import GEOMETRY
from normuon_lens.analysis.claims.observation import Observation
from normuon_lens.analysis.claims.rule import RULE
from normuon_lens.analysis.claims.training import TRAINING
from normuon_lens.analysis.claims.verdict import CANNOT_TELL, Answer, Finding, Undecided
from normuon_lens.analysis.settled import SKIP
from normuon_lens.errors import LensError
from normuon_lens.runfile import Run


@dataclass(frozen=True)
class Claim:
    """One observation of the paper, and what these runs say of it.

    Attributes
    ----------
    id : str
        Such as ``"adam-ill-conditioned"``.
    statement : str
        The observation in our words, one sentence.
    source : str
        Where the paper has it.
    test : str
        The rule that was applied, with its thresholds.
    verdict : {"seen", "not seen", "cannot tell"}
    reason : str
        One sentence, without a full stop.
    findings : tuple of Finding
        The figures found.
    """

    id: str
    statement: str
    source: str
    test: str
    verdict: str
    reason: str
    findings: tuple[Finding, ...]


def check_claims(runs: Sequence[Run], *, skip: int = SKIP) -> list[Claim]:
    """Check each observation of the paper on these runs.

    Parameters
    ----------
    runs : sequence of Run
        Of one model, under Adam or AdamW, Muon and NorMuon; several seeds of each may be among
        them, and runs of NorMuon with its parts changed. Others are not looked at.
    skip : int
        Leave out the first so many steps where medians over steps are taken.

    Returns
    -------
    list of Claim
        One for each observation, in the paper's order, whatever the runs are: what they do not
        hold enough for cannot be told.
    """
    evidence = Evidence(runs, skip)
    return [_claim(observation, evidence) for observation in (*GEOMETRY, *RULE, *TRAINING)]


def _claim(observation: Observation, evidence: Evidence) -> Claim:
    try:
        answer = observation.check(evidence)
    except Undecided as missing:
        answer = Answer(CANNOT_TELL, str(missing), missing.findings)
    except LensError as refusal:
        answer = Answer(CANNOT_TELL, str(refusal))
    return Claim(
        observation.id,
        observation.statement,
        observation.source,
        observation.test,
        answer.verdict,
        answer.reason,
        answer.findings,
    )
