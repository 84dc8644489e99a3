"""Runs in, tables and verdicts out.

Metrics over recorded steps, runs compared side by side, the paper's observations checked, and the
engine that spreads work on stored matrices over processes.
"""

from normuon_lens.analysis.claims import Claim, check_claims
from normuon_lens.analysis.comparison import Comparison, compare
from normuon_lens.analysis.measure import measure, measure_all
from normuon_lens.analysis.offline import analyze
from normuon_lens.analysis.results import results_of
from normuon_lens.analysis.table import table

__all__ = [
    "Claim",
    "Comparison",
    "analyze",
    "check_claims",
    "compare",
    "measure",
    "measure_all",
    "results_of",
    "table",
]
