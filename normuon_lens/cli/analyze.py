"""``normuon-lens analyze``: metrics from stored matrices, on all cores, to be resumed at will."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import click

from normuon_lens.cli.runs import json_option, open_runs, runs_argument, skip_option
from normuon_lens.cli.tables import console, figure, new_table, print_json
from normuon_lens.errors import LensError

if TYPE_CHECKING:
    import pandas as pd

    from normuon_lens.analysis.offline.coordinator import Analysis, Progress

SHOWN = (
    "condition_number",
    "spread_p95_p5",
    "neuron_cv",
    "neuron_max_min",
    "cosine_previous",
    "alignment",
)
"""Columns of the table when no metric is asked for."""

BOUND = "condition_is_lower_bound"
PIPED_SECONDS = 20.0
"""Time between two lines of progress where no bar can be drawn."""


@click.command(epilog="Example: normuon-lens analyze runs/normuon.h5 --workers 8")
@runs_argument
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME",
    help="Only this metric, such as condition_number; can be repeated. Default: all.",
)
@click.option(
    "--stage",
    "stages",
    multiple=True,
    metavar="STAGE",
    help="Only matrices of this stage, such as update; can be repeated. Default: all.",
)
@click.option("--matrix", metavar="GLOB", help='Only matrices of these names, such as "*.mlp.*".')
@click.option(
    "--workers",
    type=click.IntRange(1, 4096),
    metavar="N",
    help="Processes on this machine, one core each. Default: all cores that may be used.",
)
@click.option(
    "--dask",
    metavar="ADDRESS",
    help="Let a Dask cluster compute, such as tcp://host:8786; it must see the same paths.",
)
@click.option(
    "-o", "--output", metavar="FOLDER", help="Write the results there, not beside the recordings."
)
@skip_option
@json_option
def analyze(
    runs: tuple[str, ...],
    metrics: tuple[str, ...],
    stages: tuple[str, ...],
    matrix: str | None,
    workers: int | None,
    dask: str | None,
    output: str | None,
    skip: int,
    as_json: bool,
) -> int:
    """Compute metrics from the full matrices that a run kept.

    On all cores, or on a Dask cluster. The recording is only read; results go beside it, to
    x.h5.analysis.jsonl, one line a matrix and step. Ctrl-C at any time: what is done is kept, and
    the same command goes on where it was. At the end, medians by kind of matrix. A RUN may also
    be a folder, and may still be recorded: analyse it again later for what was added.
    """
    from normuon_lens.analysis.offline.coordinator import Analysis, Selection

    if dask and workers:
        raise click.UsageError("give --workers or --dask, not both")
    # Whether a condition number is a lower bound belongs to it.
    wanted = (*metrics, *([BOUND] if "condition_number" in metrics else []))
    with Analysis(open_runs(runs), Selection(wanted, stages, matrix), output) as analysis:
        for run in analysis.without:
            click.echo(f"normuon-lens: nothing of it kept, left out: {run.path.name}", err=True)
        with Bar() as bar:
            try:
                analysis.work(workers=workers, dask=dask, progress=bar.show)
            except KeyboardInterrupt:
                if not bar.last.total:  # nothing is known yet
                    raise
                bar.interrupted = True
        if bar.interrupted:
            kept = f"{bar.last.done:,} of {bar.last.total:,} done and kept in {_named(analysis)}"
            click.echo(f"interrupted: {kept}; type the same again to go on", err=True)
            return 130
        rows = medians(analysis.frame(), skip)
        if as_json:
            print_json(_content(analysis, bar.last, rows, skip))
        else:
            _print(rows, metrics or SHOWN, skip)
            _print_where(analysis, bar, output)
        if analysis.failures:
            raise LensError(analysis.failed)
    return 0


def medians(found: pd.DataFrame, skip: int) -> list[dict[str, Any]]:
    """Return medians over steps and matrices by run, stage and kind of matrix.

    Parameters
    ----------
    found : DataFrame
        As an analysis gives it.
    skip : int
        Leave out the first so many steps of a run, unless it has no others.

    Returns
    -------
    list of dict
        With run, stage, matrices (a kind, such as ``blocks.*.mlp.up``), count (how many matrices,
        each at one step), and medians by metric.
    """
    from normuon_lens.analysis.comparison.kinds import matrix_group

    late = found["step"] > skip
    settled = found[late | ~late.groupby(found["run"], observed=True).transform("any")]
    kinds = {name: matrix_group(name) for name in found["matrix"].cat.categories}
    by = [settled["run"], settled["stage"], settled["matrix"].astype(str).map(kinds)]
    rows = []
    for (run, stage, kind), part in settled.groupby(by, observed=True, sort=False):
        values = part.groupby("metric", observed=True)["value"].median()
        rows.append(
            {
                "run": str(run),
                "stage": str(stage),
                "matrices": str(kind),
                "count": len(part[["matrix", "step"]].drop_duplicates()),
                "medians": {str(name): float(value) for name, value in values.items()},
            }
        )
    return rows


class Bar:
    """Progress on standard error: a bar on a terminal, elsewhere a line now and then.

    Attributes
    ----------
    last : Progress
        The last that was shown; of nothing before.
    interrupted : bool
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        from normuon_lens.analysis.offline.coordinator import Progress

        to = Console(stderr=True, highlight=False)
        self._piped = not to.is_terminal
        columns = [BarColumn(), TextColumn("{task.fields[said]}", markup=False)]
        self._bar = RichProgress(*columns, console=to, transient=True, disable=self._piped)
        self._task = self._bar.add_task("", total=1.0, said="")
        self._began = self._told = time.monotonic()
        self.last = Progress(0, 0, 0, 0.0)
        self.interrupted = False

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._began
        self._bar.stop()

    def show(self, progress: Progress) -> None:
        """Tell how far it is."""
        self.last = progress
        now = time.monotonic()
        rate = (progress.done - progress.before) / max(now - self._began, 1e-9)
        said = f"{progress.done:,} of {progress.total:,} matrices, {figure(rate)}/s"
        if 0 < progress.share < 1:
            left = (now - self._began) * (1 / progress.share - 1)
            said += f", about {_duration(left)} to go"
        self._bar.update(self._task, completed=progress.share, said=said)
        if self._piped and now - self._told >= PIPED_SECONDS:
            self._told = now
            click.echo(said, err=True)


def _content(
    analysis: Analysis, progress: Progress, rows: list[dict[str, Any]], skip: int
) -> dict[str, Any]:
    return {
        "results": [str(path) for path in analysis.paths],
        "done": progress.done,
        "total": progress.total,
        "before": progress.before,
        "failed": [failure.text for failure in analysis.failures],
        "skipped": skip,
        "medians": rows,
    }


def _print(rows: list[dict[str, Any]], metrics: Sequence[str], skip: int) -> None:
    from normuon_lens.metrics import describe

    to = console()
    shown = [name for name in metrics if any(name in row["medians"] for row in rows)]
    for run in dict.fromkeys(row["run"] for row in rows):
        labels = [describe(name).label for name in shown]
        title = f"{run} (medians; first {skip} steps left out)"
        table = new_table(title, ["stage", "matrices", "kept", *labels], text_columns=2)
        stage = ""
        for row in [row for row in rows if row["run"] == run]:
            if stage and row["stage"] != stage:
                table.add_section()
            values = row["medians"]
            cells = [figure(values.get(name, math.nan)) for name in shown]
            if values.get(BOUND, 0.0) > 0.5 and "condition_number" in shown:
                at = shown.index("condition_number")
                cells[at] = f"≥ {cells[at]}"
            first = row["stage"] if row["stage"] != stage else ""
            table.add_row(first, row["matrices"], str(row["count"]), *cells)
            stage = row["stage"]
        to.print(table)


def _print_where(analysis: Analysis, bar: Bar, folder: str | None) -> None:
    to = console()
    new = bar.last.done - bar.last.before
    if new:
        rate = f"{_duration(bar.seconds)} ({figure(new / bar.seconds)}/s)"
        earlier = f", {bar.last.before:,} were done before" if bar.last.before else ""
        said = f"{new:,} matrices in {rate}{earlier}"
    else:
        said = f"{bar.last.before:,} matrices, all done before"
    to.print(f"{said}: {_named(analysis)}", soft_wrap=True)
    arguments = [str(analysis.runs[0].path), *([folder] if folder else [])]
    to.print(
        "In pandas: from normuon_lens.analysis import results_of; "
        f"results_of({', '.join(map(repr, arguments))})",
        soft_wrap=True,
    )


def _named(analysis: Analysis) -> str:
    more = len(analysis.paths) - 1
    return f"{analysis.paths[0]}{f' and {more} more' if more else ''}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{figure(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{figure(minutes / 60)} h"
