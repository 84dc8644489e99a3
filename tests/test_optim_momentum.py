"""The running mean of gradients against its closed form."""

import numpy as np
import pytest
import torch

from normuon_lens.optim.momentum import advance

STEPS = 12


def gradients(shape=(5, 3), dtype=torch.float64):
    generator = torch.manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(STEPS)]


def weighted(grads, beta):
    """(1−β) Σ β^(t−i) Gᵢ, the oldest first."""
    weights = (1 - beta) * beta ** np.arange(len(grads))[::-1]
    return sum(weight * G.numpy() for weight, G in zip(weights, grads, strict=True))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.95, 0.999])
def test_it_is_the_exponentially_weighted_mean(beta, nesterov):
    M = torch.zeros(5, 3, dtype=torch.float64)
    grads = gradients()
    for t, G in enumerate(grads, start=1):
        found = advance(M, G, beta=beta, nesterov=nesterov)
        mean = weighted(grads[:t], beta)
        np.testing.assert_allclose(M.numpy(), mean, rtol=0, atol=1e-14)
        # Looking ahead is one more step with the same gradient.
        ahead = weighted([*grads[:t], G], beta) if nesterov else mean
        np.testing.assert_allclose(found.numpy(), ahead, rtol=0, atol=1e-14)


def test_it_is_advanced_in_place_and_handed_on_as_it_is():
    M, G = torch.ones(5, 3), torch.full((5, 3), 3.0)
    assert advance(M, G, beta=0.5, nesterov=False) is M
    assert torch.equal(M, torch.full((5, 3), 2.0))


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_gradient_is_left_alone(nesterov):
    M, G = torch.ones(5, 3), torch.full((5, 3), 3.0)
    found = advance(M, G, beta=0.5, nesterov=nesterov)
    assert torch.equal(G, torch.full((5, 3), 3.0))
    found.zero_()  # whoever writes into the result writes into no gradient
    assert torch.equal(G, torch.full((5, 3), 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nesterov", [False, True])
def test_rows_do_not_need_each_other(nesterov, dtype):
    whole = torch.zeros(5, 3, dtype=dtype)
    parts = [torch.zeros(rows, 3, dtype=dtype) for rows in (2, 0, 3)]
    for G in gradients(dtype=dtype):
        expected = advance(whole, G, beta=0.9, nesterov=nesterov)
        shards = zip(parts, G.split([2, 0, 3]), strict=True)
        found = [advance(M, shard, beta=0.9, nesterov=nesterov) for M, shard in shards]
        assert torch.equal(torch.cat(found), expected)
        assert torch.equal(torch.cat(parts), whole)


def test_a_constant_gradient_is_approached_from_zero():
    M, G = torch.zeros(5, 3, dtype=torch.float64), gradients()[0]
    for t in range(1, STEPS):
        advance(M, G, beta=0.9, nesterov=False)
        torch.testing.assert_close(M, (1 - 0.9**t) * G, rtol=1e-14, atol=0)
