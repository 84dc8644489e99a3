"""Costs on paper, against the tensors and products of real optimizers."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import normuon_lens.optim
from normuon_lens.errors import LensError
from normuon_lens.optim import Muon, NorMuon
from normuon_lens.optim.cost import (
    PAPER_TRAFFIC,
    RULES,
    SCHEMES,
    Cost,
    cost,
    newton_schulz_flops,
    newton_schulz_work,
    state_bytes,
    state_elements,
    wire_bytes,
)
from normuon_lens.optim.owners import ORDERS, assign_owners
from normuon_lens.optim.presets import PRESETS

# Square, wide, tall, fewer rows than ranks, a convolution, and rows that no rank count divides.
PARAMETERS = ((64, 64), (16, 64), (256, 64), (64, 256), (3, 50), (24, 3, 7, 7), (37, 11))
SHAPES = [(shape[0], math.prod(shape[1:])) for shape in PARAMETERS]
OPTIMIZERS = {"AdamW": torch.optim.AdamW, "Muon": Muon, "NorMuon": NorMuon}


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in PARAMETERS]


def measured_state(optimizer: torch.optim.Optimizer) -> int:
    """Return bytes of state as they are in memory, without counters of steps."""
    return sum(
        tensor.numel() * tensor.element_size()
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    )


def stepped(rule: str, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = OPTIMIZERS[rule](params, lr=0.01)
    if rule == "AdamW":  # whose state is made by the first step
        for parameter in params:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("rule", RULES)
def test_state_is_what_real_optimizers_keep(rule: str) -> None:
    assert measured_state(stepped(rule, parameters())) == sum(state_bytes(rule, SHAPES))
    counted = sum(4 * state_elements(rule, m, n) for m, n in SHAPES)
    assert [counted] == state_bytes(rule, SHAPES)


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_state_is_adamws_alone(rule: str) -> None:
    kept = measured_state(stepped(rule, parameters(torch.bfloat16)))
    ours = rule != "AdamW"
    assert [kept] == state_bytes(rule, SHAPES, precision="float32" if ours else "bfloat16")
    assert state_bytes(rule, SHAPES, precision="bfloat16") == [sum(state_bytes(rule, SHAPES)) // 2]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_rank_keeps_the_state_of_its_rows(ranks: int) -> None:
    counted = state_bytes("AdamW", SHAPES, ranks)
    for rank in range(ranks):
        chunks = [parameter.detach().chunk(ranks) for parameter in parameters()]
        rows = [torch.nn.Parameter(held[rank].clone()) for held in chunks if rank < len(held)]
        assert measured_state(stepped("AdamW", rows)) == counted[rank]
    for rule in RULES:
        assert sum(state_bytes(rule, SHAPES, ranks)) == sum(state_bytes(rule, SHAPES))


def plain_newton_schulz(X: Tensor, steps: int) -> Tensor:
    X = X.mT if X.shape[0] > X.shape[1] else X
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (-4.775 * A + 2.0315 * (A @ A)) @ X
    return X


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 5])
def test_flops_are_those_of_the_plain_products(shape: tuple[int, int], steps: int) -> None:
    with FlopCounterMode(display=False) as counter:
        plain_newton_schulz(torch.ones(shape, device="meta"), steps)
    assert newton_schulz_flops(*shape, steps) == counter.get_total_flops()


def simulated(
    rule: str, ranks: int, scheme: str, order: str, precision: str
) -> tuple[list[int], list[int]]:
    """Send every row, one by one; return bytes sent and received by each rank."""
    sent, received = [0] * ranks, [0] * ranks

    def send(source: int, target: int, n: int) -> None:
        if source != target:
            size = n * (4 if precision == "float32" else 2) + (4 if rule == "NorMuon" else 0)
            sent[source] += size
            received[target] += size

    rounds = assign_owners([m * n for m, n in SHAPES], ranks, order)
    owner = {i: rank for dealt in rounds for rank, i in enumerate(dealt) if i is not None}
    for index, (m, n) in enumerate(SHAPES):
        for holder, rows in enumerate(torch.arange(m).chunk(ranks)):
            for _ in rows:
                if scheme == "owners":
                    send(holder, owner[index], n)
                    send(owner[index], holder, n)
                else:
                    for other in range(ranks):
                        send(holder, other, n)
    return sent, received


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 17])
def test_bytes_on_the_wire_are_those_of_rows_sent_one_by_one(ranks: int) -> None:
    for rule, scheme, order, precision in product(
        ("Muon", "NorMuon"), SCHEMES, ORDERS, PAPER_TRAFFIC
    ):
        counted = wire_bytes(rule, SHAPES, ranks, scheme=scheme, order=order, precision=precision)
        sent, received = simulated(rule, ranks, scheme, order, precision)
        assert counted == sent
        if scheme == "owners":
            assert counted == received
        if ranks == 1:
            assert counted == [0]
    assert wire_bytes("AdamW", SHAPES, ranks) == [0] * ranks


@pytest.mark.parametrize("ranks", [2, 4, 16])
def test_bytes_per_parameter_where_rows_divide(ranks: int) -> None:
    shapes = [(64, 96), (128, 64), (32, 32)]
    found = {(row.rule, row.scheme, row.precision): row for row in cost(shapes, ranks=ranks)}
    muon = {
        (scheme, precision): found["Muon", scheme, precision].sent_per_parameter
        for scheme in SCHEMES
        for precision in PAPER_TRAFFIC
    }
    assert muon == pytest.approx(
        {
            ("owners", "float32"): 8 * (ranks - 1) / ranks**2,
            ("owners", "bfloat16"): 4 * (ranks - 1) / ranks**2,
            ("everywhere", "float32"): 4 * (ranks - 1) / ranks,
            ("everywhere", "bfloat16"): 2 * (ranks - 1) / ranks,
        }
    )
    rows, elements = sum(m for m, _ in shapes), sum(m * n for m, n in shapes)
    along = 2 * 4 * rows / elements * (ranks - 1) / ranks**2
    normuon = found["NorMuon", "owners", "bfloat16"].sent_per_parameter
    assert normuon == pytest.approx(muon["owners", "bfloat16"] + along)


def test_work_is_that_of_the_matrices_a_rank_owns() -> None:
    shapes = [(2, 8), (4, 4), (8, 8)]  # 16, 16 and 64 elements: owned by ranks 1, 0 and 0
    work = [newton_schulz_flops(*shape) for shape in shapes]
    assert newton_schulz_work(shapes, 2) == [work[2] + work[1], work[0]]
    assert newton_schulz_work(shapes, 2, order="snake") == [work[2], work[0] + work[1]]
    assert newton_schulz_work(shapes, 4) == [work[2], work[0], work[1], 0]
    assert newton_schulz_work(shapes, 4, scheme="everywhere") == [sum(work)] * 4
    assert newton_schulz_work(shapes, 1, steps=10) == [2 * sum(work)]


def test_cost_puts_everything_together() -> None:
    others = [(100, 8), (37,)]
    costs = cost(SHAPES, others, ranks=3, steps=2, order="snake")
    assert [(row.precision, row.rule, row.scheme) for row in costs] == [
        (precision, *way)
        for precision in PAPER_TRAFFIC
        for way in (("AdamW", None), *product(("Muon", "NorMuon"), SCHEMES))
    ]
    for row in costs:
        assert row.parameters == sum(m * n for m, n in SHAPES)
        rest = state_bytes("AdamW", [(100, 8), (37, 1)], 3, row.precision)
        state = state_bytes(row.rule, SHAPES, 3, row.precision)
        assert row.matrix_state == sum(state)
        assert row.rank_state == tuple(a + b for a, b in zip(state, rest, strict=True))
        if row.scheme is None:
            assert row.rank_sent == row.rank_flops == (0, 0, 0)
            assert math.isnan(row.balance)
        else:
            assert list(row.rank_flops) == newton_schulz_work(
                SHAPES, 3, scheme=row.scheme, order="snake", steps=2
            )
            assert list(row.rank_sent) == wire_bytes(
                row.rule,
                SHAPES,
                3,
                scheme=row.scheme,
                order="snake",
                precision=row.precision,
            )


def test_balance_is_busiest_to_average() -> None:
    row = Cost("Muon", "owners", "float32", 1, 4, (4, 0), (0, 0), (3, 1))
    assert row.balance == 1.5


def test_a_snake_deals_more_evenly() -> None:
    matrices = [shape for _, shape in PRESETS["gpt-1.1b"].matrices()]
    balances = [
        next(row.balance for row in cost(matrices, ranks=64, order=order) if row.scheme)
        for order in ORDERS
    ]
    assert balances == pytest.approx([1.44, 1.10], abs=5e-3)  # as docs/cost.md says


def test_the_papers_figures() -> None:
    increase = {name: after / before - 1 for name, (before, after) in PAPER_TRAFFIC.items()}
    assert PAPER_TRAFFIC["float32"] == (12, 16)
    assert increase == pytest.approx({"float32": 1 / 3, "bfloat16": 1 / 2})
    assert state_elements("NorMuon", 8192, 2048) / state_elements("AdamW", 8192, 2048) == (
        pytest.approx(0.5, abs=3e-4)
    )


def test_what_cannot_be_meant() -> None:
    with pytest.raises(LensError, match="rule must be one of AdamW, Muon, NorMuon, got 'adam'"):
        state_elements("adam", 2, 2)
    with pytest.raises(LensError, match="rule must be"):
        wire_bytes("adam", SHAPES, 2)
    with pytest.raises(LensError, match="precision must be one of float32, bfloat16, got 'fp8'"):
        wire_bytes("Muon", SHAPES, 2, precision="fp8")
    with pytest.raises(LensError, match="precision must be"):
        state_bytes("Muon", SHAPES, precision="fp8")
    with pytest.raises(LensError, match="scheme must be one of owners, everywhere"):
        wire_bytes("Muon", SHAPES, 2, scheme="nowhere")
    with pytest.raises(LensError, match="scheme must be"):
        newton_schulz_work(SHAPES, 2, scheme="nowhere")
    with pytest.raises(LensError, match="order of owners must be"):
        cost(SHAPES, order="zigzag")
    with pytest.raises(LensError, match="steps must be at least 1, got 0"):
        cost(SHAPES, steps=0)
    with pytest.raises(LensError, match="at least one matrix"):
        cost([])
    for ranks in (0, -2):
        with pytest.raises(LensError, match="ranks must be at least 1"):
            cost(SHAPES, ranks=ranks)
        with pytest.raises(LensError, match="ranks must be at least 1"):
            state_bytes("AdamW", [], ranks)


def test_counting_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import normuon_lens.optim.cost, normuon_lens.optim.presets\n"
        "import normuon_lens.optim\n"
        "normuon_lens.optim.NorMuon"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith('pip install "normuon-lens[torch]"')


def test_no_module_takes_the_place_of_a_function() -> None:
    code = (
        "import normuon_lens.optim.orthogonalize\n"
        "from normuon_lens.optim import orthogonalize\n"
        "import torch\n"
        "orthogonalize(torch.eye(2))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert dir(normuon_lens.optim) == normuon_lens.optim.__all__
    with pytest.raises(AttributeError, match="no attribute 'Adam'"):
        normuon_lens.optim.Adam  # noqa: B018
