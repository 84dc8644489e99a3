"""Runs side by side, as tables: who learns faster, at what cost, and what the updates are like."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from normuon_lens.analysis.comparison import Comparison, RunSummary, compare
from normuon_lens.analysis.comparison.kinds import Quantiles, Row
from normuon_lens.analysis.comparison.seeds import Paired, Spread
from normuon_lens.analysis.crossing import LOSS_WINDOW
from normuon_lens.errors import LensError
from normuon_lens.metrics import describe

from .report_parts import Block, Caution, Cell, Key, Sentences, Table
from .store import Entry
from .words import NONE, count, duration, factor, loss, named, shown, size, told

ABREAST = 6
"""More runs than this stand one below the other: a page is no wider."""

EVERYTHING = "all matrices"

Show = Callable[[float], str]
"""How a figure is written down."""


def comparison_blocks(entries: Sequence[Entry], keys: dict[str, Key]) -> tuple[Block, ...]:
    """Return the comparison of runs with steps, or the reason why they cannot be compared."""
    if not entries:
        return ()
    try:
        found = compare([entry.run for entry in entries if entry.run])
    except LensError as error:
        what = "These runs cannot be compared" if len(entries) > 1 else "There is no comparison"
        return (Caution(f"{what}: {told(str(error), entries, keys)}."),)
    names = [keys[entry.id].name for entry in entries]
    seeds = len(found.variants) < len(found.runs)
    remarks = tuple((("text", told(text, entries, keys)),) for text in found.remarks)
    return (
        *([_runs(found, names)] if len(names) > 1 else []),
        *([_seeds(found)] if seeds else []),
        _updates(found, [named(variant.name) for variant in found.variants] if seeds else names),
        *([Sentences(remarks, "What to keep in mind")] if remarks else []),
    )


# -- runs ------------------------------------------------------------------------------------------


def _runs(found: Comparison, names: Sequence[str]) -> Table:
    """Return a row a run: where its loss got, how soon, and what it cost."""
    runs, first, target = found.runs, found.runs[0], found.target
    columns: list[tuple[str, list[Cell]]] = [
        ("run", [Cell(name) for name in names]),
        ("optimizer", [Cell(named(run.optimizer)) for run in runs]),
        ("steps", [Cell(f"{run.steps:,}") for run in runs]),
        ("loss", [Cell(loss(run.loss)) for run in runs]),
        ("validation loss", [Cell(loss(run.val_loss)) for run in runs]),
        (f"steps to {loss(target.loss)}", [_reached(run, first) for run in runs]),
        ("time to it", [Cell(duration(run.target_seconds)) for run in runs]),
        ("time a step", [Cell(duration(run.step_seconds)) for run in runs]),
        ("time in all", [Cell(duration(run.seconds)) for run in runs]),
        ("optimizer state", [Cell(size(run.state_bytes)) for run in runs]),
    ]
    if all(run.optimizer == name for run, name in zip(runs, names, strict=True)):
        del columns[1]
    kept = [(name, cells) for name, cells in columns if {cell.text for cell in cells} != {NONE}]
    rows = tuple(zip(*(cells for _, cells in kept), strict=True))
    texts = sum(name in ("run", "optimizer") for name, _ in kept)
    return Table("Runs", tuple(name for name, _ in kept), rows, texts, _about(found, names))


def _about(found: Comparison, names: Sequence[str]) -> str:
    """Say where the figures of runs are from."""
    said = [f"Up to step {found.last_step:,}, which all have reached"]
    if any(math.isfinite(run.loss) for run in found.runs):
        said.append(f"a loss is the mean of the last {LOSS_WINDOW} logged")
    if math.isfinite(found.target.loss):
        said.append(
            f"steps to {loss(found.target.loss)}, the final loss of {names[0]}, count to where "
            "that mean first is as low"
        )
    if any(math.isfinite(run.step_seconds) for run in found.runs):
        logged = found.clock == "seconds"
        said.append(f"time is {'as the trainings logged it' if logged else 'of day, with pauses'}")
    if found.state:
        how = "as recorded" if found.state == "recorded" else "counted from their shapes, float32"
        said.append(f"state is the optimizer's for these matrices, {how}")
    return "; ".join(said)


def _reached(run: RunSummary, first: RunSummary) -> Cell:
    """Return the step at which the target was reached, and how many fewer than the first took."""
    if math.isnan(run.target_step):
        return Cell(NONE if math.isnan(run.loss) else "not reached")
    steps = f"{run.target_step:,.0f}"
    if run is first or math.isnan(first.target_step):
        return Cell(steps)
    saved = round(first.target_step - run.target_step)
    sign = "−" if saved > 0 else "+" if saved < 0 else "±"
    return Cell(steps, (f"{sign}{abs(saved):,}",))


# -- seeds -----------------------------------------------------------------------------------------


def _seeds(found: Comparison) -> Table:
    """Return each figure of the variants, and how it compares with the first's seed by seed."""
    goal = loss(found.target.loss)
    kinds: tuple[tuple[str, str, Show, Show], ...] = (
        ("loss", "loss", loss, shown),
        ("val_loss", "validation loss", loss, shown),
        ("target_step", f"steps to {goal}", "{:,.0f}".format, "{:,.0f}".format),
        ("target_seconds", f"time to {goal}", duration, duration),
        ("step_seconds", "time a step", duration, duration),
        ("seconds", "time in all", duration, duration),
    )
    rows = []
    for key, label, show, show_difference in kinds:
        if not any(variant.spreads[key].count for variant in found.variants):
            continue
        for variant in found.variants:
            spread = variant.spreads[key]
            mean = Cell(show(spread.mean), _sd(spread, show_difference)) if spread.count else NO
            against = _against(variant.against_first.get(key), show_difference)
            of = Cell(f"{spread.count} of {len(variant.runs)}")
            rows.append((Cell(label), Cell(named(variant.name)), of, mean, *against))
    pairs = [pair for variant in found.variants for pair in variant.against_first.values()]
    most = max((pair.better + pair.worse for pair in pairs), default=0)
    note = "Mean over the runs that differ in their seed alone, with the standard deviation (sd)"
    if most:
        note += (
            f"; difference from {named(found.variants[0].name)} between runs of equal seed; p is "
            f"of the two-sided sign test and cannot be below {2 / 2**most:.2g} with {most} seeds"
        )
    columns = ("figure", "variant", "runs", "mean", "difference", "lower in", "p")
    return Table("Over seeds", columns, tuple(rows), 2, note)


NO = Cell(NONE)


def _sd(spread: Spread, show: Show) -> tuple[str, ...]:
    return (f"sd {show(spread.sd)}",) if spread.count > 1 else ()


def _against(paired: Paired | None, show: Show) -> tuple[Cell, Cell, Cell]:
    """Return the difference, in how many seeds it is lower, and the p-value of that."""
    if paired is None:
        return Cell(""), Cell(""), Cell("")
    difference, seeds = paired.difference, paired.better + paired.worse + paired.equal
    sign = "−" if difference.mean < 0 else "+"
    mean = Cell(f"{sign}{show(abs(difference.mean))}", _sd(difference, show))
    return (
        mean if difference.count else NO,
        Cell(f"{paired.better} of {count(seeds, 'seed')}") if seeds else NO,
        Cell(f"{paired.p:.2g}") if seeds and math.isfinite(paired.p) else NO,
    )


# -- updates ---------------------------------------------------------------------------------------


def _updates(found: Comparison, names: Sequence[str]) -> Table:
    """Return the metrics by kind of matrix, those of all matrices first."""
    first = max(found.first_step, min(found.skipped, found.last_step - 1) + 1)
    if found.last_step <= found.skipped:
        first = found.first_step
    note = f"Steps {first:,} to {found.last_step:,}: medians, with the 10th and 90th percentile"
    note += f", and factors relative to {names[0]}" * (len(names) > 1)
    if any(value.is_lower_bound for row in found.rows for value in row.values):
        note += "; ≥ is a lower bound, for the smallest singular value is lost in rounding"
    ordered = sorted(found.rows, key=lambda row: row.group != EVERYTHING)
    by_variant = len(found.variants) < len(found.runs)
    table = [
        (Cell(named(row.group)), Cell(describe(row.metric).label), _values(row, by_variant))
        for row in ordered
    ]
    if len(names) <= ABREAST:
        rows = tuple((group, metric, *cells) for group, metric, cells in table)
        columns, texts = ("matrices", "metric", *names), 2
    else:
        rows = tuple(
            (group, metric, Cell(name), cell)
            for group, metric, cells in table
            for name, cell in zip(names, cells, strict=True)
        )
        columns, texts = ("matrices", "metric", "run", "median"), 3
    return Table("Updates by kind of matrix", columns, rows, texts, note)


def _values(row: Row, by_variant: bool) -> list[Cell]:
    """Return a cell a run or variant: its median, and more quietly its factor and its spread."""
    values = row.by_variant if by_variant else row.values
    ratios = row.variant_ratios() if by_variant else row.ratios()
    cells = []
    for value, ratio in zip(values, ratios, strict=True):
        relative = "" if value is values[0] else _factor(values[0], value, ratio)
        spread = f"{shown(value.low)} – {shown(value.high)}" if value.count else ""
        bound = "≥ " if value.is_lower_bound else ""
        notes = tuple(filter(None, (relative, spread)))
        cells.append(Cell(f"{bound}{shown(value.median)}", notes))
    return cells


def _factor(first: Quantiles, value: Quantiles, ratio: float) -> str:
    """Return the factor; nothing where bounds do not even say in which direction it may err."""
    if first.is_lower_bound == value.is_lower_bound:
        return "" if first.is_lower_bound else factor(ratio)
    known = ratio >= 1 if value.is_lower_bound else ratio < 1
    return f"≥ {factor(ratio)}" if known else ""
