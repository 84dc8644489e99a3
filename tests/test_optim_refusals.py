"""What cannot be trained is refused in one line, on every rank alike, and no rank ever hangs."""

import contextlib
import datetime
import os
import signal
from pathlib import Path

import pytest
import torch
from ranks import on_ranks

from normuon_lens.errors import LensError
from normuon_lens.optim import Muon, NorMuon

RANKS = 4
SHAPES = [(9, 5), (6, 12), (2, 8)]
LR = 0.02


def refusal(action):
    """Return what a LensError says, None if there is none; any other error fails the test."""
    try:
        action()
    except LensError as error:
        return str(error)
    return None


# At construction.


def placed(mesh, *placements, shape=(8, 8), dtype=torch.float32):
    from torch.distributed.tensor import ones

    return torch.nn.Parameter(ones(shape, dtype=dtype, device_mesh=mesh, placements=placements))


def meshes():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))


def refused_at_construction():
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    flat, square = meshes()

    def fsdp1(**options):
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)

    tensor_parallel = torch.nn.Sequential(
        torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 8, bias=False)
    )
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    parallelize_module(tensor_parallel, square["b"], plan)
    fully_shard(tensor_parallel, mesh=square["a"])

    def good():
        return placed(flat, Shard(0))

    summed = torch.nn.Parameter(DTensor.from_local(torch.ones(8, 8), flat, [Partial()]))
    plain = torch.nn.Parameter(torch.ones(8, 8))
    cases = {
        "vector": [good(), placed(flat, Shard(0), shape=(8,))],
        "row": [good(), placed(flat, Shard(0), shape=(1, 8))],
        "column": [("up", good()), ("down", placed(flat, Shard(0), shape=(8, 1)))],
        "complex": [placed(flat, Shard(0), dtype=torch.complex64)],
        "columns": [("up", good()), ("down", placed(flat, Shard(1)))],
        "both": [placed(square, Shard(0), Shard(0))],
        "partial": [summed],
        "strided": [("up", tensor_parallel[0].weight)],
        "crossed": [("down", tensor_parallel[1].weight)],
        "meshes": [good(), placed(square, Replicate(), Shard(0))],
        "submeshes": [placed(square["a"], Shard(0)), placed(square["b"], Shard(0))],
        "plain last": [good(), plain],
        "plain first": [plain, good()],
        "fsdp1": list(fsdp1().named_parameters()),
        "fsdp1 orig": list(fsdp1(use_orig_params=True).named_parameters()),
    }
    told = {name: refusal(lambda p=params: NorMuon(p, LR)) for name, params in cases.items()}
    told["group"] = refusal(lambda: Muon([good()], LR, process_group=dist.group.WORLD))

    # A group that is refused leaves the optimizer as it was, to be trained on and added to.
    optimizer, twin = Muon([good()], LR), Muon([good()], LR)
    told["added"] = refusal(
        lambda: optimizer.add_param_group({"params": [placed(square, Replicate(), Shard(0))]})
    )
    assert len(optimizer.param_groups) == len(optimizer.state) == 1
    for each in (optimizer, twin):
        each.add_param_group({"params": [good()]})
        set_gradients(each)
        each.step()
    assert_alike(snapshot(optimizer), snapshot(twin))
    return told


# At the step.


def matrices(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def snapshot(optimizer):
    """Copy what this rank holds of weights and state."""
    tensors = [t for p in matrices(optimizer) for t in (p, *optimizer.state[p].values())]
    return [getattr(t, "to_local", lambda t=t: t)().detach().clone() for t in tensors]


def assert_alike(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def set_gradients(optimizer):
    from torch.distributed.tensor import DTensor, distribute_tensor

    generator = torch.manual_seed(7)
    for p in matrices(optimizer):
        G = torch.randn(p.shape, generator=generator).to(p.dtype)
        if isinstance(p, DTensor):
            G = distribute_tensor(G, p.device_mesh, p.placements, src_data_rank=None)
        p.grad = G


def tensors(shapes=SHAPES, dtype=torch.float32):
    generator = torch.manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def under_ddp(rule=NorMuon, shapes=SHAPES, dtype=torch.float32, **options):
    import torch.distributed as dist

    params = [torch.nn.Parameter(t) for t in tensors(shapes, dtype)]
    return rule(params, LR, process_group=dist.group.WORLD, **options)


def under_fsdp(*placements, mesh):
    from torch.distributed.tensor import distribute_tensor

    names = ("up.weight", "gate.weight", "down.weight")
    sharded = [distribute_tensor(t, mesh, placements, src_data_rank=None) for t in tensors()]
    params = [torch.nn.Parameter(t) for t in sharded]
    return NorMuon([{"params": list(zip(names, params, strict=True))}], LR)


# What may go wrong on some ranks: done to an optimizer, each returns how it is undone.


def no_gradient(optimizer):
    p = matrices(optimizer)[1]
    gradient, p.grad = p.grad, None
    return lambda: setattr(p, "grad", gradient)


def sparse_gradient(optimizer):
    p = matrices(optimizer)[1]
    gradient, p.grad = p.grad, p.grad.to_sparse()
    return lambda: setattr(p, "grad", gradient)


def whole_gradient(optimizer):
    from torch.distributed.tensor import Replicate

    p = matrices(optimizer)[2]
    gradient = p.grad
    whole = torch.zeros(p.shape)
    p.grad = type(gradient).from_local(whole, gradient.device_mesh, [Replicate()], run_check=False)
    return lambda: setattr(p, "grad", gradient)


def another_rate(optimizer):
    group = optimizer.param_groups[0]
    group["lr"] = torch.tensor(0.0625)
    return lambda: group.update(lr=LR)


def refused_at_the_step():
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, Shard

    rank = dist.get_rank()
    flat, square = meshes()
    told = {}

    def refuse(name, make, spoil, ranks):
        optimizer, twin = make(), make()
        for each in (optimizer, twin):
            set_gradients(each)
            each.step()
        mend = spoil(optimizer) if rank in ranks else lambda: None
        before = snapshot(optimizer)
        told[name] = refusal(optimizer.step)
        assert_alike(snapshot(optimizer), before)
        mend()
        optimizer.step()
        twin.step()
        assert_alike(snapshot(optimizer), snapshot(twin))

    def fsdp():
        return under_fsdp(Shard(0), mesh=flat)

    def hsdp():
        return under_fsdp(Replicate(), Shard(0), mesh=square)

    refuse("missing, DDP", under_ddp, no_gradient, [1])
    refuse("missing, FSDP", fsdp, no_gradient, [0, 2, 3])
    refuse("missing, HSDP", hsdp, no_gradient, [3])
    refuse("sparse on one", under_ddp, sparse_gradient, [2])
    refuse("sparse on all", under_ddp, sparse_gradient, range(RANKS))
    refuse("whole on one", fsdp, whole_gradient, [1])
    refuse("whole on all", fsdp, whole_gradient, range(RANKS))
    refuse("rate", fsdp, another_rate, [3])

    # Ranks that were built otherwise; what comes next on the same group must not mind.
    def differ(name, ours, theirs):
        optimizer = theirs() if rank == 1 else ours()
        set_gradients(optimizer)
        before = snapshot(optimizer)
        told[name] = refusal(optimizer.step)
        assert_alike(snapshot(optimizer), before)

    def two_groups():
        optimizer = under_ddp(shapes=SHAPES[:2])
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 8))]})
        return optimizer

    differ("number", under_ddp, lambda: under_ddp(shapes=SHAPES[:2]))
    differ("order", under_ddp, lambda: under_ddp(shapes=SHAPES[::-1]))
    differ("dtype", under_ddp, lambda: under_ddp(dtype=torch.float64))
    differ("groups", under_ddp, two_groups)
    differ("owners", under_ddp, lambda: under_ddp(owners="snake"))
    differ("scale", under_ddp, lambda: under_ddp(scale="preserve_norm"))
    differ("rule", under_ddp, lambda: under_ddp(rule=Muon))

    # Rows that are sharded by hand, otherwise than by torch.chunk: ranks 0 and 3 hold what they
    # should.
    def by_hand(rows):
        rows = torch.ones(rows[rank], 8)
        return DTensor.from_local(
            rows, flat, [Shard(0)], run_check=False, shape=(8, 8), stride=(8, 1)
        )

    even, uneven, whole = by_hand([2, 2, 2, 2]), by_hand([2, 3, 1, 2]), torch.ones(8, 8)
    for name, weight, gradient in (
        ("rows", uneven, uneven),
        ("gradient's rows", even, uneven),
        ("sharded gradient", whole, even),
    ):
        p = torch.nn.Parameter(weight.clone())
        p.grad = gradient
        group = dist.group.WORLD if weight is whole else None
        told[name] = refusal(NorMuon([p], LR, process_group=group).step)
        assert torch.equal(p, weight)

    told["no_sync"] = refuse_what_ddp_did_not_reduce()
    return told


class Branches(torch.nn.Module):
    """Three matrices that all, some and no ranks use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.all, self.some, self.none = (torch.nn.Linear(6, 4, bias=False) for _ in range(3))

    def forward(self, x, some):
        return (self.all(x) + self.some(x) if some else self.all(x)).square().sum()


def refuse_what_ddp_did_not_reduce():
    import torch.distributed as dist

    rank = dist.get_rank()
    model = torch.nn.parallel.DistributedDataParallel(Branches(), find_unused_parameters=True)
    optimizer = NorMuon(model.named_parameters(), LR, process_group=dist.group.WORLD)
    before = snapshot(optimizer)
    with model.no_sync():
        model(torch.ones(2, 6) + rank, some=rank == 2).backward()
    told = refusal(optimizer.step)
    assert_alike(snapshot(optimizer), before)

    optimizer.zero_grad()
    model(torch.ones(2, 6) + rank, some=rank == 2).backward()
    gradients = [p.grad for p in matrices(optimizer)]
    assert gradients[1] is not None  # by DDP, also where it was not used
    assert gradients[2] is None
    twin = NorMuon([torch.nn.Parameter(p.detach().clone()) for p in matrices(optimizer)], LR)
    for p, gradient in zip(matrices(twin), gradients, strict=True):
        p.grad = gradient
    twin.step()
    optimizer.step()
    assert_alike(snapshot(optimizer), snapshot(twin))
    return told


def everything_refused():
    return refused_at_construction(), refused_at_the_step()


@pytest.fixture(scope="module")
def refused():
    """Return what each of the ranks was told, by case."""
    results = on_ranks(RANKS, everything_refused)
    return [constructed | stepped for constructed, stepped in results]


NO_MATRIX = ("is not a matrix with at least two rows and two columns", "AdamW", "split_parameters")
ROWS_ONLY = ("only whole rows can be sharded, by Shard(0)", "tensor parallelism to AdamW")
ONE_DIMENSION = ("is sharded along more than one mesh dimension", "tensor parallelism to AdamW")
FIRST, SECOND = "parameter 0 of group 0", "parameter 1 of group 0"
ONE_MESH = ("Make one optimizer for the parameters of each mesh",)

AT_CONSTRUCTION = {
    "vector": (f"{SECOND} of shape (8,)", *NO_MATRIX),
    "row": (f"{SECOND} of shape (1, 8)", *NO_MATRIX),
    "column": (f"{SECOND} (down) of shape (8, 1)", *NO_MATRIX),
    "complex": (f"{FIRST} of shape (8, 8) is torch.complex64", "AdamW", "split_parameters"),
    "columns": (f"{SECOND} (down) of shape (8, 8) is placed as (Shard(dim=1),)", *ROWS_ONLY),
    "partial": (f"{FIRST} of shape (8, 8) is placed as (Partial(sum),)", *ROWS_ONLY),
    "both": (f"{FIRST} of shape (8, 8)", "(Shard(dim=0), Shard(dim=0))", *ONE_DIMENSION),
    "strided": (f"{FIRST} (up) of shape (16, 8)", "(_StridedShard(dim=0", *ONE_DIMENSION),
    "crossed": (f"{FIRST} (down) of shape (8, 16)", "(Shard(dim=0), Shard(dim=1)", *ONE_DIMENSION),
    "meshes": (f"{SECOND} is on DeviceMesh((a=2, b=2)", f"but {FIRST} is on Device", *ONE_MESH),
    "submeshes": (f"{SECOND} is on DeviceMesh((b=2)", f"but {FIRST} is on Device", *ONE_MESH),
    "plain last": (f"{SECOND} is on no mesh", f"but {FIRST} is on DeviceMesh((4", *ONE_MESH),
    "plain first": (f"{SECOND} is on DeviceMesh((4", f"but {FIRST} is on no mesh", *ONE_MESH),
    "fsdp1": (f"{FIRST} (_fsdp_wrapped_module._flat_param)", "flattened by FSDP1", "fully_shard"),
    "fsdp1 orig": (f"{FIRST} (_fsdp_wrapped_module.0.weight)", "by FSDP1", "fully_shard"),
    "group": (f"{FIRST} is a DTensor", "process_group is for plain parameters. Leave it out"),
    "added": ("parameter 0 of group 1 is on Device", f"but {FIRST} is on DeviceMesh", *ONE_MESH),
}

SAME_STEP = "the ranks are not about to take the same step: "
GRADIENTS = ("Give a parameter a gradient on all ranks or on none", "zero gradient on the others")
SETTINGS = ("Give every rank the same settings.",)
PARAMETERS = ("Give every rank the same parameters in the same order.",)
DENSE = ("has a sparse gradient. Give it to SparseAdam, or make its gradient dense",)
REDUCED = ("but its gradient is (Replicate(),) on DeviceMesh", "Reduce the gradient to the param")

AT_THE_STEP = {
    "missing, DDP": (
        f"{SAME_STEP}on ranks 0, 2, 3, {SECOND} has a gradient; "
        f"on rank 1, {SECOND} has no gradient. ",
        *GRADIENTS,
    ),
    "missing, FSDP": (
        f"{SAME_STEP}on ranks 0, 2, 3, {SECOND} (gate.weight) has no gradient; "
        f"on rank 1, {SECOND} (gate.weight) has a gradient. ",
        *GRADIENTS,
    ),
    "missing, HSDP": (f"on rank 3, {SECOND} (gate.weight) has no gradient", *GRADIENTS),
    "sparse on one": (f"NorMuon: on rank 2, {SECOND}", *DENSE),
    "sparse on all": (f"NorMuon: on ranks 0, 1, 2, 3, {SECOND}", *DENSE),
    "whole on one": (
        "NorMuon: on rank 1, parameter 2 of group 0 (down.weight) is (Shard(dim=0),) on DeviceMesh",
        *REDUCED,
    ),
    "whole on all": ("on ranks 0, 1, 2, 3, parameter 2 of group 0 (down.weight)", *REDUCED),
    "rate": ("on ranks 0, 1, 2, group 0 has lr=0.02; on rank 3, group 0 has lr=0.0625", *SETTINGS),
    "scale": ("scale='match_rms'; on rank 1, group 0 has scale='preserve_norm'", *SETTINGS),
    "owners": ("has owners='round_robin'; on rank 1, the optimizer has owners='snake'", *SETTINGS),
    "groups": ("has 1 parameter group(s); on rank 1, the optimizer has 2 param", *SETTINGS),
    "number": (
        f"{SAME_STEP}on ranks 0, 2, 3, parameter 2 of group 0 has shape (2, 8) and is "
        "torch.float32; on rank 1, there are no more parameters",
        *PARAMETERS,
    ),
    "order": (f"{FIRST} has shape (9, 5)", f"on rank 1, {FIRST} has shape (2, 8)", *PARAMETERS),
    "dtype": ("is torch.float32; on rank 1", "(9, 5) and is torch.float64", *PARAMETERS),
    "rows": (
        f"on rank 1, {FIRST} has 3 of its 8 rows here, where torch.chunk puts 2",
        "fully_shard",
    ),
    "gradient's rows": (
        f"on rank 1, {FIRST} has a gradient that has 3 of its 8 rows here",
        "fully_shard",
    ),
    "sharded gradient": (
        f"{FIRST} is no DTensor, but its gradient is (Shard(dim=0),) on DeviceMesh",
        "Reduce the gradient to the param",
    ),
    "no_sync": (f"on ranks 0, 1, 3, {SECOND} (module.some.weight) has no gradient", *GRADIENTS),
}


@pytest.mark.parametrize("case", AT_CONSTRUCTION)
def test_what_no_owner_can_orthogonalize_is_refused_at_construction(refused, case):
    for told in refused:
        assert told[case].startswith("Muon: " if case in ("group", "added") else "NorMuon: ")
        assert all(text in told[case] for text in AT_CONSTRUCTION[case]), told[case]


@pytest.mark.parametrize("case", AT_THE_STEP)
def test_what_only_some_ranks_would_do_is_refused_on_all_before_anything_moves(refused, case):
    text = refused[0][case]
    assert [told[case] for told in refused] == [text] * RANKS
    assert text.startswith("NorMuon: ")
    assert all(part in text for part in AT_THE_STEP[case]), text


def test_ranks_with_different_optimizers_are_told_so(refused):
    for rank, told in enumerate(refused):
        assert told["rule"] == (
            f"{'Muon' if rank == 1 else 'NorMuon'}: {SAME_STEP}on ranks 0, 2, 3, the optimizer is "
            f"NorMuon; on rank 1, the optimizer is Muon. {SETTINGS[0]}"
        )


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_numbers_that_are_not_real_are_refused(dtype):
    parameter = torch.nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
    with pytest.raises(LensError, match=f"^Muon: {FIRST} of shape .4, 4. is {dtype}. Give it to A"):
        Muon([parameter], LR)


def lose_a_rank(folder):
    """On rank 1 stop, come back, die; on the others write down what their steps say meanwhile."""
    import torch.distributed as dist

    rank = dist.get_rank()
    pids = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    optimizers = []
    for _ in range(2):
        params = [torch.nn.Parameter(t) for t in tensors()]
        group = dist.new_group(timeout=datetime.timedelta(seconds=2))
        optimizers.append(NorMuon(params, LR, process_group=group))
        set_gradients(optimizers[-1])
        optimizers[-1].step()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGKILL)
    told = []
    for optimizer in optimizers:
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError) as error:
            optimizer.step()
        told.append(str(error.value))
        assert_alike(snapshot(optimizer), before)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[1], signal.SIGCONT)
    Path(folder, str(rank)).write_text("\n".join(told))


def test_a_rank_that_is_lost_stops_the_others_within_the_timeout_of_their_group(tmp_path):
    with pytest.raises(AssertionError, match=r"no result from ranks \[1\]"):
        on_ranks(3, lose_a_rank, str(tmp_path), timeout=120)
    stopped, dead = zip(*((tmp_path / r).read_text().splitlines() for r in "02"), strict=True)
    assert any("Timed out waiting 2000ms" in text for text in stopped)
    assert all("Connection" in text for text in dead)  # closed or reset, by rank 1


def fail_in_the_midst():
    """Take steps over many rounds that raise on rank 1 only: in the observer, in its own work."""
    import torch.distributed as dist

    params = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(20)]
    optimizer = NorMuon(params, LR, process_group=dist.group.WORLD, ns_steps="exact")
    told = []

    def step(nan):
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, torch.nan if i == nan else 1.0)
        try:
            optimizer.step()
        except Exception as error:
            told.append(type(error).__name__)
        else:
            told.append(None)

    def raise_something(*_):
        raise ZeroDivisionError

    step(nan=None)
    if dist.get_rank() == 1:
        optimizer.stage_observer = raise_something
    step(nan=None)
    optimizer.stage_observer = None
    before = [p.detach().clone() for p in params]
    step(nan=4)  # dealt to rank 1, in the second of seven rounds
    decayed = [b * (1 - LR * 0.1) for b in before]
    return told, [not torch.allclose(p, d) for p, d in zip(params, decayed, strict=True)]


def test_what_raises_in_the_midst_on_one_rank_does_not_make_the_others_wait():
    results = on_ranks(3, fail_in_the_midst, timeout=120)
    assert [told for told, _ in results] == [
        [None, None, None],
        [None, "ZeroDivisionError", "_LinAlgError"],
        [None, None, None],
    ]
    for _, moved in results:  # the matrix that nobody could compute stays, but for its decay
        assert moved == [i != 4 for i in range(20)]
