"""Puts a report together: from runs to headline, comparison, observations, figures, provenance."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from normuon_lens import __version__
from normuon_lens.analysis.claims import check_claims
from normuon_lens.analysis.settled import SKIP
from normuon_lens.analysis.table import labels
from normuon_lens.errors import LensError
from normuon_lens.runfile import Run

from .findings import Finding, findings
from .headline import BALANCED, EVEN, Headline, Share, headlines_of
from .report_charts import chart_blocks
from .report_comparison import comparison_blocks
from .report_parts import (
    Block,
    Card,
    Cards,
    Caution,
    Figure,
    Key,
    Part,
    Prose,
    Report,
    Section,
    Sentences,
    Verdict,
    Verdicts,
)
from .report_provenance import provenance_blocks
from .store import Entry, Store
from .words import (
    count,
    duration,
    inert,
    listed,
    named,
    percent,
    sentence,
    shown,
    size,
    told,
)

TITLED = 4
"""More runs than this are counted in the title instead of named."""

PAPER = "arXiv 2510.05491"

PRIMER = (
    "An optimizer's step moves every weight matrix of a model. The condition number says how many "
    "times farther that update reaches along its strongest direction than along its weakest: near "
    "1 every direction learns, in the hundreds a few directions take it all. The imbalance (CV) "
    "says how unevenly the neurons, the rows of a matrix, are moved: 0 is all alike, 0.3 a "
    "typical difference of 30 % from their mean. A neuron is starved where it moves less than a "
    "tenth of that mean."
)
"""What a reader must know who has read nothing else."""


class Shelf(Store):
    """Runs under the names that the comparison gives them, in short: each has another."""

    def label(self, entry: Entry) -> str:
        """Return what a run is called here."""
        runs = [known.run for known in self.entries if known.run]
        called = dict(zip(map(id, runs), labels(runs), strict=True))
        return named(called.get(id(entry.run), entry.name))


def report_of(store: Store, command: str, now: datetime.datetime) -> Report:
    """Return the report of all runs of a store.

    Parameters
    ----------
    store : Store
        Its labels name the runs.
    command : str
        What was typed for it.
    now : datetime
        When that was, with its time zone.

    Raises
    ------
    LensError
        If none of the runs can be read.
    """
    entries = [entry for entry in store.entries if entry.run is not None]
    if not entries:
        raise LensError(f"none of these can be read: {store.entries[0].error}")
    keys = {entry.id: Key(store.label(entry), entry.style) for entry in entries}
    begun = [entry for entry in entries if entry.begun]
    cautions = _cautions(store, keys)
    sections = [
        Section("short", "In short", (*cautions, *_headline(begun, keys))),
        Section("comparison", _comparison_title(begun), comparison_blocks(begun, keys)),
        Section("claims", "The paper's observations, checked on these runs", _claims(begun, keys)),
        Section("figures", "Figures", chart_blocks(store, begun, keys)),
        Section("provenance", "Where this comes from", provenance_blocks(store, keys)),
    ]
    return Report(
        title=_title(list(keys.values())),
        about=_about([entry.run for entry in entries if entry.run], now),
        runs=tuple(keys.values()),
        sections=tuple(section for section in sections if section.blocks),
        made=f"normuon-lens {__version__}, {now:%Y-%m-%d %H:%M %Z}",
        command=inert(command),
    )


def _comparison_title(entries: Sequence[Entry]) -> str:
    return "Side by side" if len(entries) > 1 else "By kind of matrix"


def _title(keys: Sequence[Key]) -> str:
    names = [key.name for key in keys]
    if len(names) == 1:
        return names[0]
    return f"{listed(names) if len(names) <= TITLED else f'{len(names)} runs'} side by side"


def _about(runs: Sequence[Run], now: datetime.datetime) -> tuple[str, ...]:
    models = dict.fromkeys(
        named(str(run.metadata["model"])) for run in runs if run.metadata.get("model")
    )
    last = [int(run.steps[-1]) if len(run.steps) else 0 for run in runs]
    steps = f"{min(last):,}–{max(last):,} steps" if len(set(last)) > 1 else count(last[0], "step")
    model = listed(list(models)) if len(models) <= 2 else count(len(models), "model")
    return (*([model] if models else []), steps, f"{now:%d %B %Y}".lstrip("0"))


def _cautions(store: Store, keys: dict[str, Key]) -> list[Block]:
    """Say what is not there, or not all there yet."""
    said = []
    for entry in store.entries:
        if entry.run is None:
            why = told(entry.error, [entry], keys).removeprefix(f"{entry.path.name}: ")
            said.append(f"{named(entry.path.name)} cannot be read and is left out: {why}")
        elif not entry.begun:
            said.append(f"{keys[entry.id].name} has no step yet: there is nothing to tell of it")
        elif entry.live:
            last = int(entry.run.steps[-1])
            said.append(
                f"{keys[entry.id].name} is still being recorded: this is what it was at step {last}"
            )
    return [Caution(f"{sentence(text)}.") for text in said]


# -- in short --------------------------------------------------------------------------------------


def _headline(entries: Sequence[Entry], keys: dict[str, Key]) -> list[Block]:
    if not entries:
        return []
    names = {entry.id: keys[entry.id].name for entry in entries}
    # Each run by itself: of many together, only the worst would be told.
    found = [each for entry in entries for each in findings([entry], "update", names)]
    rest = [each for each in findings(entries, "update", names) if not each.run]
    figures = headlines_of(entries, "update")
    cards = [
        _card(keys[entry.id], row, [f for f in found if f.run == entry.id])
        for entry, row in zip(entries, figures, strict=True)
    ]
    note = (
        f"Medians over matrices and steps, the first {SKIP} steps left out. High is a condition "
        f"number above {EVEN:g}, an imbalance above {BALANCED:g}."
    )
    return [
        Prose(PRIMER),
        Cards(tuple(cards)),
        *([Sentences(tuple(map(_parts, rest)))] if rest else []),
        Prose(note),
    ]


def _card(key: Key, figures: Headline, found: Sequence[Finding]) -> Card:
    if figures.early:
        key = Key(f"{key.name} (first steps only)", key.style)
    loss = f"loss at step {figures.loss_step:,}" if figures.loss_step else "loss"
    bound = "≥ " * figures.is_lower_bound
    return Card(
        key,
        (
            Figure(
                "condition number",
                f"{bound}{shown(figures.condition)}",
                *_verdict(figures.ill_conditioned),
            ),
            Figure("imbalance (CV)", shown(figures.imbalance), *_verdict(figures.imbalanced)),
            Figure("starved neurons", percent(figures.starved)),
            Figure(loss, shown(figures.loss)),
        ),
        tuple(map(_parts, found)),
    )


def _verdict(share: Share) -> tuple[str, str]:
    """Return in words and as a tone how many matrices are not healthy."""
    total = share.of + share.unknown
    if not total:
        return "", ""
    if not share.of:
        return "lost in rounding", ""
    if not share.bad:
        return f"{f'{share.of} of {total}' if share.unknown else 'all'} healthy", "good"
    return f"{f'all {total}' if share.bad == total else f'{share.bad} of {total}'} high", "bad"


def _parts(found: Finding) -> tuple[Part, ...]:
    return tuple((style, text if style == "text" else named(text)) for style, text in found.parts)


# -- observations ----------------------------------------------------------------------------------


def _claims(entries: Sequence[Entry], keys: dict[str, Key]) -> tuple[Block, ...]:
    if not entries:
        return ()
    try:
        claims = check_claims([entry.run for entry in entries if entry.run])
    except LensError as error:
        why = told(str(error), entries, keys)
        return (Caution(f"They cannot be checked on these runs: {why}."),)
    verdicts = tuple(
        Verdict(
            statement=claim.statement,
            source=claim.source,
            test=claim.test,
            verdict=claim.verdict,
            reason=told(claim.reason, entries, keys),
            findings=tuple(
                (sentence(found.label), _figure(found.value, found.unit))
                for found in claim.findings
            ),
        )
        for claim in claims
    )
    tally = [
        f"{sum(claim.verdict == verdict for claim in claims)} {verdict}"
        for verdict in ("seen", "not seen", "cannot tell")
    ]
    intro = (
        f"The paper is that on NorMuon, {PAPER}. Each observation is stated, tested by a rule that "
        f"was fixed beforehand, and judged on these runs alone: {listed(tally)}."
    )
    return (Prose(intro), Verdicts(verdicts))


def _figure(value: float, unit: str) -> str:
    if unit == "bytes":
        return size(value)
    if unit in ("s", "seconds"):
        return duration(value)
    if unit == "share":
        return percent(value)
    text = f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e6 else shown(value)
    return f"{text} {unit}" if unit not in ("", "ratio") else text
