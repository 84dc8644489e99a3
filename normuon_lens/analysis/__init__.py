"""Runs in, tables out: metrics over recorded steps, and runs compared side by side."""

from normuon_lens.analysis.comparison import Comparison, compare
from normuon_lens.analysis.measure import measure, measure_all, table

__all__ = ["Comparison", "compare", "measure", "measure_all", "table"]
