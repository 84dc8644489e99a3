"""What Muon and NorMuon share: parameters, state, checkpoints, refusals, observation."""

import copy
import io
import pickle

import pytest
import torch

import normuon_lens.optim
from normuon_lens.errors import LensError
from normuon_lens.optim import Muon, NorMuon, _shell
from normuon_lens.optim._shell import MatrixOptimizer

RULES = [Muon, NorMuon]
both = pytest.mark.parametrize("rule", RULES)


def parameters(dtype=torch.float32):
    generator = torch.manual_seed(1)
    shapes = [(12, 6), (6, 12), (4, 3, 2, 2)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def run(optimizer, steps, seed=2):
    """Take steps on random gradients and return the weights."""
    generator = torch.manual_seed(seed)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in params]


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_the_face():
    assert normuon_lens.optim.__all__ == ["Muon", "NorMuon", "orthogonalize", "split_parameters"]


@both
def test_state_is_there_at_once_and_as_small_as_promised(rule):
    optimizer = rule(parameters(), 0.01)
    extra = torch.nn.Parameter(torch.ones(5, 7))
    optimizer.add_param_group({"params": [extra]})
    for p, state in optimizer.state.items():
        m, n = p.flatten(1).shape
        assert sum(s.numel() for s in state.values()) == (m * n if rule is Muon else m * (n + 1))
        assert state["momentum_buffer"].shape == p.shape
        assert not any(s.any() for s in state.values())
    assert len(optimizer.state) == 4


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_state_is_never_narrower_than_float32(dtype, expected):
    optimizer = NorMuon(parameters(dtype), 0.01)
    run(optimizer, 2)
    assert {s.dtype for state in optimizer.state.values() for s in state.values()} == {expected}


@both
def test_bfloat16_weights_are_rounded_once(rule):
    # One step in float32 from the same numbers, rounded, is the same bitwise.
    wide, narrow = parameters(), parameters(torch.bfloat16)
    for one, other in zip(wide, narrow, strict=True):
        one.data.copy_(other)
        other.grad = torch.randn(one.shape, generator=torch.manual_seed(3)).bfloat16()
        one.grad = other.grad.float()
    for params in (wide, narrow):
        rule(params, 0.02, ns_dtype=torch.float32).step()
    assert_equal(narrow, [p.bfloat16() for p in wide])


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_saved_training_continues_bitwise(rule, dtype):
    uninterrupted = rule(parameters(dtype), 0.02)
    run(uninterrupted, 5, seed=4)
    expected = run(uninterrupted, 5, seed=5)

    first = rule(parameters(dtype), 0.02)
    weights = run(first, 5, seed=4)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = rule([torch.nn.Parameter(w) for w in weights], 0.5, weight_decay=0.7)
    second.load_state_dict(torch.load(file, weights_only=True))
    for mine, other in zip(second.state.values(), first.state.values(), strict=True):
        assert_equal(mine.values(), other.values())
    assert_equal(run(second, 5, seed=5), expected)


@both
def test_loaded_state_is_a_copy(rule):
    first, second = rule(parameters(), 0.02), rule(parameters(), 0.02)
    run(first, 3)
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(first.state_dict())
    run(second, 3)
    for i, state in first.state_dict()["state"].items():
        assert_equal(state.values(), before["state"][i].values())


def test_a_users_load_hooks_are_heard():
    first, second = NorMuon(parameters(), 0.02), NorMuon(parameters(torch.bfloat16), 0.02)
    run(first, 3)

    def forget(_, state_dict):
        state = {i: {k: s * 0 for k, s in one.items()} for i, one in state_dict["state"].items()}
        return state_dict | {"state": state}

    def mark(optimizer):
        for state in optimizer.state.values():
            state["second_moment"].fill_(7)

    second.register_load_state_dict_pre_hook(forget)
    second.register_load_state_dict_post_hook(mark)
    second.load_state_dict(first.state_dict())
    for state in second.state.values():
        assert not state["momentum_buffer"].any()
        assert (state["second_moment"] == 7).all()


@both
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_continue_bitwise_and_unobserved(rule, copier):
    optimizer = rule(parameters(), 0.02)
    run(optimizer, 3)
    optimizer.stage_observer = lambda *_: None  # a lambda cannot be pickled: it must not be tried
    twin = copier(optimizer)
    assert twin.stage_observer is None
    assert "stage_observer" not in str(optimizer.state_dict())
    assert_equal(run(twin, 3, seed=6), run(optimizer, 3, seed=6))


def test_a_state_of_the_other_scale_form_is_refused():
    saved = NorMuon(parameters(), 0.02, scale="preserve_norm")
    run(saved, 2)
    optimizer = NorMuon(parameters(), 0.02)
    with pytest.raises(
        LensError, match=r'saved with scale="preserve_norm".*runs scale="match_rms"'
    ):
        optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["scale"] == "match_rms"
    assert not any(s.any() for state in optimizer.state.values() for s in state.values())


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.Muon(params[:2], 0.02),
        lambda params: Muon(params, 0.02),
        lambda params: torch.optim.AdamW(params),
    ],
)
def test_a_state_of_another_optimizer_is_refused(make):
    with pytest.raises(LensError, match="NorMuon: this state was saved by another optimizer"):
        NorMuon(parameters(), 0.02).load_state_dict(make(parameters()).state_dict())


def test_a_state_of_another_model_is_refused():
    others = [torch.nn.Parameter(p.detach().mT.clone()) for p in parameters()]
    with pytest.raises(LensError, match=r"parameter of shape \(12, 6\) needs"):
        NorMuon(parameters(), 0.02).load_state_dict(NorMuon(others, 0.02).state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        NorMuon(parameters(), 0.02).load_state_dict(NorMuon(parameters()[:2], 0.02).state_dict())


def test_checkpoint_helpers_of_torch_move_nothing():
    # They run a fake step with zero gradients on an optimizer whose state is not there yet.
    from torch.distributed.checkpoint import state_dict as dcp

    model = torch.nn.Linear(6, 12, bias=False)
    optimizer = NorMuon(model.parameters(), 0.02)
    before = model.weight.detach().clone()
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
    assert torch.equal(model.weight, before)
    run(optimizer, 2)
    dcp.set_optimizer_state_dict(model, optimizer, saved)
    assert not optimizer.state[model.weight]["momentum_buffer"].any()


@both
def test_a_zero_gradient_moves_nothing_but_decay(rule):
    for scale in ("match_rms", "preserve_norm"):
        for decay in (0.0, 0.5):
            params = parameters()
            before = [p.detach().clone() for p in params]
            optimizer = rule(params, 0.02, weight_decay=decay, scale=scale)
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            torch.testing.assert_close(params, [b * (1 - 0.02 * decay) for b in before])
            if decay == 0:
                assert_equal(params, before)


@both
def test_no_gradient_means_untouched(rule):
    params = parameters()
    before = [p.detach().clone() for p in params]
    params[0].grad = torch.ones_like(params[0])
    optimizer = rule(params, 0.02)
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert_equal(params[1:], before[1:])
    assert not optimizer.state[params[1]]["momentum_buffer"].any()


@both
@pytest.mark.parametrize("nesterov", [False, True])
def test_gradients_are_left_as_they_are(rule, nesterov):
    params = parameters()
    optimizer = rule(params, 0.02, nesterov=nesterov)
    run(optimizer, 2)
    before = [p.grad.clone() for p in params]
    optimizer.step()
    assert_equal([p.grad for p in params], before)


@both
def test_memory_layout_does_not_matter(rule):
    plain = [torch.nn.Parameter(torch.randn(4, 3, 2, 2, generator=torch.manual_seed(7)))]
    last = [torch.nn.Parameter(plain[0].detach().to(memory_format=torch.channels_last))]
    for params in (plain, last):
        params[0].grad = torch.randn(4, 3, 2, 2, generator=torch.manual_seed(8))
    last[0].grad = last[0].grad.to(memory_format=torch.channels_last)
    for params in (plain, last):
        optimizer = rule(params, 0.02)
        for _ in range(3):
            optimizer.step()
    assert_equal(last, plain)


@both
def test_closures_schedulers_and_groups(rule):
    layer = torch.nn.Linear(6, 12, bias=False)
    optimizer = rule([{"params": layer.parameters(), "lr": 0.04, "weight_decay": 0.0}], 0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.arange(18.0).view(3, 6)).square().mean()
        loss.backward()
        return loss

    for lr in (0.04, 0.02, 0.01):
        before = layer.weight.detach().clone()
        expected = layer(torch.arange(18.0).view(3, 6)).square().mean().item()
        with torch.no_grad():  # the closure gets its gradients all the same
            assert optimizer.step(closure).item() == expected
        rms = (layer.weight - before).square().mean().sqrt().item()
        assert rms == pytest.approx(0.2 * lr, rel=1e-4)  # float32 weights around 0.3
        scheduler.step()


@both
def test_step_hooks_fire_once_a_step(rule):
    optimizer, calls = rule(parameters(), 0.02), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    run(optimizer, 2)
    assert calls == ["before", "after"] * 2


@both
def test_which_scale_form_runs_is_shown(rule):
    assert "scale: match_rms" in repr(rule(parameters(), 0.02))
    assert "scale: preserve_norm" in repr(rule(parameters(), 0.02, scale="preserve_norm"))


@both
@pytest.mark.parametrize("nesterov", [False, True])
def test_an_observer_sees_the_stages_and_changes_nothing(rule, nesterov):
    plain = run(rule(parameters(), 0.02, nesterov=nesterov), 4)
    optimizer = rule(parameters(), 0.02, nesterov=nesterov)
    seen = []
    optimizer.stage_observer = lambda p, stage, matrix: seen.append((p, stage, matrix.clone()))
    assert_equal(run(optimizer, 4), plain)

    stages = ["momentum", "orthogonalized", *["normalized"][rule is Muon :], "update"]
    params = optimizer.param_groups[0]["params"]
    assert [(id(p), stage) for p, stage, _ in seen] == [
        (id(p), stage) for _ in range(4) for p in params for stage in stages
    ]
    assert all(matrix.shape == p.flatten(1).shape for p, _, matrix in seen)
    last = {stage: matrix for _, stage, matrix in seen[-len(stages) :]}
    M, G = optimizer.state[params[-1]]["momentum_buffer"].flatten(1), params[-1].grad.flatten(1)
    expected = 0.95 * M + 0.05 * G if nesterov else M
    torch.testing.assert_close(last["momentum"], expected)
    orthogonalized = normuon_lens.optim.orthogonalize(last["momentum"])
    assert torch.equal(last["orthogonalized"], orthogonalized)
    if rule is NorMuon:
        v = optimizer.state[params[-1]]["second_moment"]
        torch.testing.assert_close(last["normalized"], orthogonalized / v.sqrt())
    direction = last[stages[-2]]
    scaled = 0.2 * 0.02 * direction / direction.square().mean().sqrt()
    torch.testing.assert_close(last["update"], scaled)


REFUSED = [
    (torch.ones(8), r"shape \(8,\) is not a matrix"),
    (torch.ones(()), r"shape \(\) is not a matrix"),
    (torch.ones(1, 8), r"shape \(1, 8\) is not a matrix"),
    (torch.ones(8, 1), r"shape \(8, 1\) is not a matrix"),
    (torch.ones(8, 1, 1, 1), "is not a matrix"),
    (torch.ones(0, 8), "is not a matrix"),
    (torch.ones(8, 8, dtype=torch.complex64), "is torch.complex64"),
    (torch.ones(8, 8).to_sparse(), "is sparse"),
]


@both
@pytest.mark.parametrize(("tensor", "text"), REFUSED)
def test_what_is_not_a_matrix_is_refused_with_its_place(rule, tensor, text):
    bad = torch.nn.Parameter(tensor)
    with pytest.raises(LensError, match=f"{rule.__name__}: parameter 3 of group 0 .*{text}") as e:
        rule([*parameters(), bad], 0.02)
    assert "Give it to AdamW" in str(e.value)
    assert "split_parameters" in str(e.value)
    named = [("up.weight", parameters()[0]), ("up.bias", bad)]
    with pytest.raises(LensError, match=r"parameter 1 of group 0 \(up.bias\)"):
        rule(named, 0.02)


@both
def test_a_refused_group_leaves_no_trace(rule):
    optimizer = rule(parameters(), 0.02)
    good, bad = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))
    with pytest.raises(LensError, match="parameter 1 of group 1"):
        optimizer.add_param_group({"params": [good, bad]})
    with pytest.raises(LensError, match="lr must be"):
        optimizer.add_param_group({"params": [good], "lr": -1.0})
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.state) == 3
    optimizer.add_param_group({"params": [good]})
    assert len(optimizer.state) == 4


@both
def test_a_sparse_gradient_is_refused_before_anything_moves(rule):
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = rule(params, 0.02)
    params[0].grad = torch.ones_like(params[0])
    params[1].grad = torch.ones_like(params[1]).to_sparse()
    with pytest.raises(LensError, match="parameter 1 of group 0 has a sparse gradient"):
        optimizer.step()
    assert_equal(params, before)


COMMON = [
    ("lr", -0.1),
    ("lr", float("nan")),
    ("lr", float("inf")),
    ("weight_decay", -1.0),
    ("weight_decay", float("nan")),
    ("ns_steps", 0),
    ("ns_steps", 2.5),
    ("scale", "moonshot"),
    ("ns_dtype", torch.float16),
]


@pytest.mark.parametrize(
    ("rule", "name", "value"),
    [
        *[(rule, name, value) for rule in RULES for name, value in COMMON],
        (Muon, "momentum", 1.0),
        (Muon, "momentum", -0.1),
        (NorMuon, "betas", (0.9, 1.0)),
        (NorMuon, "betas", (-0.1, 0.9)),
        (NorMuon, "betas", (0.9,)),
        (NorMuon, "eps", 0.0),
        (NorMuon, "eps", float("nan")),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(rule, name, value):
    with pytest.raises(LensError, match=f"^{name} must be .*, got "):
        rule(parameters(), **({"lr": 0.02} | {name: value}))


# -- matrices of one shape, stacked as on a GPU ---------------------------------------------------

STACKED = [
    (Muon, {}),
    (Muon, {"nesterov": True, "scale": "preserve_norm"}),
    (NorMuon, {}),
    (NorMuon, {"nesterov": True, "scale": "preserve_norm"}),
    (NorMuon, {"granularity": "coordinate"}),
    (NorMuon, {"normalize": "before"}),
    (NorMuon, {"granularity": "coordinate", "normalize": "before", "nesterov": True}),
    (NorMuon, {"only": "tall"}),
    (NorMuon, {"only": "wide", "ns_coefficients": "polar_express"}),
    (NorMuon, {"ns_steps": "exact"}),
]


def stack_equal_shapes(parameters):
    """Group as `_batches` does on a GPU, two at most."""
    alike = {}
    for p in parameters:
        alike.setdefault(p.flatten(1).shape, []).append(p)
    for batch in alike.values():
        for start in range(0, len(batch), 2):
            yield batch[start : start + 2]


def observed_training(rule, options, dtype):
    """Weights, state and what the observer saw of each parameter, in its order."""
    generator = torch.manual_seed(21)
    shapes = [(12, 6), (6, 12), (12, 6), (4, 3, 2, 2), (8, 8), (12, 6), (4, 12), (8, 8)]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    optimizer = rule(params, 0.02, **options)
    seen = {id(p): [] for p in params}
    optimizer.stage_observer = lambda p, stage, X: seen[id(p)].append((stage, X.clone()))
    for number in range(4):
        for i, p in enumerate(params):
            G = 10.0 ** -(3 * i) * torch.randn(p.shape, generator=generator)
            # One that joins later, one without a gradient now and then, one of zero.
            p.grad = None if (i == 2 and number < 2) or (i == 7 and number == 3) else G.to(dtype)
        params[4].grad.zero_()
        optimizer.step()
    return params, [optimizer.state[p] for p in params], list(seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rule", "options"), STACKED)
def test_stacked_matrices_are_updated_as_one_by_one(monkeypatch, rule, options, dtype):
    weights, states, seen = observed_training(rule, options, dtype)
    stacks = []

    def recording(self, batch, group, step_batch=MatrixOptimizer._step_batch):
        stacks.append(len(batch))
        step_batch(self, batch, group)

    monkeypatch.setattr(_shell, "_batches", stack_equal_shapes)
    monkeypatch.setattr(MatrixOptimizer, "_step_batch", recording)
    stacked_weights, stacked_states, stacked_seen = observed_training(rule, options, dtype)
    assert sum(stacks) == 8 * 4 - 3
    assert stacks.count(2) == 3 + 3 + 3 + 2
    # Bitwise, but for a decomposition, whose last digits depend on where in memory a matrix lies.
    near = {"rtol": 0, "atol": 1e-6 if "ns_steps" in options else 0}
    torch.testing.assert_close(stacked_weights, weights, **near)
    for found, expected in zip(stacked_states, states, strict=True):
        assert found.keys() == expected.keys()
        for name in expected:
            assert expected[name].shape == found[name].shape
            torch.testing.assert_close(found[name], expected[name], **near)
    for found, expected in zip(stacked_seen, seen, strict=True):
        assert [stage for stage, _ in found] == [stage for stage, _ in expected]
        torch.testing.assert_close([X for _, X in found], [X for _, X in expected], **near)


def test_a_cpu_takes_one_matrix_at_a_time():
    params = parameters() + parameters()
    assert [[id(p) for p in batch] for batch in _shell._batches(params)] == [
        [id(p)] for p in params
    ]


class OnGpu:
    """Stands in for a parameter on a GPU, of which only shape, dtype and device are asked."""

    def __init__(self, *shape, dtype=torch.float32, index=0):
        self.shape, self.dtype = torch.Size(shape), dtype
        self.device = torch.device("cuda", index)

    def numel(self):
        return self.shape.numel()


def test_a_gpu_takes_matrices_of_one_shape_dtype_and_device_together(monkeypatch):
    a, b, c = OnGpu(8, 6), OnGpu(6, 8), OnGpu(8, 3, 2)
    d, e = OnGpu(8, 6, dtype=torch.bfloat16), OnGpu(8, 6, index=1)
    f, g = OnGpu(8, 6), OnGpu(6, 8)
    assert list(_shell._batches([a, b, c, d, e, f, g])) == [[a, c, f], [b, g], [d], [e]]
    # As many as fit, never none.
    monkeypatch.setattr(_shell, "BATCH_ELEMENTS", 2 * 48 + 1)
    assert list(_shell._batches([a, b, c, d, e, f, g])) == [[a, c], [f], [b, g], [d], [e]]
    monkeypatch.setattr(_shell, "BATCH_ELEMENTS", 1)
    assert list(_shell._batches([a, c])) == [[a], [c]]
    assert list(_shell._batches([])) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("rule", "options"), STACKED)
def test_a_gpu_goes_where_a_cpu_goes(rule, options):
    def trained(device):
        params = [torch.nn.Parameter(p.detach().to(device)) for p in parameters() + parameters()]
        optimizer = rule(params, 0.02, ns_dtype=torch.float32, **options)
        generator = torch.manual_seed(22)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(device)
            optimizer.step()
        return [p.detach().cpu() for p in params]

    torch.testing.assert_close(trained("cuda"), trained("cpu"), rtol=0, atol=1e-4)
