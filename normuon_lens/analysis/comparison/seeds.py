"""Several seeds of one variant: how much they scatter, and whether a difference is more than that.

A variant is an optimizer with its settings. Runs of two variants from the same seed started from
the same weights and saw the same batches, so most of what a seed does cancels in their difference:
it is taken seed by seed. Whether one variant is better is told by the sign test, which asks only
how often it was: with so few seeds, assumptions on how losses are distributed could not be checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """A figure over the runs of a variant that have it.

    Attributes
    ----------
    mean : float
        NaN without any.
    sd : float
        Sample standard deviation (over n - 1); NaN with fewer than two.
    count : int
    """

    mean: float
    sd: float
    count: int


@dataclass(frozen=True)
class Paired:
    """A variant against the first one, seed by seed; lower is better.

    Attributes
    ----------
    better, worse, equal : int
        Seeds. A variant that got to a target is better than one that did not within as many
        steps; seeds of which that cannot be told are in none of the three.
    p : float
        Two-sided p-value of the sign test: how likely a count at least as lopsided would be if
        either were as likely to be better. NaN if no seed decides.
    difference : Spread
        This variant minus the first one, over the seeds in which both have the figure.
    """

    better: int
    worse: int
    equal: int
    p: float
    difference: Spread


@dataclass(frozen=True)
class Variant:
    """Runs that differ in their seed alone.

    Attributes
    ----------
    name : str
        The optimizer, with the settings that tell it apart.
    runs : tuple of int
        Places of its runs in the comparison.
    seeds : tuple of (int or None)
        Of each run; None if it was not recorded.
    spreads : dict of str to Spread
        By figure.
    against_first : dict of str to Paired
        By figure, of those that say which is better; empty for the first variant, and where no
        seed is in both.
    """

    name: str
    runs: tuple[int, ...]
    seeds: tuple[int | None, ...]
    spreads: dict[str, Spread]
    against_first: dict[str, Paired]


@dataclass(frozen=True)
class Figure:
    """One number of every run.

    Attributes
    ----------
    values : sequence of float
        Lower is better; NaN where a run does not have it.
    beyond : sequence of float
        Where it is known that a missing value is larger than this: a target that was not reached
        within so many steps. NaN where a missing value says nothing.
    """

    values: Sequence[float]
    beyond: Sequence[float]


def over_seeds(
    names: Sequence[str],
    seeds: Sequence[int | None],
    figures: Mapping[str, Figure],
    paired: Sequence[str],
) -> tuple[Variant, ...]:
    """Gather runs into variants.

    Parameters
    ----------
    names : sequence of str
        Variant of every run.
    seeds : sequence of (int or None)
        Seed of every run. Runs of one variant and seed make one pair, by their mean.
    figures : mapping of str to Figure
    paired : sequence of str
        Those of them in which variants are compared with the first.

    Returns
    -------
    tuple of Variant
        In the order in which they appear.
    """
    members: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        members.setdefault(name, []).append(i)
    first = next(iter(members), "")
    return tuple(
        Variant(
            name,
            tuple(runs),
            tuple(seeds[i] for i in runs),
            {key: spread(figure.values[i] for i in runs) for key, figure in figures.items()},
            {}
            if name == first
            else {
                key: found
                for key in paired
                if (found := _paired(figures[key], seeds, runs, members[first]))
            },
        )
        for name, runs in members.items()
    )


def spread(values: Iterable[float]) -> Spread:
    """Return mean, sample standard deviation and count of what is finite."""
    known = [value for value in values if math.isfinite(value)]
    mean = float(np.mean(known)) if known else math.nan
    sd = float(np.std(known, ddof=1)) if len(known) > 1 else math.nan
    return Spread(mean, sd, len(known))


def sign_test(better: int, worse: int) -> float:
    """Return the two-sided p-value of so many signs of either kind; NaN without any."""
    n = better + worse
    if not n:
        return math.nan
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / (1 << n))


def caveats_of_seeds(variants: Sequence[Variant]) -> Iterator[str]:
    """Say whether there are seeds enough to tell a difference from their noise."""
    logged = [variant for variant in variants if variant.spreads["loss"].count]
    for variant in logged:
        for seed in sorted({x for x in variant.seeds if x is not None}):
            if (count := variant.seeds.count(seed)) > 1:
                yield f"{variant.name}: {count} runs of seed {seed}, which are paired as one"
    if len(logged) < 2:
        return
    if all(len(variant.runs) == 1 for variant in logged):
        several = len({variant.seeds for variant in logged}) > 1
        yield (
            f"one run of each{', of different seeds' if several else ''}: they cannot tell whether "
            "losses differ by more than they do from seed to seed"
        )
        return
    for variant in logged:
        if variant is not variants[0] and not variant.against_first:
            yield f"{variant.name} and {variants[0].name} have no seed in common to be paired by"


def _paired(
    figure: Figure, seeds: Sequence[int | None], runs: Sequence[int], first: Sequence[int]
) -> Paired | None:
    here, there = _by_seed(figure, seeds, runs), _by_seed(figure, seeds, first)
    pairs = [(here[seed], there[seed]) for seed in here if seed in there]
    if not pairs:
        return None
    signs = [_sign(*ours, *theirs) for ours, theirs in pairs]
    better, worse, equal = (signs.count(sign) for sign in (-1, 1, 0))
    difference = spread(ours[0] - theirs[0] for ours, theirs in pairs)
    return Paired(better, worse, equal, sign_test(better, worse), difference)


def _by_seed(
    figure: Figure, seeds: Sequence[int | None], runs: Sequence[int]
) -> dict[int, tuple[float, float]]:
    """Return value and what a missing one lies beyond, by known seed."""
    found: dict[int, list[int]] = {}
    for i in runs:
        seed = seeds[i]
        if seed is not None:
            found.setdefault(seed, []).append(i)
    return {
        seed: (spread(figure.values[i] for i in of).mean, min(figure.beyond[i] for i in of))
        for seed, of in found.items()
    }


def _sign(value: float, beyond: float, other: float, other_beyond: float) -> int | None:
    """Compare two figures: -1 if the first is better (lower), None if it cannot be told."""
    if math.isfinite(value) and math.isfinite(other):
        return (value > other) - (value < other)
    if math.isfinite(value) and value <= other_beyond:
        return -1
    if math.isfinite(other) and other <= beyond:
        return 1
    return None
