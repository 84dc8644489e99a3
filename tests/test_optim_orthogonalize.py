"""Newton-Schulz against float64 NumPy, against torch's own, and its promises."""

import itertools

import numpy as np
import pytest
import torch

from normuon_lens.optim import orthogonalize
from normuon_lens.optim.orthogonalize import _fast_cpu_dtype, fast_dtype, frobenius_norm

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
