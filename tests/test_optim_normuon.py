"""NorMuon against float64 NumPy, and the invariants of its rule."""

import itertools

import numpy as np
import pytest
import torch

from normuon_lens.optim import Muon, NorMuon

SHAPES = [(24, 8), (8, 24), (12, 12), (6, 3, 2, 2)]
STEPS = 40


def newton_schulz(M):
    X = M / np.linalg.norm(M)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X


def normuon(W, M, v, G, lr, wd, beta1, beta2, eps, nesterov, scale):
    M = beta1 * M + (1 - beta1) * G
    O = newton_schulz(beta1 * M + (1 - beta1) * G if nesterov else M)
    v = beta2 * v + (1 - beta2) * np.mean(O * O, axis=1)
    N = O / (np.sqrt(v)[:, None] + eps)
    m, n = W.shape
    if scale == "match_rms":
        step = 0.2 * lr * np.sqrt(m * n) / np.linalg.norm(N) * N
    else:
        step = lr * np.sqrt(max(1, m / n)) * np.linalg.norm(O) / np.linalg.norm(N) * N
    return W - lr * wd * W - step, M, v


def gradients(shape, seed, dtype=torch.float64):
    """Make a steady part plus noise, rows of very different size: as in real training."""
    generator = torch.manual_seed(seed)
    rows = torch.randn(shape[0], generator=generator).exp().view(-1, *[1] * (len(shape) - 1))
    steady = torch.randn(shape, generator=generator)
    noise = (torch.randn(shape, generator=generator) for _ in range(STEPS))
    return [(rows * (steady + one)).to(dtype) for one in noise]


def train(start, grads, make):
    """All weights a training goes through, the start first."""
    weight = torch.nn.Parameter(start.clone())
    optimizer = make([weight])
    weights = [start]
    for G in grads:
        weight.grad = G.clone()
        optimizer.step()
        weights.append(weight.detach().clone())
    return weights


# float64: 485-fold amplified rounding, measured 2e-14 of the way gone. float32 weights of
# size 1 moved by 0.1 hold the first way only to 1e-5 of itself; measured 4e-6.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-13), (torch.float32, 2e-5)])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scale", ["match_rms", "preserve_norm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_follows_the_formula_step_by_step(shape, scale, nesterov, dtype, tolerance):
    start = torch.randn(shape, generator=torch.manual_seed(1)).to(dtype)
    grads = gradients(shape, 2, dtype)
    weights = train(
        start,
        grads,
        # A large eps, so that leaving it out is seen.
        lambda params: NorMuon(
            params,
            0.02,
            (0.9, 0.8),
            1e-3,
            weight_decay=0.3,
            nesterov=nesterov,
            scale=scale,
            ns_dtype=dtype,
        ),
    )
    W = W0 = start.double().numpy().reshape(shape[0], -1)
    M, v = np.zeros_like(W), np.zeros(shape[0])
    for G, weight in zip(grads, weights[1:], strict=True):
        gradient = G.double().numpy().reshape(W.shape)
        W, M, v = normuon(W, M, v, gradient, 0.02, 0.3, 0.9, 0.8, 1e-3, nesterov, scale)
        found = weight.double().numpy().reshape(W.shape)
        assert np.linalg.norm(found - W) < tolerance * np.linalg.norm(W - W0)


def test_the_defaults_are_the_papers():
    weights = train(
        torch.ones(8, 4).double(),
        gradients((8, 4), 3),
        lambda params: NorMuon(params, 0.02),
    )
    W, M, v = np.ones((8, 4)), np.zeros((8, 4)), np.zeros(8)
    for G, weight in zip(gradients((8, 4), 3), weights[1:], strict=True):
        W, M, v = normuon(W, M, v, G.numpy(), 0.02, 0.1, 0.95, 0.95, 1e-8, False, "match_rms")
        np.testing.assert_allclose(weight.numpy(), W, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [Muon, NorMuon])
@pytest.mark.parametrize("ns_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, (300, 200)])
def test_match_rms_moves_by_exactly_a_fifth_of_the_learning_rate(rule, shape, ns_dtype):
    # Float64 weights, so that the difference of two weights is the update. The rounding left is
    # theirs, 1e-16 of weights of size 1 in steps of 0.006.
    weights = train(
        torch.randn(shape, generator=torch.manual_seed(4)).double(),
        gradients(shape, 5)[:10],
        lambda params: rule(params, 0.03, weight_decay=0, ns_dtype=ns_dtype),
    )
    for before, after in itertools.pairwise(weights):
        rms = (after - before).square().mean().sqrt().item()
        assert rms == pytest.approx(0.2 * 0.03, rel=1e-12)


def test_match_rms_holds_in_float32_to_its_rounding():
    # From zero the first step is the weight itself.
    for rule in (Muon, NorMuon):
        (_, first) = train(
            torch.zeros(1500, 300),
            [torch.randn(1500, 300, generator=torch.manual_seed(6))],
            lambda params, rule=rule: rule(params, 0.03),
        )
        assert first.double().square().mean().sqrt().item() == pytest.approx(0.006, rel=1e-6)


def test_preserve_norm_moves_as_far_as_muon():
    start = torch.randn(24, 8, generator=torch.manual_seed(7)).double()
    ways = [
        [(after - before).norm() for before, after in itertools.pairwise(weights)]
        for weights in (
            train(
                start,
                gradients((24, 8), 8),
                lambda params, rule=rule: rule(params, 0.03, weight_decay=0, scale="preserve_norm"),
            )
            for rule in (Muon, NorMuon)
        )
    ]
    torch.testing.assert_close(*ways, rtol=1e-12, atol=0)


def test_neurons_are_balanced_where_muon_leaves_them_uneven():
    def imbalance(rule, step):
        weights = train(
            torch.zeros(24, 8).double(),
            gradients((24, 8), 9),
            lambda params: rule(params, 0.03, weight_decay=0),
        )
        norms = (weights[step] - weights[step - 1]).norm(dim=1)
        return (norms.std(correction=0) / norms.mean()).item()

    assert imbalance(NorMuon, 1) < 1e-6  # by construction: v is a multiple of this O∘O; eps is left
    assert imbalance(NorMuon, STEPS) < imbalance(Muon, STEPS) / 2


@pytest.mark.parametrize("shape", SHAPES)
def test_permuting_neurons_permutes_the_weights(shape):
    # Only the order of sums differs: rounding, 485-fold.
    start = torch.randn(shape, generator=torch.manual_seed(10)).double()
    order = torch.randperm(shape[0], generator=torch.manual_seed(11))
    plain = train(start, gradients(shape, 12), lambda params: NorMuon(params, 0.02))
    permuted = train(
        start[order],
        [G[order] for G in gradients(shape, 12)],
        lambda params: NorMuon(params, 0.02),
    )
    torch.testing.assert_close(permuted[-1], plain[-1][order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [Muon, NorMuon])
def test_the_scale_of_the_loss_does_not_matter(rule):
    # A power of two, so that no rounding differs: bitwise.
    start = torch.randn(24, 8, generator=torch.manual_seed(13))
    grads = gradients((24, 8), 14, torch.float32)
    plain = train(start, grads, lambda params: rule(params, 0.02))
    scaled = train(start, [G * 2.0**-30 for G in grads], lambda params: rule(params, 0.02))
    assert torch.equal(scaled[-1], plain[-1])


def test_a_dead_neuron_rests_and_disturbs_nobody():
    grads = gradients((24, 8), 15)
    for G in grads:
        G[3] = 0
    weights = train(
        torch.ones(24, 8).double(), grads, lambda params: NorMuon(params, 0.02, weight_decay=0)
    )
    assert torch.equal(weights[-1][3], torch.ones(8).double())
    assert torch.isfinite(weights[-1]).all()
    assert (weights[-1] != 1).any(dim=1).sum() == 23
