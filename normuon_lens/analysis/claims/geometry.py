"""What the paper says of the updates: how they are conditioned, and shared among neurons."""

from __future__ import annotations

import math

import numpy as np

from normuon_lens.analysis.claims.evidence import Evidence, Figures, Geometry
from normuon_lens.analysis.claims.observation import PAPER, Observation
from normuon_lens.analysis.claims.verdict import SHARES, Answer, Finding, Undecided, Vote
from normuon_lens.analysis.settled import finite_median

ORDER = 10.0
"""Badly conditioned: an order of magnitude between the strongest and the weakest direction."""

FACTOR = 2.0
"""Lower, or more even, is by a factor of two or more; about the same is within it."""

BOTH = (
    "the condition number σ₁/σₖ, and of p95/p5 of the singular values (which does not hang on a "
    "single one)"
)


def adam_is_ill_conditioned(evidence: Evidence) -> Answer:
    """Look at Adam's condition numbers by themselves."""
    (adam,) = evidence.geometry("Adam")
    badly = _at_least(adam.condition, ORDER) & _at_least(adam.spread, ORDER)
    return badly.decide(
        f"have a condition number and a p95/p5 of {ORDER:g} or more", _conditions(("Adam", adam))
    )


def muon_is_better_conditioned(evidence: Evidence) -> Answer:
    """Hold Muon's condition numbers against Adam's."""
    adam, muon = evidence.geometry("Adam", "Muon")
    lower = _at_most(muon.condition, 1 / FACTOR, adam.condition)
    lower &= _at_most(muon.spread, 1 / FACTOR, adam.spread)
    said = "have at most half of Adam's condition number and p95/p5"
    return lower.decide(said, _conditions(("Adam", adam), ("Muon", muon)))


def muon_leaves_imbalance(evidence: Evidence) -> Answer:
    """Hold Muon's neuron norms in tall matrices against what chance makes of orthogonal ones."""
    (muon,) = evidence.geometry("Muon")
    tall = _tall(evidence)
    cv = muon.cv.where(tall)
    shapes = [(x.m, x.n) for x in evidence.matrices if x.m > x.n]
    chance = np.array([cv_by_chance(m, n) for m, n in shapes])
    findings = [
        Finding("median neuron CV, Muon, m > n", cv.median, "ratio"),
        Finding("the same of random orthogonal matrices", finite_median(chance), "ratio"),
    ]
    if not tall.all():
        others = muon.cv.where(~tall).median
        findings.append(Finding("median neuron CV, Muon, m ≤ n", others, "ratio"))
    uneven = Vote(cv.values >= FACTOR * chance, np.isfinite(cv.values))
    said = "with m > n have at least twice the CV that chance would give"
    return uneven.decide(said, tuple(findings))


def normuon_evens_neurons(evidence: Evidence) -> Answer:
    """Hold NorMuon's neuron norms in tall matrices, and its conditioning, against Muon's."""
    muon, normuon = evidence.geometry("Muon", "NorMuon")
    tall = _tall(evidence)
    muon, normuon = muon.where(tall), normuon.where(tall)
    even = _at_most(normuon.cv, 1 / FACTOR, muon.cv)
    low = _at_most(normuon.condition, FACTOR, muon.condition)
    low &= _at_most(normuon.spread, FACTOR, muon.spread)
    cvs = tuple(
        Finding(f"median neuron CV, {name}, m > n", figures.cv.median, "ratio")
        for name, figures in (("Muon", muon), ("NorMuon", normuon))
    )
    said = "with m > n have at most half of Muon's CV, at no more than twice its condition number"
    return (even & low).decide(said, (*cvs, *_conditions(("Muon", muon), ("NorMuon", normuon))))


def cv_by_chance(m: int, n: int) -> float:
    """Return the CV of the row norms of a random orthogonal matrix of shape (m, n), m > n.

    Its squared row norms are Beta(n/2, (m − n)/2) distributed: what is left over when directions
    are orthogonal and nothing else is known of them.
    """
    a, b = n / 2, (m - n) / 2
    log_mean = math.lgamma(a + 0.5) - math.lgamma(a) + math.lgamma(a + b) - math.lgamma(a + b + 0.5)
    return math.sqrt(max(0.0, n / m / math.exp(2 * log_mean) - 1))


def _at_least(figures: Figures, limit: float) -> Vote:
    yes = figures.values >= limit
    return Vote(yes, np.isfinite(figures.values) & (yes | ~figures.bounds))


def _at_most(figures: Figures, factor: float, others: Figures) -> Vote:
    """Whether figures are at most so many times others; a bound may hide the opposite."""
    yes = figures.values <= factor * others.values
    finite = np.isfinite(figures.values) & np.isfinite(others.values)
    return Vote(yes, finite & np.where(yes, ~figures.bounds, ~others.bounds))


def _tall(evidence: Evidence) -> np.ndarray:
    tall = evidence.tall
    if not tall.any():
        raise Undecided(
            "none of these matrices has m > n; where m ≤ n the rows of an orthogonal matrix are "
            "equally long by themselves"
        )
    return tall


def _conditions(*named: tuple[str, Geometry]) -> tuple[Finding, ...]:
    return tuple(
        Finding(
            f"median {what}, {name}",
            figures.median,
            "at least" if figures.bounds.mean() > 0.5 else "ratio",
        )
        for what, which in (("condition number", "condition"), ("σ p95/p5", "spread"))
        for name, geometry in named
        for figures in [getattr(geometry, which)]
    )


GEOMETRY = (
    Observation(
        "adam-ill-conditioned",
        "Adam's updates are badly conditioned: they move far along few directions and hardly along "
        "the others.",
        f"{PAPER}, Figure 1",
        f"In a matrix, the medians over steps of {BOTH}, are {ORDER:g} or more. {SHARES}",
        adam_is_ill_conditioned,
    ),
    Observation(
        "muon-lowers-condition",
        "Muon's orthogonalization lowers the condition number of the updates.",
        f"{PAPER}, abstract and Figure 1",
        f"In a matrix, the medians over steps of {BOTH}, are at most half of Adam's. {SHARES}",
        muon_is_better_conditioned,
    ),
    Observation(
        "muon-leaves-imbalance",
        "Muon's updates have very unequal neuron norms, so that some neurons dominate; this is so "
        "where m > n.",
        f"{PAPER}, abstract and Figure 1",
        "In a matrix with m > n, the median CV of the neuron norms is at least twice that of a "
        f"random orthogonal matrix of its shape, known in closed form. {SHARES}",
        muon_leaves_imbalance,
    ),
    Observation(
        "normuon-evens-neurons",
        "NorMuon evens out the neuron norms and keeps the low condition number of Muon.",
        f"{PAPER}, abstract and Figure 1",
        "In a matrix with m > n, the median CV of the neuron norms is at most half of Muon's, and "
        f"the medians of {BOTH}, are at most twice Muon's. {SHARES}",
        normuon_evens_neurons,
    ),
)
