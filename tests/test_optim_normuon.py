"""NorMuon against float64 NumPy, and the invariants of its rule."""

import importlib
import itertools

import numpy as np
import pytest
import torch

from normuon_lens.optim import Muon, NorMuon

MODULE = importlib.import_module("normuon_lens.optim.orthogonalize")
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


# -- ablations -----------------------------------------------------------------------------------


def polar(M):
    U, _, Vh = np.linalg.svd(M, full_matrices=False)
    return U @ Vh


def normalized(X, v, beta2, eps, granularity):
    """Return X over the root of the running mean of its square, and that mean."""
    square = X * X if granularity == "coordinate" else np.mean(X * X, axis=1, keepdims=True)
    v = beta2 * v + (1 - beta2) * square
    return X / (np.sqrt(v) + eps), v


def ablated(
    W, M, v, G, *, beta2, granularity, normalize, only, nesterov, scale, power=newton_schulz
):
    """Return W, M and v after a step at lr 0.02, weight decay 0.3, beta1 0.9, eps 1e-3."""
    M = 0.9 * M + 0.1 * G
    X = 0.9 * M + 0.1 * G if nesterov else M
    m, n = W.shape
    if not {"all": True, "tall": m > n, "wide": m < n}[only]:
        direction = O = power(X)
    elif normalize == "before":
        X, v = normalized(X, v, beta2, 1e-3, granularity)
        direction = O = power(X)
    else:
        O = power(X)
        direction, v = normalized(O, v, beta2, 1e-3, granularity)
    if scale == "match_rms":
        step = 0.2 * 0.02 * np.sqrt(m * n) / np.linalg.norm(direction)
    else:
        step = 0.02 * np.sqrt(max(1, m / n)) * np.linalg.norm(O) / np.linalg.norm(direction)
    return W - 0.02 * 0.3 * W - step * direction, M, v


def follow(shape, grads, power=newton_schulz, **options):
    """Train NorMuon and its NumPy twin; return their worst distance as a share of the way gone."""
    given = {"granularity": "neuron", "normalize": "after", "only": "all"} | options
    given = {"beta2": 0.8, "nesterov": False, "scale": "match_rms"} | given
    start = torch.randn(shape, generator=torch.manual_seed(21)).double()
    steps = "exact" if power is polar else 5
    ours = given | {"betas": (0.9, given["beta2"]), "eps": 1e-3, "ns_steps": steps}
    del ours["beta2"]
    weights = train(start, grads, lambda p: NorMuon(p, 0.02, weight_decay=0.3, **ours))
    W = W0 = start.numpy().reshape(shape[0], -1)
    M, v, worst = np.zeros_like(W), 0.0, 0.0
    for G, weight in zip(grads, weights[1:], strict=True):
        W, M, v = ablated(W, M, v, G.numpy().reshape(W.shape), power=power, **given)
        distance = np.linalg.norm(weight.numpy().reshape(W.shape) - W)
        worst = max(worst, distance / np.linalg.norm(W - W0))
    return worst


ABLATIONS = list(itertools.product(["neuron", "coordinate"], ["after", "before"]))


@pytest.mark.parametrize("only", ["all", "tall", "wide"])
@pytest.mark.parametrize(("granularity", "normalize"), ABLATIONS)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scale", ["match_rms", "preserve_norm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_ablations_follow_their_formula(shape, scale, nesterov, granularity, normalize, only):
    options = {"granularity": granularity, "normalize": normalize, "only": only}
    worst = follow(shape, gradients(shape, 22), nesterov=nesterov, scale=scale, **options)
    # Normalizing by coordinate divides small entries by as small a root: measured 1.2e-13.
    assert worst < 1e-12


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.999])
@pytest.mark.parametrize(("granularity", "normalize"), ABLATIONS)
def test_every_beta2_follows_the_formula(granularity, normalize, beta2):
    options = {"granularity": granularity, "normalize": normalize, "beta2": beta2}
    assert follow((24, 8), gradients((24, 8), 23), **options) < 1e-12


@pytest.mark.parametrize(("granularity", "normalize"), ABLATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_exact_polar_factor_follows_the_formula(shape, granularity, normalize):
    options = {"granularity": granularity, "normalize": normalize}
    # The polar factor is only as well known as the smallest singular value is far from zero.
    assert follow(shape, gradients(shape, 24), power=polar, **options) < 1e-9


@pytest.mark.parametrize("only", ["tall", "wide"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scale", ["match_rms", "preserve_norm"])
def test_a_matrix_of_the_other_shape_is_muons_bitwise(shape, only, nesterov, scale):
    m, n = shape[0], np.prod(shape[1:])
    start = torch.randn(shape, generator=torch.manual_seed(25))
    grads = gradients(shape, 26, torch.float32)[:10]
    common = {"nesterov": nesterov, "scale": scale}
    optimizers = []

    def make(params):
        optimizers.append(NorMuon(params, 0.02, (0.9, 0.8), only=only, **common))
        return optimizers[-1]

    ours = train(start, grads, make)
    muons = train(start, grads, lambda params: Muon(params, 0.02, 0.9, **common))
    plain = train(start, grads, lambda params: NorMuon(params, 0.02, (0.9, 0.8), **common))
    (state,) = optimizers[0].state.values()
    if (m > n) if only == "tall" else (m < n):
        assert state.keys() == {"momentum_buffer", "second_moment"}
        assert torch.equal(ours[-1], plain[-1])
        assert not torch.equal(ours[-1], muons[-1])
    else:
        assert state.keys() == {"momentum_buffer"}
        assert torch.equal(ours[-1], muons[-1])
        assert not torch.equal(ours[-1], plain[-1])


def test_state_is_one_number_a_neuron_or_one_a_coordinate():
    for granularity, width in (("neuron", 1), ("coordinate", 12)):
        weight = torch.nn.Parameter(torch.ones(6, 3, 2, 2))
        optimizer = NorMuon([weight], 0.02, granularity=granularity)
        assert optimizer.state[weight]["second_moment"].shape == (6, width)


def stages(grads, **options):
    """Return the stages of each step of a training on one matrix, in float64."""
    weight = torch.nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = NorMuon([weight], 0.02, weight_decay=0, **options)
    seen = []
    for G in grads:
        seen.append({})
        optimizer.stage_observer = lambda _, stage, X: seen[-1].update({stage: X.numpy().copy()})
        weight.grad = G.clone()
        optimizer.step()
    return seen


def spread(norms):
    return np.std(norms) / np.mean(norms)


def neurons(X):
    return np.linalg.norm(X, axis=1)


def test_without_memory_every_neuron_of_the_normalized_matrix_has_norm_root_n():
    for shape in [(24, 8), (8, 24), (12, 12)]:
        for seen in stages(gradients(shape, 27)[:5], betas=(0.9, 0.0), eps=1e-15):
            np.testing.assert_allclose(neurons(seen["normalized"]), np.sqrt(shape[1]), rtol=1e-12)
            np.testing.assert_allclose(
                neurons(seen["update"]), 0.004 * np.sqrt(shape[1]), rtol=1e-12
            )


def test_without_memory_by_coordinate_the_update_is_a_sign():
    options = {"betas": (0.9, 0.0), "eps": 1e-15, "granularity": "coordinate"}
    for seen in stages(gradients((24, 8), 28)[:5], **options):
        np.testing.assert_allclose(
            seen["update"], 0.004 * np.sign(seen["orthogonalized"]), rtol=1e-9
        )


def test_with_long_memory_the_second_moment_is_the_mean_over_all_steps():
    # β2 → 1: v / (1−β2) is the plain sum of the squares so far, and the step size cancels scale.
    seen = stages(gradients((24, 8), 29), betas=(0.9, 1 - 1e-9), eps=1e-15)
    rows = np.zeros(24)
    for step in seen:
        O = step["orthogonalized"]
        rows += np.mean(O * O, axis=1)
        direction = O / np.sqrt(rows)[:, None]
        expected = 0.004 * direction * np.sqrt(direction.size) / np.linalg.norm(direction)
        np.testing.assert_allclose(step["update"], expected, rtol=0, atol=1e-8)


def crowded(shape, seed):
    """Make rows of one size, three quarters of which share a direction, plus noise."""
    generator = torch.manual_seed(seed)
    steady = torch.randn(shape, generator=generator)
    steady[: shape[0] * 3 // 4] = steady[0]
    noise = (torch.randn(shape, generator=generator) for _ in range(STEPS))
    return [(steady + 0.3 * one).double() for one in noise]


def later_spread(grads, **options):
    """Mean spread of the norms of Muon's neurons and of the update's, over later steps."""
    seen = stages(grads, **options)[20:]
    return tuple(
        np.mean([spread(neurons(step[stage])) for step in seen])
        for stage in ("orthogonalized", "update")
    )


def test_after_evens_neurons_and_before_only_those_that_differ_in_size():
    # Tall matrices, where Muon's neurons are uneven: measured 0.6 to 0.8.
    sizes, directions = gradients((48, 12), 30), crowded((48, 12), 30)
    for grads in (sizes, directions):
        muon, after = later_spread(grads)
        assert after < 0.2 < 0.5 < muon
    assert later_spread(sizes, normalize="before")[1] < 0.2
    assert later_spread(directions, normalize="before")[1] > 0.5


def test_before_evens_what_goes_in_and_orthogonalizing_undoes_part_of_it():
    for seen in stages(gradients((48, 12), 31)[5:15], betas=(0.9, 0.0), normalize="before"):
        assert spread(neurons(seen["normalized"])) < 1e-5
        assert spread(neurons(seen["orthogonalized"])) > 0.05
        # What leaves is orthogonal: conditioning is kept, which normalizing after costs.
        assert np.linalg.cond(seen["update"]) < 1.8


def test_by_coordinate_entries_even_out_by_neuron_they_do_not():
    grads = gradients((24, 8), 32)
    entries = {
        granularity: np.mean(
            [spread(np.abs(s["update"])) for s in stages(grads, granularity=granularity)[20:]]
        )
        for granularity in ("neuron", "coordinate")
    }
    assert entries["coordinate"] < entries["neuron"] / 1.5


def test_stages_come_in_the_order_in_which_they_are_made():
    for place, order in (
        ("after", ["momentum", "orthogonalized", "normalized", "update"]),
        ("before", ["momentum", "normalized", "orthogonalized", "update"]),
    ):
        (seen,) = stages(gradients((6, 4), 33)[:1], normalize=place)
        assert list(seen) == order


# -- compiled --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's compiler on itself
@pytest.mark.parametrize(("rule", "ns_dtype"), [(NorMuon, None), (Muon, torch.float32)])
def test_a_compiled_step_is_one_graph_and_the_same_bitwise(monkeypatch, rule, ns_dtype):
    from torch._dynamo.testing import CompileCounter

    monkeypatch.setattr(MODULE, "BLOCK", 4)  # so that small matrices are multiplied in blocks
    torch._dynamo.reset()
    counter = CompileCounter()
    trained = []
    for compiled in (False, True):
        generator = torch.manual_seed(34)
        shapes = [(9, 10), (24, 9)]
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        optimizer = rule(params, 0.02, ns_dtype=ns_dtype, ns_steps=4)
        step = torch.compile(optimizer.step, backend=counter) if compiled else optimizer.step
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            step()
        trained.append(params)
    torch._dynamo.reset()
    assert counter.frame_count == 1
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))
