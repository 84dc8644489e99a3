"""Where updates go, against plain float64 formulas."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from normuon_lens.errors import LensError
from normuon_lens.metrics import (
    alignment,
    cosine,
    leverage_scores,
    singular_values,
    update_error,
    update_to_weight,
    update_to_weight_spectral,
)

Floats = NDArray[np.float64]

SHAPES = [(12, 5), (5, 12), (8, 8), (1, 6), (6, 1)]
SCALES = [1e-200, 1.0, 1e200]


def gaussian(shape: tuple[int, int], seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape)


def polar(matrix: Floats) -> Floats:
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray(left @ right)


def naive_cosine(a: Floats, b: Floats) -> float:
    dot = math.fsum(float(x) * float(y) for x, y in zip(a.flat, b.flat, strict=True))
    return dot / math.sqrt(
        math.fsum(float(x) ** 2 for x in a.flat) * math.fsum(float(y) ** 2 for y in b.flat)
    )


def naive_alignment(gradient: Floats, update: Floats) -> float:
    nuclear = float(np.linalg.svd(gradient, compute_uv=False).sum())
    inner = float(np.trace(gradient.T @ update))
    return -inner / (nuclear * float(np.linalg.norm(update)) / math.sqrt(min(gradient.shape)))


def naive_leverage(matrix: Floats) -> Floats:
    return np.diag(matrix @ np.linalg.pinv(matrix)).copy()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_equal_the_naive_ones(shape: tuple[int, int], dtype: type) -> None:
    gradient: NDArray[Any] = gaussian(shape, 1).astype(dtype)
    update: NDArray[Any] = gaussian(shape, 2).astype(dtype)
    g, u = gradient.astype(np.float64), update.astype(np.float64)
    assert cosine(gradient, update) == pytest.approx(naive_cosine(g, u), rel=1e-12)
    # The nuclear norm may come from the Gram route: 5e-18 * cond**2 stays below 1e-11 here.
    assert alignment(gradient, update) == pytest.approx(naive_alignment(g, u), rel=1e-10)
    np.testing.assert_allclose(leverage_scores(gradient), naive_leverage(g), rtol=1e-11)


@pytest.mark.parametrize("b_scale", SCALES)
@pytest.mark.parametrize("a_scale", SCALES)
def test_scale_free_at_extreme_scales(a_scale: float, b_scale: float) -> None:
    a, b = gaussian((6, 4), 1), gaussian((6, 4), 2)
    assert cosine(a * a_scale, b * b_scale) == pytest.approx(naive_cosine(a, b), rel=1e-12)
    assert alignment(a * a_scale, b * b_scale) == pytest.approx(naive_alignment(a, b), rel=1e-10)
    np.testing.assert_allclose(leverage_scores(a * a_scale), naive_leverage(a), rtol=1e-12)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf])
def test_what_is_undefined_is_nan(bad: float) -> None:
    good = gaussian((4, 3))
    for fill in ((slice(None), slice(None)), (0, 0)):
        broken = good.copy() if bad else np.zeros((4, 3))
        broken[fill] = bad
        assert math.isnan(cosine(good, broken))
        assert math.isnan(cosine(broken, good))
        assert math.isnan(alignment(good, broken))
        assert math.isnan(alignment(broken, good))
        np.testing.assert_array_equal(leverage_scores(broken), np.full(4, np.nan))
        assert np.isnan(update_to_weight_spectral([1.0, 0.5], broken))


def test_an_entry_that_is_not_finite_spoils_the_cosine_even_against_zeros() -> None:
    assert math.isnan(cosine([[np.inf, 1.0]], [[0.0, 1.0]]))
    assert math.isnan(alignment([[0.0, 1.0]], [[np.inf, 1.0]]))


def test_cosine_of_what_is_known() -> None:
    a = gaussian((5, 7))
    assert cosine(a, 3 * a) == pytest.approx(1)
    assert cosine(a, -a) == pytest.approx(-1)
    assert cosine([[1.0, 0.0]], [[0.0, 2.0]]) == 0
    assert -1 <= cosine(a, a * (1 / 3)) <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_alignment_of_the_polar_factor_is_one(shape: tuple[int, int]) -> None:
    gradient = gaussian(shape)
    assert alignment(gradient, -0.01 * polar(gradient)) == pytest.approx(1)
    assert alignment(gradient, polar(gradient)) == pytest.approx(-1)


def test_alignment_of_the_gradient_itself_exceeds_one() -> None:
    gradient = np.diag([3.0, 1.0])
    assert alignment(gradient, -gradient) == pytest.approx(math.sqrt(2 * 10) / 4)
    rank_one = np.outer([1.0, 2.0, 3.0], [1.0, -1.0, 0.0, 2.0])
    # Rank one, k = 3: the bound. Its zero singular values come out at 1e-16.
    assert alignment(rank_one, -rank_one) == pytest.approx(math.sqrt(3))


@pytest.mark.parametrize("measure", [cosine, alignment])
def test_shapes_must_agree(measure: Callable[[Floats, Floats], float]) -> None:
    with pytest.raises(LensError, match=r"one shape, got \(2, 3\) and \(3, 2\)"):
        measure(np.ones((2, 3)), np.ones((3, 2)))


def test_update_to_weight() -> None:
    ratio = update_to_weight([1.0, 0.0, 1.0, np.nan, 1.0, np.inf], [4.0, 2.0, 0.0, 1.0, np.inf, 1])
    np.testing.assert_array_equal(ratio, [0.25, 0.0, np.nan, np.nan, np.nan, np.nan])
    assert update_to_weight(np.float32(1), 3.0).dtype == np.float64


@pytest.mark.parametrize(("bits", "size"), [(8, 0.3), (8, 0.02), (11, 0.01), (24, 1e-5)])
def test_update_error_is_that_of_rounding_the_sum(bits: int, size: float) -> None:
    """Weights of `bits` binary digits, moved and rounded again: the difference is off by this."""

    def rounded(x: Floats) -> Floats:
        unit = 2.0 ** (np.floor(np.log2(np.abs(x))) + 1 - bits)
        return np.round(x / unit) * unit

    weight, update = rounded(gaussian((64, 64), 1)), size * gaussian((64, 64), 2)
    seen = rounded(weight + update) - weight
    true = np.linalg.norm(seen - update) / np.linalg.norm(update)
    estimate = update_error(np.linalg.norm(seen), np.linalg.norm(weight), 2.0**-bits)
    assert 0.7 * true < estimate < 1.4 * true


def test_update_error_at_its_ends() -> None:
    np.testing.assert_array_equal(
        update_error([1.0, 1e-9, 0.0, np.nan, 1.0], [1.0, 1.0, 1.0, 1.0, np.nan], 2.0**-8),
        [0.4 * 2.0**-8, 1.0, np.nan, np.nan, np.nan],
    )
    assert update_error(1.0, 5.0, 0.0) == 0.0


@pytest.mark.parametrize("shape", SHAPES)
def test_update_to_weight_spectral_equals_the_spectral_norms(shape: tuple[int, int]) -> None:
    update, weight = gaussian(shape, 1), gaussian(shape, 2)
    expected = np.linalg.norm(update, 2) / np.linalg.norm(weight, 2)
    sigma, _ = singular_values(update)
    np.testing.assert_allclose(
        update_to_weight_spectral([sigma, 2 * sigma, 0 * sigma], weight),
        expected * np.array([1.0, 2.0, 0.0]),
        rtol=1e-12,
    )


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8)])
@pytest.mark.parametrize("rank", [1, 3])
def test_leverage_of_rank_deficient_matrices_sums_to_the_rank(
    shape: tuple[int, int], rank: int
) -> None:
    matrix = gaussian((shape[0], rank), 1) @ gaussian((rank, shape[1]), 2)
    scores = leverage_scores(matrix)
    assert scores.sum() == pytest.approx(rank)
    np.testing.assert_allclose(scores, naive_leverage(matrix), rtol=1e-10)


def test_leverage_is_the_squared_row_norm_of_the_polar_factor() -> None:
    momentum = gaussian((30, 6)) * np.logspace(0, -3, 6)
    np.testing.assert_allclose(
        np.sqrt(leverage_scores(momentum)), np.linalg.norm(polar(momentum), axis=1), rtol=1e-10
    )


@pytest.mark.parametrize("matrix", [np.ones(3), np.ones((0, 3)), np.ones((2, 2)) * 1j])
def test_leverage_refuses_what_is_no_real_matrix(matrix: Floats) -> None:
    with pytest.raises(LensError, match=r"real matrix.*got shape"):
        leverage_scores(matrix)


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(1, 8), st.integers(1, 8)), st.integers(0, 2**32 - 1))
def test_permuting_rows_changes_nothing(shape: tuple[int, int], seed: int) -> None:
    gradient, update = gaussian(shape, seed), gaussian(shape, seed + 1)
    order = np.random.default_rng(seed).permutation(shape[0])
    assert cosine(gradient[order], update[order]) == pytest.approx(cosine(gradient, update))
    assert alignment(gradient[order], update[order]) == pytest.approx(
        alignment(gradient, update), abs=1e-9
    )
    # Square Gaussian matrices may be ill-conditioned: scores are only as good as eps * cond.
    np.testing.assert_allclose(
        leverage_scores(gradient[order]), leverage_scores(gradient)[order], rtol=1e-6
    )
