"""One row for each metric: its name, formula, meaning and code, printed alike everywhere.

The command line, the page's tooltips, the documentation and the exports all read `CATALOGUE`; what
a figure means is written down here and nowhere else.
"""

import html
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from normuon_lens.errors import LensError
from normuon_lens.metrics import motion, neurons, spectrum
from normuon_lens.metrics._numeric import Floats

INPUTS: dict[str, str] = {
    "norms": "(..., m) row norms of the update",
    "columns": "int, n: how many entries a row has",
    "sigma": "(..., k) singular values of the update, descending, k = min(m, n)",
    "floor": "(...) below it a singular value is noise",
    "weight_norm": "(...) Frobenius norm of the weight before the step",
    "roundoff": "float, unit roundoff of the weight where the update is a difference of weights",
    "update": "(m, n) what the step did to the weight, without decoupled weight decay",
    "previous": "(m, n) the update recorded before this one",
    "gradient": "(m, n) gradient of the step",
    "momentum": "(m, n) averaged gradient, what the optimizer orthogonalizes",
    "weight": "(m, n) the weight before the step",
}
"""What a metric can be computed from, and its shape."""


@dataclass(frozen=True, repr=False)
class Metric:
    """What one figure means, and how it is computed; printed, it explains itself.

    Attributes
    ----------
    name : str
        Key in `CATALOGUE`, in exports and on the command line.
    label : str
        Short title for axes and columns.
    unit : str
        "ratio", "share", "count", "yes/no", "weight" (the unit of the weight) or "weight²".
    formula : str
        In plain text.
    shape : str
        Shapes of what goes in, in the order of `needs`, and of what comes out.
    reading : str
        One or two sentences for the person who trains.
    healthy : mapping of str to (float, float)
        Usual range after the first ~20 steps, by optimizer; empty where none is known.
    needs : tuple of str
        What `compute` takes, positionally, out of `INPUTS`.
    compute : callable
        Arrays to one float64 array of the shape declared; NaN where undefined. Can be pickled.
    """

    name: str
    label: str
    unit: str
    formula: str
    shape: str
    reading: str
    healthy: Mapping[str, tuple[float, float]]
    needs: tuple[str, ...]
    compute: Callable[..., Floats]

    def __repr__(self) -> str:
        lines = [f"{self.name}: {self.label} (unit: {self.unit})", f"  {self.formula}"]
        lines += textwrap.wrap(self.reading, 88, initial_indent="  ", subsequent_indent="  ")
        return "\n".join([*lines, *(f"  {name}: {text}" for name, text in self._facts())])

    def _repr_html_(self) -> str:
        facts = [("formula", self.formula), ("unit", self.unit), *self._facts()]
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
            for name, text in facts
        )
        head = f"<b>{html.escape(self.label)}</b> <code>{html.escape(self.name)}</code>"
        return f"<p>{head}<br>{html.escape(self.reading)}</p><table><tbody>{rows}</tbody></table>"

    def _facts(self) -> list[tuple[str, str]]:
        healthy = [f"{name} {low:g} to {high:g}" for name, (low, high) in self.healthy.items()]
        return [
            *([("healthy after the first steps", ", ".join(healthy))] if healthy else []),
            *((f"from {need}", INPUTS[need]) for need in self.needs),
        ]


def describe(name: str) -> Metric:
    """Look up one metric.

    Parameters
    ----------
    name : str
        As in `CATALOGUE`.

    Returns
    -------
    Metric
        Its row.

    Raises
    ------
    LensError
        When there is none of that name; the message names the closest ones.
    """
    if name not in CATALOGUE:
        closest = ", ".join(get_close_matches(name, CATALOGUE, n=3, cutoff=0.0))
        raise LensError(f"no metric is called {name!r}: the closest are {closest}")
    return CATALOGUE[name]


def _float64(measure: Callable[..., ArrayLike], *inputs: ArrayLike) -> Floats:
    return np.asarray(measure(*inputs), dtype=np.float64)


def _condition_value(sigma: ArrayLike, floor: ArrayLike) -> ArrayLike:
    return spectrum.condition_number(sigma, floor).value


def _condition_is_lower_bound(sigma: ArrayLike, floor: ArrayLike) -> ArrayLike:
    return spectrum.condition_number(sigma, floor).is_lower_bound


def _resolved(sigma: ArrayLike, floor: ArrayLike) -> ArrayLike:
    return spectrum.condition_number(sigma, floor).resolved


def _update_to_weight(norms: ArrayLike, weight_norm: ArrayLike) -> ArrayLike:
    return motion.update_to_weight(neurons.frobenius_norm(norms), weight_norm)


def _update_error(norms: ArrayLike, weight_norm: ArrayLike, roundoff: ArrayLike) -> ArrayLike:
    return motion.update_error(neurons.frobenius_norm(norms), weight_norm, roundoff)


_SHAPES = {
    ("sigma",): "(..., k) -> (...)",
    ("sigma", "floor"): "(..., k), (...) -> (...)",
    ("sigma", "weight"): "(..., k), (m, n) -> (...)",
    ("norms",): "(..., m) -> (...)",
    ("norms", "columns"): "(..., m), n -> (...)",
    ("norms", "weight_norm"): "(..., m), (...) -> (...)",
    ("norms", "weight_norm", "roundoff"): "(..., m), (...), u -> (...)",
    ("update", "previous"): "(m, n), (m, n) -> ()",
    ("gradient", "update"): "(m, n), (m, n) -> ()",
}


def _row(
    name: str,
    label: str,
    unit: str,
    formula: str,
    reading: str,
    needs: tuple[str, ...],
    measure: Callable[..., ArrayLike],
    **healthy: tuple[float, float],
) -> Metric:
    compute = partial(_float64, measure)
    return Metric(name, label, unit, formula, _SHAPES[needs], reading, healthy, needs, compute)


_SIGMA = ("sigma",)
_FLOORED = ("sigma", "floor")
_NORMS = ("norms",)

# Healthy ranges come from the recorded sample runs, with room (medians of tall matrices: condition
# 1.67 Muon, 2.14 NorMuon; CV .083 and max/min 1.67 NorMuon; square matrices keep a condition of
# 15-18 under both, 5-126 from the 10th to the 90th percentile), and from Newton-Schulz on made-up
# matrices (p95/p5 1.5-1.74, share in the band 0.90-1; after row normalization p95/p5 up to 2.4).
_ROWS = (
    _row(
        "condition_number",
        "condition number",
        "ratio",
        "σ₁ / max(σₖ, floor)",
        "How many times farther the update moves along its strongest direction than along its "
        "weakest. 1 is orthogonal; one tiny singular value is enough to make it large.",
        _FLOORED,
        _condition_value,
        Muon=(1.0, 100.0),
        NorMuon=(1.0, 100.0),
    ),
    _row(
        "condition_is_lower_bound",
        "condition number is a lower bound",
        "yes/no",
        "σₖ ≤ floor",
        "1 where the smallest singular value drowns in rounding noise: the condition number is the "
        "figure shown or anything above it.",
        _FLOORED,
        _condition_is_lower_bound,
    ),
    _row(
        "resolved",
        "resolved singular values",
        "count",
        "#{i : σᵢ > floor}",
        "How many singular values stand above the noise, out of min(m, n).",
        _FLOORED,
        _resolved,
    ),
    _row(
        "sigma_max",
        "spectral norm",
        "weight",
        "σ₁",
        "The farthest the update moves any input of unit length.",
        _SIGMA,
        spectrum.sigma_max,
    ),
    _row(
        "spread_median",
        "σ₁ over median σ",
        "ratio",
        "σ₁ / max(P50(σ), floor)",
        "How far the strongest direction stands out from the typical one.",
        _FLOORED,
        spectrum.spread_median,
    ),
    _row(
        "spread_p95_p5",
        "σ p95 / p5",
        "ratio",
        "P95(σ) / max(P5(σ), floor)",
        "Nine tenths of the singular values lie within this factor. Unlike the condition number it "
        "does not hang on a single value.",
        _FLOORED,
        spectrum.spread_p95_p5,
        Muon=(1.0, 2.0),
        NorMuon=(1.0, 3.0),
    ),
    _row(
        "spread_p90",
        "trimmed condition number",
        "ratio",
        "σ₁ / max(P10(σ), floor)",
        "The condition number when the smallest tenth of the singular values is left out: 90 % of "
        "them lie within this factor of the largest.",
        _FLOORED,
        spectrum.spread_p90,
    ),
    _row(
        "stable_rank",
        "stable rank",
        "count",
        "‖U‖_F² / σ₁²",
        "How many directions as strong as the strongest would carry the whole update: 1 if one "
        "dominates, min(m, n) if orthogonal.",
        _SIGMA,
        spectrum.stable_rank,
    ),
    _row(
        "entropy_rank",
        "entropy rank",
        "count",
        "exp(−Σ pᵢ ln pᵢ), pᵢ = σᵢ² / Σσ²",
        "The effective number of directions, judged by all singular values: 1 to min(m, n).",
        _SIGMA,
        spectrum.entropy_rank,
    ),
    _row(
        "orthogonality_error",
        "orthogonality error",
        "ratio",
        "√mean((s² − 1)²), s = σ / rms(σ)",
        "Distance from an orthogonal matrix at equal energy: 0 is orthogonal. Newton-Schulz by "
        "itself leaves about 0.3.",
        _SIGMA,
        spectrum.orthogonality_error,
    ),
    _row(
        "newton_schulz_share",
        "share in the Newton-Schulz band",
        "share",
        "max over c of #{i : 0.68 ≤ c·σᵢ ≤ 1.15} / k",
        "How many of the singular values lie within one band as wide as Newton-Schulz leaves them "
        "(a factor 1.69), whatever the learning rate.",
        _SIGMA,
        spectrum.newton_schulz_share,
        Muon=(0.85, 1.0),
    ),
    _row(
        "neuron_mean",
        "mean neuron norm",
        "weight",
        "mean(r)",
        "How far a neuron moves on average.",
        _NORMS,
        neurons.neuron_mean,
    ),
    _row(
        "neuron_variance",
        "variance of neuron norms",
        "weight²",
        "var(r)",
        "Raw spread; it grows with the learning rate squared, so do not compare optimizers by it.",
        _NORMS,
        neurons.neuron_variance,
    ),
    _row(
        "neuron_variance_unit",
        "variance at unit RMS",
        "ratio",
        "var(r / rms(r))",
        "Spread of the neuron norms at equal energy, from 0 (all equal) to 1: comparable across "
        "optimizers.",
        _NORMS,
        neurons.neuron_variance_unit,
    ),
    _row(
        "neuron_cv",
        "neuron CV",
        "ratio",
        "std(r) / mean(r)",
        "The headline figure of imbalance: 0 when all neurons move equally far, 0.3 when they "
        "typically differ by 30 % from the mean.",
        _NORMS,
        neurons.neuron_cv,
        NorMuon=(0.0, 0.15),
    ),
    _row(
        "neuron_max_min",
        "neuron max/min",
        "ratio",
        "max(r) / min(r > 0)",
        "The farthest-moving neuron against the least-moving live one.",
        _NORMS,
        neurons.neuron_max_min,
        NorMuon=(1.0, 3.0),
    ),
    _row(
        "neuron_gini",
        "Gini coefficient of neuron norms",
        "ratio",
        "Σᵢⱼ|rᵢ − rⱼ| / (2 m² mean(r))",
        "Inequality among the neurons: 0 when all move equally far, close to 1 when few do all "
        "the moving.",
        _NORMS,
        neurons.neuron_gini,
    ),
    *(
        _row(
            f"neuron_p{percent}",
            f"neuron norm p{percent} / mean",
            "ratio",
            f"P{percent}(r) / mean(r)",
            f"{percent} % of the neurons move less than this, in units of the layer's mean; near 1 "
            "means balanced.",
            _NORMS,
            partial(neurons.neuron_percentile, percent=percent),
        )
        for percent in (1, 10, 50, 90, 99)
    ),
    _row(
        "neuron_top1_share",
        "energy in the top 1 % of neurons",
        "share",
        "Σ of the largest max(1, ⌊m/100⌋) r² / Σr²",
        "What part of the squared update the busiest 1 % of the neurons take.",
        _NORMS,
        neurons.neuron_top1_share,
    ),
    _row(
        "neuron_dead",
        "dead neurons",
        "count",
        "#{i : rᵢ = 0}",
        "Neurons that did not move at all.",
        _NORMS,
        neurons.neuron_dead,
    ),
    _row(
        "neuron_starved",
        "starved neurons",
        "share",
        "#{i : rᵢ < 0.1 mean(r)} / m",
        "Neurons that moved less than a tenth of the layer's mean; dead ones count too.",
        _NORMS,
        neurons.neuron_starved,
    ),
    _row(
        "neuron_not_finite",
        "neurons not finite",
        "count",
        "#{i : rᵢ = ∞ or not a number}",
        "Neurons whose update was infinite or not a number. Above 0 the training has diverged, or "
        "is about to.",
        _NORMS,
        neurons.neuron_not_finite,
    ),
    _row(
        "update_rms",
        "update RMS",
        "weight",
        "‖U‖_F / √(mn)",
        "How far a single entry moves, typically. NorMuon holds it at exactly 0.2 times the "
        "learning rate.",
        ("norms", "columns"),
        neurons.update_rms,
    ),
    _row(
        "update_to_weight",
        "update over weight",
        "ratio",
        "‖U‖_F / ‖W‖_F",
        "How large the step is beside the weight that it changes.",
        ("norms", "weight_norm"),
        _update_to_weight,
    ),
    _row(
        "update_error",
        "rounding error of the update",
        "ratio",
        "min(1, 0.4 u ‖W‖_F / ‖U‖_F)",
        "How much of what is recorded as the update is the rounding of the weights that it is a "
        "difference of; 0 where the update was taken before it was added. Above 0.1 no figure of "
        "this matrix can be trusted.",
        ("norms", "weight_norm", "roundoff"),
        _update_error,
    ),
    _row(
        "update_to_weight_spectral",
        "update over weight, spectral",
        "ratio",
        "σ₁(U) / σ₁(W)",
        "How much the step can change the layer's largest gain, relative to that gain.",
        ("sigma", "weight"),
        motion.update_to_weight_spectral,
    ),
    _row(
        "cosine_previous",
        "cosine to the previous update",
        "ratio",
        "⟨U,U'⟩ / (‖U‖_F ‖U'‖_F)",
        "1 when the update repeats the one recorded before, 0 when unrelated, −1 when it takes it "
        "back.",
        ("update", "previous"),
        motion.cosine,
    ),
    _row(
        "alignment",
        "alignment with the gradient",
        "ratio",
        "−⟨G,U⟩ / (‖G‖_* · ‖U‖_F/√k)",
        "First-order progress beside that of the exact polar factor, which has 1. Below 1 is what "
        "momentum and balancing cost; above 1 the update leans on few directions; negative climbs.",
        ("gradient", "update"),
        motion.alignment,
    ),
)

CATALOGUE: dict[str, Metric] = {metric.name: metric for metric in _ROWS}
"""Every metric by name, in reading order."""
