"""Runs of one model side by side: who is ahead, by more than seed noise or not, at what cost."""

from normuon_lens.analysis.comparison.side_by_side import Comparison, RunSummary, compare

__all__ = ["Comparison", "RunSummary", "compare"]
