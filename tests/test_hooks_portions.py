"""Every neuron's norm is recorded by exactly one rank, or by one each of those that share it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from normuon_lens.hooks.portions import Portion, recorded_rows
from normuon_lens.optim.sharded import Holding
from normuon_lens.runfile import STAGES, Matrices, Matrix


@st.composite
def spread(draw: Any) -> tuple[int, list[Portion], Matrices]:
    """Return some ranks, and matrices of all kinds held by them, as torch would spread them."""
    copies, shards = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    ranks = copies * shards
    numbered = draw(st.permutations(range(ranks)))  # HSDP numbers ranks in either order
    portions, matrices = [], []
    for i in range(draw(st.integers(1, 4))):
        rows, width = draw(st.integers(2, 12)), draw(st.integers(2, 4))
        inputs_first = draw(st.booleans())
        everywhere = draw(st.booleans())
        spans: list[Any] = [None] * ranks
        replicas: list[Any] = [None] * ranks
        # torch says which rows each rank has, in ascending order; a rank may have none.
        chunks = [chunk.tolist() for chunk in torch.arange(rows).chunk(shards)]
        for place, rank in enumerate(numbered):
            copy, shard = divmod(place, shards)
            held = chunks[shard] if shard < len(chunks) else []
            spans[rank] = (held[0], held[-1] + 1) if held else (rows, rows)
            replicas[rank] = (copy,)
            if everywhere:
                spans[rank], replicas[rank] = (0, rows), (rank,)
        owner = draw(st.none() | st.integers(0, ranks - 1))
        portions.append(Portion(Holding(rows, tuple(spans), tuple(replicas)), owner, inputs_first))
        matrices.append(Matrix(f"w{i}", *((width, rows) if inputs_first else (rows, width))))
    return ranks, portions, Matrices(matrices)


@given(spread())
def test_every_norm_is_recorded_once_at_every_stage(
    case: tuple[int, list[Portion], Matrices],
) -> None:
    ranks, portions, matrices = case
    recorded = [recorded_rows(portions, matrices, rank) for rank in range(ranks)]
    for stage in STAGES:
        for i, (portion, matrix) in enumerate(zip(portions, matrices, strict=True)):
            times: Counter[int] = Counter()
            parts = set()
            for rank in range(ranks):
                start, stop, of = recorded[rank][stage][i]
                times.update(range(start, stop))
                if start == stop:
                    continue
                parts.add(of)
                assert 0 <= start < stop <= matrix.m
                if portion.is_whole(stage):
                    assert rank == portion.owner
                elif portion.inputs_first:
                    assert (start, stop) == (0, matrix.m)
                    assert portion.holding.spans[rank][0] < portion.holding.spans[rank][1]
                else:
                    # Only what is there can be recorded.
                    assert (start, stop) == portion.holding.spans[rank]
            (of,) = parts
            assert times == dict.fromkeys(range(matrix.m), of)
            if not portion.inputs_first or portion.is_whole(stage):
                assert of == 1


@given(spread())
def test_inputs_first_norms_come_together_from_their_parts(
    case: tuple[int, list[Portion], Matrices],
) -> None:
    ranks, portions, matrices = case
    for i, portion in enumerate(portions):
        if not portion.inputs_first:
            continue
        stored = np.random.default_rng(i).standard_normal((portion.holding.rows, matrices[i].m))
        squares = np.zeros(matrices[i].m)
        for rank in range(ranks):
            start, stop, _ = portion.norms("gradient", i, rank, matrices[i].m)
            if start < stop:
                squares += (stored[slice(*portion.holding.spans[rank])] ** 2).sum(0)
        np.testing.assert_allclose(squares, (stored**2).sum(0))


def test_an_owner_records_whole_what_it_sees_whole_and_gradients_stay_with_their_rows() -> None:
    holding = Holding(9, ((0, 5), (5, 9)), ((), ()))
    owned = [Portion(holding, 1, False)]
    matrices = Matrices([Matrix("w", 9, 4)])
    first, second = (recorded_rows(owned, matrices, rank) for rank in (0, 1))
    assert first["gradient"] == ((0, 5, 1),)
    assert second["gradient"] == ((5, 9, 1),)
    for stage in STAGES[1:]:
        assert first[stage] == ((0, 0, 1),)
        assert second[stage] == ((0, 9, 1),)


def test_replicas_share_the_matrices() -> None:
    # On two replicas of two shards each, every rank records half of every other matrix.
    holding = Holding(8, ((0, 4), (4, 8), (0, 4), (4, 8)), ((0,), (0,), (1,), (1,)))
    matrices = Matrices([Matrix(f"w{i}", 8, 3) for i in range(6)])
    portions = [Portion(holding, None, False)] * 6
    counts = [
        sum(stop - start for start, stop, _ in recorded_rows(portions, matrices, rank)["update"])
        for rank in range(4)
    ]
    assert counts == [12] * 4
