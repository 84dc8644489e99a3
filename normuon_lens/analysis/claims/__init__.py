"""The paper's observations, each checked on the runs at hand."""

from normuon_lens.analysis.claims.check import Claim, check_claims
from normuon_lens.analysis.claims.verdict import Finding

__all__ = ["Claim", "Finding", "check_claims"]
