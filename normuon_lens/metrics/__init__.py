"""What a number means: every metric as a pure function of arrays, and one catalogue of them all.

NumPy and SciPy only. Functions of norms (..., m) and of singular values (..., k) keep the leading
axes, so a whole history goes through at once. The undefined is NaN, never a warning.
"""

from normuon_lens.metrics.catalogue import CATALOGUE, INPUTS, Metric, describe
from normuon_lens.metrics.motion import (
    alignment,
    cosine,
    leverage_scores,
    update_to_weight,
    update_to_weight_spectral,
)
from normuon_lens.metrics.neurons import (
    frobenius_norm,
    neuron_cv,
    neuron_dead,
    neuron_dead_share,
    neuron_gini,
    neuron_max_min,
    neuron_mean,
    neuron_percentile,
    neuron_starved,
    neuron_top1_share,
    neuron_variance,
    neuron_variance_unit,
    row_norms,
    starved_streak,
    update_rms,
)
from normuon_lens.metrics.spectrum import (
    ConditionNumber,
    condition_number,
    entropy_rank,
    newton_schulz_share,
    orthogonality_error,
    rounding_noise,
    sigma_max,
    singular_values,
    spread_median,
    spread_p90,
    spread_p95_p5,
    stable_rank,
)

__all__ = [
    "CATALOGUE",
    "INPUTS",
    "ConditionNumber",
    "Metric",
    "alignment",
    "condition_number",
    "cosine",
    "describe",
    "entropy_rank",
    "frobenius_norm",
    "leverage_scores",
    "neuron_cv",
    "neuron_dead",
    "neuron_dead_share",
    "neuron_gini",
    "neuron_max_min",
    "neuron_mean",
    "neuron_percentile",
    "neuron_starved",
    "neuron_top1_share",
    "neuron_variance",
    "neuron_variance_unit",
    "newton_schulz_share",
    "orthogonality_error",
    "rounding_noise",
    "row_norms",
    "sigma_max",
    "singular_values",
    "spread_median",
    "spread_p90",
    "spread_p95_p5",
    "stable_rank",
    "starved_streak",
    "update_rms",
    "update_to_weight",
    "update_to_weight_spectral",
]
