"""Newton-Schulz against float64 NumPy, against torch's own, and its promises."""

import importlib
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from normuon_lens.errors import LensError
from normuon_lens.optim import orthogonalize
from normuon_lens.optim.orthogonalize import (
    COEFFICIENTS,
    ELONGATED,
    _fast_cpu_dtype,
    _plain,
    fast_dtype,
    frobenius_norm,
)

MODULE = importlib.import_module("normuon_lens.optim.orthogonalize")
DOCS = Path(__file__).parents[1] / "docs"

SHAPES = [(48, 16), (16, 48), (24, 24), (2, 2), (130, 70)]


def newton_schulz(M):
    X = M / np.linalg.norm(M)
    for _ in range(5):
        A = X @ X.T  # always the row side: right for every shape, only slower
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X


def relative(found, expected):
    difference = found.double().numpy() - expected
    return np.linalg.norm(difference) / np.linalg.norm(expected)


# Up to 485-fold amplification of the rounding of small singular values, averaged over all of them:
# measured at most 6e-15, 2e-6 and 0.02; a few times that.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_numpy(shape, dtype, tolerance):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(1))
    found = orthogonalize(matrix, dtype=dtype)
    assert found.shape == shape
    assert found.dtype == torch.float64
    assert relative(found, newton_schulz(matrix.numpy())) < tolerance


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (64, 64)])
def test_bfloat16_is_torchs_arithmetic(shape):
    # Signs on 4^k entries: the norm is a power of two, so neither side rounds in normalizing.
    # Tall matrices are multiplied transposed there: a BLAS may add in another order, 1 ulp of 1.
    matrix = torch.randn(shape, generator=torch.manual_seed(2)).sign()
    coefficients = (3.4445, -4.7750, 2.0315)
    theirs = torch.optim._muon._zeropower_via_newtonschulz(matrix, coefficients, 5, 1e-7)
    ours = orthogonalize(matrix, dtype=torch.bfloat16).bfloat16()
    tolerance = 2**-7 if shape[0] > shape[1] else 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_is_as_near_the_truth_as_torchs_in_bfloat16():
    for seed, shape in itertools.product(range(3), [(64, 256), (256, 64), (96, 96)]):
        matrix = torch.randn(shape, generator=torch.manual_seed(seed))
        truth = newton_schulz(matrix.double().numpy())
        coefficients = (3.4445, -4.7750, 2.0315)
        theirs = torch.optim._muon._zeropower_via_newtonschulz(matrix, coefficients, 5, 1e-7)
        ours = orthogonalize(matrix, dtype=torch.bfloat16)
        assert relative(ours, truth) < 1.5 * relative(theirs, truth)


def test_singular_values_land_where_the_docstring_says():
    U, _ = torch.linalg.qr(torch.randn(64, 24, dtype=torch.float64, generator=torch.manual_seed(3)))
    V, _ = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=torch.manual_seed(4)))
    before = torch.logspace(0, -2.8, 24, dtype=torch.float64)  # down to 0.0016 of the largest
    before = before / before.norm()
    before[-1] = 1e-7
    after = torch.diagonal(U.mT @ orthogonalize((U * before) @ V.mT) @ V)
    lifted = before > 0.0015
    assert 15 < lifted.sum() < 24
    assert after[lifted].min() > 0.68
    assert after[lifted].max() < 1.21
    assert 450e-7 < after[-1] < 485e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_zero_stays_zero_and_dtype_is_kept(dtype):
    found = orthogonalize(torch.zeros(4, 3, dtype=dtype))
    assert found.dtype == dtype
    assert torch.equal(found, torch.zeros(4, 3, dtype=dtype))


@pytest.mark.parametrize("exponent", [-43, -20, 20, 55])
def test_scale_does_not_matter(exponent):
    matrix = torch.randn(16, 8, generator=torch.manual_seed(5))
    scaled = matrix * 2.0**exponent
    assert torch.equal(orthogonalize(scaled), orthogonalize(matrix))


@pytest.mark.parametrize("size", [1e-16, 1e-25, 1e-44])
def test_what_is_too_small_to_measure_is_not_blown_up(size):
    found = orthogonalize(torch.full((16, 8), size))
    assert torch.isfinite(found).all()
    assert found.abs().max() < 1


def test_narrow_input_is_normalized_in_float32():
    # 300² overflows float16, whose largest number is 65504.
    matrix = 300 * torch.randn(8, 8, generator=torch.manual_seed(6)).half()
    expected = orthogonalize(matrix.float(), dtype=torch.float32)
    assert torch.equal(orthogonalize(matrix, dtype=torch.float32), expected.half())


def test_input_is_left_alone_also_with_few_steps():
    matrix = torch.randn(6, 4, generator=torch.manual_seed(7))
    before = matrix.clone()
    for steps in (0, 1, 5):
        orthogonalize(matrix, steps, dtype=torch.float32)
    assert torch.equal(matrix, before)
    torch.testing.assert_close(
        orthogonalize(matrix, 0, dtype=torch.float32), matrix / matrix.norm()
    )


def test_autocast_does_not_lower_the_precision():
    matrix = torch.randn(16, 8, generator=torch.manual_seed(8))
    expected = orthogonalize(matrix, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(orthogonalize(matrix, dtype=torch.float32), expected)


def test_default_dtype_is_the_machines_and_float64_is_kept():
    matrix = torch.randn(16, 8, generator=torch.manual_seed(9))
    fast = fast_dtype("cpu")
    assert fast in (torch.bfloat16, torch.float32)
    assert torch.equal(orthogonalize(matrix), orthogonalize(matrix, dtype=fast))
    exact = matrix.double()
    assert torch.equal(orthogonalize(exact), orthogonalize(exact, dtype=torch.float64))


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"),
    [
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
    ],
)
def test_bfloat16_is_taken_where_the_cpu_has_it(monkeypatch, amx, avx512, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert _fast_cpu_dtype() == expected
    assert fast_dtype("meta") == torch.float32


def test_frobenius_norm_of_a_large_matrix():
    matrix = torch.randn(3000, 500, generator=torch.manual_seed(10))
    # One running float32 sum is off by 4e-5 here.
    assert abs(frobenius_norm(matrix).item() / matrix.double().norm().item() - 1) < 1e-6


# -- coefficients and the bands that they make -------------------------------------------------


def schedule(coefficients, steps):
    """One triple an iteration, the last of a set repeated."""
    triples = COEFFICIENTS[coefficients]
    return [triples[min(i, len(triples) - 1)] for i in range(steps)]


def odd_quintic(triple, x):
    a, b, c = triple
    return a * x + b * x**3 + c * x**5


def composed(coefficients, steps, x):
    for triple in schedule(coefficients, steps):
        x = odd_quintic(triple, x)
    return x


def bands(text):
    """Read the rows of a table, in reStructuredText or Markdown, as (name, steps, numbers)."""
    name, cell, gap = r'"(quintic|polar_express)"`*', r"([\d.,]+)", r"[ |]+"
    row = rf"{name}[^\d\n]+(\d+){gap}{cell}{gap}\[{cell}, {cell}\]{gap}{cell}"
    return [
        (name, int(steps), [cell.replace(",", "") for cell in cells])
        for name, steps, *cells in re.findall(row, text)
    ]


def test_the_table_of_bands_is_what_the_polynomials_do():
    rows = bands(orthogonalize.__doc__)
    assert len(rows) == 8
    x = np.geomspace(1e-8, 1, 200_001)
    for name, steps, (lifted, low, high, slope) in rows:
        y = composed(name, steps, x)
        # The share from which on nothing falls below the band, to two digits.
        start = np.flatnonzero(y < float(low))[-1] + 1
        assert f"{x[start]:.1e}" == f"{float(lifted):.1e}"
        # The band is rounded outwards: its edges are the highest and the deepest turn of the curve.
        unit = 10.0 ** -len(low.partition(".")[2])
        assert math.ceil(y.max() / unit - 1e-9) == round(float(high) / unit)
        turns = y[1:-1][(y[1:-1] <= y[:-2]) & (y[1:-1] <= y[2:])]
        assert math.floor(min(turns.min(), y[-1]) / unit - 1e-9) == round(float(low) / unit)
        assert f"{y[0] / x[0]:.2e}" == f"{float(slope):.2e}"


def test_most_values_lie_below_115_after_five_quintic_steps():
    lifted = composed("quintic", 5, np.geomspace(0.0015, 1, 100_001))
    assert 0.05 < np.mean(lifted > 1.15) < 0.1


def test_the_guide_has_the_table_of_the_docstring():
    assert bands((DOCS / "normuon.md").read_text()) == bands(orthogonalize.__doc__)


def test_the_quintic_is_that_of_torch():
    (defaults,) = torch.optim.Muon([torch.ones(2, 2)]).param_groups
    assert COEFFICIENTS["quintic"] == (defaults["ns_coefficients"],)
    assert defaults["ns_steps"] == 5


def turning_points(triple, low, high):
    """Return the ends of an interval and where the polynomial turns: p'(x) = a + 3bx² + 5cx⁴."""
    a, b, c = triple
    squares = np.roots([5 * c, 3 * b, a])
    assert np.all(squares.imag == 0)
    return np.array([low, *np.sqrt(np.sort(squares.real)), high])


def test_polar_express_is_the_best_quintic_of_each_interval():
    # Chebyshev: an odd quintic, of three coefficients, is the best approximation of one on [l, u]
    # if and only if its error takes its largest size at four points there, with signs in turn. The
    # paper never takes an l below 0.0241 u, and then rescales so that p(l) and p(u) lie about one.
    *triples, limit = COEFFICIENTS["polar_express"]
    assert limit == (15 / 8, -10 / 8, 3 / 8)  # the best for l → u → 1: p(1) = 1, p' = p'' = 0
    low, high, cushioned = 1e-3, 1.0, 0
    for triple in triples:
        raw = np.array(triple) * 1.01 ** np.array([1, 3, 5])
        narrowed = max(low, 0.02407327424182761 * high)
        cushioned += narrowed > low
        points = turning_points(raw, narrowed, high)
        assert np.all(np.diff(points) > 0)
        values = odd_quintic(raw, points)
        middle = (values.max() + values.min()) / 2
        # Later intervals are so narrow that the error itself is near the resolution of float64.
        size = (values.max() - values.min()) / 2
        error = (values - middle) / size
        np.testing.assert_allclose(error, [-1, 1, -1, 1], atol=1e-12 + 1e-15 / size)
        low, high = odd_quintic(raw, low), odd_quintic(raw, high)
        assert low + high == pytest.approx(2, abs=1e-11)
        if narrowed == low:
            assert middle == pytest.approx(1, abs=1e-11)
    assert (low, cushioned) == (pytest.approx(1, abs=1e-8), 3)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("steps", [1, 2, 5, 7, 8, 10])
def test_singular_values_go_through_the_polynomials(coefficients, steps):
    U, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((40, 12)))
    V, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((12, 12)))
    before = np.geomspace(1, 1e-4, 12)
    before /= np.linalg.norm(before)
    matrix = torch.from_numpy((U * before) @ V.T)
    for one in (matrix, matrix.mT):
        found = orthogonalize(one, steps, coefficients=coefficients)
        found = found.numpy() if one is matrix else found.numpy().T
        expected = (U * composed(coefficients, steps, before)) @ V.T
        # 235,000-fold rounding at most.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


# -- the fast paths of float32 -----------------------------------------------------------------


def numbers(*shape):
    return torch.randn(shape, dtype=torch.float64)


def with_spectrum(shape, sigma):
    U, _ = torch.linalg.qr(numbers(shape[0], len(sigma)))
    V, _ = torch.linalg.qr(numbers(shape[1], len(sigma)))
    return (U * sigma) @ V.mT


def geometric(shape, decades):
    return with_spectrum(shape, torch.logspace(0, -decades, min(shape), dtype=torch.float64))


def half_zero(shape):
    s = min(shape)
    return with_spectrum(shape, (torch.arange(s) < max(1, s // 2)).double())


def rank_one_and_noise(shape):
    m, n = shape
    strong = 100 * (m**0.5 + n**0.5) / (m * n) ** 0.5
    return numbers(m, n) + strong * numbers(m, 1) * numbers(1, n)


GENERIC = {
    "Gaussian": lambda shape: numbers(*shape),
    "condition 1e4": lambda shape: geometric(shape, 4),
    "condition 1e8": lambda shape: geometric(shape, 8),
    "half of it zero": half_zero,
    "rank one": lambda shape: numbers(shape[0], 1) * numbers(1, shape[1]),
    "rank one and noise": rank_one_and_noise,
    "rows from 1 to 1e-6": lambda shape: numbers(*shape) * torch.logspace(0, -6, shape[0])[:, None],
    "columns from 1 to 1e-6": lambda shape: numbers(*shape) * torch.logspace(0, -6, shape[1]),
    "all positive": lambda shape: numbers(*shape).abs(),
    "near zero": lambda shape: 1e-14 * numbers(*shape),
}

# Many roundings are the same here, and plain products may be exact by chance.
REGULAR = {
    "constant": lambda shape: torch.ones(shape),
    "nearly constant": lambda shape: 1 + 1e-4 * numbers(*shape),
    "constant columns": lambda shape: numbers(1, shape[1]).abs().expand(shape),
    "constant rows": lambda shape: numbers(shape[0], 1).abs().expand(shape),
    "three rows repeated": lambda shape: numbers(3, shape[1])[torch.arange(shape[0]) % 3],
    "four by four blocks": lambda shape: torch.kron(
        numbers(4, 4), torch.ones(-(-shape[0] // 4), -(-shape[1] // 4))
    )[: shape[0], : shape[1]],
    "one hot": lambda shape: torch.eye(*shape),
    "a triangle of ones": lambda shape: torch.ones(shape).tril(),
}

# With blocks of 16: none, one, two, three and more of them, even and uneven, and elongation on
# either side of where the small Gram matrix takes over.
CROSSING = [
    *[(2, 2), (15, 20), (31, 31), (32, 47), (63, 94), (66, 66)],
    *[(2, 3), (2, 100), (15, 23), (31, 47), (32, 48), (49, 75), (66, 140)],
]


def errors(matrix, steps, coefficients):
    """Relative error of orthogonalizing in float32, and of plain float32, from plain float64."""
    X = matrix.double() / max(matrix.double().norm(), 1e-15)
    triples = schedule(coefficients, steps)
    expected = _plain(X, triples).numpy()
    found = orthogonalize(matrix, steps, dtype=torch.float32, coefficients=coefficients)
    return relative(found, expected), relative(_plain(X.float(), triples), expected)


def lifted_rounding(steps, coefficients):
    """Return what an error of one unit in the last place becomes where the matrix is zero."""
    slope = math.prod(a for a, _, _ in schedule(coefficients, steps))
    return torch.finfo(torch.float32).eps * slope


def test_the_shapes_lie_on_both_sides_of_every_branch():
    sides = [(min(shape), max(shape) / min(shape)) for shape in CROSSING]
    for elongated in (False, True):
        found = {short // 16 for short, ratio in sides if (ratio >= ELONGATED) == elongated}
        assert found == {0, 1, 2, 3, 4}
    assert any(1.45 < ratio < ELONGATED for _, ratio in sides)
    assert any(ratio == ELONGATED for _, ratio in sides)


# Measured at most 2.5e-5 above four times the plain error after five steps and 5.5e-5 after others;
# bfloat16 is at 1e-2 and above.
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("name", GENERIC)
def test_fast_paths_are_as_accurate_as_plain_float32(monkeypatch, name, coefficients):
    monkeypatch.setattr(MODULE, "BLOCK", 16)
    torch.manual_seed(1)
    for shape, steps in itertools.product(CROSSING, (1, 2, 3, 4, 5, 7, 10)):
        for turned in (shape, shape[::-1]):
            ours, plain = errors(GENERIC[name](turned).float(), steps, coefficients)
            assert ours < 4 * plain + (5e-5 if steps == 5 else 1e-4), (turned, steps)


# Measured at most 1.6e-4 above four times the plain error up to five steps.
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("name", REGULAR)
def test_errors_that_are_alike_do_not_add_up(monkeypatch, name, coefficients):
    monkeypatch.setattr(MODULE, "BLOCK", 16)
    torch.manual_seed(2)
    for shape, steps in itertools.product(CROSSING, (1, 2, 3, 4, 5, 7, 10)):
        for turned in (shape, shape[::-1]):
            ours, plain = errors(REGULAR[name](turned).float(), steps, coefficients)
            assert ours < 4 * plain + 3e-4 + lifted_rounding(steps, coefficients), (turned, steps)


# At these sizes a Gram iteration with the multiples of I on its diagonal is off by 3e-3 (quintic)
# and 2e-2 (polar_express) where the matrix is constant.
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(577, 600), (400, 599), (640, 400), (600, 900)])
def test_fast_paths_are_accurate_in_blocks_of_their_true_size(shape, coefficients):
    torch.manual_seed(3)
    for name, make in {"Gaussian": numbers, "constant": torch.ones}.items():
        ours, plain = errors(make(*shape).float(), 5, coefficients)
        assert ours < 4 * plain + (5e-5 if name == "Gaussian" else 1e-3), name


@pytest.mark.parametrize("name", GENERIC | REGULAR)
def test_float32_is_far_more_accurate_than_torchs_bfloat16(name):
    # Measured at least 100 times.
    torch.manual_seed(4)
    coefficients = COEFFICIENTS["quintic"][0]
    for shape in [(64, 128), (96, 60), (64, 70)]:
        matrix = (GENERIC | REGULAR)[name](shape).float()
        X = matrix.double() / matrix.double().norm()
        expected = _plain(X, [coefficients] * 5).numpy()
        theirs = torch.optim._muon._zeropower_via_newtonschulz(matrix, coefficients, 5, 1e-7)
        ours = orthogonalize(matrix, dtype=torch.float32)
        assert relative(ours, expected) < relative(theirs, expected) / 20, shape


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_nothing_blows_up_however_many_steps(coefficients):
    # Noise of every size in directions that are next to zero: it is lifted, never over the band.
    torch.manual_seed(5)
    for steps in (1, 3, 5, 12, 25):
        highest = composed(coefficients, steps, np.geomspace(1e-9, 1, 100_001)).max()
        for shape in [(16, 24), (24, 16), (40, 200), (33, 33)]:
            for make in (GENERIC | REGULAR).values():
                found = orthogonalize(
                    make(shape).float(), steps, dtype=torch.float32, coefficients=coefficients
                )
                assert np.linalg.norm(found.numpy(), 2) < highest * (1 + 1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(8, 8), (8, 20), (400, 400), (400, 700)])
def test_what_is_not_finite_is_not_hidden(shape, value):
    matrix = torch.ones(shape)
    matrix[1, 2] = value
    assert not torch.isfinite(orthogonalize(matrix, dtype=torch.float32)).all()


@pytest.mark.parametrize("shape", [(40, 30), (30, 45), (30, 90), (400, 420), (400, 600)])
def test_the_transposed_matrix_has_the_transposed_result(shape):
    matrix = torch.randn(shape, generator=torch.manual_seed(6))
    found = orthogonalize(matrix.mT, dtype=torch.float32).mT
    expected = orthogonalize(matrix, dtype=torch.float32)
    assert relative(found, expected.double().numpy()) < 2e-5


# -- the exact polar factor ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)],
)
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (24, 24), (2, 2), (300, 200)])
def test_exact_is_the_polar_factor_of_numpy(shape, dtype, tolerance):
    matrix = torch.randn(shape, generator=torch.manual_seed(7)).to(dtype)
    left, sigma, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    # Rounding to bfloat16 can have made values up to 2^-8 of the norm.
    kept = sigma > torch.finfo(dtype).eps / 2 * np.linalg.norm(sigma)
    assert kept.sum() >= (0.5 if dtype == torch.bfloat16 else 1) * min(shape)
    expected = left[:, kept] @ right[kept]
    for choice in ({}, {"dtype": torch.bfloat16}, {"coefficients": "polar_express"}):
        found = orthogonalize(matrix, "exact", **choice)
        assert found.dtype == dtype
        assert relative(found, expected) < tolerance


# The more the smallest value that is kept stands out of the rounding, the better it is known.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 0.1)],
)
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (200, 150)])
def test_exact_leaves_out_what_is_only_rounding(shape, dtype, tolerance):
    left, _ = np.linalg.qr(np.random.default_rng(8).standard_normal((shape[0], 4)))
    right, _ = np.linalg.qr(np.random.default_rng(9).standard_normal((shape[1], 4)))
    matrix = torch.from_numpy((left * [1, 0.9, 0.5, 0.2]) @ right.T).to(dtype)
    found = orthogonalize(matrix, "exact")
    assert relative(found, left @ right.T) < tolerance
    assert np.linalg.matrix_rank(found.double().numpy(), tol=0.5) == 4


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)],
)
def test_exact_of_rank_one_is_its_direction(dtype, tolerance):
    generator = torch.manual_seed(10)
    u, v = (torch.randn(size, dtype=torch.float64, generator=generator) for size in (200, 150))
    found = orthogonalize(torch.outer(u, v).to(dtype), "exact")
    expected = torch.outer(u / u.norm(), v / v.norm())
    assert relative(found, expected.numpy()) < tolerance


def test_exact_keeps_small_values_that_are_none_of_rounding():
    small = torch.diag(torch.tensor([1.0, 1e-6]))
    assert torch.equal(orthogonalize(small, "exact"), torch.eye(2))
    smaller = torch.diag(torch.tensor([1.0, 1e-9]))
    assert torch.equal(orthogonalize(smaller, "exact"), torch.diag(torch.tensor([1.0, 0.0])))
    assert torch.equal(orthogonalize(smaller.double(), "exact"), torch.eye(2).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_exact_of_zero_is_zero(dtype):
    assert torch.equal(
        orthogonalize(torch.zeros(3, 5, dtype=dtype), "exact"), torch.zeros(3, 5, dtype=dtype)
    )
    tiny = torch.full((3, 5), 1e-20, dtype=torch.float32)
    assert not orthogonalize(tiny, "exact").any()


@pytest.mark.parametrize("exponent", [-40, 30])
def test_exact_does_not_depend_on_scale(exponent):
    matrix = torch.randn(9, 5, generator=torch.manual_seed(10))
    found = orthogonalize(matrix * 2.0**exponent, "exact")
    torch.testing.assert_close(found, orthogonalize(matrix, "exact"), rtol=0, atol=1e-6)


def test_many_steps_of_polar_express_reach_the_exact_factor():
    matrix = torch.randn(30, 12, dtype=torch.float64, generator=torch.manual_seed(11))
    found = orthogonalize(matrix, 10, coefficients="polar_express")
    exact = orthogonalize(matrix, "exact")
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)
    assert (orthogonalize(matrix, 10) - exact).abs().max() > 0.01  # the quintic never does


def test_coefficients_of_another_name_are_refused_in_one_line():
    with pytest.raises(LensError, match=r"one of quintic, polar_express, got 'cubic'\.$"):
        orthogonalize(torch.ones(2, 3), coefficients="cubic")


# -- batches -------------------------------------------------------------------------------------


def batch(shape, count=4):
    """Matrices of very different size, one of them zero."""
    sizes = torch.tensor([1.0, 1e-6, 0.0, 1e6])[:count].view(-1, 1, 1)
    return sizes * torch.randn(count, *shape, generator=torch.manual_seed(12))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("steps", [5, "exact"])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9), (10, 40)])
def test_a_batch_is_its_matrices_one_by_one(shape, steps, dtype):
    matrices = batch(shape).to(torch.promote_types(dtype or torch.float32, torch.float32))
    found = orthogonalize(matrices, steps, dtype=dtype)
    assert found.shape == matrices.shape
    one_by_one = torch.stack([orthogonalize(matrix, steps, dtype=dtype) for matrix in matrices])
    if steps == "exact":
        torch.testing.assert_close(found, one_by_one, rtol=0, atol=1e-6)
    else:
        assert torch.equal(found, one_by_one)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_batched_products_are_those_of_each_matrix(shape, coefficients):
    # The path of a GPU, in float64 on the CPU.
    matrices = batch(shape).double()
    X = matrices / frobenius_norm(matrices).clamp_min(1e-15)
    found = _plain(X, schedule(coefficients, 5))
    for one, matrix in zip(found, matrices, strict=True):
        expected = orthogonalize(matrix, coefficients=coefficients)
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-12)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_gpu
def test_a_gpu_multiplies_in_bfloat16_if_it_has_it():
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert fast_dtype("cuda") == (torch.bfloat16 if native else torch.float32)


@on_gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)],
)
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (130, 70), (400, 800)])
def test_a_batch_on_a_gpu_agrees_with_numpy(shape, dtype, tolerance):
    matrices = torch.randn(3, *shape, dtype=torch.float64, generator=torch.manual_seed(13))
    found = orthogonalize(matrices.cuda(), dtype=dtype).cpu()
    for one, matrix in zip(found, matrices, strict=True):
        assert relative(one, newton_schulz(matrix.numpy())) < tolerance


@on_gpu
def test_exact_on_a_gpu_is_that_of_the_cpu():
    matrices = torch.randn(3, 20, 9, generator=torch.manual_seed(14))
    found = orthogonalize(matrices.cuda(), "exact").cpu()
    torch.testing.assert_close(found, orthogonalize(matrices, "exact"), rtol=0, atol=1e-5)
