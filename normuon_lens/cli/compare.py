"""``normuon-lens compare``: several optimizers on one model, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from normuon_lens.cli.runs import json_option, open_runs, runs_argument, skip_option
from normuon_lens.cli.tables import console, factor, figure, new_table, print_json
from normuon_lens.errors import LensError

if TYPE_CHECKING:
    from normuon_lens.analysis import Comparison
    from normuon_lens.analysis.comparison import RunSummary
    from normuon_lens.analysis.comparison.kinds import Quantiles
    from normuon_lens.analysis.comparison.seeds import Paired
    from normuon_lens.runfile import Run

EXAMPLES = """\b
Example: normuon-lens compare runs/adamw.h5 runs/muon.h5 runs/normuon.h5
  several seeds of each, against Muon:
    normuon-lens compare runs/*.h5 --baseline muon-seed0
"""


@click.command(epilog=EXAMPLES)
@runs_argument
@click.option(
    "--target",
    type=float,
    metavar="LOSS",
    help="Count steps to this loss.  [default: the final loss of the first run]",
)
@click.option(
    "--baseline",
    metavar="RUN",
    help="Compare with this run, a name or a file, instead of the first.",
)
@skip_option
@json_option
def compare(
    runs: tuple[str, ...], target: float | None, baseline: str | None, skip: int, as_json: bool
) -> None:
    """Compare runs of one model, side by side.

    Losses, steps to a target loss, time and memory of every run; condition numbers and neuron
    imbalance by kind of matrix, with factors relative to the first run. Runs that differ in their
    seed alone are taken together, and compared with the first optimizer's seed by seed. A RUN may
    also be a folder: all its recordings are taken.
    """
    from normuon_lens.analysis import compare as compare_runs

    opened = open_runs(runs)
    if baseline is not None:
        opened = _first(baseline, opened)
    comparison = compare_runs(opened, skip=skip, target=target)
    if as_json:
        print_json(asdict(comparison))
    else:
        print_comparison(comparison, console())


def print_comparison(comparison: Comparison, to: Console) -> None:
    """Print a comparison: runs, variants over seeds, metrics by kind of matrix, and remarks."""
    _print_runs(comparison, to)
    if len(comparison.variants) < len(comparison.runs):
        _print_seeds(comparison, to)
    _print_updates(comparison, to)
    for remark in comparison.remarks:
        to.print(f"- {remark}", soft_wrap=True)


def _first(wanted: str, runs: Sequence[Run]) -> list[Run]:
    """Return the runs with the one that is wanted at the head."""
    from normuon_lens.analysis.table import labels

    names = labels(runs)
    paths = [run.path.resolve() for run in runs]
    for known in (names, [run.path.name.removesuffix(".h5") for run in runs]):
        if known.count(wanted) == 1:
            at = known.index(wanted)
            break
    else:
        path = Path(wanted.removesuffix(".parts")).resolve()
        if path not in paths:
            raise LensError(f"--baseline {wanted}: no such run, there are {', '.join(names)}")
        at = paths.index(path)
    return [runs[at], *runs[:at], *runs[at + 1 :]]


# -- runs ------------------------------------------------------------------------------------


def _print_runs(comparison: Comparison, to: Console) -> None:
    runs, first, target = comparison.runs, comparison.runs[0], comparison.target
    seeds = len(comparison.variants) < len(runs)
    names = [("run", [run.name for run in runs])]
    if any(run.name != run.optimizer for run in runs):
        names.append(("optimizer", [run.optimizer for run in runs]))
    whole = all(run.last_step == comparison.last_step for run in runs)
    loss = "loss" if whole else f"loss at {comparison.last_step:,}"
    columns = [
        ("steps", [f"{run.steps:,}" for run in runs]),
        (loss, [_loss(run.loss) for run in runs]),
        (f"val. {loss}", [_loss(run.val_loss) for run in runs]),
    ]
    if math.isfinite(target.loss):
        columns += [
            (
                f"steps to {_loss(target.loss)}",
                [_reached(run, None if seeds else first) for run in runs],
            ),
            ("time to it", [_time(run.target_seconds) for run in runs]),
        ]
    columns += [
        ("time a step", [_time(run.step_seconds) for run in runs]),
        ("time in all", [_time(run.seconds) for run in runs]),
        ("state", [_size(run.state_bytes) for run in runs]),
        ("status", [_status(run) for run in runs]),
    ]
    telling = [column for column in columns if set(column[1]) - {"–", "finished"}]
    shown = [*names, *telling]
    table = new_table("Runs", [name for name, _ in shown], text_columns=len(names))
    for cells in zip(*(cells for _, cells in shown), strict=True):
        table.add_row(*cells)
    to.print(table)
    for line in _about(comparison):
        to.print(line, soft_wrap=True)
    to.print()


def _about(comparison: Comparison) -> Iterator[str]:
    """Say where the figures of runs are from."""
    from normuon_lens.analysis.crossing import LOSS_WINDOW

    target = comparison.target
    if math.isfinite(target.loss):
        whose = f", the final loss of {target.of}," if target.of else ""
        yield (
            f"loss: mean of the last {LOSS_WINDOW} logged; steps to {_loss(target.loss)}{whose} "
            "count to where that mean first is as low"
        )
    if any(math.isfinite(run.step_seconds) for run in comparison.runs):
        yield (
            "time: as the trainings logged it"
            if comparison.clock == "seconds"
            else "time: of day, pauses and all that ran at the same time included"
        )
    if comparison.state == "recorded":
        yield "state: of the optimizer for these matrices, as recorded"
    elif comparison.state == "counted":
        yield "state: of the optimizer for these matrices, counted from their shapes in float32"


def _loss(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:#.4g}"


def _reached(run: RunSummary, first: RunSummary | None) -> str:
    """Return when a run reached the target, and how far from another run that is."""
    if math.isnan(run.target_step):
        return "–" if math.isnan(run.loss) else "not reached"
    steps = f"{run.target_step:,.0f}"
    if first is None or first is run or math.isnan(first.target_step):
        return steps
    saved = round(first.target_step - run.target_step)
    return f"{steps} ({'−' if saved > 0 else '+' if saved < 0 else '±'}{abs(saved):,})"


def _time(seconds: float) -> str:
    return _times(seconds, math.nan)


def _unit(seconds: float) -> tuple[float, str]:
    """Return the unit in which a time is best told, in seconds and by its name."""
    units = (3600.0, "h"), (60.0, "min"), (1.0, "s")
    return next((unit for unit in units if abs(seconds) >= 2 * unit[0]), (1e-3, "ms"))


def _size(size: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{figure(size / unit)} {name}"
    return "–" if math.isnan(size) else f"{size:.0f} B"


def _status(run: RunSummary) -> str:
    return run.status + (f", {run.dropped} samples dropped" if run.dropped else "")


# -- seeds -----------------------------------------------------------------------------------

Show = Callable[[float, float], str]
"""Writes down a mean, or a difference, with its standard deviation, which may be NaN."""


def _print_seeds(comparison: Comparison, to: Console) -> None:
    """Print each figure of the variants, and how it compares with the first one's seed by seed."""
    variants, target = comparison.variants, _loss(comparison.target.loss)
    kinds: list[tuple[str, str, Show]] = [
        ("loss", "loss", _losses),
        ("val_loss", "val. loss", _losses),
        ("target_step", f"steps to {target}", _counts),
        ("target_seconds", f"time to {target}", _times),
        ("step_seconds", "time a step", _times),
    ]
    columns = ["figure", "variant", "runs", "mean ± sd", "difference", "lower in", "p"]
    table = new_table("Seeds", columns, text_columns=2)
    for key, label, show in kinds:
        if not any(variant.spreads[key].count for variant in variants):
            continue
        for variant in variants:
            spread = variant.spreads[key]
            table.add_row(
                label if variant is variants[0] else "",
                variant.name,
                f"{spread.count} of {len(variant.runs)}",
                show(spread.mean, spread.sd),
                *_against(variant.against_first.get(key), show),
                end_section=variant is variants[-1],
            )
    to.print(table)
    pairs = [found for variant in variants for found in variant.against_first.values()]
    most = max((pair.better + pair.worse for pair in pairs), default=0)
    if most:
        to.print(
            f"difference: from {variants[0].name}, between runs of equal seed; p: sign test, "
            f"two-sided, which cannot be below {2 / 2**most:.3g} with {_seeds(most)}",
            soft_wrap=True,
        )
    to.print()


def _against(paired: Paired | None, show: Show) -> list[str]:
    """Return cells: the difference, in how many seeds it is lower, and the p-value of that."""
    if paired is None:
        return ["", "", ""]
    of, told = paired.difference, paired.better + paired.worse + paired.equal
    difference = "–"
    if of.count:
        sign = "−" if of.mean < 0 else "+" if of.mean > 0 else "±"
        some = f" ({_seeds(of.count)})" if of.count < told else ""
        difference = f"{sign}{show(abs(of.mean), of.sd)}{some}"
    p = "–" if math.isnan(paired.p) else f"{paired.p:.3g}"
    return [difference, f"{paired.better} of {told}" if told else "–", p]


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _losses(mean: float, sd: float) -> str:
    return _plus_minus(_loss(mean), sd)


def _counts(mean: float, sd: float) -> str:
    return _plus_minus("–" if math.isnan(mean) else f"{mean:,.0f}", sd)


def _times(mean: float, sd: float) -> str:
    unit, name = _unit(mean)
    shown = _plus_minus(figure(mean / unit), sd / unit)
    return "–" if math.isnan(mean) else f"{shown} {name}"


def _plus_minus(mean: str, sd: float) -> str:
    return mean if math.isnan(sd) else f"{mean} ± {_shown(sd, 2)}"


# -- updates ---------------------------------------------------------------------------------


def _print_updates(comparison: Comparison, to: Console) -> None:
    """Print the metrics by kind of matrix, a column a run or, with several seeds, a variant."""
    from normuon_lens.metrics import describe

    rows = comparison.rows
    if len(comparison.variants) < len(comparison.runs):
        names = [variant.name for variant in comparison.variants]
        cells = [_cells(row.by_variant, row.variant_ratios()) for row in rows]
    else:
        names = [run.name for run in comparison.runs]
        cells = [_cells(row.values, row.ratios()) for row in rows]
    columns = [(name, _aligned([cell[i] for cell in cells])) for i, name in enumerate(names)]
    groups = [row.group for row in rows]
    labels = [f"  {describe(row.metric).label}" for row in rows]
    first = comparison.first_step
    if comparison.last_step > comparison.skipped:
        first = max(first, comparison.skipped + 1)
    title = f"Updates, steps {first:,}–{comparison.last_step:,}: median (10–90 %)"
    room = to.width - max(map(len, [*groups, *labels])) - 2
    for chosen in _fitting([_width(name, cells) for name, cells in columns], room):
        table = new_table(title, ["matrices", *(columns[i][0] for i in chosen)])
        for at, (group, label) in enumerate(zip(groups, labels, strict=True)):
            if group not in groups[:at]:
                table.add_section()
                table.add_row(group)
            table.add_row(label, *(columns[i][1][at] for i in chosen))
        to.print(table)
    if any(value.is_lower_bound for row in rows for value in row.values):
        to.print("≥: a lower bound, for the smallest singular value is lost in rounding")
    to.print()


Cell = tuple[str, str, str]
"""Median, range, and factor relative to the first column."""


def _cells(values: Sequence[Quantiles], ratios: Sequence[float]) -> list[Cell]:
    first = values[0]
    cells = [_cell(first, "")]
    for value, ratio in zip(values[1:], ratios[1:], strict=True):
        cells.append(_cell(value, _bounded_factor(first, value, ratio)))
    return cells


def _cell(value: Quantiles, relative: str) -> Cell:
    bound = "≥ " if value.is_lower_bound else ""
    return f"{bound}{figure(value.median)}", _range(value), relative


def _bounded_factor(first: Quantiles, value: Quantiles, ratio: float) -> str:
    """Return the factor; nothing where bounds do not even say in which direction it may err."""
    if first.is_lower_bound == value.is_lower_bound:
        return "" if first.is_lower_bound else factor(ratio)
    known = ratio >= 1 if value.is_lower_bound else ratio < 1
    return f"≥{factor(ratio)}" if known else ""


def _range(value: Quantiles) -> str:
    """Return both quantiles: shorter than the median where it still is seen to lie between them."""
    if not value.count:
        return ""
    low, high = (float(f"{quantile:.2g}") for quantile in (value.low, value.high))
    digits = 2 if low < value.median < high else 3
    return f"({_shown(value.low, digits)}–{_shown(value.high, digits)})"


def _shown(value: float, digits: int) -> str:
    value = float(f"{value:.{digits}g}") if abs(value) < 10**digits else value
    if not math.isfinite(value) or not 1e-3 <= abs(value) < 1e6:
        return figure(value)
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def _width(name: str, cells: Sequence[str]) -> int:
    """Return the width that cells need, under a name that may be broken at spaces."""
    return max(map(len, [*name.split(), *cells])) + 2


def _aligned(cells: Sequence[Cell]) -> list[str]:
    """Return cells of one column, their parts under one another."""
    wide = [max(len(cell[i]) for cell in cells) for i in range(3)]
    return [
        f"{median:>{wide[0]}} {spread:<{wide[1]}} {relative:>{wide[2]}}"
        for median, spread, relative in cells
    ]


def _fitting(widths: Sequence[int], room: int) -> list[list[int]]:
    """Return columns, by number, in as many tables as their widths need."""
    tables: list[list[int]] = []
    free = 0
    for i, width in enumerate(widths):
        if width > free or not tables:
            tables.append([])
            free = room
        tables[-1].append(i)
        free -= width
    return tables
