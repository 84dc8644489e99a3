"""``normuon-lens compare``: several optimizers on one model, side by side."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.console import Console

from normuon_lens.cli.runs import json_option, open_runs, runs_argument, skip_option
from normuon_lens.cli.tables import console, factor, figure, new_table, print_json

if TYPE_CHECKING:
    from normuon_lens.analysis import Comparison


@click.command(
    epilog="Example: normuon-lens compare runs/adamw.h5 runs/muon.h5 runs/normuon.h5",
)
@runs_argument
@skip_option
@json_option
def compare(runs: tuple[str, ...], skip: int, as_json: bool) -> None:
    """Compare runs of one model, side by side.

    Condition numbers and neuron imbalance by kind of matrix: medians over matrices and steps, with
    factors relative to the first run. A RUN may also be a folder: all its recordings are taken.
    """
    from normuon_lens.analysis import compare as compare_runs

    comparison = compare_runs(open_runs(runs), skip=skip)
    if as_json:
        print_json(asdict(comparison))
    else:
        print_comparison(comparison, console())


def print_comparison(comparison: Comparison, to: Console) -> None:
    """Print the two tables of a comparison: the runs, then the metrics by kind of matrix."""
    from normuon_lens.metrics import describe

    overview = new_table(
        "Runs", ["run", "optimizer", "steps", "loss", "validation loss", "status"], text_columns=2
    )
    for run in comparison.runs:
        status = run.status + (f", {run.dropped} samples dropped" if run.dropped else "")
        loss, validation = (f"{x:.3f}" if x == x else "–" for x in (run.loss, run.val_loss))
        overview.add_row(run.name, run.optimizer, str(run.steps), loss, validation, status)
    to.print(overview)
    title = f"Updates (medians; first {comparison.skipped} steps left out)"
    names = [run.name for run in comparison.runs]
    table = new_table(title, ["matrices", "metric", *names], text_columns=2)
    group = ""
    for row in comparison.rows:
        if group and row.group != group:
            table.add_section()
        cells = [figure(row.values[0].median)]
        for value, ratio in zip(row.values[1:], row.ratios()[1:], strict=True):
            cells.append(f"{figure(value.median)}  {factor(ratio):>6}")
        table.add_row(row.group if row.group != group else "", describe(row.metric).label, *cells)
        group = row.group
    to.print(table)
