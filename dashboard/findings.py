"""What the page says first: each run in one plain sentence or two, the worst of it first.

A sentence claims no more than is known: a bound is "at least", first steps are said to be those,
and of what is lost in rounding nothing is said. Losses are stated; whether their difference means
anything, one run of each cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from normuon_lens.analysis.measure import Series
from normuon_lens.analysis.settled import settled
from normuon_lens.metrics import neuron_percentile

from .headline import equal_step, ill_conditioned, imbalanced, is_early, loss_at
from .overview import Cell, cells_of
from .store import Entry
from .words import shown

MOST = 8
"""Sentences, at most: more is no overview."""

STARVING = 0.01
"""With less than this share of its neurons starved, a matrix is not worth a sentence."""

NAMED_LOSSES = 4
"""Runs whose loss is told beside the lowest."""

ORDER = ("not finite", "condition", "imbalance", "starved", "healthy", "loss")
"""Kinds of findings, the most important first."""

Part = tuple[str, str]
"""Style, which is ``text``, ``matrix``, ``run`` or ``figure``, and text, never markup."""


class Finding(NamedTuple):
    """One sentence.

    Attributes
    ----------
    kind : str
        One of `ORDER`.
    run : str
        Id of the run it is about; empty if it compares them all.
    matrix : str or None
        The matrix it names.
    step : int or None
        The step it names.
    parts : tuple of (str, str)
        Style and text of each part. Names stand in them as they are in the file.
    """

    kind: str
    run: str
    matrix: str | None
    step: int | None
    parts: tuple[Part, ...]


class _Subject(NamedTuple):
    """A run at a stage, as sentences speak of it."""

    entry: Entry
    stage: str
    label: str
    cells: list[Cell]

    @property
    def run(self) -> list[Part]:
        """Its name, with the stage where that is not the update."""
        name: Part = ("run", self.label)
        return [name] if self.stage == "update" else [name, ("text", f" ({self.stage})")]

    @property
    def names(self) -> list[str]:
        """Its matrices, in the order of its cells."""
        assert self.entry.run is not None
        return self.entry.run.matrices

    def rows(self, i: int) -> int:
        """Neurons of a matrix."""
        assert self.entry.run is not None
        return int(self.entry.run.table[i].m)

    def series(self, metric: str) -> Series:
        """One metric of it over all steps."""
        return self.entry.series(metric, self.stage)

    def worst(self, values: Sequence[float]) -> int:
        """Place of the highest of one value a matrix, where the matrix can be trusted."""
        pairs = zip(self.cells, values, strict=True)
        known = [cell.trusted and math.isfinite(value) for cell, value in pairs]
        return int(np.where(known, values, -np.inf).argmax())

    def tell(self, kind: str, what: str, many: str, worst: int, *rest: Part) -> Finding:
        """Say what happens in how many matrices, and how far it goes in the worst of them."""
        name = self.names[worst]
        told: list[Part] = [("text", what), ("figure", many), ("text", ": in "), ("matrix", name)]
        return Finding(kind, self.entry.id, name, None, (*self.run, *told, *rest))


def findings(entries: Sequence[Entry], stage: str, labels: Mapping[str, str]) -> list[Finding]:
    """Return what is worth saying of some readable runs, the most important first.

    Parameters
    ----------
    entries : sequence of Entry
    stage : str
    labels : mapping of str to str
        Names of the runs by id.

    Returns
    -------
    list of Finding
        At most one a run and kind, and `MOST` in all.
    """
    ailing: list[Finding] = []
    well: list[Finding] = []
    for entry in entries:
        subject = _Subject(entry, stage, labels[entry.id], cells_of(entry, stage))
        found = [tell(subject) for tell in (_not_finite, _condition, _imbalance, _starved)]
        wrong = [finding for finding in found if finding is not None]
        ailing += wrong
        well += [] if wrong else _healthy(subject)
    ailing.sort(key=lambda finding: ORDER.index(finding.kind))
    last = _loss(entries, labels)
    return [*[*ailing, *well][: MOST - len(last)], *last]


def _not_finite(subject: _Subject) -> Finding | None:
    """Say which matrix was not finite, or in how many and which was first; when and how often."""
    steps, broken = subject.series("neuron_not_finite")
    bad = broken > 0
    when = steps[bad.any(axis=1)]
    if not len(when):
        return None
    first = int(when[0])
    name = subject.names[int(bad[steps == first][0].argmax())]
    count = int(bad.any(axis=0).sum())
    if count == 1:
        told: list[Part] = [("matrix", name), ("text", " under "), *subject.run]
        told.append(("text", " was not finite at step "))
    else:
        told = [*subject.run, ("text", " was not finite in ")]
        told += [("figure", _matrices(count, len(subject.names))), ("text", ": first in ")]
        told += [("matrix", name), ("text", ", at step ")]
    more = f" and {len(when) - 1:,} more" if len(when) > 1 else ""
    told += [("figure", f"{first:,}"), ("text", f"{more}.")]
    return Finding("not finite", subject.entry.id, name, first, tuple(told))


def _condition(subject: _Subject) -> Finding | None:
    """Say in how many matrices some directions get far more than others, and the worst."""
    share = ill_conditioned(subject.cells)
    if not share.bad:
        return None
    worst = subject.worst([cell.condition for cell in subject.cells])
    cell = subject.cells[worst]
    return subject.tell(
        "condition",
        " steps unevenly in ",
        _matrices(share.bad, share.of + share.unknown),
        worst,
        ("text", " the strongest direction gets " + "at least " * cell.is_bound),
        ("figure", f"{shown(cell.condition)} times"),
        ("text", f" what the weakest gets{_so_far(subject.series('condition_number'))}."),
    )


def _imbalance(subject: _Subject) -> Finding | None:
    """Say in how many matrices some neurons move far more than others, and the worst."""
    share = imbalanced(subject.cells)
    if not share.bad:
        return None
    worst = subject.worst([cell.cv for cell in subject.cells])
    # Of this one matrix: percentiles of all of them would take longer than all else on the page.
    norms = settled(subject.entry.norms(subject.names[worst], subject.stage))
    busiest, quietest = (neuron_percentile(norms, percent) for percent in (99, 1))
    with np.errstate(all="ignore"):
        ratio = np.where(quietest == 0, np.inf, busiest / quietest)
    typical = float(np.median(ratio[~np.isnan(ratio)]))
    # Beyond the two percentiles neurons differ by more: "at least" holds of the outermost two too,
    # which are meant where a hundredth of the neurons is less than one.
    if subject.rows(worst) >= 100:
        busy, quiet, still = "1 % of neurons move", "quietest 1 %", "quietest 1 % do"
    else:
        busy, quiet, still = "neuron moves", "quietest", "quietest neuron does"
    how: list[Part] = [
        ("text", f" the busiest {busy} at least "),
        ("figure", f"{shown(typical)}x"),
        ("text", f" as far as the {quiet}"),
    ]
    if math.isinf(typical):
        how = [("text", f" the {still} not move at all")]
    return subject.tell(
        "imbalance",
        " moves its neurons unevenly in ",
        _matrices(share.bad, share.of + share.unknown),
        worst,
        *how,
        ("text", f"{_so_far(subject.series('neuron_cv'))}."),
    )


def _starved(subject: _Subject) -> Finding | None:
    """Say in how many matrices neurons are starved, and the worst."""
    shares = [cell.starved / subject.rows(i) for i, cell in enumerate(subject.cells)]
    pairs = zip(subject.cells, shares, strict=True)
    count = sum(cell.trusted and share >= STARVING for cell, share in pairs)
    if not count:
        return None
    worst = subject.worst(shares)
    return subject.tell(
        "starved",
        " starves neurons in ",
        _matrices(count, sum(map(math.isfinite, shares))),
        worst,
        ("text", " "),
        ("figure", f"{subject.cells[worst].starved:,.0f} of {subject.rows(worst):,}"),
        (
            "text",
            f" move less than a tenth of the mean{_so_far(subject.series('neuron_starved'))}.",
        ),
    )


def _healthy(subject: _Subject) -> list[Finding]:
    """Say what is known to be well; nothing where nothing is known."""
    conditioned, balanced = ill_conditioned(subject.cells), imbalanced(subject.cells)
    known = {
        what: _matrices(share.of, share.of + share.unknown)
        for what, share in (
            ("is well conditioned", conditioned),
            ("moves its neurons evenly", balanced),
        )
        if share.of
    }
    if not known:
        return []
    told = list(subject.run)
    if len(set(known.values())) == 1:
        known = {" and ".join(known): next(iter(known.values()))}
    for i, (what, many) in enumerate(known.items()):
        told += [("text", f"{' and' * (i > 0)} {what} in "), ("figure", many)]
    rest = "; of the rest too little is known" if conditioned.unknown or balanced.unknown else ""
    # The longer of the two remarks is the one that is there.
    so_far = max((_so_far(subject.series(x)) for x in ("condition_number", "neuron_cv")), key=len)
    told.append(("text", f"{rest}{so_far}."))
    return [Finding("healthy", subject.entry.id, None, None, tuple(told))]


def _loss(entries: Sequence[Entry], labels: Mapping[str, str]) -> list[Finding]:
    """State the losses of several runs at an equal step; those that look the same share a place."""
    step = equal_step(entries)
    losses = sorted((loss_at(entry, step), labels[entry.id]) for entry in entries)
    losses = [(loss, name) for loss, name in losses if math.isfinite(loss)]
    if step is None or len(losses) < 2:
        return []
    told_losses = [(shown(loss), name) for loss, name in losses]
    lowest = told_losses[0][0]
    first = [name for loss, name in told_losses if loss == lowest]
    others = [(loss, name) for loss, name in told_losses if loss != lowest]
    told: list[Part] = [("text", "At step "), ("figure", f"{step:,}"), ("text", " ")]
    for i, name in enumerate(first):
        told += [("text", " and " if i == len(first) - 1 else ", ")] * (i > 0) + [("run", name)]
    verb = "has" if len(first) == 1 else "have"
    what = "the lowest loss" if others else "the same loss"
    told += [("text", f" {verb} {what}, "), ("figure", lowest)]
    for i, (loss, name) in enumerate(others[:NAMED_LOSSES]):
        told += [("text", ", " if i else "; "), ("run", name), ("text", " "), ("figure", loss)]
    if len(others) > NAMED_LOSSES:
        told.append(("text", f" and {len(others) - NAMED_LOSSES} more"))
    told.append(("text", "."))
    return [Finding("loss", "", None, step, tuple(told))]


def _matrices(count: int, total: int) -> str:
    if total == 1:
        return "its one matrix"
    return f"all {total} matrices" if count == total else f"{count} of {total} matrices"


def _so_far(series: Series) -> str:
    """Return a remark where a figure stands on a run's first steps, which are not like the rest."""
    if not is_early(series):
        return ""
    last = int(series.steps[-1])
    return f" (first {last} steps only)" if last > 1 else " (first step only)"
