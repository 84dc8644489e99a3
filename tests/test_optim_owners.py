"""Dealing matrices and rows out to ranks."""

from __future__ import annotations

import itertools

import pytest
import torch

from normuon_lens.errors import LensError
from normuon_lens.optim.owners import assign_owners, row_range

RANKS = (1, 2, 3, 4, 5, 8, 16)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 8, 9, 16, 17, 100])
def test_rows_are_split_as_torch_splits_them(rows: int, ranks: int) -> None:
    chunks = [chunk.tolist() for chunk in torch.arange(rows).chunk(ranks)]
    chunks += [[]] * (ranks - len(chunks))
    ranges = [row_range(rows, ranks, rank) for rank in range(ranks)]
    assert [list(range(*ends)) for ends in ranges] == chunks
    assert all(0 <= start <= stop <= rows for start, stop in ranges)


@pytest.mark.parametrize("order", ["round_robin", "snake"])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 16, 33])
def test_every_matrix_has_one_owner(count: int, ranks: int, order: str) -> None:
    sizes = [(i * 7919) % 13 for i in range(count)]
    rounds = assign_owners(sizes, ranks, order)
    assert all(len(dealt) == ranks for dealt in rounds)
    assert len(rounds) == -(-count // ranks)
    dealt = [index for index in itertools.chain(*rounds) if index is not None]
    assert sorted(dealt) == list(range(count))
    # No matrix waits for a later round while a smaller one goes before it.
    per_round = [[sizes[i] for i in dealt if i is not None] for dealt in rounds]
    for before, after in itertools.pairwise(per_round):
        assert min(before) >= max(after)


def test_largest_first_and_equal_ones_in_the_order_of_the_model() -> None:
    assert assign_owners([1, 3, 2, 3, 3], 2) == [[1, 3], [4, 2], [0, None]]
    assert assign_owners([], 4) == []
    assert assign_owners([5], 3) == [[0, None, None]]


def test_snake_turns_every_odd_round() -> None:
    sizes = [8, 7, 6, 5, 4, 3, 2]
    assert assign_owners(sizes, 3, "snake") == [[0, 1, 2], [5, 4, 3], [6, None, None]]
    assert assign_owners(sizes[:5], 3, "snake") == [[0, 1, 2], [None, 4, 3]]
    assert assign_owners(sizes[:5], 3) == [[0, 1, 2], [3, 4, None]]


@pytest.mark.parametrize("ranks", [0, -1])
def test_no_ranks(ranks: int) -> None:
    with pytest.raises(LensError, match=f"ranks must be at least 1, got {ranks}"):
        assign_owners([1], ranks)
    with pytest.raises(LensError, match=f"ranks must be at least 1, got {ranks}"):
        row_range(1, ranks, 0)


def test_what_cannot_be_meant() -> None:
    with pytest.raises(LensError, match="one of round_robin, snake, got 'zigzag'"):
        assign_owners([1], 2, "zigzag")
    with pytest.raises(LensError, match="0 to 1, got 2"):
        row_range(4, 2, 2)
    with pytest.raises(LensError, match="0 to 1, got -1"):
        row_range(4, 2, -1)
    with pytest.raises(LensError, match="rows must be at least 0, got -4"):
        row_range(-4, 2, 0)
