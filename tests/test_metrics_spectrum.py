"""Spectra against a plain float64 SVD, on shapes and scales where shortcuts break."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from normuon_lens.errors import LensError
from normuon_lens.metrics import (
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
from normuon_lens.metrics import spectrum as spectrum_module

Floats = NDArray[np.float64]

SHAPES = {"tall": (48, 20), "wide": (20, 48), "square": (32, 32), "row": (1, 9), "one": (1, 1)}
SPREADS = {
    "spread_median": spread_median,
    "spread_p95_p5": spread_p95_p5,
    "spread_p90": spread_p90,
}
MEASURES: dict[str, Callable[[ArrayLike], Floats]] = {
    **SPREADS,
    "stable_rank": stable_rank,
    "entropy_rank": entropy_rank,
    "orthogonality_error": orthogonality_error,
    "newton_schulz_share": newton_schulz_share,
}


def gaussian(shape: tuple[int, int], seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape)


def orthogonal(m: int, n: int, seed: int = 0) -> Floats:
    q = np.linalg.qr(gaussian((max(m, n), min(m, n)), seed))[0]
    return q if m >= n else q.T


def with_spectrum(shape: tuple[int, int], sigma: Floats, seed: int = 0) -> Floats:
    """Q diag(sigma) Q': a matrix whose singular values are known."""
    m, n = shape
    k = len(sigma)
    return np.asarray(orthogonal(m, k, seed) * sigma @ orthogonal(n, k, seed + 1).T)


def naive_singular_values(matrix: NDArray[Any]) -> Floats:
    return np.asarray(np.linalg.svd(matrix.astype(np.float64), compute_uv=False))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_singular_values_equal_a_plain_svd(shape: tuple[int, int], dtype: type) -> None:
    matrix: NDArray[Any] = gaussian(shape).astype(dtype)
    sigma, floor = singular_values(matrix)
    assert sigma.dtype == np.float64
    assert sigma.shape == (min(shape),)
    assert np.all(np.diff(sigma) <= 0)
    # Gram route, condition below 1e3: relative error 4e-16 * cond**2 at most, and here < 1e-11.
    np.testing.assert_allclose(sigma, naive_singular_values(matrix), rtol=1e-11)
    assert floor == pytest.approx(1e-7 * sigma[0])


def test_singular_values_of_strided_and_integer_matrices() -> None:
    matrix: NDArray[Any] = np.arange(60).reshape(6, 10) % 7
    for view in (matrix[::2, ::3], matrix[::-1, ::-1], matrix.T, np.asfortranarray(matrix)):
        np.testing.assert_allclose(
            singular_values(view)[0], naive_singular_values(view), rtol=1e-10, atol=1e-13
        )


def test_singular_values_leave_the_input_alone() -> None:
    matrix = gaussian((5, 3))
    before = matrix.copy()
    singular_values(matrix)
    np.testing.assert_array_equal(matrix, before)


@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (32, 32)])
@pytest.mark.parametrize("rank", [1, 7])
def test_rank_deficient_matrices_fall_to_the_floor_of_the_svd(
    shape: tuple[int, int], rank: int
) -> None:
    known = np.linspace(3.0, 1.0, rank)
    sigma, floor = singular_values(with_spectrum(shape, known))
    assert floor == pytest.approx(max(shape) * 2.0**-52 * sigma[0])
    np.testing.assert_allclose(sigma[:rank], known, rtol=1e-13)
    assert np.all(sigma[rank:] <= floor)
    cond = condition_number(sigma, floor)
    assert cond.is_lower_bound
    assert cond.resolved == rank
    assert cond.value == pytest.approx(sigma[0] / floor)


@pytest.mark.parametrize("smallest", [1e-5, 4e-7, 1.5e-7])
@pytest.mark.parametrize("noise", [0.0, 2e-9, 1e-8])
def test_a_faster_route_never_errs_by_more_than_the_noise(smallest: float, noise: float) -> None:
    known = np.geomspace(1.0, smallest, 24)
    matrix = with_spectrum((64, 24), known)
    sigma, floor = singular_values(matrix, noise=noise)
    by_gram = floor == pytest.approx(1e-7 * sigma[0])
    assert by_gram == (smallest == 1e-5 or (smallest == 4e-7 and noise > 0))
    np.testing.assert_allclose(sigma, known, rtol=1e-7, atol=max(noise, 1e-10) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_rank_deficient_matrices_stay_on_the_gram_route_under_noise(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = with_spectrum((48, 20), np.array([3.0, 1.0]), seed)
    monkeypatch.delattr(np.linalg, "svd")
    # Gram eigenvalues of a singular matrix come out negative as often as not.
    sigma, floor = singular_values(matrix, noise=1e-3)
    assert floor == 1e-3
    assert np.all(sigma >= 0)
    assert condition_number(sigma, floor).resolved == 2


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-20, 1e20, 1e200, 1e305])
def test_extreme_scales_neither_overflow_nor_underflow(scale: float) -> None:
    matrix = gaussian((24, 10))
    sigma, floor = singular_values(matrix * scale)
    np.testing.assert_allclose(sigma, naive_singular_values(matrix) * scale, rtol=1e-11)
    assert condition_number(sigma, floor).value == pytest.approx(sigma[0] / sigma[-1])


def test_subnormal_matrix_and_overflowing_norm() -> None:
    sigma, _ = singular_values(np.full((2, 2), 5e-324))
    assert sigma[0] == 1e-323
    sigma, floor = singular_values(np.full((2, 2), 1.7e308))
    assert sigma[0] == np.inf
    assert np.isnan(condition_number(sigma, floor).value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_non_finite_matrices_are_nan_in_silence(
    bad: float, shape: tuple[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    matrix = gaussian(shape)
    matrix[1, 2] = bad
    sigma, floor = singular_values(matrix)
    np.testing.assert_array_equal(sigma, np.full(4, np.nan))
    assert math.isnan(floor)
    cond = condition_number(sigma, floor)
    assert np.isnan(cond.value)
    assert not cond.is_lower_bound
    assert cond.resolved == 0
    assert capfd.readouterr() == ("", "")  # LAPACK prints on Inf


def test_zero_matrix_is_void() -> None:
    sigma, floor = singular_values(np.zeros((3, 5)), noise=0.25)
    np.testing.assert_array_equal(sigma, np.zeros(3))
    assert floor == 0.25
    cond = condition_number(sigma, floor)
    assert np.isnan(cond.value)
    assert not cond.is_lower_bound
    assert cond.resolved == 0


@pytest.mark.parametrize(
    "matrix", [np.ones(3), np.ones((2, 2, 2)), np.ones((0, 3)), np.ones((2, 2)) * 1j]
)
def test_what_is_no_real_matrix_is_refused(matrix: Floats) -> None:
    with pytest.raises(LensError, match=r"real matrix.*got shape"):
        singular_values(matrix)


@pytest.mark.parametrize("exponent", range(1, 13))
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)])
def test_known_condition_numbers_are_resolved(shape: tuple[int, int], exponent: int) -> None:
    k = min(shape)
    matrix = with_spectrum(shape, np.logspace(0, -exponent, k))
    cond = condition_number(*singular_values(matrix))
    # Building the matrix and the SVD each err by a few eps * sigma_1 = 1e-16, seen relative to
    # sigma_k = 10**-exponent; the Gram route errs by 5e-18 * cond**2, taken up to 1e6 only.
    tolerance = 20 * 2.0**-52 * 10.0**exponent + (1e-4 if exponent <= 6 else 0)
    assert cond.value == pytest.approx(10.0**exponent, rel=tolerance)
    assert not cond.is_lower_bound
    assert cond.resolved == k


@pytest.mark.parametrize("exponent", [15, 18])
def test_condition_beyond_the_floor_is_a_lower_bound(exponent: int) -> None:
    cond = condition_number(
        *singular_values(with_spectrum((40, 24), np.logspace(0, -exponent, 24)))
    )
    assert cond.is_lower_bound
    assert cond.value <= 10.0**exponent
    assert cond.value == pytest.approx(1 / (40 * 2.0**-52), rel=1e-6)


@pytest.mark.parametrize("exponent", [2, 5, 8])
def test_noise_of_the_recorder_is_the_floor(exponent: int) -> None:
    noise = 1e-4
    sigma, floor = singular_values(
        with_spectrum((40, 24), np.logspace(0, -exponent, 24)), noise=noise
    )
    assert floor == noise
    cond = condition_number(sigma, floor)
    assert cond.is_lower_bound == (exponent > 4)
    assert cond.value == pytest.approx(min(10.0**exponent, 1e4), rel=1e-6)
    # np.logspace holds 24 values; those strictly above the noise are resolved.
    assert cond.resolved == (np.logspace(0, -exponent, 24) > noise).sum()


def test_svd_is_called_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    svd = np.linalg.svd

    def counting(matrix: Floats, *, compute_uv: bool) -> Floats:
        assert not compute_uv
        calls.append(matrix.shape)
        return np.asarray(svd(matrix, compute_uv=False))

    monkeypatch.setattr(np.linalg, "svd", counting)
    ill = with_spectrum((24, 40), np.logspace(0, -8, 24))
    singular_values(gaussian((24, 40)))
    singular_values(ill, noise=1e-5)
    singular_values(ill * 1e100, noise=1e95)
    assert calls == []
    singular_values(ill, noise=1e-7)
    singular_values(ill * 1e100, noise=1e-5)
    assert calls == [(40, 24)] * 2  # the tall orientation: several times faster
    monkeypatch.setattr(spectrum_module, "GRAM_LIMIT", 23)
    sigma, floor = singular_values(gaussian((24, 40)))
    assert len(calls) == 3
    assert floor == pytest.approx(40 * 2.0**-52 * sigma[0])


@pytest.mark.parametrize(
    ("dtype", "unit"),
    [("float64", 2**-53), ("float32", 2**-24), ("float16", 2**-11), ("bfloat16", 2**-8)],
)
def test_rounding_noise_formula(dtype: str, unit: float) -> None:
    assert rounding_noise((16, 4), 5.0, dtype) == pytest.approx(0.4 * unit * 5.0 * (0.25 + 0.5))


@pytest.mark.parametrize("shape", [(200, 100), (100, 200)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rounding_noise_predicts_the_error_of_rounding(shape: tuple[int, int], dtype: str) -> None:
    matrix = gaussian(shape)
    error = matrix.astype(dtype).astype(np.float64) - matrix
    predicted = rounding_noise(shape, float(np.linalg.norm(matrix)), dtype)
    # The factor 0.4 is a rule of thumb for the RMS of rounding; it holds to a few per cent here.
    assert naive_singular_values(error)[0] == pytest.approx(predicted, rel=0.15)


def test_rounding_noise_refuses_an_unknown_dtype() -> None:
    with pytest.raises(LensError, match=r"'int8'.*float32"):
        rounding_noise((2, 2), 1.0, "int8")


def naive_measures(sigma: Floats) -> dict[str, float]:
    k = len(sigma)
    p5, p10, p50, p95 = np.percentile(sigma, [5, 10, 50, 95])
    energy = [float(s) ** 2 for s in sigma]
    shares = [e / sum(energy) for e in energy]
    mean_energy = sum(energy) / k
    gram = np.diag(energy) / mean_energy
    best = max(
        sum(0.68 <= s * scale <= 1.15 for s in sigma)
        for scale in [0.68 * (1 + 1e-12) / s for s in sigma if s > 0]
    )
    return {
        "spread_median": sigma[0] / p50 if p50 else math.inf,
        "spread_p95_p5": p95 / p5 if p5 else math.inf,
        "spread_p90": sigma[0] / p10 if p10 else math.inf,
        "stable_rank": sum(energy) / energy[0],
        "entropy_rank": math.exp(-sum(p * math.log(p) for p in shares if p > 0)),
        "orthogonality_error": float(np.linalg.norm(gram - np.eye(k))) / math.sqrt(k),
        "newton_schulz_share": best / k,
    }


SPECTRA = {
    "gaussian": naive_singular_values(gaussian((30, 21))),
    "single": np.array([4.0]),
    "pair": np.array([4.0, 1.0]),
    "orthogonal": np.full(12, 0.3),
    "rank one": np.array([2.0, 0.0, 0.0, 0.0]),
    "rank deficient": np.array([3.0, 2.0, 1.5, 1.0, 0.0, 0.0]),
    "decades": np.logspace(0, -9, 40),
    "band": np.linspace(1.14, 0.69, 17),
}


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("case", SPECTRA)
def test_measures_equal_the_naive_ones(case: str, name: str) -> None:
    expected = naive_measures(SPECTRA[case])[name]
    value = MEASURES[name](SPECTRA[case])
    assert value.shape == ()
    # The orthogonality error of an orthogonal matrix is a difference of ones: 1e-15.
    assert value == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_measures_of_what_is_known() -> None:
    assert orthogonality_error(np.array([1.0, 0.0, 0.0, 0.0, 0.0])) == pytest.approx(2.0)
    assert stable_rank(np.array([2.0, 2.0, 1.0])) == pytest.approx(2.25)
    assert newton_schulz_share(np.array([1.15, 0.9, 0.69, 0.01])) == 0.75
    assert spread_p90(np.linspace(11.0, 1.0, 11)) == pytest.approx(11.0 / 2.0)
    assert spread_median(np.array([8.0, 4.0, 1.0])) == 2.0


@pytest.mark.parametrize("name", SPREADS)
def test_spreads_stop_at_the_floor(name: str) -> None:
    sigma = 4 * np.array([1.0, 1.0, 1e-17, 1e-17, 1e-17, 1e-18])
    assert SPREADS[name](sigma, 4e-3) == pytest.approx(1e3)


@pytest.mark.parametrize("name", MEASURES)
def test_void_and_non_finite_rows_are_nan_and_spoil_no_other(name: str) -> None:
    good = np.array([3.0, 2.0, 1.0])
    stack = np.array([good, good * 0, [np.nan] * 3, [np.inf, 1, 1], [2, 1, np.nan], good])
    expected = naive_measures(good)[name]
    np.testing.assert_allclose(
        MEASURES[name](stack.reshape(2, 3, 3)),
        [[expected, np.nan, np.nan], [np.nan, np.nan, expected]],
        rtol=1e-12,
    )


def test_condition_number_keeps_the_leading_axes() -> None:
    sigma = np.array([[[4.0, 2.0], [0.0, 0.0]], [[5.0, 1e-9], [np.nan, np.nan]]])
    floor = np.array([[1e-3, 0.0], [1e-3, np.nan]])
    cond = condition_number(sigma, floor)
    np.testing.assert_allclose(cond.value, [[2.0, np.nan], [5e3, np.nan]])
    np.testing.assert_array_equal(cond.is_lower_bound, [[False, False], [True, False]])
    np.testing.assert_array_equal(cond.resolved, [[2, 0], [1, 0]])
    np.testing.assert_array_equal(cond.floor, floor)
    np.testing.assert_allclose(condition_number(sigma, 1e-3).value, cond.value)


def test_condition_number_of_a_singular_matrix_without_floor_is_infinite() -> None:
    cond = condition_number([1.0, 0.0], 0.0)
    assert cond.value == np.inf
    assert cond.is_lower_bound


def test_sigma_max() -> None:
    stack = np.array([[3.0, 1.0], [0.0, 0.0], [np.inf, 1.0], [1.0, np.nan]])
    np.testing.assert_array_equal(sigma_max(stack), [3.0, 0.0, np.nan, np.nan])


shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=60, deadline=None)
@given(shapes, seeds, st.floats(1e-150, 1e150), st.sampled_from([-1, 1]))
def test_scaling_scales_the_spectrum_and_nothing_else(
    shape: tuple[int, int], seed: int, size: float, sign: int
) -> None:
    matrix = gaussian(shape, seed)
    sigma, floor = singular_values(matrix)
    scaled, scaled_floor = singular_values(matrix * (sign * size))
    # The scaled entries are rounded anew: a few eps * sigma_1, and 1e-10 for a Gram route at 1e4.
    np.testing.assert_allclose(scaled, sigma * size, rtol=1e-9, atol=1e-12 * sigma[0] * size)
    np.testing.assert_allclose(
        condition_number(scaled, scaled_floor).value,
        condition_number(sigma, floor).value,
        rtol=1e-6,
    )
    for measure in MEASURES.values():
        np.testing.assert_allclose(measure(scaled), measure(sigma), rtol=1e-6, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(shapes, seeds)
def test_permuting_rows_and_columns_changes_nothing(shape: tuple[int, int], seed: int) -> None:
    matrix = gaussian(shape, seed)
    rng = np.random.default_rng(seed)
    shuffled = matrix[rng.permutation(shape[0])][:, rng.permutation(shape[1])]
    sigma = singular_values(matrix)[0]
    np.testing.assert_allclose(
        singular_values(shuffled)[0], sigma, rtol=1e-9, atol=1e-12 * sigma[0]
    )


@settings(max_examples=60, deadline=None)
@given(shapes, seeds, st.floats(1e-3, 1e3))
def test_orthogonal_in_condition_one_out(shape: tuple[int, int], seed: int, size: float) -> None:
    k = min(shape)
    sigma, floor = singular_values(orthogonal(*shape, seed) * size)
    # float64 rounding of the QR factor: some eps, squared by no more than the Gram product.
    assert condition_number(sigma, floor).value == pytest.approx(1, abs=1e-12)
    assert stable_rank(sigma) == pytest.approx(k)
    assert entropy_rank(sigma) == pytest.approx(k)
    assert orthogonality_error(sigma) == pytest.approx(0, abs=1e-12)
    assert newton_schulz_share(sigma) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.6801, 1.1499), min_size=1, max_size=30), st.floats(1e-9, 1e9))
def test_whatever_lies_in_the_band_counts_at_any_learning_rate(
    values: list[float], rate: float
) -> None:
    sigma = np.sort(values)[::-1] * rate
    assert newton_schulz_share(sigma) == 1


def test_nothing_is_below_one_however_high_the_floor() -> None:
    sigma, floor = np.array([3.0, 2.0, 1.0]), 7.0
    condition = condition_number(sigma, floor)
    assert (condition.value, condition.is_lower_bound, condition.resolved) == (1.0, True, 0)
    for spread in (spread_median, spread_p95_p5, spread_p90):
        assert spread(sigma, floor) == 1.0
