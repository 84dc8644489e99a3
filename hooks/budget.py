"""Keeps the recorder's cost within a share of the training's time, by recording less often."""

from __future__ import annotations

import math
from dataclasses import replace

from normuon_lens.errors import AttachError

from .schedule import Schedule

WINDOW = 50
"""Steps between two looks at the cost."""

WARM_UP = 5
"""First steps that are no measure: buffers are made, code is loaded."""

NORMS_SHARE = 0.7
"""Of the budget, at most so much is for neuron norms; the rest is for whole matrices."""

LEAST_SHARE = 0.25
"""Of the budget, so much is always for recording: where what cannot be thinned (shadows) takes more
than all of it, recording next to nothing would not help."""


class Budget:
    """Measures what steps of each kind cost, and says how often they can be afforded.

    Parameters
    ----------
    share : float
        Time in hooks relative to the rest of the training, 0.05 for 5 %.
    asked : Schedule
        What the user asked for: never recorded more often than that.

    Raises
    ------
    AttachError
        If `share` is not a number above 0.
    """

    def __init__(self, share: float, asked: Schedule) -> None:
        if not 0 < share < math.inf:
            raise AttachError(f"budget={share}: expected a share of the training time such as 0.05")
        self.share = share
        self._asked = asked
        self._cost: dict[str, float] = {}
        self._seen = 0
        self._clear()

    def spent(self, kind: str, seconds: float, elapsed: float) -> None:
        """Note one step.

        Parameters
        ----------
        kind : {"", "norms", "sample"}
            What was recorded of it.
        seconds, elapsed : float
            In hooks, and from the end of the step before to its own, hooks included.
        """
        self._seen += 1
        if self._seen <= WARM_UP:
            return
        self._spent.setdefault(kind, []).append(seconds)
        self._rest += elapsed - seconds
        self._count += 1

    def affordable(self, now: Schedule) -> Schedule:
        """Return the schedule to go on with: `now`, unless a look at the cost says otherwise."""
        if self._count < WINDOW:
            return now
        self._cost |= {kind: sum(costs) / len(costs) for kind, costs in self._spent.items()}
        rest = self._rest / self._count
        self._clear()
        wanted = self._needed(rest)
        # Back to more only when it is worth a change, lest it goes to and fro.
        if wanted.every > now.every or wanted.norms_every > now.norms_every:
            return replace(wanted, first=now.first)
        if 2 * wanted.every <= now.every or 2 * wanted.norms_every <= now.norms_every:
            return replace(wanted, first=now.first)
        return now

    def _needed(self, rest: float) -> Schedule:
        asked = self._asked
        nothing = self._cost.get("", 0.0)
        norms = max(0.0, self._cost.get("norms", 0.0) - nothing)
        spare = max(self.share * rest - nothing, LEAST_SHARE * self.share * rest, 1e-9)
        norms_every = asked.norms_every
        if norms / norms_every > NORMS_SHARE * spare:
            norms_every *= math.ceil(norms / (NORMS_SHARE * spare * norms_every))
        # A sampled step takes norms too, and only some of them were due anyway.
        sample = max(0.0, self._cost.get("sample", 0.0) - nothing - norms / norms_every)
        left = spare - norms / norms_every
        factor = max(1, math.ceil(sample / (left * asked.sample_every)))
        return Schedule(
            asked.every * factor, norms_every, asked.matrices_every * factor, asked.first
        )

    def _clear(self) -> None:
        self._spent: dict[str, list[float]] = {}
        self._rest, self._count = 0.0, 0
