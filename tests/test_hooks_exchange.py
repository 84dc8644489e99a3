"""Matrices come together from the rows of all ranks, each once, and owners share the work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from normuon_lens.hooks.exchange import Exchange, ExchangeLost, Weight, Whole, deal
from normuon_lens.hooks.portions import Portion
from normuon_lens.hooks.schedule import Schedule
from normuon_lens.hooks.selection import Watched
from normuon_lens.optim.owners import row_range
from normuon_lens.optim.sharded import Holding
from normuon_lens.runfile import Matrices, Matrix

RANKS = 3
SHAPES = [(9, 4), (2, 5), (4, 3), (6, 6)]  # on three ranks 3, 3, 3 and 1, 1, 0 and 2, 2, 0 rows
SCHEDULE = Schedule(every=2, norms_every=1, matrices_every=2)


def on_threads(body: Callable[[Exchange, int], Any], **given: Any) -> list[Any]:
    """Call `body` on every rank, a thread each; return the results, or what was raised."""
    store, results = dist.HashStore(), [None] * RANKS

    def run(rank: int) -> None:
        group = dist.ProcessGroupGloo(store, rank, RANKS, timedelta(seconds=10))
        try:
            results[rank] = body(make_exchange(group, rank, **given), rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def make_exchange(group: Any, rank: int, owners: dict[int, int] | None = None) -> Exchange:
    """Make one; the third matrix is float64, the last has inputs first and is on every rank."""
    watched, portions, matrices = [], [], []
    for i, (m, n) in enumerate(SHAPES):
        spans = tuple(row_range(m, RANKS, r) for r in range(RANKS))
        holding = Holding(m, spans, ((),) * RANKS) if i < 3 else Holding.everywhere(m, RANKS)
        watched.append(Watched(nn.Parameter(torch.empty(m, n)), i, 0, 0, i == 3))
        portions.append(Portion(holding, (owners or {}).get(i), i == 3))
        matrices.append(Matrix(f"w{i}", m, n, "float64" if i == 2 else "float32"))
    return Exchange(group, rank, RANKS, watched, portions, Matrices(matrices))


def values(i: int, stage: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * i + len(stage))
    return torch.randn(SHAPES[i], generator=generator, dtype=torch.float64)


def offer(exchange: Exchange, rank: int, stages: tuple[str, ...], scale: float = 1.0) -> None:
    exchange.begin()
    for item, portion in zip(exchange._watched, exchange._portions, strict=True):
        rows = slice(*portion.holding.spans[rank])
        for stage in stages:
            mine = values(item.index, stage)[rows].to(torch.float32 if item.index != 2 else None)
            exchange.offer(item, stage, mine, scale=scale, decay=0.25, rounded=None)
            mine.zero_()  # a copy was taken
        weight = values(item.index, "weight")[rows]
        exchange.weigh(item, float(torch.linalg.vector_norm(weight)))


def turns(exchange: Exchange, rank: int) -> list[tuple[list[Any], int]]:
    """Take three sampled steps; what was received at each, and the bytes sent for it."""
    received = []
    for step in (2, 4, 6):
        before = exchange.bytes
        offer(exchange, rank, ("gradient", "update"), scale=-2.0)
        assert exchange.agree(step, SCHEDULE, failed=False) == (SCHEDULE, True)
        exchange.send()
        received.append((list(exchange.receive()), exchange.bytes - before))
    assert list(exchange.receive()) == []
    return received


def test_every_matrix_comes_together_once_a_turn_and_owners_change() -> None:
    results = on_threads(turns)
    for result in results:
        assert isinstance(result, list), result
    owners: dict[int, set[int]] = {i: set() for i in range(len(SHAPES))}
    for turn in range(3):
        got: list[tuple[int, str]] = []
        sent = 0
        for rank, result in enumerate(results):
            wholes, count = result[turn]
            sent += count
            for whole in wholes:
                assert isinstance(whole, Whole)
                index = whole.item.index
                got.append((index, whole.stage))
                owners[index].add(rank)
                expected = -2.0 * values(index, whole.stage)
                assert whole.values.dtype == ("float64" if index == 2 else "float32")
                exact = 1e-15 if index == 2 else 1e-6
                stored = expected.T if index == 3 else expected
                assert abs(whole.values - stored.numpy()).max() <= exact * 10
                norm = float(torch.linalg.vector_norm(values(index, "weight")))
                assert whole.weight_norm == pytest.approx(norm, rel=1e-9)
                assert whole.decay == 0.25
        assert sorted(got) == sorted((i, s) for i in range(4) for s in ("gradient", "update"))
        # Nothing of the matrix that every rank has; of the others the rows that others hold.
        owner = deal(
            {i: float(m * n * min(m, n)) for i, (m, n) in enumerate(SHAPES)}, [0.0] * 3, turn
        )
        expected_bytes = 48 * RANKS * (RANKS - 1)
        for i, (m, n) in enumerate(SHAPES[:3]):
            start, stop = row_range(m, RANKS, owner[i])
            size = 8 if i == 2 else 4
            expected_bytes += 2 * size * n * (m - (stop - start)) + 8 * (RANKS - 1)
        assert sent == expected_bytes
    assert all(len(found) > 1 for found in owners.values())


def test_of_what_an_owner_has_whole_only_the_norm_of_the_weight_is_sent() -> None:
    def body(exchange: Exchange, rank: int) -> tuple[list[Any], int]:
        exchange.begin()
        item = exchange._watched[0]
        exchange.weigh(item, float(rank + 1))
        exchange.agree(2, SCHEDULE, failed=False)
        before = exchange.bytes
        exchange.send()
        return list(exchange.receive()), exchange.bytes - before

    results = on_threads(body, owners={0: 1})
    assert [sent for _, sent in results] == [8, 0, 8]
    assert [len(found) for found, _ in results] == [0, 1, 0]
    (weight,) = results[1][0]
    assert isinstance(weight, Weight)
    assert weight.item.index == 0
    assert weight.norm == pytest.approx((1 + 4 + 9) ** 0.5)


def test_ranks_go_on_with_what_the_slowest_can_afford() -> None:
    wanted = [Schedule(2, 1, 2, 5), Schedule(6, 1, 6, 5), Schedule(2, 4, 2, 5)]

    def body(exchange: Exchange, rank: int) -> tuple[Schedule, bool]:
        exchange.begin()
        return exchange.agree(2, wanted[rank], failed=False)

    assert on_threads(body) == [(Schedule(6, 4, 6, 5), True)] * RANKS


@pytest.mark.parametrize("odd", range(RANKS))
def test_all_ranks_learn_alike_that_one_is_elsewhere_or_can_no_more(odd: int) -> None:
    def elsewhere(exchange: Exchange, rank: int) -> Any:
        exchange.begin()
        return exchange.agree(3 if rank == odd else 2, SCHEDULE, failed=False)

    def failed(exchange: Exchange, rank: int) -> Any:
        exchange.begin()
        return exchange.agree(2, SCHEDULE, failed=rank == odd)

    def another_matrix(exchange: Exchange, rank: int) -> Any:
        exchange.begin()
        exchange.weigh(exchange._watched[int(rank == odd)], 1.0)
        _, alike = exchange.agree(2, SCHEDULE, failed=False)
        # Nothing is sent then, and the next step is as good as any.
        offer(exchange, rank, ("update",))
        again = exchange.agree(4, SCHEDULE, failed=False)
        exchange.send()
        return alike, again, len(list(exchange.receive()))

    for error in on_threads(elsewhere):
        assert isinstance(error, ExchangeLost)
        assert "different steps" in str(error)
    for error in on_threads(failed):
        assert isinstance(error, ExchangeLost)
        assert str(error) == "a rank can record no more"
    results = on_threads(another_matrix)
    assert [(alike, again) for alike, again, _ in results] == [(False, (SCHEDULE, True))] * RANKS
    assert sum(count for *_, count in results) == len(SHAPES)


def test_what_was_offered_of_a_step_that_never_ended_is_forgotten() -> None:
    def body(exchange: Exchange, rank: int) -> Any:
        if rank == 1:
            offer(exchange, rank, ("update", "gradient"))
        offer(exchange, rank, ("update",))
        _, alike = exchange.agree(2, SCHEDULE, failed=False)
        exchange.send()
        return alike, [whole.stage for whole in exchange.receive()]

    for alike, stages in on_threads(body):
        assert alike
        assert set(stages) <= {"update"}


# --- who owns what -------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 50), max_size=12),
    st.lists(st.integers(0, 60), min_size=1, max_size=5),
    st.integers(0, 20),
)
def test_work_is_dealt_evenly(costs: list[int], loads: list[int], turn: int) -> None:
    dealt = deal(dict(enumerate(map(float, costs))), list(map(float, loads)), turn)
    assert sorted(dealt) == list(range(len(costs)))
    assert set(dealt.values()) <= set(range(len(loads)))
    total = list(loads)
    for matrix, rank in dealt.items():
        total[rank] += costs[matrix]
    # Nobody who was given something has more than the least loaded by over one matrix.
    for rank in dealt.values():
        assert total[rank] - min(total) <= max(costs)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 5))
def test_the_dearest_matrix_goes_round_and_ranks_agree(costs: list[int], ranks: int) -> None:
    of = dict(enumerate(map(float, costs)))
    turns = [deal(of, [0.0] * ranks, turn) for turn in range(ranks)]
    dearest = max(of, key=lambda i: (of[i], -i))
    assert sorted(dealt[dearest] for dealt in turns) == list(range(ranks))
    # Every rank deals for itself: the order in which it knows the matrices must not matter.
    assert [deal(dict(reversed(of.items())), [0.0] * ranks, turn) for turn in range(ranks)] == turns
