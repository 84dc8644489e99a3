"""What is saved on some ranks continues on others, bitwise as if nothing had happened.

Of every training there is a twin in this one process that is never interrupted, sharded or saved.
"""

import copy
import inspect

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import on_ranks
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from normuon_lens.errors import LensError
from normuon_lens.optim import Muon, NorMuon

# torch's word on a checkpoint of one process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SAVED, END = 3, 6  # steps

# Settings that checkpoints of the previous release do not name.
NEWER = ("ns_coefficients", "granularity", "normalize", "only", "wire_dtype")

# Rows that 2, 3 and 4 ranks share unevenly, and of which some ranks of 3 or 4 get none.
SHAPES = {"a": (7, 5), "b": (3, 8), "c": (2, 6), "d": (9, 4), "e": (5, 3, 2, 2), "f": (12, 12)}
TRAININGS = {
    "Muon": (Muon, torch.float32, {"nesterov": True, "scale": "preserve_norm"}),
    "NorMuon": (NorMuon, torch.float32, {}),
    "bfloat16": (NorMuon, torch.bfloat16, {"normalize": "before"}),
    "coordinate": (NorMuon, torch.float32, {"granularity": "coordinate", "only": "tall"}),
}

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_RANK_0 = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Weights(torch.nn.Module):
    """Matrices for our optimizers and a vector for AdamW."""

    def __init__(self, dtype, seed):
        super().__init__()
        generator = torch.manual_seed(seed)
        for name, shape in (SHAPES | {"bias": (5,)}).items():
            weight = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, torch.nn.Parameter(weight))


def begin(training, mesh=None, otherwise=False, **settings):
    """Return a model, sharded over a mesh if there is one, and its two optimizers.

    `otherwise`, to be loaded into: of other weights, and settings other than the checkpoint's,
    where it is the checkpoint's that count.
    """
    rule, dtype, own = TRAININGS[training]
    model = Weights(dtype, seed=int(otherwise))
    if mesh is not None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=mesh)
    *named, (_, bias) = model.named_parameters()
    lr = torch.tensor(0.02) if training == "NorMuon" else 0.02
    first, second = {"params": named[:2], "weight_decay": 0.3}, {"params": named[2:], "lr": lr}
    own = {"lr": 0.04} | own
    if otherwise:
        first, second = {"params": named[:2]}, {"params": named[2:], "lr": 0.5 * lr}
        own |= {"lr": 0.5, "weight_decay": 0.7, "nesterov": "nesterov" not in own, "ns_steps": 2}
    adamw = torch.optim.AdamW([bias], lr=0.3 if otherwise else 0.003)
    return model, [rule([first, second], **own | settings), adamw]


def train(model, optimizers, first, last):
    """Take steps on given gradients, under a learning rate that falls."""
    for step in range(first, last):
        generator = torch.manual_seed(100 + step)
        for name, p in model.named_parameters():
            shape = SHAPES.get(name, (5,))
            p.grad = of_this_rank(torch.randn(shape, generator=generator).to(p.dtype), p)
        for optimizer in optimizers:
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * 0.9


def of_this_rank(whole, p):
    if not hasattr(p, "device_mesh"):
        return whole
    from torch.distributed.tensor import DTensor

    parts = whole.chunk(p.device_mesh.size())
    rank = p.device_mesh.get_local_rank()
    part = parts[rank] if rank < len(parts) else whole[:0]
    return DTensor.from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def outcome(model, optimizers):
    """Return what this process holds of weights and state, and the settings of all groups."""
    tensors = {}
    for name, p in model.named_parameters():
        optimizer = optimizers[name == "bias"]
        for key, tensor in {"weight": p, **optimizer.state.get(p, {})}.items():
            part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            tensors[name, key] = part.detach().clone()
    groups = [
        {k: tuple(v) if k == "betas" else v for k, v in group.items() if k != "params"}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    return tensors, groups


def assert_continued(results, training):
    """Check that what all ranks hold together is bitwise what the uninterrupted twin holds."""
    tensors, groups = uninterrupted(training)
    for parts, told in results:
        assert parts.keys() == tensors.keys()
        assert told == groups
    for name, whole in tensors.items():
        parts = [parts[name] for parts, _ in results]
        found = parts[0] if whole.ndim == 0 else torch.cat(parts)
        assert found.dtype == whole.dtype
        assert torch.equal(found, whole), name


def uninterrupted(training):
    model, optimizers = begin(training)
    train(model, optimizers, 0, END)
    return outcome(model, optimizers)


# Ways to save and to load, each from and into a model and its optimizers.


def alone():
    return not torch.distributed.is_initialized()


def save_sharded(folder, model, optimizers, options=None):
    weights, state = get_state_dict(model, optimizers, options=options)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=folder)


def load_sharded(folder, model, optimizers, options=None, planner=None):
    weights, state = get_state_dict(model, optimizers, options=options)
    loaded = {"model": weights, "optim": state}
    dcp.load(loaded, checkpoint_id=folder, planner=planner)
    set_state_dict(
        model,
        optimizers,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optim"],
        options=options,
    )


def save_flat(folder, model, optimizers):
    save_sharded(folder, model, optimizers, FLAT)


def load_flat(folder, model, optimizers):
    load_sharded(folder, model, optimizers, FLAT)


def save_full(path, model, optimizers):
    full = get_state_dict(model, optimizers, options=FULL)
    if torch.distributed.get_rank() == 0:
        torch.save(full, path)
    else:
        assert full == ({}, {})


def load_full(path, model, optimizers):
    options = FULL if alone() else FROM_RANK_0
    weights, state = torch.load(path) if alone() or torch.distributed.get_rank() == 0 else ({}, {})
    set_model_state_dict(model, weights, options=options)
    set_optimizer_state_dict(model, optimizers, state, options=options)


def objects(model, optimizers):
    get_optimizer_state_dict(model, optimizers[1])  # makes the state of AdamW, ours is there
    return {"model": model, "first": optimizers[0], "second": optimizers[1]}


def save_objects(folder, model, optimizers):
    dcp.save(objects(model, optimizers), checkpoint_id=folder)


def load_objects(folder, model, optimizers):
    dcp.load(objects(model, optimizers), checkpoint_id=folder)


def save_parts(folder, model, optimizers):
    state = [model.state_dict(), *(optimizer.state_dict() for optimizer in optimizers)]
    torch.save(state, f"{folder}.{torch.distributed.get_rank()}")


def load_parts(folder, model, optimizers):
    loaded = torch.load(f"{folder}.{torch.distributed.get_rank()}")
    for each, state in zip((model, *optimizers), loaded, strict=True):
        each.load_state_dict(state)


WAYS = {
    "sharded": (save_sharded, load_sharded),
    "flat": (save_flat, load_flat),
    "full": (save_full, load_full),
    "objects": (save_objects, load_objects),
    "parts": (save_parts, load_parts),  # on as many ranks as saved
}
LOADED = [(training, "sharded") for training in TRAININGS]
LOADED += [("NorMuon", "flat"), ("NorMuon", "full"), ("NorMuon", "objects")]
SAVED_ALONE = "NorMuon", "alone"


def continued(folder, mesh, loaded=LOADED):
    """Load every checkpoint in every way, continue, and return what this process then holds."""
    results = {}
    for training, way in loaded:
        model, optimizers = begin(training, mesh, otherwise=True)
        load = WAYS["sharded" if way == "alone" else way][1]
        load(f"{folder}/{training}.{way}", model, optimizers)
        train(model, optimizers, SAVED, END)
        results[training, way] = outcome(model, optimizers)
    return results


def mesh_of_all_ranks():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


def save_and_continue_on_ranks(folder):
    mesh = mesh_of_all_ranks()
    results = {}
    for training in TRAININGS:
        model, optimizers = begin(training, mesh)
        assert_there_at_once(model, optimizers[0])
        train(model, optimizers, 0, SAVED)
        for way in WAYS:
            if training == "NorMuon" or way in ("sharded", "parts"):
                WAYS[way][0](f"{folder}/{training}.{way}", model, optimizers)
        train(model, optimizers, SAVED, END)
        results[training, "never left"] = outcome(model, optimizers)
    loaded = [*LOADED, *((training, "parts") for training in TRAININGS)]
    return results | continued(folder, mesh, loaded)


def assert_there_at_once(model, optimizer):
    before = [p.to_local().clone() for p in model.parameters()]
    get_optimizer_state_dict(model, optimizer)  # would step an optimizer without state
    for p, weight in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.to_local(), weight)
        for state in optimizer.state.get(p, {}).values():
            assert (state.device_mesh, state.placements) == (p.device_mesh, p.placements)
            assert len(state.to_local()) == len(p.to_local())
            assert not state.to_local().any()
    assert len(optimizer.state) == len(SHAPES)


def continue_on_fewer_ranks(folder):
    mesh = mesh_of_all_ranks()
    return continued(folder, mesh, [*LOADED, SAVED_ALONE]), refused_on_ranks(folder, mesh)


def told_on_loading(load, path, model, optimizers):
    """Return what a refused load says, having seen what it left as it was."""
    train(model, optimizers, 0, 1)
    tensors, groups = outcome(model, optimizers)
    with pytest.raises((LensError, CheckpointException)) as error:
        load(path, model, optimizers)
    after, groups_after = outcome(model, optimizers)
    assert groups_after == groups
    if load in (load_on_each, load_whole_tensors):  # the others fill what is there in place
        assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())
    return str(error.value)


def refused_on_ranks(folder, mesh):
    """Load into optimizers that the checkpoint is not for; return what they say, by case."""
    told = {}
    for way in ("sharded", "flat", "full", "objects"):
        other = begin("NorMuon", mesh, scale="preserve_norm")
        told[way] = told_on_loading(WAYS[way][1], f"{folder}/NorMuon.{way}", *other)
    sharded = f"{folder}/NorMuon.sharded"
    for setting, value in (
        ("normalize", "before"),
        ("only", "tall"),
        ("granularity", "coordinate"),
    ):
        other = begin("NorMuon", mesh, **{setting: value})
        told[setting] = told_on_loading(load_sharded, sharded, *other)
    other = begin("NorMuon", mesh, scale="preserve_norm")
    told["each"] = told_on_loading(load_on_each, f"{folder}/NorMuon.full", *other)
    told["whole"] = told_on_loading(load_whole_tensors, folder, *begin("NorMuon", mesh))

    # A checkpoint of an older release, which did not know some of the settings.
    model, optimizers = begin("NorMuon", mesh, otherwise=True)
    load_sharded(sharded, model, optimizers)
    weights, state = get_state_dict(model, optimizers)
    for group in state["param_groups"]:
        for setting in NEWER:
            group.pop(setting, None)
    older = f"{folder}/NorMuon.older{mesh.size()}"
    dcp.save({"model": weights, "optim": state}, checkpoint_id=older)
    model, optimizers = begin("NorMuon", mesh, otherwise=True)
    told["older"] = told_on_loading(load_sharded, older, model, optimizers)
    partly = DefaultLoadPlanner(allow_partial_load=True)
    load_sharded(older, model, optimizers, planner=partly)
    train(model, optimizers, SAVED, END)
    return told, outcome(model, optimizers)


def load_on_each(path, model, optimizers):
    set_optimizer_state_dict(model, optimizers, torch.load(path)[1], options=FULL)


def load_whole_tensors(folder, model, optimizers):
    """Load what one process saved by torch.save, not by DCP."""
    _, alone = begin("NorMuon")
    optimizers[0].load_state_dict(alone[0].state_dict())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return where 4 ranks and one process have saved, and what the 4 ranks have in the end."""
    folder = str(tmp_path_factory.mktemp("saved"))
    model, optimizers = begin("NorMuon")
    train(model, optimizers, 0, SAVED)
    save_sharded(f"{folder}/NorMuon.alone", model, optimizers)
    return folder, on_ranks(4, save_and_continue_on_ranks, folder)


@pytest.fixture(scope="module", params=[3, 2])
def fewer(saved, request):
    return on_ranks(request.param, continue_on_fewer_ranks, saved[0])


FORM = (
    'NorMuon: group 0 was saved with scale="match_rms", but this optimizer runs '
    'scale="preserve_norm", and learning rates of the two do not transfer. '
    'Make it with scale="match_rms".'
)
REFUSED = {
    "sharded": FORM,
    "flat": FORM,
    "objects": FORM,
    "full": FORM,
    "each": FORM,
    "normalize": 'with normalize="after", but this optimizer runs normalize="before", and second m',
    "only": 'saved with only="all", but this optimizer runs only="tall", and the two keep second m',
    "granularity": "second_moment",  # in DCP's words, which looks at shapes first
    "older": "Missing key in checkpoint state_dict: optim.param_groups.",  # in DCP's words too
    "whole": "NorMuon: the saved momentum_buffer of parameter 0 of group 0 (a) is no DTensor, but "
    "that of this optimizer is (Shard(dim=0),) on DeviceMesh",
}


def test_what_an_optimizer_of_other_settings_saved_is_refused_on_every_rank(fewer):
    for _, (told, _) in fewer:
        assert told.keys() == REFUSED.keys()
        for case, text in REFUSED.items():
            assert text in told[case]
            assert told[case] == fewer[0][1][0][case]


def test_what_an_older_release_saved_on_ranks_continues(fewer):
    assert_continued([older for _, (_, older) in fewer], "NorMuon")


def assert_all_continued(results):
    for training, way in results[0]:
        assert_continued([held[training, way] for held in results], training)


def test_what_four_ranks_saved_continues_on_four_ranks(saved):
    _, results = saved
    assert {way for _, way in results[0]} == {"never left", *WAYS}
    assert_all_continued(results)


def test_what_four_ranks_or_one_process_saved_continues_on_fewer_ranks(fewer):
    results = [held for held, _ in fewer]
    assert {way for _, way in results[0]} == {"alone", *WAYS} - {"parts"}
    assert_all_continued(results)


def test_what_four_ranks_saved_continues_in_one_process(saved):
    folder, _ = saved
    assert_all_continued([continued(folder, None, [*LOADED, SAVED_ALONE])])


def taken_up(saved, **settings):
    """Return an optimizer for copies of the weights of another one."""
    groups = [
        {"params": [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]}
        for group in saved.param_groups
    ]
    return type(saved)(groups, **{"lr": 0.5} | settings)


def trained(optimizer, steps=3):
    generator = torch.manual_seed(5)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return optimizer


def assert_same_state(one, other):
    for p, q in zip(one.state, other.state, strict=True):
        assert torch.equal(p, q)
        assert one.state[p].keys() == other.state[q].keys()
        for key, state in one.state[p].items():
            assert torch.equal(state, other.state[q][key])


def new(rule, **settings):
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(6, 4), (4, 6), (5, 5)]]
    return trained(rule([{"params": params[:2]}, {"params": params[2:]}], 0.02, **settings))


@pytest.mark.parametrize(
    ("setting", "one", "other"),
    [
        ("scale", "match_rms", "preserve_norm"),
        ("normalize", "after", "before"),
        ("granularity", "neuron", "coordinate"),
        ("only", "all", "tall"),
        ("only", "tall", "wide"),
    ],
)
def test_a_state_of_another_form_or_ablation_is_refused_and_nothing_changes(setting, one, other):
    for there, here in ((one, other), (other, one)):
        saved, optimizer = new(NorMuon, **{setting: there}), new(NorMuon, **{setting: here})
        twin = new(NorMuon, **{setting: here})
        text = (
            f'^NorMuon: group 0 was saved with {setting}="{there}", but this optimizer runs '
            f'{setting}="{here}", and .*. Make it with {setting}="{there}".$'
        )
        with pytest.raises(LensError, match=text):
            optimizer.load_state_dict(saved.state_dict())
        # Not only in the first group.
        mixed = new(NorMuon, **{setting: here})
        mixed.param_groups[1][setting] = there
        with pytest.raises(
            LensError, match=f'^NorMuon: group 1 was saved with {setting}="{there}"'
        ):
            optimizer.load_state_dict(mixed.state_dict())
        assert_same_state(trained(optimizer), trained(twin))


OLDER = {
    Muon: ("lr", "momentum", "weight_decay", "nesterov", "ns_steps", "scale", "ns_dtype"),
    NorMuon: ("lr", "betas", "eps", "weight_decay", "nesterov", "ns_steps", "scale", "ns_dtype"),
}


def as_of_old(optimizer):
    """Return its state as the previous release would have saved it."""
    state, names = optimizer.state_dict(), ("params", *OLDER[type(optimizer)])
    groups = [{name: group[name] for name in names} for group in state["param_groups"]]
    return state | {"param_groups": groups}


@pytest.mark.parametrize("rule", [Muon, NorMuon])
def test_a_state_of_the_previous_release_continues_under_the_settings_it_does_not_name(rule):
    saved = new(rule, nesterov=True, weight_decay=0.3)
    optimizer, another = taken_up(saved), taken_up(saved, ns_coefficients="polar_express")
    for each in (optimizer, another):
        each.load_state_dict(as_of_old(saved))
    for group in another.param_groups:
        assert (group["lr"], group["weight_decay"], group["nesterov"]) == (0.02, 0.3, True)
        assert group["ns_coefficients"] == "polar_express"
    assert_same_state(trained(optimizer), trained(saved))
    with pytest.raises(AssertionError):
        assert_same_state(trained(another), saved)


@pytest.mark.parametrize(
    ("setting", "value"), [("normalize", "before"), ("granularity", "coordinate"), ("only", "tall")]
)
def test_a_state_of_the_previous_release_is_of_no_ablation(setting, value):
    saved = new(NorMuon)
    with pytest.raises(LensError, match=f'group 0 was saved with {setting}="(after|neuron|all)"'):
        taken_up(saved, **{setting: value}).load_state_dict(as_of_old(saved))


@pytest.mark.parametrize("rule", [Muon, NorMuon])
def test_a_state_can_be_loaded_again_and_again(rule):
    # torch adds to the defaults of an optimizer that has loaded.
    saved = new(rule)
    optimizer = taken_up(saved)
    for _ in range(3):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.load_state_dict(as_of_old(saved))
        optimizer.load_state_dict(saved.state_dict())
    extra = torch.nn.Parameter(torch.ones(3, 3))
    for each in (optimizer, saved):
        each.add_param_group({"params": [torch.nn.Parameter(extra.detach().clone())]})
    optimizer.load_state_dict(saved.state_dict())
    assert_same_state(trained(optimizer), trained(saved))


@pytest.mark.parametrize("name", ["state_dict", "load_state_dict", "add_param_group", "step"])
def test_signatures_are_those_of_torch(name):
    own = inspect.signature(getattr(NorMuon, name)).parameters.values()
    of_torch = inspect.signature(getattr(torch.optim.Optimizer, name)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in own] == [
        (p.name, p.kind, p.default) for p in of_torch
    ]
