"""What an optimizer costs: state to keep, bytes to send, products to compute.

All of it is counted from the shapes of the weights, in whole numbers, without torch. Over several
ranks the rows of every matrix are split as FSDP2 splits them, and there are two schemes for what
needs a matrix whole, which is Newton-Schulz:

- ``"owners"``: each matrix has one owner. The other ranks send it their rows of the momentum, it
  orthogonalizes, and sends every rank its rows of the result [1]_.
- ``"everywhere"``: every rank sends its rows to every other, and all do the same work.

Under NorMuon a row takes its second moment along, one number in float32: the owner needs those of
all rows, for the step size depends on the norm of the whole update.

.. [1] NorMuon, Algorithm 2, https://arxiv.org/abs/2510.05491
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from normuon_lens.errors import LensError
from normuon_lens.optim.owners import assign_owners, check_ranks, row_range

Shape = tuple[int, int]
"""Rows m and columns n of a matrix."""

RULES = ("AdamW", "Muon", "NorMuon")
SCHEMES = ("owners", "everywhere")
BYTES = {"float32": 4, "bfloat16": 2}
SECOND_MOMENT_BYTES = 4
"""Of NorMuon's one number a row, on the wire: float32, whatever the precision of the momentum."""

PAPER_TRAFFIC = {"float32": (12, 16), "bfloat16": (8, 12)}
"""Bytes a parameter and step under FSDP [NorMuon]: under AdamW, and under Muon or NorMuon.

Every pass over the parameters counts whole. Our reading of the totals: two gathers of the weights
(4 B each, in BF16 2 B), one reduce-scatter of the gradients (4 B), and for Muon and NorMuon the
momentum to its owner and the update back (2 B each: Newton-Schulz runs in BF16).
"""


@dataclass(frozen=True)
class Cost:
    """What one way to optimize a model costs.

    Attributes
    ----------
    rule : {"AdamW", "Muon", "NorMuon"}
        How the matrices are optimized; all other parameters are AdamW's.
    scheme : {"owners", "everywhere"} or None
        Where matrices are orthogonalized; None under AdamW, which does not.
    precision : {"float32", "bfloat16"}
        Of the state, and of what is sent.
    parameters : int
        Elements of all matrices.
    matrix_state : int
        Bytes of state for the matrices, over all ranks.
    rank_state : tuple of int, one per rank
        Bytes of state that each rank keeps, for the whole model.
    rank_sent : tuple of int, one per rank
        Bytes that each rank sends to others in one step of the optimizer, and receives.
    rank_flops : tuple of int, one per rank
        Floating-point operations of Newton-Schulz on each rank in one step.
    """

    rule: str
    scheme: str | None
    precision: str
    parameters: int
    matrix_state: int
    rank_state: tuple[int, ...]
    rank_sent: tuple[int, ...]
    rank_flops: tuple[int, ...]

    @property
    def sent_per_parameter(self) -> float:
        """Bytes sent per step by the average rank, per element of the matrices."""
        return sum(self.rank_sent) / len(self.rank_sent) / self.parameters

    @property
    def balance(self) -> float:
        """Work of the busiest rank relative to the average one: 1 is perfect; NaN without work."""
        whole = sum(self.rank_flops)
        return max(self.rank_flops) * len(self.rank_flops) / whole if whole else math.nan


def cost(
    matrices: Sequence[Shape],
    others: Iterable[tuple[int, ...]] = (),
    *,
    ranks: int = 1,
    steps: int = 5,
    order: str = "round_robin",
) -> list[Cost]:
    """Count what a model costs under every rule, scheme and precision.

    Parameters
    ----------
    matrices : sequence of (int, int)
        Shapes (m, n), at least one, in the order of the model.
    others : iterable of tuple of int
        Shapes of all other parameters.
    ranks : int
        Over which the rows of every parameter are split.
    steps : int
        Newton-Schulz iterations.
    order : {"round_robin", "snake"}
        In which owners are dealt, see `assign_owners`.

    Returns
    -------
    list of Cost
        In float32, then in bfloat16: AdamW, then Muon and NorMuon under either scheme.

    Raises
    ------
    LensError
        If there are no matrices, or a number or a word is out of range.
    """
    if not matrices:
        raise LensError("cost needs at least one matrix.")
    adamw_rows = [(shape[0], math.prod(shape[1:])) for shape in others]
    ways = [("AdamW", None), *((rule, scheme) for rule in RULES[1:] for scheme in SCHEMES)]
    work = {
        scheme: newton_schulz_work(matrices, ranks, scheme=scheme, order=order, steps=steps)
        for scheme in SCHEMES
    }
    costs = []
    for precision in BYTES:
        rest = state_bytes("AdamW", adamw_rows, ranks, precision)
        for rule, scheme in ways:
            state = state_bytes(rule, matrices, ranks, precision)
            sent = work_done = [0] * ranks
            if scheme is not None:
                work_done = work[scheme]
                sent = wire_bytes(
                    rule, matrices, ranks, scheme=scheme, order=order, precision=precision
                )
            costs.append(
                Cost(
                    rule,
                    scheme,
                    precision,
                    parameters=sum(m * n for m, n in matrices),
                    matrix_state=sum(state),
                    rank_state=tuple(map(sum, zip(state, rest, strict=True))),
                    rank_sent=tuple(sent),
                    rank_flops=tuple(work_done),
                )
            )
    return costs


def state_elements(rule: str, m: int, n: int) -> int:
    """Return how many numbers an optimizer keeps for one matrix of shape (m, n).

    Parameters
    ----------
    rule : {"AdamW", "Muon", "NorMuon"}
    m, n : int
        Rows and columns.

    Returns
    -------
    int
        AdamW 2mn (momentum and second moment), Muon mn (momentum), NorMuon m(n + 1) (momentum,
        and a second moment for each row). Counters of steps are left out.

    Raises
    ------
    LensError
        If the rule is unknown.

    References
    ----------
    NorMuon, https://arxiv.org/abs/2510.05491
    """
    _refuse_unknown("rule", rule, RULES)
    return {"AdamW": 2 * m * n, "Muon": m * n, "NorMuon": m * (n + 1)}[rule]


def state_bytes(
    rule: str, shapes: Iterable[Shape], ranks: int = 1, precision: str = "float32"
) -> list[int]:
    """Return the bytes of state that each rank keeps, for its rows of every matrix.

    Parameters
    ----------
    rule : {"AdamW", "Muon", "NorMuon"}
    shapes : iterable of (int, int)
    ranks : int
    precision : {"float32", "bfloat16"}
        Of all state. The optimizers here keep float32 at least, so bfloat16 is for comparison.

    Returns
    -------
    list of int, one per rank

    Raises
    ------
    LensError
        If a word is unknown or there are no ranks.
    """
    _refuse_unknown("precision", precision, BYTES)
    return _held(((m, state_elements(rule, 1, n) * BYTES[precision]) for m, n in shapes), ranks)


def wire_bytes(
    rule: str,
    shapes: Sequence[Shape],
    ranks: int,
    *,
    scheme: str = "owners",
    order: str = "round_robin",
    precision: str = "float32",
) -> list[int]:
    """Return the bytes that each rank sends to other ranks in one step of the optimizer.

    Parameters
    ----------
    rule : {"AdamW", "Muon", "NorMuon"}
        AdamW sends nothing.
    shapes : sequence of (int, int)
        In the order of the model.
    ranks : int
    scheme : {"owners", "everywhere"}
    order : {"round_robin", "snake"}
        In which owners are dealt, see `assign_owners`.
    precision : {"float32", "bfloat16"}
        Of momentum and update on the wire.

    Returns
    -------
    list of int, one per rank
        A rank receives as many bytes as it sends under ``"owners"``: every row comes back the way
        it went.

    Raises
    ------
    LensError
        If a word is unknown or there are no ranks.
    """
    _refuse_unknown("rule", rule, RULES)
    _refuse_unknown("scheme", scheme, SCHEMES)
    _refuse_unknown("precision", precision, BYTES)
    along = SECOND_MOMENT_BYTES if rule == "NorMuon" else 0
    rows = [(m, n * BYTES[precision] + along) for m, n in shapes]
    held = _held(rows, ranks)
    if rule == "AdamW":
        return [0] * ranks
    if scheme == "everywhere":
        return [own * (ranks - 1) for own in held]
    sent = held
    for index, owner in _owned([m * n for m, n in shapes], ranks, order):
        m, size = rows[index]
        start, stop = row_range(m, ranks, owner)
        # Its own rows it does not send, and all the others' it sends back.
        sent[owner] += (m - 2 * (stop - start)) * size
    return sent


def newton_schulz_flops(m: int, n: int, steps: int = 5) -> int:
    """Return the floating-point operations of Newton-Schulz on one matrix of shape (m, n).

    Parameters
    ----------
    m, n : int
        Rows and columns.
    steps : int
        Iterations.

    Returns
    -------
    int
        With s and l the smaller and the larger of m and n, each iteration multiplies X by its
        transpose (2ls²), the result by itself (2s³), and X by what came of that (2ls²). These are
        the plain products; code that makes use of their symmetry, or iterates on the small
        product alone, does fewer.
    """
    s, l = sorted((m, n))
    return steps * (2 * l * s**2 + 2 * s**3 + 2 * l * s**2)


def newton_schulz_work(
    shapes: Sequence[Shape],
    ranks: int,
    *,
    scheme: str = "owners",
    order: str = "round_robin",
    steps: int = 5,
) -> list[int]:
    """Return the floating-point operations of Newton-Schulz on each rank in one step.

    Parameters
    ----------
    shapes : sequence of (int, int)
        In the order of the model.
    ranks : int
    scheme : {"owners", "everywhere"}
    order : {"round_robin", "snake"}
        In which owners are dealt, see `assign_owners`.
    steps : int
        Iterations, at least 1.

    Returns
    -------
    list of int, one per rank

    Raises
    ------
    LensError
        If a word is unknown or a number out of range.
    """
    _refuse_unknown("scheme", scheme, SCHEMES)
    if steps < 1:
        raise LensError(f"steps must be at least 1, got {steps}.")
    work = [0] * ranks
    for index, owner in _owned([m * n for m, n in shapes], ranks, order):
        work[owner] += newton_schulz_flops(*shapes[index], steps)
    return [sum(work)] * ranks if scheme == "everywhere" else work


def _owned(sizes: Sequence[int], ranks: int, order: str) -> list[tuple[int, int]]:
    """Return every matrix, by index, with the rank that owns it."""
    rounds = assign_owners(sizes, ranks, order)
    return [(i, rank) for dealt in rounds for rank, i in enumerate(dealt) if i is not None]


def _held(rows: Iterable[tuple[int, int]], ranks: int) -> list[int]:
    """Return the bytes of each rank's rows, given how many rows there are and bytes per row."""
    check_ranks(ranks)
    # The first ranks hold an equal share each, one what is left, the others none: a matrix is
    # noted where this changes, however many ranks there are.
    change = [0] * (ranks + 1)
    for m, size in rows:
        _, share = row_range(m, ranks, 0)
        full, left = divmod(m, share)
        change[0] += share * size
        change[full] += (left - share) * size
        if left:
            change[full + 1] -= left * size
    return list(accumulate(change[:-1]))


def _refuse_unknown(what: str, word: str, known: Iterable[str]) -> None:
    if word not in known:
        raise LensError(f"{what} must be one of {', '.join(known)}, got {word!r}.")
