"""Figures over seeds: against the statistics of Python and SciPy, and counts made by hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import binomtest

from normuon_lens.analysis.comparison.seeds import (
    Figure,
    Variant,
    caveats_of_seeds,
    over_seeds,
    sign_test,
    spread,
)

NAN = math.nan


def variants(
    names: str, seeds: Sequence[int | None], values: list[float], beyond: list[float] | None = None
) -> tuple[Variant, ...]:
    """Gather runs of variants with names of one letter."""
    figure = Figure(values, [NAN] * len(values) if beyond is None else beyond)
    return over_seeds(list(names), seeds, {"loss": figure}, ["loss"])


def test_spread_is_mean_and_sample_deviation_of_what_is_finite() -> None:
    values = [1.5, NAN, 2.25, 4.0, math.inf]
    mean, sd = statistics.mean([1.5, 2.25, 4.0]), statistics.stdev([1.5, 2.25, 4.0])
    found = spread(values)
    assert (found.mean, found.sd) == pytest.approx((mean, sd))
    assert found.count == 3
    one, none = spread([2.0]), spread([NAN])
    assert (one.mean, one.count) == (2.0, 1)
    assert none.count == 0
    assert math.isnan(one.sd)
    assert math.isnan(none.mean)


def test_sign_test_is_the_binomial_test() -> None:
    for better in range(9):
        for worse in range(9):
            if better + worse:
                expected = binomtest(better, better + worse).pvalue
                assert sign_test(better, worse) == pytest.approx(expected)
    assert math.isnan(sign_test(0, 0))
    assert sign_test(0, 5000) == 0.0
    assert sign_test(2500, 2500) == 1.0


def test_differences_are_taken_between_runs_of_equal_seed() -> None:
    seeds = [1, 2, 3, 4, 4, 3, 2, 9]
    values = [1.0, 2.0, 3.0, 4.0, 3.5, 3.25, 1.0, 0.0]
    first, other = variants("aaaabbbb", seeds, values)
    assert (first.name, first.runs, first.seeds) == ("a", (0, 1, 2, 3), (1, 2, 3, 4))
    assert first.against_first == {}
    assert other.spreads["loss"].mean == pytest.approx(np.mean(values[4:]))
    paired = other.against_first["loss"]
    differences = [3.5 - 4, 3.25 - 3, 1 - 2]
    assert (paired.better, paired.worse, paired.equal) == (2, 1, 0)
    assert paired.p == pytest.approx(binomtest(2, 3).pvalue)
    assert paired.difference.mean == pytest.approx(np.mean(differences))
    assert paired.difference.sd == pytest.approx(np.std(differences, ddof=1))
    assert paired.difference.count == 3


def test_a_seed_that_is_there_twice_counts_once() -> None:
    _, other = variants("abb", [1, 1, 1], [2.0, 1.0, 2.5])
    paired = other.against_first["loss"]
    assert (paired.better, paired.worse) == (1, 0)
    assert (paired.difference.mean, paired.difference.count) == (-0.25, 1)
    assert other.spreads["loss"].count == 2


def test_unknown_seeds_and_equal_figures_decide_nothing() -> None:
    _, other = variants("ab", [None, None], [2.0, 1.0])
    assert other.against_first == {}
    _, other = variants("ab", [1, 1], [2.0, 2.0])
    paired = other.against_first["loss"]
    assert (paired.better, paired.worse, paired.equal) == (0, 0, 1)
    assert math.isnan(paired.p)


@pytest.mark.parametrize(
    ("first", "other", "counts"),
    [
        ((NAN, 600), (300, 600), (1, 0)),  # got there within the steps that the first took in vain
        ((NAN, 200), (300, 600), (0, 0)),  # the first was stopped before that
        ((300, 600), (NAN, 600), (0, 1)),
        ((300, 600), (NAN, 200), (0, 0)),
        ((NAN, 600), (NAN, 600), (0, 0)),
        ((NAN, NAN), (300, NAN), (0, 0)),  # a loss that was not logged is beyond nothing
    ],
)
def test_a_target_that_was_not_reached_is_beyond_the_last_step(
    first: tuple[float, float], other: tuple[float, float], counts: tuple[int, int]
) -> None:
    found = variants("ab", [1, 1], [first[0], other[0]], [first[1], other[1]])
    paired = found[1].against_first["loss"]
    assert (paired.better, paired.worse) == counts
    assert paired.equal == 0
    assert paired.difference.count == 0


def test_what_seeds_cannot_tell_is_said() -> None:
    said = list(caveats_of_seeds(variants("ab", [1, 2], [1.0, 2.0])))
    assert len(said) == 1
    assert said[0].startswith("one run of each, of different seeds: they cannot tell")
    assert list(caveats_of_seeds(variants("ab", [1, 1], [1.0, NAN]))) == []
    said = list(caveats_of_seeds(variants("aabbcc", [1, 2, 3, 3, 1, 2], [1.0] * 6)))
    assert said == [
        "b: 2 runs of seed 3, which are paired as one",
        "b and a have no seed in common to be paired by",
    ]
