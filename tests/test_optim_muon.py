"""Muon against float64 NumPy and against torch.optim.Muon."""

import numpy as np
import pytest
import torch

from normuon_lens.optim import Muon, orthogonalize
from normuon_lens.optim.orthogonalize import COEFFICIENTS

SHAPES = [(24, 8), (8, 24), (12, 12), (6, 3, 2, 2)]
STEPS = 40


def newton_schulz(M):
    X = M / np.linalg.norm(M)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X


def muon(W, M, G, lr, wd, mu, nesterov, scale, power=newton_schulz):
    M = mu * M + (1 - mu) * G
    O = power(mu * M + (1 - mu) * G if nesterov else M)
    m, n = W.shape
    eta = 0.2 * lr * np.sqrt(m * n) / np.linalg.norm(O)
    if scale == "preserve_norm":
        eta = lr * np.sqrt(max(1, m / n))
    return W - lr * wd * W - eta * O, M


def gradients(shape, seed):
    """Make a steady part plus noise, rows of very different size: as in real training."""
    generator = torch.manual_seed(seed)
    rows = torch.randn(shape[0], generator=generator).exp().view(-1, *[1] * (len(shape) - 1))
    steady = torch.randn(shape, generator=generator)
    return [rows * (steady + torch.randn(shape, generator=generator)) for _ in range(STEPS)]


# float64: 485-fold amplified rounding, measured 2e-14 of the way gone. float32 weights of
# size 1 moved by 0.1 hold the first way only to 1e-5 of itself; measured 4e-6.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-13), (torch.float32, 2e-5)])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scale", ["match_rms", "preserve_norm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_follows_the_formula_step_by_step(shape, scale, nesterov, dtype, tolerance):
    start = torch.randn(shape, generator=torch.manual_seed(1)).to(dtype)
    weight = torch.nn.Parameter(start.clone())
    optimizer = Muon(
        [weight], 0.02, 0.9, weight_decay=0.3, nesterov=nesterov, scale=scale, ns_dtype=dtype
    )
    W = W0 = start.double().numpy().reshape(shape[0], -1)
    M = np.zeros_like(W)
    for G in gradients(shape, 2):
        weight.grad = G.to(dtype)
        optimizer.step()
        W, M = muon(
            W, M, weight.grad.double().numpy().reshape(W.shape), 0.02, 0.3, 0.9, nesterov, scale
        )
        found = weight.detach().double().numpy().reshape(W.shape)
        assert np.linalg.norm(found - W) < tolerance * np.linalg.norm(W - W0)


def side_by_side(shape, nesterov):
    """Worst distance to torch.optim.Muon over a training, as a share of the way gone."""
    start = torch.randn(shape, generator=torch.manual_seed(3))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone().flatten(1))
    optimizers = (
        Muon([ours], 0.02, nesterov=nesterov, scale="preserve_norm", ns_dtype=torch.bfloat16),
        torch.optim.Muon([theirs], 0.02, nesterov=nesterov, adjust_lr_fn="original"),
    )
    worst = 0.0
    for G in gradients(shape, 4):
        ours.grad, theirs.grad = G, G.flatten(1).clone()
        for optimizer in optimizers:
            optimizer.step()
        away = (ours.flatten(1) - theirs).norm() / (theirs - start.flatten(1)).norm()
        worst = max(worst, away.item())
    return worst


# Float32 weights of size 1 hold a first step of 0.006 to 1e-5 of itself: measured 1e-5.
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_torchs_muon_but_for_the_rounding_of_the_norm(monkeypatch, shape, nesterov):
    def ours(gradient, *_):
        return orthogonalize(gradient, dtype=torch.bfloat16)

    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", ours)
    assert side_by_side(shape, nesterov) < 3e-5


# torch rounds matrix, norm and quotient to bfloat16 (2⁻⁹ each), we round once (products agree
# bitwise, see test_optim_orthogonalize); Newton-Schulz amplifies that. Measured at most 0.024.
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_stays_with_torchs_muon_as_it_is(shape, nesterov):
    assert side_by_side(shape, nesterov) < 6e-2


# -- choices of Newton-Schulz --------------------------------------------------------------------


def polar(M):
    U, _, Vh = np.linalg.svd(M, full_matrices=False)
    return U @ Vh


def iterated(coefficients, steps):
    """Return Newton-Schulz on the row side, the last triple repeated."""

    def power(M):
        X = M / np.linalg.norm(M)
        for i in range(steps):
            a, b, c = coefficients[min(i, len(coefficients) - 1)]
            A = X @ X.T
            X = a * X + (b * A + c * A @ A) @ X
        return X

    return power


CHOICES = [
    ({"ns_steps": "exact"}, polar),
    *[
        ({"ns_steps": steps, "ns_coefficients": name}, iterated(COEFFICIENTS[name], steps))
        for name in COEFFICIENTS
        for steps in (1, 3, 7, 9)
    ],
]


@pytest.mark.parametrize(("options", "power"), CHOICES)
@pytest.mark.parametrize("scale", ["match_rms", "preserve_norm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_choice_follows_its_formula(shape, scale, options, power):
    start = torch.randn(shape, generator=torch.manual_seed(5)).double()
    weight = torch.nn.Parameter(start.clone())
    optimizer = Muon([weight], 0.02, 0.9, weight_decay=0.3, scale=scale, **options)
    W = W0 = start.numpy().reshape(shape[0], -1)
    M = np.zeros_like(W)
    for G in gradients(shape, 6):
        weight.grad = G.double()
        optimizer.step()
        gradient = weight.grad.numpy().reshape(W.shape)
        W, M = muon(W, M, gradient, 0.02, 0.3, 0.9, False, scale, power)
        found = weight.detach().numpy().reshape(W.shape)
        # Up to 70,000-fold amplified rounding; measured at most 2e-12.
        assert np.linalg.norm(found - W) < 2e-11 * np.linalg.norm(W - W0)


def test_the_exact_update_is_orthogonal_and_of_the_promised_size():
    for m, n in ((24, 8), (8, 24), (12, 12)):
        weight = torch.nn.Parameter(torch.zeros(m, n))
        optimizer = Muon([weight], 0.02, ns_steps="exact")
        weight.grad = torch.randn(m, n, generator=torch.manual_seed(7))
        optimizer.step()
        sigma = np.linalg.svd(weight.detach().double().numpy(), compute_uv=False)
        np.testing.assert_allclose(sigma, 0.2 * 0.02 * np.sqrt(max(m, n)), rtol=1e-5)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (12, 12)])
def test_torchs_match_rms_trusts_in_singular_values_of_one(shape):
    # It scales by 0.2 √max(m, n), which is the RMS of 0.2 only if ‖O‖_F = √min(m, n).
    theirs, ours = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    G = torch.randn(shape, generator=torch.manual_seed(8))
    for weight, optimizer in (
        (theirs, torch.optim.Muon([theirs], 0.02, adjust_lr_fn="match_rms_adamw")),
        (ours, Muon([ours], 0.02, nesterov=True, ns_dtype=torch.bfloat16)),
    ):
        weight.grad = G.clone()
        optimizer.step()
    short = np.linalg.norm(newton_schulz(G.double().numpy())) / np.sqrt(min(shape))
    assert short < 0.99
    torch.testing.assert_close(theirs / short, ours, rtol=0.05, atol=2e-4)
