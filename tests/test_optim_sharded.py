"""Muon and NorMuon on real gloo ranks, against a single process, arithmetic by hand, closed forms.

A launch of ranks costs seconds, so many checks share one: what the ranks do is in the functions
above the tests, and tests look at what came back.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import pickle
import time

import pytest
import torch
from ranks import on_ranks
from torch import nn

from normuon_lens.optim import Muon, NorMuon, split_parameters
from normuon_lens.optim import normuon as normuon_module
from normuon_lens.optim.cost import wire_bytes
from normuon_lens.optim.muon import muon_update
from normuon_lens.optim.normuon import normuon_update
from normuon_lens.optim.orthogonalize import COEFFICIENTS

RULES = {"Muon": Muon, "NorMuon": NorMuon}
LR, DECAY, BETA = 0.02, 0.1, 0.95
STEPS = 20


# --- matrices, gradients, places -----------------------------------------------------------------


def seeded(*seed):
    return torch.Generator().manual_seed(hash(seed) % 2**32)


class Places:
    """The meshes of four ranks and their groups, made once by all of them together."""

    def __init__(self):
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        self.rank = dist.get_rank()
        names = ("replica", "shard")
        line = init_device_mesh("cpu", (4,), mesh_dim_names=("shard",))
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        column = init_device_mesh("cpu", (4, 1), mesh_dim_names=names)
        self.halves = square["replica"]  # ranks 0 and 2, 1 and 3: not numbered as in the world
        self.meshes = {
            "fsdp on 4": line,
            "fsdp on 2": self.halves,
            "fsdp on 1": column["shard"],
            "hsdp on 2x2": square,
            "hsdp on 4x1": column,
            "replicated on 4": line,
        }
        self.groups = {
            "ddp on 4": dist.group.WORLD,
            "ddp on 2": self.halves.get_group(),
            "ddp on 1": column.get_group("shard"),
            "ddp, all work everywhere": None,
            "alone": None,
        }

    def sign(self, way):
        """Return which way this rank's gradients are off, so that the mean of all is not."""
        if way == "alone":
            return 0
        return (-1) ** (self.halves.get_local_rank() if way.endswith("on 2") else self.rank)

    def spread_model(self, model, parts, way):
        """Return the model as one trains it, and arguments for the optimizer."""
        from torch.distributed._composable.replicate_with_fsdp import replicate
        from torch.distributed.fsdp import fully_shard
        from torch.nn.parallel import DistributedDataParallel

        if way in self.meshes:
            spread = replicate if way.startswith("replicated") else fully_shard
            for module in (*parts, model):
                spread(module, mesh=self.meshes[way])  # as users do: the parts, then what is left
            return model, {}
        group = self.groups[way]
        if way.startswith("ddp"):
            model = DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
        return model, {"process_group": group}

    def spread(self, tensor, way):
        """Return a tensor of which every rank has all as the ranks should hold it."""
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        if way not in self.meshes:
            return tensor.clone()
        last = Replicate() if way.startswith("replicated") else Shard(0)
        mesh = self.meshes[way]
        placements = [Replicate()] * (mesh.ndim - 1) + [last]
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

    def optimizer(self, way, rule, tensors, **settings):
        """Return an optimizer over equal tensors, spread in one way, and its parameters."""
        matrices = [nn.Parameter(self.spread(tensor, way)) for tensor in tensors]
        if way not in self.meshes:
            settings |= {"process_group": self.groups[way]}
        return RULES[rule](matrices, LR, **settings), matrices

    def step(self, optimizer, matrices, way, gradients):
        for matrix, gradient in zip(matrices, gradients, strict=True):
            matrix.grad = self.spread(gradient.to(matrix.dtype), way)
        optimizer.step()


def whole(tensor):
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def everything(optimizer, matrices):
    """Weight and state of every matrix, whole, by name."""
    return [
        {"weight": whole(p)} | {name: whole(s) for name, s in optimizer.state[p].items()}
        for p in matrices
    ]


def assert_same(found, expected, what):
    """Bitwise: weights, momentum and second moments of all matrices."""
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            off = (one[name] - other[name]).abs().max()
            assert torch.equal(one[name], other[name]), f"{name} of matrix {i}, {what}: {off}"


# --- twenty steps of a model ---------------------------------------------------------------------

# Options of a group, dtype of its weights, their shapes. On four ranks two or three rows leave a
# rank without any, an odd number is split unevenly.
SHARED = [
    ({}, "float32", [(64, 16), (16, 64), (33, 33), (5, 7), (2, 8)]),
    ({"nesterov": True, "scale": "preserve_norm"}, "float32", [(3, 20), (48, 12), (12, 24)]),
    ({"ns_coefficients": "polar_express", "ns_steps": 7}, "float32", [(9, 9)]),
    ({"ns_dtype": torch.bfloat16, "weight_decay": 0.0}, "float32", [(7, 21)]),
    ({"ns_steps": "exact", "lr": 0.01}, "float32", [(10, 6)]),
    ({}, "float32", [(6, 3, 2, 2), (3, 2, 3, 3)]),
    ({"nesterov": True}, "bfloat16", [(17, 9), (3, 8)]),
    ({"scale": "preserve_norm"}, "float64", [(11, 5)]),
]
OF_NORMUON = [
    ({"only": "tall"}, "float32", [(24, 8), (8, 24)]),
    ({"only": "wide", "scale": "preserve_norm"}, "float32", [(8, 24), (9, 9)]),
    ({"granularity": "coordinate"}, "float32", [(10, 6)]),
    ({"granularity": "coordinate", "normalize": "before"}, "bfloat16", [(3, 15)]),
    ({"normalize": "before"}, "float64", [(6, 12)]),
    ({"normalize": "before", "nesterov": True}, "float32", [(12, 20), (3, 4)]),
]
GROUPS = {"Muon": SHARED, "NorMuon": SHARED + OF_NORMUON}
LATE, GAPS, NEVER = 1, 4, 7  # matrices with zero gradients at first, with none at times, and always

WAYS = {
    "Muon": [
        ("fsdp on 4", "snake"),
        ("hsdp on 2x2", "round_robin"),
        ("ddp on 2", "round_robin"),
    ],
    "NorMuon": [
        ("fsdp on 4", "round_robin"),
        ("fsdp on 2", "snake"),
        ("hsdp on 2x2", "snake"),
        ("replicated on 4", "round_robin"),
        ("ddp on 4", "round_robin"),
        ("ddp, all work everywhere", "round_robin"),
    ],
}


@functools.cache
def gradient_of(step, i, shape):
    """Return what all ranks together should make of a step, and how far each of them is off.

    Small whole numbers over eight: however ranks are summed, even in bfloat16, nothing is rounded.
    """
    if i == NEVER or (i == GAPS and 5 <= step < 8):
        return None
    if i == LATE and step < 3:
        return torch.zeros(shape), torch.zeros(shape)
    common = torch.randint(-24, 25, shape, generator=seeded(step, i)) / 8
    off = torch.randint(-7, 8, shape, generator=seeded(step, i, 1)) / 8
    return common, off


class Weights(nn.Module):
    """Matrices of one dtype; the backward pass gives them the gradients that are put in."""

    def __init__(self, matrices):
        super().__init__()
        for i, (shape, dtype) in matrices.items():
            weight = torch.randn(shape, generator=seeded(i)).to(dtype)
            self.register_parameter(f"w{i}", nn.Parameter(weight))

    def forward(self, gradients):
        loss = torch.zeros((), dtype=torch.float64)
        for name, weight in self.named_parameters():
            if name in gradients:
                loss = loss + (weight.double() * gradients[name].double()).sum()
        return loss


class Model(nn.Module):
    """One part a dtype, for FSDP2 shards only equal dtypes together."""

    def __init__(self, groups):
        super().__init__()
        shapes = [(shape, dtype) for _, dtype, shapes in groups for shape in shapes]
        self.parts = nn.ModuleList(
            Weights({i: (s, getattr(torch, d)) for i, (s, d) in enumerate(shapes) if d == dtype})
            for dtype in ("float32", "bfloat16", "float64")
        )

    def forward(self, gradients):
        return sum(part(gradients) for part in self.parts)

    def matrices(self):
        """Return the parameters by what `Weights` calls them, in the order of the groups."""
        by_name = {name.split(".")[-1]: p for name, p in self.named_parameters()}
        return {f"w{i}": by_name[f"w{i}"] for i in range(len(by_name))}


def train(places, way, rule, owners="round_robin"):
    """Train a model in one way; everything at the end and, alone, two matrices on the way."""
    model = Model(GROUPS[rule])
    trained, arguments = places.spread_model(model, model.parts, way)
    matrices = model.matrices()
    named = iter(matrices.items())
    groups = [
        {"params": list(itertools.islice(named, len(shapes)))} | options
        for options, _, shapes in GROUPS[rule]
    ]
    late = groups.pop()  # comes when the others have taken steps
    optimizer = RULES[rule](groups, LR, owners=owners, **arguments)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    watched = []
    for step in range(STEPS):
        if step == 3:
            optimizer.add_param_group(late)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        drawn = {w: gradient_of(step, i, p.shape) for i, (w, p) in enumerate(matrices.items())}
        mine = {w: g[0] + places.sign(way) * g[1] for w, g in drawn.items() if g is not None}
        optimizer.zero_grad()
        trained(mine).backward()
        optimizer.step()
        scheduler.step()
        if way == "alone":
            watched.append([whole(matrices[f"w{i}"]) for i in (LATE, GAPS)])
    return everything(optimizer, matrices.values()), watched


def train_in_many_ways():
    places = Places()
    trained = {}
    for rule, ways in WAYS.items():
        for way, owners in ways:
            trained[rule, way, owners] = train(places, way, rule, owners)[0]
    if places.rank == 0:
        trained |= {rule: train(places, "alone", rule) for rule in RULES}
    return trained


def test_twenty_steps_are_bitwise_those_of_a_single_process_however_spread():
    by_rank = on_ranks(4, train_in_many_ways)
    for rule, ways in WAYS.items():
        alone, watched = by_rank[0].pop(rule)
        for (way, owners), (rank, trained) in itertools.product(ways, enumerate(by_rank)):
            assert_same(trained[rule, way, owners], alone, f"{rule}, {way}, {owners}, rank {rank}")

        # And a single process did what it should where nothing but the gradient tells.
        model = Model(GROUPS[rule]).matrices()
        assert torch.equal(alone[NEVER]["weight"], model[f"w{NEVER}"])
        assert not alone[NEVER]["momentum_buffer"].any()
        late, gaps = ([seen[i] for seen in watched] for i in range(2))
        shrunk = math.prod(1 - LR / (1 + step) * DECAY for step in range(3))
        torch.testing.assert_close(late[2], model[f"w{LATE}"] * shrunk, rtol=1e-6, atol=0)
        assert torch.equal(gaps[4], gaps[7])
        assert not torch.equal(gaps[7], gaps[8])
        for i, matrix in enumerate(alone):
            assert i == NEVER or not torch.equal(matrix["weight"], model[f"w{i}"])


# --- single steps: the wire, copies, stages ------------------------------------------------------

# Largest first, with uneven shards and, on four ranks, empty ones.
UNEVEN = [(64, 16), (33, 31), (10, 100), (3, 200), (2, 150), (50, 4), (7, 7)]
DEALT = {"round_robin": [0, 1, 2, 3, 0, 1, 2], "snake": [0, 1, 2, 3, 3, 2, 1]}
EVEN = [(128, 64)] * 8
COUNTED = [
    *itertools.product(["fsdp on 4"], RULES, [None, torch.bfloat16], DEALT),
    ("fsdp on 2", "NorMuon", None, "round_robin"),
    ("hsdp on 2x2", "NorMuon", None, "snake"),
    ("hsdp on 2x2", "Muon", torch.bfloat16, "round_robin"),
    ("ddp on 4", "NorMuon", torch.bfloat16, "snake"),
    ("ddp on 4", "Muon", None, "round_robin"),
    ("replicated on 4", "Muon", None, "round_robin"),
    ("ddp, all work everywhere", "NorMuon", None, "round_robin"),
]

NARROW = [((64, 16), "float32"), ((16, 64), "float32"), ((33, 33), "float32"), ((3, 20), "float32")]
NARROW += [((6, 3, 2, 2), "float32"), ((17, 9), "bfloat16"), ((11, 5), "float64")]
NARROW_WAYS = {
    "Muon": ["fsdp on 4", "ddp on 1"],
    "NorMuon": [
        *("fsdp on 4", "fsdp on 2", "fsdp on 1", "hsdp on 2x2", "hsdp on 4x1"),
        *("replicated on 4", "ddp on 4", "ddp on 2", "ddp on 1"),
    ],
}

WORK = [(256, 256)] * 4
WORKED = ["fsdp on 4", "ddp on 4", "ddp, all work everywhere"]

ERROR_SHAPES = [(64, 16), (16, 64), (96, 24), (33, 33)]

WATCHED = [(17, 6), (6, 17), (9, 9), (2, 5), (4, 2, 2, 2)]
WATCHED_WAYS = {"alone": None, "fsdp on 4": None, "hsdp on 2x2": None, "hsdp on 4x1": None}
WATCHED_WAYS |= {"ddp on 4": None, "ddp on 2": torch.bfloat16}


def normal(shapes, *seed):
    return [torch.randn(shape, generator=seeded(i, *seed)) for i, shape in enumerate(shapes)]


@contextlib.contextmanager
def exchanges_counted():
    """Count the bytes this rank sends to others and receives from others, as they are sent."""
    import torch.distributed as dist

    real = dist.all_to_all_single
    counted = {"sent": 0, "received": 0}

    def counting(output, message, output_sizes, input_sizes, group, async_op):
        for tensor, sizes, name in (
            (output, output_sizes, "received"),
            (message, input_sizes, "sent"),
        ):
            assert sum(sizes) == len(tensor)
            others = sum(sizes) - sizes[group.rank()]
            counted[name] += others * tensor.element_size()
        return real(output, message, output_sizes, input_sizes, group=group, async_op=async_op)

    dist.all_to_all_single = counting
    try:
        yield counted
    finally:
        dist.all_to_all_single = real


def count_bytes(places, way, rule, wire_dtype, owners, shapes):
    from torch.distributed.tensor.debug import CommDebugMode

    optimizer, matrices = places.optimizer(
        way, rule, normal(shapes), wire_dtype=wire_dtype, owners=owners
    )
    with exchanges_counted() as counted, CommDebugMode() as calls:
        places.step(optimizer, matrices, way, normal(shapes, 1))
    collectives = {str(name).split(".")[-1]: n for name, n in calls.get_comm_counts().items()}
    return counted | {"calls": collectives}


def train_narrow(places, way, rule):
    """Twenty steps with bfloat16 on the wire."""
    shapes = [shape for shape, _ in NARROW]
    weights = [w.to(getattr(torch, d)) for w, (_, d) in zip(normal(shapes), NARROW, strict=True)]
    optimizer, matrices = places.optimizer(way, rule, weights, wire_dtype=torch.bfloat16)
    for step in range(STEPS):
        places.step(optimizer, matrices, way, normal(shapes, step))
    return everything(optimizer, matrices)


def train_narrow_by_hand(rule):
    """Do the same in a single process: momentum and update are rounded, nothing else is."""
    shapes = [shape for shape, _ in NARROW]
    trained = []
    for i, (weight, (_, dtype)) in enumerate(zip(normal(shapes), NARROW, strict=True)):
        weight = weight.to(getattr(torch, dtype))
        wide = torch.promote_types(weight.dtype, torch.float32)
        momentum = torch.zeros_like(weight.flatten(1), dtype=wide)
        v = torch.zeros(len(weight), 1, dtype=wide)
        for step in range(STEPS):
            gradient = normal(shapes, step)[i].to(weight.dtype).to(wide).flatten(1)
            momentum = torch.lerp(momentum, gradient, 1 - BETA)
            mean = momentum.bfloat16().to(wide)
            settings = {"lr": LR, "scale": "match_rms", "ns_steps": 5, "ns_dtype": None}
            settings |= {"ns_coefficients": "quintic"}
            if rule == "Muon":
                update = muon_update(mean, **settings).update
            else:
                settings |= {"beta2": 0.95, "eps": 1e-8, "normalize": "after"}
                update = normuon_update(mean, v, **settings).update
            update = update.bfloat16().to(wide).view(weight.shape)
            moved = weight.to(wide) - torch.add(update, weight.to(wide), alpha=LR * DECAY)
            weight = moved.to(weight.dtype)
        state = {"weight": weight, "momentum_buffer": momentum.view(weight.shape)}
        trained.append(state | ({"second_moment": v} if rule == "NorMuon" else {}))
    return trained


def first_update(places, rule, wire_dtype):
    """Return what the first step subtracts from zero weights."""
    optimizer, matrices = places.optimizer(
        "fsdp on 4",
        rule,
        [torch.zeros(shape) for shape in ERROR_SHAPES],
        scale="preserve_norm" if rule == "Muon" else "match_rms",
        ns_dtype=torch.float32,
        wire_dtype=wire_dtype,
    )
    places.step(optimizer, matrices, "fsdp on 4", normal(ERROR_SHAPES, 3))
    return [-whole(p) for p in matrices]


def watch(places, way, wire_dtype):
    """Return what the observer was shown in two steps: (matrix, stage, tensor)."""
    optimizer, matrices = places.optimizer(
        way, "NorMuon", normal(WATCHED), wire_dtype=wire_dtype, nesterov=True
    )
    shown = []

    def observe(parameter, stage, tensor):
        index = next(i for i, p in enumerate(matrices) if p is parameter)
        shown.append((index, stage, tensor.clone()))

    optimizer.stage_observer = observe
    for step in range(2):
        places.step(optimizer, matrices, way, normal(WATCHED, step))
    return shown


@contextlib.contextmanager
def newton_schulz_is(function):
    """Put a function in the place of Newton-Schulz; it is given the real one first."""
    real = normuon_module.orthogonalize
    normuon_module.orthogonalize = functools.partial(function, real)
    try:
        yield
    finally:
        normuon_module.orthogonalize = real


def measure_work(places, way, shapes):
    """Return calls and CPU seconds of Newton-Schulz on this rank, step by step."""
    calls = []

    def measured(real, matrix, steps, **settings):
        start = time.thread_time()
        result = real(matrix, steps, **settings)
        calls.append(time.thread_time() - start)
        return result

    optimizer, matrices = places.optimizer(way, "NorMuon", normal(shapes), ns_dtype=torch.float32)
    steps = []
    with newton_schulz_is(measured):
        for step in range(6):
            calls.clear()
            places.step(optimizer, matrices, way, normal(shapes, step))
            steps.append((len(calls), sum(calls)))
    return steps


def copy_and_go_on(places, way, copier):
    """Return where an optimizer and its copy get to by the same steps.

    And the copy when it was made, and after steps of the original alone.
    """
    optimizer, matrices = places.optimizer(way, "NorMuon", normal(WATCHED), owners="snake")
    for step in range(3):
        places.step(optimizer, matrices, way, normal(WATCHED, step))
    twin = copier(optimizer)
    twins = twin.param_groups[0]["params"]
    before = everything(twin, twins)
    twin.load_state_dict(optimizer.state_dict())  # a copy is still the same optimizer
    for step in range(3, 6):
        places.step(optimizer, matrices, way, normal(WATCHED, step))
    untouched = everything(twin, twins)
    for step in range(3, 6):
        places.step(twin, twins, way, normal(WATCHED, step))
    return everything(optimizer, matrices), everything(twin, twins), before, untouched


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def take_single_steps():
    places = Places()
    found = {
        "bytes": {way: count_bytes(places, *way, UNEVEN) for way in COUNTED},
        "even": {
            (way, rule): count_bytes(places, way, rule, None, "round_robin", EVEN)
            for way in ("fsdp on 4", "fsdp on 2")
            for rule in RULES
        },
        "narrow": {
            (way, rule): train_narrow(places, way, rule)
            for rule, ways in NARROW_WAYS.items()
            for way in ways
        },
        "update": {
            (rule, wire): first_update(places, rule, wire)
            for rule in RULES
            for wire in (None, torch.bfloat16)
        },
        "shown": {way: watch(places, way, wire) for way, wire in WATCHED_WAYS.items()},
        "copies": [
            copy_and_go_on(places, way, copier)
            for way in ("fsdp on 4", "hsdp on 2x2")
            for copier in (copy.deepcopy, pickled)
        ],
        "work": {way: measure_work(places, way, WORK) for way in WORKED},
        "six": measure_work(places, "fsdp on 4", [(12, 8)] * 6),
    }
    if places.rank == 0:
        found["by hand"] = {rule: train_narrow_by_hand(rule) for rule in RULES}
    return found


@pytest.fixture(scope="module")
def single_steps():
    return on_ranks(4, take_single_steps)


def sent_by_hand(way, shapes, owners, row_bytes):
    """Bytes that each of four ranks sends, matrix by matrix and rank by rank."""
    sent = [0] * 4
    for (m, n), owner in zip(shapes, owners, strict=True):
        shards = 4 if way == "fsdp on 4" else 2
        rows = [len(chunk) for chunk in torch.arange(m).chunk(shards)]
        rows += [0] * (shards - len(rows))
        if way == "fsdp on 4":
            holds, gives = rows, [rank for rank in range(4) if rank != owner]
        elif way == "hsdp on 2x2":  # ranks 0 and 1 hold all rows together, and so do 2 and 3
            holds, gives = rows * 2, [owner ^ 1]
        else:
            holds, gives = [m] * 4, []
        for rank in gives:
            sent[rank] += holds[rank] * row_bytes(n)
        sent[owner] += sum(holds[rank] for rank in range(4) if rank != owner) * row_bytes(n)
    return sent


def test_bytes_sent_are_those_of_the_formula(single_steps):
    counted = {way: [found["bytes"][way] for found in single_steps] for way in COUNTED}
    for (way, rule, wire_dtype, owners), by_rank in counted.items():
        sent = [rank["sent"] for rank in by_rank]
        if way == "ddp, all work everywhere":
            assert sent == [0] * 4
            assert all(rank["calls"] == {} for rank in by_rank)
            continue
        precision, width = ("bfloat16", 2) if wire_dtype else ("float32", 4)
        v = 4 if rule == "NorMuon" else 0
        if way.startswith("fsdp"):
            ranks = int(way[-1])
            formula = wire_bytes(rule, UNEVEN, ranks, order=owners, precision=precision)
            received = [rank["received"] for rank in by_rank]
            # Ranks 0 and 2 are the first and the second of their mesh, and so are 1 and 3.
            assert sent == received == [formula[rank * ranks // 4] for rank in range(4)]
        if way != "fsdp on 2":
            by_hand = sent_by_hand(way, UNEVEN, DEALT[owners], lambda n, w=width, v=v: n * w + v)
            assert sent == by_hand, (way, rule, wire_dtype, owners)
        # Nothing else goes over the wire: a round is two exchanges, and all agree on them once.
        rounds = 4 if way == "fsdp on 2" else 2
        expected = {"alltoall_base_": 2 * rounds, "allgather_": 1}
        assert all(rank["calls"] == expected for rank in by_rank)


def test_bytes_per_parameter_where_all_is_even(single_steps):
    parameters = sum(m * n for m, n in EVEN)
    for found in single_steps:
        for ranks in (2, 4):
            sent = {rule: found["even"][f"fsdp on {ranks}", rule]["sent"] for rule in RULES}
            assert sent["Muon"] == 8 * (ranks - 1) * parameters / ranks**2
            assert sent["NorMuon"] == sent["Muon"] * (64 + 1) / 64


def test_bfloat16_on_the_wire_rounds_alike_on_any_number_of_ranks(single_steps):
    by_hand = single_steps[0]["by hand"]
    for (rank, found), rule in itertools.product(enumerate(single_steps), RULES):
        for way in NARROW_WAYS[rule]:
            # Bitwise: v and the kept momentum are as exact as ever, only the messages are rounded.
            assert_same(found["narrow"][way, rule], by_hand[rule], f"{rule}, {way}, rank {rank}")


def test_bfloat16_on_the_wire_errs_by_its_rounding_and_what_newton_schulz_makes_of_it(single_steps):
    """Bound the error of one update.

    A bfloat16 is off by u = 2⁻⁸ at most. Newton-Schulz applies an odd polynomial g to the singular
    values, so a small change of X changes g(X) by at most L times as much in the Frobenius norm,
    where L is the largest of |g'(x)| and g(x)/x over the singular values on the way. A row o that
    is off by e is off by 2e/‖o‖ at most once it is normalized. The update is rounded once more.
    """
    u = 2.0**-8
    a, b, c = COEFFICIENTS["quintic"][0]

    def g(x):
        for _ in range(5):
            x = a * x + b * x**3 + c * x**5
        return x

    found = single_steps[0]["update"]
    for i, gradient in enumerate(normal(ERROR_SHAPES, 3)):
        m, n = gradient.shape
        M = (1 - BETA) * gradient.double()
        rounded = torch.lerp(torch.zeros(m, n), gradient, 1 - BETA).bfloat16().double()
        assert ((rounded - M).abs() <= u * M.abs() * 1.001).all()
        X, Y = M / M.norm(), rounded / rounded.norm()
        off = torch.linalg.norm(Y - X)
        U, S, Vh = torch.linalg.svd(X, full_matrices=False)
        O = U * g(S) @ Vh
        x = torch.linspace(max(S[-1] - off, 1e-9), S[0] + off, 20001, dtype=torch.float64)
        L = torch.maximum(g(x) / x, torch.gradient(g(x), spacing=(x,))[0].abs()).max()
        bounds = {
            "Muon": u + L * off / O.norm(),
            "NorMuon": u + 2 * L * off / (math.sqrt(m) * O.norm(dim=1).min()),
        }
        for rule, bound in bounds.items():
            exact, narrow = found[rule, None][i].double(), found[rule, torch.bfloat16][i].double()
            error = (narrow - exact).norm() / exact.norm()
            print(rule, (m, n), f"error {error:.2%}, bound {bound:.2%}, L {L:.3g}")
            assert 2.0**-11 < error <= bound
        # What is compared with is the exact update.
        torch.testing.assert_close(
            found["Muon", None][i].double(), LR * math.sqrt(max(1, m / n)) * O, rtol=1e-3, atol=1e-5
        )


def test_the_observer_sees_every_matrix_whole_where_it_is_whole(single_steps):
    alone = single_steps[0]["shown"]["alone"]
    stages = ["momentum", "orthogonalized", "normalized", "update"]
    assert [(i, stage) for i, stage, _ in alone] == [
        *itertools.product(range(len(WATCHED)), stages)
    ] * 2
    for way, wire_dtype in WATCHED_WAYS.items():
        shown = [found["shown"][way] for found in single_steps]
        for i, stage in itertools.product(range(len(WATCHED)), stages):
            expected = [tensor for j, s, tensor in alone if (j, s) == (i, stage)]
            seen = [[t for j, s, t in rank if (j, s) == (i, stage)] for rank in shown]
            everywhere = way in ("alone", "hsdp on 4x1") or way.startswith("ddp")
            halves = [seen[::2], seen[1::2]] if way == "ddp on 2" else [seen]
            for ranks in halves:
                times = sorted(len(tensors) for tensors in ranks)
                if way == "alone" or (everywhere and stage == "update"):
                    assert times == [2] * len(ranks)
                else:
                    assert times == [0] * (len(ranks) - 1) + [2]
            for tensors in seen:
                for one, other in zip(tensors, expected, strict=bool(tensors)):
                    assert one.shape == (WATCHED[i][0], math.prod(WATCHED[i][1:]))
                    if wire_dtype is None:
                        assert torch.equal(one, other)
            # Also where the wire rounds: what the owner is shown is what everybody subtracts.
            updates = [tensors for tensors in seen if tensors]
            for others in updates[1:]:
                assert all(map(torch.equal, others, updates[0]))


def test_copies_go_on_as_the_original_does(single_steps):
    for found in single_steps:
        assert len(found["copies"]) == 4
        for original, twin, before, untouched in found["copies"]:
            assert_same(twin, original, "of the copy")
            assert_same(untouched, before, "after steps of the original")
            assert not torch.equal(before[0]["weight"], twin[0]["weight"])


def test_a_rank_does_its_share_of_the_work(single_steps):
    for found in single_steps:
        redundant = found["work"]["ddp, all work everywhere"]
        assert [calls for calls, _ in redundant] == [4] * 6
        for way in ("fsdp on 4", "ddp on 4"):
            shared = found["work"][way]
            assert [calls for calls, _ in shared] == [1] * 6
            share = min(cpu for _, cpu in shared) / min(cpu for _, cpu in redundant)
            print(f"{way}: share {share:.3f}")
            assert 0.12 < share < 0.45  # a busy machine blurs CPU seconds
    # Six matrices on four ranks: every one has one owner.
    calls = [[calls for calls, _ in found["six"]] for found in single_steps]
    assert calls == [[2] * 6, [2] * 6, [1] * 6, [1] * 6]


# --- a real model --------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.up, self.down = nn.Linear(24, 50), nn.Linear(50, 24)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Embedding, two blocks and a head; one layer can be left out."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 24)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.extra = nn.Linear(24, 24)
        self.head = nn.Linear(24, 20)

    def forward(self, tokens, extra):
        x = self.embedding(tokens).flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.extra(x) if extra else x)


def train_net(way, rule, dtype):
    """Twenty steps: alone on all data, spread over two ranks on a half each."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(1)
    model = Net().to(dtype)
    trained, arguments = model, {}
    if way == "fsdp":
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
    elif way != "alone":
        trained = DistributedDataParallel(model, find_unused_parameters=True)
        arguments = {"process_group": dist.group.WORLD} if way == "ddp" else {}
    matrices, others = split_parameters(model)
    optimizers = [
        RULES[rule](matrices, LR, ns_dtype=dtype, **arguments),
        torch.optim.AdamW(others, lr=0.01),
    ]
    schedulers = [
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS) for optimizer in optimizers
    ]
    for step in range(STEPS):
        tokens = torch.randint(20, (16, 6), generator=seeded(step))
        if way != "alone":
            tokens = tokens.chunk(2)[dist.get_rank()]
        logits = trained(tokens[:, :-1], step % 4 != 1)
        loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    state = everything(optimizers[0], matrices)
    return state, {name: whole(p) for name, p in model.named_parameters()}


NET_RUNS = [("NorMuon", torch.float32), ("NorMuon", torch.float64), ("Muon", torch.float32)]


NET_WAYS = ("alone", "fsdp", "ddp", "ddp, all work everywhere")

ROUNDS = 8
PACES = [(0.05, 0.025), (0.06, 0.015), (0.03, 0.03)]  # seconds of a matrix, and of an exchange


def hiding(compute, transfer):
    """Seconds of all rounds' work and of all their exchanges, and what is nearer to the longer."""
    work, wire = ROUNDS * compute, ROUNDS * 2 * transfer
    return work, wire, (max(work, wire) + work + wire) / 2


def measure_overlap(compute, transfer):
    """Return seconds of a step on slow ranks with a slow link each, and exchanges under way."""
    import torch.distributed as dist

    real = dist.all_to_all_single
    free = 0.0  # when the link has carried everything that was put on it
    started, finished, under_way = [], [], []

    class Slow:
        def __init__(self, work, until):
            self.work, self.until = work, until

        def wait(self):
            self.work.wait()
            time.sleep(max(0.0, self.until - time.monotonic()))
            finished.append(self)

    def slowed(*args, **settings):
        nonlocal free
        free = max(time.monotonic(), free) + transfer
        started.append(Slow(real(*args, **settings), free))
        return started[-1]

    def slow(_, matrix, steps, **settings):
        under_way.append(len(started) - len(finished))
        time.sleep(compute)
        return matrix.clone()

    matrices = [nn.Parameter(weight) for weight in normal([(8, 4)] * 2 * ROUNDS)]
    optimizer = NorMuon(matrices, LR, process_group=dist.group.WORLD)
    for matrix in matrices:
        matrix.grad = torch.ones(8, 4)
    fastest = math.inf
    dist.all_to_all_single = slowed
    try:
        with newton_schulz_is(slow):
            for _ in range(6):  # the machine may be busy; one after the other can never be fast
                under_way.clear()
                dist.barrier()
                start = time.monotonic()
                optimizer.step()
                seconds = torch.tensor(time.monotonic() - start, dtype=torch.float64)
                dist.all_reduce(seconds, dist.ReduceOp.MAX)
                fastest = min(fastest, seconds.item())
                if fastest < hiding(compute, transfer)[2]:
                    break
    finally:
        dist.all_to_all_single = real
    return fastest, under_way


def be_two_ranks():
    return {
        "nets": {(way, *run): train_net(way, *run) for run in NET_RUNS for way in NET_WAYS},
        "overlap": [measure_overlap(*pace) for pace in PACES],
    }


@pytest.fixture(scope="module")
def two_ranks():
    return on_ranks(2, be_two_ranks)


def test_a_model_trained_on_halves_of_the_data_is_that_of_a_single_process(two_ranks):
    """Compare up to the order in which gradients are summed, which twenty steps magnify.

    float32 rounds sums to about 1e-7, float64 to 1e-16, of gradients of which many are small.
    """
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}
    nets = [found["nets"] for found in two_ranks]
    torch.manual_seed(1)
    start = {name: p.detach() for name, p in Net().named_parameters()}
    for rule, dtype in NET_RUNS:
        state, weights = nets[0]["alone", rule, dtype]
        for name, weight in weights.items():
            assert (weight - start[name]).abs().max() > 0.02
        for way in ("fsdp", "ddp", "ddp, all work everywhere"):
            for of_rank in nets:
                found_state, found = of_rank[way, rule, dtype]
                for name in weights:
                    off = (found[name] - weights[name]).abs().max()
                    print(rule, dtype, way, name, float(off))
                    assert off < tolerance[dtype], (rule, dtype, way, name)
                for i, (one, other) in enumerate(zip(found_state, state, strict=True)):
                    assert one.keys() == other.keys()
                    for name in one:
                        off = (one[name] - other[name]).abs().max() / other[name].abs().max()
                        assert off < 10 * tolerance[dtype], (rule, dtype, way, i, name)
            first, second = (of_rank[way, rule, dtype] for of_rank in nets)
            assert_same(first[0], second[0], f"{rule}, {way}, between the ranks")
        # The same gradients: who does the work makes no difference.
        shared, redundant = nets[0]["ddp", rule, dtype], nets[0][way, rule, dtype]
        assert_same(shared[0], redundant[0], f"{rule}, shared and redundant")


def test_transfers_hide_behind_the_work(two_ranks):
    for number, pace in enumerate(PACES):
        work, wire, bound = hiding(*pace)
        for found in two_ranks:
            seconds, under_way = found["overlap"][number]
            print(f"work {work:.2f} s, wire {wire:.2f} s, together {seconds:.3f} s")
            assert max(work, wire) <= seconds < bound
            # Two rounds on their way to the owners, and two on their way back.
            assert under_way == [2, 3, *[4] * (ROUNDS - 4), 3, 2]
