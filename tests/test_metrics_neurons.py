"""Neuron norms and their imbalance against Python loops."""

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from normuon_lens import metrics
from normuon_lens.errors import LensError
from normuon_lens.metrics import neuron_percentile, row_norms, starved_streak, update_rms

Floats = NDArray[np.float64]

RATIOS: dict[str, Callable[[Floats], Floats]] = {
    "variance_unit": metrics.neuron_variance_unit,
    "cv": metrics.neuron_cv,
    "max_min": metrics.neuron_max_min,
    "gini": metrics.neuron_gini,
    "top1_share": metrics.neuron_top1_share,
    "starved": metrics.neuron_starved,
    **{
        f"p{percent}": partial(neuron_percentile, percent=percent)
        for percent in (1, 10, 50, 90, 99)
    },
}
SIZES: dict[str, Callable[[Floats], Floats]] = {
    "mean": metrics.neuron_mean,
    "variance": metrics.neuron_variance,
    "frobenius": metrics.frobenius_norm,
    "update_rms": lambda norms: update_rms(norms, 7),
}
COUNTS: dict[str, Callable[[Floats], Floats]] = {
    "dead": metrics.neuron_dead,
    "dead_share": metrics.neuron_dead_share,
}
MEASURES = {**RATIOS, **SIZES, **COUNTS}


def naive(norms: Floats) -> dict[str, float]:
    r = sorted(float(x) for x in norms)
    m = len(r)
    mean = math.fsum(r) / m
    energy = [x * x for x in r]
    live = [x for x in r if x > 0]
    rms = math.sqrt(math.fsum(energy) / m)

    def percentile(percent: float) -> float:
        position = (m - 1) * percent / 100
        low = math.floor(position)
        high = min(low + 1, m - 1)
        return (r[low] + (position - low) * (r[high] - r[low])) / mean

    return {
        "mean": mean,
        "variance": statistics.pvariance(r),
        "variance_unit": statistics.pvariance([x / rms for x in r]),
        "cv": statistics.pstdev(r) / mean,
        "max_min": live[-1] / live[0],
        "gini": math.fsum(abs(x - y) for x in r for y in r) / (2 * m * m * mean),
        "top1_share": math.fsum(energy[-max(1, m // 100) :]) / math.fsum(energy),
        "starved": sum(x < 0.1 * mean for x in r) / m,
        "dead": sum(x == 0 for x in r),
        "dead_share": sum(x == 0 for x in r) / m,
        "frobenius": math.sqrt(math.fsum(energy)),
        "update_rms": math.sqrt(math.fsum(energy) / (m * 7)),
        **{f"p{percent}": percentile(percent) for percent in (1, 10, 50, 90, 99)},
    }


RNG = np.random.default_rng(3)
NORMS = {
    "chi": np.linalg.norm(RNG.standard_normal((60, 5)), axis=1),
    "heavy tail": RNG.lognormal(0, 2.5, 250),
    "equal": np.full(40, 0.3),
    "single": np.array([2.0]),
    "one holds all": np.array([0.0, 0.0, 5.0, 0.0]),
    "with dead": np.concatenate([np.zeros(3), np.linspace(0.01, 2, 30)]),
}


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("case", NORMS)
def test_measures_equal_the_naive_ones(case: str, name: str) -> None:
    value = MEASURES[name](NORMS[case])
    assert value.dtype == np.float64
    assert value.shape == ()
    # Spreads of equal norms are differences of equal numbers: 1e-16 rather than 0.
    assert value == pytest.approx(naive(NORMS[case])[name], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", MEASURES)
def test_leading_axes_are_kept_and_bad_steps_spoil_no_other(name: str) -> None:
    good = NORMS["with dead"]
    with_nan, with_inf = good.copy(), good.copy()
    with_nan[4], with_inf[5] = np.nan, np.inf
    stack = np.stack([good, with_nan, with_inf, 2 * good]).reshape(2, 2, -1)
    value = MEASURES[name](stack)
    assert value.shape == (2, 2)
    np.testing.assert_allclose(value[0, 0], naive(good)[name], rtol=1e-12)
    np.testing.assert_allclose(value[1, 1], naive(2 * good)[name], rtol=1e-12)
    assert np.isnan(value[0, 1])
    assert np.isnan(value[1, 0])


@pytest.mark.parametrize("name", MEASURES)
def test_a_void_step_has_no_ratio(name: str) -> None:
    value = MEASURES[name](np.zeros(6))
    expected = {"dead": 6.0, "dead_share": 1.0}.get(name, 0.0 if name in SIZES else np.nan)
    np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize("scale", [1e-200, 1e200, 1e305])
def test_ratios_survive_extreme_scales(scale: float, name: str) -> None:
    norms = NORMS["with dead"]
    assert RATIOS[name](norms * scale) == pytest.approx(naive(norms)[name], rel=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1e200, 1e305])
def test_sizes_survive_extreme_scales(scale: float) -> None:
    norms = NORMS["with dead"]
    for name in ("mean", "frobenius", "update_rms"):
        assert SIZES[name](norms * scale) == pytest.approx(naive(norms)[name] * scale, rel=1e-12)
    assert metrics.neuron_variance(norms * scale) == (0 if scale < 1 else np.inf)


@pytest.mark.parametrize("name", MEASURES)
def test_float32_and_float16_norms_are_computed_in_float64(name: str) -> None:
    for dtype in (np.float32, np.float16):
        norms = (NORMS["chi"] + 1e-2).astype(dtype)
        expected = naive(norms.astype(np.float64))[name]
        # Far below float32's 6e-8: a single step in float32 would show.
        assert MEASURES[name](norms) == pytest.approx(expected, rel=1e-12)


def test_faint_rows_are_not_taken_for_dead() -> None:
    norms = np.array([1e300, 1e-300])
    assert metrics.neuron_dead(norms) == 0
    assert metrics.neuron_max_min(np.array([1e150, 1e-150])) == pytest.approx(1e300)
    np.testing.assert_allclose(row_norms([[3e-250, 4e-250], [3.0, 4.0]]), [5e-250, 5.0])


def test_top_one_percent_is_rounded_down_but_never_empty() -> None:
    assert metrics.neuron_top1_share(np.ones(250)) == pytest.approx(2 / 250)
    assert metrics.neuron_top1_share(np.ones(99)) == pytest.approx(1 / 99)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (1, 5), (5, 1), (0, 3)])
def test_row_norms_equal_a_loop(shape: tuple[int, int], dtype: type) -> None:
    matrix: NDArray[Any] = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    norms = row_norms(matrix)
    assert norms.dtype == np.float64
    expected = [math.sqrt(math.fsum(float(x) ** 2 for x in row)) for row in matrix]
    np.testing.assert_allclose(norms, expected, rtol=1e-15)


def test_row_norms_of_long_float16_rows_do_not_overflow() -> None:
    # 65504 is float16's largest number: the sum must be held in float64.
    np.testing.assert_allclose(row_norms(np.full((1, 10_000), 60_000, np.float16)), [60_000 * 100])


@pytest.mark.parametrize("scale", [1e-200, 1e200, 1e305])
def test_row_norms_survive_extreme_scales(scale: float) -> None:
    matrix = np.random.default_rng(2).standard_normal((6, 5))
    np.testing.assert_allclose(
        row_norms(matrix * scale), np.linalg.norm(matrix, axis=1) * scale, rtol=1e-14
    )


def test_row_norms_show_which_row_is_not_finite() -> None:
    norms = row_norms([[3.0, 4.0], [np.nan, 1.0], [-np.inf, 1.0], [0.0, 0.0], [np.inf, np.nan]])
    np.testing.assert_array_equal(norms, [5.0, np.nan, np.inf, 0.0, np.nan])


@pytest.mark.parametrize("matrix", [np.ones(3), np.ones((2, 0)), np.ones((2, 2)) * 1j])
def test_row_norms_refuse_what_is_no_real_matrix(matrix: Floats) -> None:
    with pytest.raises(LensError, match=r"real matrix.*got shape"):
        row_norms(matrix)


def naive_streak(norms: Floats) -> list[list[int]]:
    streak = [0] * norms.shape[1]
    rows = []
    for row in norms:
        mean = sum(row) / len(row)
        if math.isfinite(mean) and mean > 0:
            streak = [s + 1 if x < 0.1 * mean else 0 for s, x in zip(streak, row, strict=True)]
        rows.append(list(streak))
    return rows


def test_starved_streak_by_hand() -> None:
    hungry, fed = [1.0, 0.01], [1.0, 0.9]
    norms = np.array([hungry, hungry, fed, hungry, [0, 0], [np.nan, 1], hungry, [1.0, 0.0]])
    streak = starved_streak(norms)
    assert streak.dtype == np.int64
    np.testing.assert_array_equal(streak[:, 0], 0)
    # The void and the NaN step say nothing: the streak of length 1 is held, then goes on.
    np.testing.assert_array_equal(streak[:, 1], [1, 2, 0, 1, 1, 1, 2, 3])


def test_starved_streak_equals_a_loop() -> None:
    norms = np.random.default_rng(5).lognormal(0, 2, (80, 11))
    norms[[7, 30, 31]] = 0
    norms[50, 2] = np.nan
    np.testing.assert_array_equal(starved_streak(norms), naive_streak(norms))
    assert starved_streak(np.empty((0, 4))).shape == (0, 4)


def test_starved_streak_needs_steps() -> None:
    with pytest.raises(LensError, match=r"\(steps, m\), got \(4,\)"):
        starved_streak(np.ones(4))


# Down to 1e-3 of each other, so that no measure sits on the edge of float64.
positive_norms = hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(1e-2, 1e1))


@settings(max_examples=80, deadline=None)
@given(positive_norms, st.floats(1e-120, 1e120))
def test_scaling_leaves_ratios_and_scales_sizes(norms: Floats, size: float) -> None:
    for name, measure in RATIOS.items():
        if name != "starved":  # a threshold: rounding may carry a norm across it
            assert measure(norms * size) == pytest.approx(measure(norms), rel=1e-9, abs=1e-12)
    for name, measure in SIZES.items():
        power = 2 if name == "variance" else 1
        assert measure(norms * size) / size**power == pytest.approx(
            measure(norms), rel=1e-9, abs=1e-12
        )


@settings(max_examples=80, deadline=None)
@given(positive_norms, st.integers(0, 2**32 - 1))
def test_permuting_neurons_changes_nothing(norms: Floats, seed: int) -> None:
    shuffled = np.random.default_rng(seed).permutation(norms)
    for name, measure in MEASURES.items():
        if name != "starved":
            assert measure(shuffled) == pytest.approx(measure(norms), rel=1e-9, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 30), st.floats(1e-100, 1e100), st.sampled_from(sorted({*RATIOS} - {"starved"}))
)
def test_equal_norms_are_balanced(m: int, size: float, name: str) -> None:
    spread = {"variance_unit", "cv", "gini"}
    expected = 0.0 if name in spread else 1 / m if name == "top1_share" else 1.0
    assert RATIOS[name](np.full(m, size)) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    st.integers(0, 999),
    st.floats(1e-200, 1e200),
    st.sampled_from([-1, 0, 1]),
)
def test_matrix_scaled_by_c_has_norms_scaled_by_its_magnitude(
    shape: tuple[int, int], seed: int, size: float, sign: int
) -> None:
    matrix = np.random.default_rng(seed).standard_normal(shape)
    np.testing.assert_allclose(
        row_norms(sign * size * matrix), abs(sign) * size * row_norms(matrix), rtol=1e-12
    )
