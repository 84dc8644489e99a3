"""The two scale forms, by hand."""

import math

import pytest
import torch

from normuon_lens.optim.scaling import step_size

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
