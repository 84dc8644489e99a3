"""Every row of the catalogue is complete, and its code does what the row declares."""

import dataclasses
import html
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
from numpy.typing import NDArray

from normuon_lens import metrics
from normuon_lens.errors import LensError
from normuon_lens.metrics import CATALOGUE, INPUTS, Metric, describe, row_norms, singular_values

Floats = NDArray[np.float64]

NAMES = [
    "condition_number",
    "condition_is_lower_bound",
    "resolved",
    "sigma_max",
    "spread_median",
    "spread_p95_p5",
    "spread_p90",
    "stable_rank",
    "entropy_rank",
    "orthogonality_error",
    "newton_schulz_share",
    "neuron_mean",
    "neuron_variance",
    "neuron_variance_unit",
    "neuron_cv",
    "neuron_max_min",
    "neuron_gini",
    "neuron_p1",
    "neuron_p10",
    "neuron_p50",
    "neuron_p90",
    "neuron_p99",
    "neuron_top1_share",
    "neuron_dead",
    "neuron_starved",
    "neuron_not_finite",
    "update_rms",
    "update_to_weight",
    "update_error",
    "update_to_weight_spectral",
    "cosine_previous",
    "alignment",
]
STEPS, M, N = 6, 14, 9
SERIES = {"norms", "sigma", "floor", "weight_norm"}
EACH = pytest.mark.parametrize("metric", CATALOGUE.values(), ids=CATALOGUE)


def history() -> dict[str, Floats | int]:
    """Six steps of one matrix: ordinary, a void and a broken one, and a rank-deficient one."""
    rng = np.random.default_rng(7)
    updates = rng.standard_normal((STEPS, M, N)) * np.logspace(0, -4, N)
    updates[2] = 0
    updates[3, 0, 0] = np.nan
    updates[4, :, 1:] = 0
    spectra = [singular_values(update) for update in updates]
    return {
        "norms": np.stack([row_norms(update) for update in updates]),
        "columns": N,
        "sigma": np.stack([sigma for sigma, _ in spectra]),
        "floor": np.array([floor for _, floor in spectra]),
        "weight_norm": rng.uniform(1, 2, STEPS),
        "roundoff": 2.0**-8,
        "update": updates[1],
        "previous": updates[0],
        "gradient": rng.standard_normal((M, N)),
        "momentum": rng.standard_normal((M, N)),
        "weight": rng.standard_normal((M, N)),
    }


def test_names_stand_in_reading_order() -> None:
    assert list(CATALOGUE) == NAMES


@EACH
def test_rows_are_complete(metric: Metric) -> None:
    assert CATALOGUE[metric.name] is metric
    for field in ("name", "label", "unit", "formula", "shape", "reading"):
        text = getattr(metric, field)
        assert text == text.strip() != ""
    assert metric.unit in {"ratio", "share", "count", "yes/no", "weight", "weight²"}
    assert metric.reading.endswith(".")
    assert metric.needs
    assert set(metric.needs) <= set(INPUTS)
    for optimizer, (low, high) in metric.healthy.items():
        assert optimizer in {"AdamW", "Muon", "NorMuon"}
        assert low < high
    with pytest.raises(dataclasses.FrozenInstanceError):
        metric.name = "other"  # type: ignore[misc]


def test_labels_are_unique() -> None:
    assert len({metric.label for metric in CATALOGUE.values()}) == len(CATALOGUE)


@EACH
def test_shape_names_the_needs_in_order(metric: Metric) -> None:
    declared = {"sigma": "(..., k)", "norms": "(..., m)", "floor": "(...)", "weight_norm": "(...)"}
    declared |= {"columns": "n", "roundoff": "u"}
    inputs, _, output = metric.shape.partition(" -> ")
    assert inputs == ", ".join(declared.get(need, "(m, n)") for need in metric.needs)
    assert output == ("(...)" if SERIES & set(metric.needs) else "()")


@EACH
def test_compute_gives_the_declared_shape_and_equals_a_loop_over_steps(metric: Metric) -> None:
    given = history()
    inputs = [given[need] for need in metric.needs]
    value = metric.compute(*inputs)
    assert isinstance(value, np.ndarray)
    assert value.dtype == np.float64
    if metric.shape.endswith("()"):
        assert value.shape == ()
        assert np.isfinite(value)
        return
    assert value.shape == (STEPS,)
    assert np.isfinite(value[[0, 1, 5]]).all()
    for t in range(STEPS):
        step = [
            np.asarray(x)[t] if need in SERIES else x
            for need, x in zip(metric.needs, inputs, strict=True)
        ]
        single = metric.compute(*step)
        assert single.shape == ()
        # Sums over a row may run in another order when it stands in a block.
        np.testing.assert_allclose(value[t], single, rtol=1e-12, atol=1e-15)


@EACH
def test_two_leading_axes_are_kept(metric: Metric) -> None:
    given = history()
    if metric.shape.endswith("()"):
        return
    inputs = [
        np.asarray(given[need]).reshape(2, 3, *np.shape(given[need])[1:])
        if need in SERIES
        else given[need]
        for need in metric.needs
    ]
    assert metric.compute(*inputs).shape == (2, 3)


@EACH
def test_compute_is_silent_and_survives_a_trip_to_another_process(metric: Metric) -> None:
    given = history()
    inputs = [given[need] for need in metric.needs]
    copy = pickle.loads(pickle.dumps(metric))
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        np.testing.assert_array_equal(copy.compute(*inputs), metric.compute(*inputs))


def test_values_of_one_known_update() -> None:
    # Rows 3, 4, 0 of two columns: sigma 4, 3; everything can be worked out by hand.
    update = np.array([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    sigma, floor = singular_values(update)
    given = {
        "norms": row_norms(update),
        "columns": 2,
        "sigma": sigma,
        "floor": floor,
        "weight_norm": 10.0,
        "roundoff": 2.0**-8,
        "update": update,
        "previous": -update,
        "gradient": -update,
        "weight": 2 * update,
    }
    expected = {
        "condition_number": 4 / 3,
        "condition_is_lower_bound": 0,
        "resolved": 2,
        "sigma_max": 4,
        "spread_median": 4 / 3.5,
        "spread_p95_p5": 3.95 / 3.05,
        "spread_p90": 4 / 3.1,
        "stable_rank": 25 / 16,
        "entropy_rank": np.exp(-(0.64 * np.log(0.64) + 0.36 * np.log(0.36))),
        "orthogonality_error": 0.28,
        "newton_schulz_share": 1,
        "neuron_mean": 7 / 3,
        "neuron_variance": 26 / 9,
        "neuron_variance_unit": 26 / 75,
        "neuron_cv": np.sqrt(26) / 7,
        "neuron_max_min": 4 / 3,
        "neuron_gini": 8 / 21,
        "neuron_p1": 0.06 * 3 / 7,
        "neuron_p10": 0.6 * 3 / 7,
        "neuron_p50": 9 / 7,
        "neuron_p90": 3.8 * 3 / 7,
        "neuron_p99": 3.98 * 3 / 7,
        "neuron_top1_share": 16 / 25,
        "neuron_dead": 1,
        "neuron_starved": 1 / 3,
        "neuron_not_finite": 0,
        "update_rms": 5 / np.sqrt(6),
        "update_to_weight": 0.5,
        "update_error": 0.4 * 2**-8 / 0.5,
        "update_to_weight_spectral": 0.5,
        "cosine_previous": -1,
        "alignment": 25 / (7 * 5 / np.sqrt(2)),
    }
    assert list(expected) == NAMES
    for name, metric in CATALOGUE.items():
        value = metric.compute(*(given[need] for need in metric.needs))
        assert value == pytest.approx(expected[name], rel=1e-12), name


def newton_schulz(matrix: Floats) -> Floats:
    x = matrix.T / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T


def test_healthy_ranges_hold_for_newton_schulz_and_row_normalization() -> None:
    rng = np.random.default_rng(0)
    muon = newton_schulz(rng.standard_normal((256, 64)))
    normuon = muon / row_norms(muon)[:, None]
    for optimizer, update in {"Muon": muon, "NorMuon": normuon}.items():
        sigma, floor = singular_values(update)
        given = {"sigma": sigma, "floor": floor, "norms": row_norms(update)}
        for metric in CATALOGUE.values():
            if optimizer in metric.healthy:
                low, high = metric.healthy[optimizer]
                # A ratio of exactly 1 may round to just below it.
                value = metric.compute(*(given[need] for need in metric.needs))
                assert low - 1e-12 <= value <= high + 1e-12, metric.name


def test_describe_finds_a_row() -> None:
    assert describe("neuron_cv") is CATALOGUE["neuron_cv"]


@pytest.mark.parametrize(
    ("name", "closest"), [("conditon_number", "condition_number"), ("cv", "neuron_cv"), ("", "")]
)
def test_describe_names_the_closest(name: str, closest: str) -> None:
    with pytest.raises(LensError, match=rf"{name!r}: the closest are .*{closest}"):
        describe(name)


@EACH
def test_a_metric_printed_explains_itself(metric: Metric) -> None:
    for said in (repr(metric), html.unescape(metric._repr_html_())):
        words = " ".join(said.split())
        for text in (metric.name, metric.label, metric.unit, metric.formula, metric.reading):
            assert text in words
        assert ("healthy" in words) == bool(metric.healthy)
        assert all(INPUTS[need] in words for need in metric.needs)
    assert max(map(len, repr(metric).splitlines())) <= 100


def test_what_is_printed_of_a_metric() -> None:
    assert repr(describe("neuron_max_min")).splitlines() == [
        "neuron_max_min: neuron max/min (unit: ratio)",
        "  max(r) / min(r > 0)",
        "  The farthest-moving neuron against the least-moving live one.",
        "  healthy after the first steps: NorMuon 1 to 3",
        "  from norms: (..., m) row norms of the update",
    ]
    assert "max(r) / min(r &gt; 0)" in describe("neuron_max_min")._repr_html_()


def test_definitions_are_reached_from_the_package_without_loading_it() -> None:
    code = (
        "import sys, normuon_lens as nl\n"
        "assert 'numpy' not in sys.modules\n"
        "print(nl.metrics.describe('neuron_cv').formula)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said.stdout == "std(r) / mean(r)\n"


def test_exports_are_sorted_and_complete() -> None:
    public = {
        name
        for name, value in vars(metrics).items()
        if not name.startswith("_") and not isinstance(value, type(metrics))
    }
    assert set(metrics.__all__) == public
    # As ruff sorts them: constants, classes, functions.
    kinds = [(not name.isupper(), not name[0].isupper()) for name in metrics.__all__]
    assert kinds == sorted(kinds)
