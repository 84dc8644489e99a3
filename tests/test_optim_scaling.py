"""The two scale forms, by hand."""

import math

import pytest
import torch

from normuon_lens.optim.scaling import SCALES, step_size

O = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]], dtype=torch.float64)  # norm 5
N = O / 2


def test_match_rms_fixes_the_root_mean_square():
    found = step_size(N, O, 0.1, "match_rms")
    assert found.item() == pytest.approx(0.2 * 0.1 * math.sqrt(6) / 2.5, rel=1e-15)
    assert (found * N).square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-15)


@pytest.mark.parametrize(("turn", "shape_factor"), [(False, math.sqrt(3 / 2)), (True, 1.0)])
def test_preserve_norm_restores_the_norm(turn, shape_factor):
    direction, orthogonalized = (N.mT, O.mT) if turn else (N, O)
    found = step_size(direction, orthogonalized, 0.1, "preserve_norm")
    assert found.item() == pytest.approx(0.1 * 2 * shape_factor, rel=1e-15)


@pytest.mark.parametrize("scale", ["match_rms", "preserve_norm"])
def test_the_zero_direction_has_step_size_zero(scale):
    zero = torch.zeros(3, 2)
    assert step_size(zero, zero, 0.1, scale).item() == 0


@pytest.mark.parametrize("scale", SCALES)
def test_every_matrix_of_a_batch_has_its_own_step_size(scale):
    directions = torch.stack([N, 7 * N.flip(0), torch.zeros_like(N)])
    orthogonalized = torch.stack([O, O / 3, torch.zeros_like(O)])
    found = step_size(directions, orthogonalized, 0.1, scale)
    assert found.shape == (3, 1, 1)
    for one, direction, matrix in zip(found, directions, orthogonalized, strict=True):
        assert torch.equal(one, step_size(direction, matrix, 0.1, scale))
    assert found[2] == 0


@pytest.mark.parametrize("factor", [1e-4, 1e4])
@pytest.mark.parametrize("scale", SCALES)
def test_the_size_of_the_direction_does_not_matter(scale, factor):
    plain = step_size(N, O, 0.1, scale) * N
    torch.testing.assert_close(step_size(factor * N, O, 0.1, scale) * (factor * N), plain)


def test_match_rms_asks_nothing_of_the_orthogonalized_matrix():
    assert torch.equal(step_size(N, O, 0.1, "match_rms"), step_size(N, 5 * O, 0.1, "match_rms"))


@pytest.mark.parametrize("scale", SCALES)
def test_the_step_is_proportional_to_the_learning_rate(scale):
    assert step_size(N, O, 0.0, scale) == 0
    torch.testing.assert_close(
        step_size(N, O, 0.3, scale), 3 * step_size(N, O, 0.1, scale), rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("shape", [(40, 10), (10, 40), (10, 10)])
def test_on_an_orthogonal_matrix_the_two_forms_differ_by_a_factor_of_the_shape(shape):
    # ‖O‖_F = √min(m, n), so match_rms is 0.2 η √max(m, n) O and preserve_norm η √max(1, m/n) O.
    m, n = shape
    U, _, Vh = torch.linalg.svd(torch.randn(shape, generator=torch.manual_seed(1)).double())
    k = min(shape)
    direction = U[:, :k] @ Vh[:k]
    found = [step_size(direction, direction, 0.1, scale).item() for scale in SCALES]
    expected = [0.1 * 0.2 * math.sqrt(max(m, n)), 0.1 * math.sqrt(max(1, m / n))]
    assert found == pytest.approx(expected, rel=1e-12)
    # So the learning rate of one that does what the other's does is 5 / √n times that.
    assert found[0] * 5 / math.sqrt(n) == pytest.approx(found[1], rel=1e-12)
