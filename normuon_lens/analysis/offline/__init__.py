"""Metrics from the full matrices that runs kept, over processes or a Dask cluster."""

from normuon_lens.analysis.offline.coordinator import analyze

__all__ = ["analyze"]
