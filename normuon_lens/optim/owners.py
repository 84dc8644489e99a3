"""Who owns what among ranks: rows of a matrix, and whole matrices for the orthogonalization.

A sharded optimizer keeps the rows of every matrix spread over all ranks, but orthogonalizes a
matrix where it is whole. So the matrices are dealt out like cards: the largest first, one to every
rank, in as many rounds as it takes [1]_.

.. [1] NorMuon, Algorithm 2, https://arxiv.org/abs/2510.05491
"""

from collections.abc import Sequence

from normuon_lens.errors import LensError

ORDERS = ("round_robin", "snake")


def assign_owners(
    sizes: Sequence[int], ranks: int, order: str = "round_robin"
) -> list[list[int | None]]:
    """Deal matrices out to ranks, one to every rank in each round.

    Parameters
    ----------
    sizes : sequence of int
        Elements of each matrix, in the order of the model.
    ranks : int
        At least 1.
    order : {"round_robin", "snake"}
        With ``"snake"`` every odd round runs from the last rank to the first, so that the rank
        that had the largest matrix of one round has the smallest of the next.

    Returns
    -------
    list of list of (int or None)
        The rounds; entry j of a round is the index into `sizes` of the matrix that rank j owns
        then, None if it has none. Larger matrices come first, equal ones in the order of the
        model.

    Raises
    ------
    LensError
        If `ranks` is not positive, or `order` is unknown.

    Examples
    --------
    >>> assign_owners([10, 40, 20, 30, 20], ranks=2)
    [[1, 3], [2, 4], [0, None]]
    >>> assign_owners([10, 40, 20, 30, 20], ranks=2, order="snake")
    [[1, 3], [4, 2], [0, None]]
    """
    check_ranks(ranks)
    if order not in ORDERS:
        raise LensError(f"order of owners must be one of {', '.join(ORDERS)}, got {order!r}.")
    # sorted is stable: every rank finds the same order without a word to the others.
    largest_first = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    rounds = []
    for start in range(0, len(sizes), ranks):
        dealt: list[int | None] = [*largest_first[start : start + ranks]]
        dealt += [None] * (ranks - len(dealt))
        odd = start // ranks % 2 == 1
        rounds.append(dealt[::-1] if odd and order == "snake" else dealt)
    return rounds


def row_range(rows: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return which rows of a matrix one rank holds, as `torch.chunk` and FSDP2 split them.

    Parameters
    ----------
    rows : int
        Of the whole matrix, at least 0.
    ranks : int
        At least 1.
    rank : int
        From 0 up to, not including, `ranks`.

    Returns
    -------
    start, stop : int
        Every rank holds ceil(rows / ranks) rows, the last ones what is left: fewer, or none
        (then ``start == stop``).

    Raises
    ------
    LensError
        If `ranks` is not positive, `rank` is none of them, or `rows` is negative.

    Examples
    --------
    >>> [row_range(9, 4, rank) for rank in range(4)]
    [(0, 3), (3, 6), (6, 9), (9, 9)]
    """
    check_ranks(ranks)
    if not 0 <= rank < ranks:
        raise LensError(f"rank must be one of the {ranks} ranks, 0 to {ranks - 1}, got {rank}.")
    if rows < 0:
        raise LensError(f"rows must be at least 0, got {rows}.")
    share = -(-rows // ranks)
    return min(rank * share, rows), min((rank + 1) * share, rows)


def check_ranks(ranks: int) -> None:
    """Raise a LensError unless there is at least one rank."""
    if ranks < 1:
        raise LensError(f"ranks must be at least 1, got {ranks}.")
