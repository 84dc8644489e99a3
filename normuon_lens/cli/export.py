"""``normuon-lens export``: every number of some runs as one table, in a file for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normuon_lens.cli.runs import open_runs, runs_argument
from normuon_lens.errors import LensError

if TYPE_CHECKING:
    import numpy as np

    from normuon_lens.runfile import Run


@click.command(epilog="Example: normuon-lens export runs/adamw.h5 runs/normuon.h5 -o runs.parquet")
@runs_argument
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    help="Write to FILE, which ends in .csv, .parquet or .json.",
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME",
    help="Only this metric, or what was logged under this name; may be given again. Default: all.",
)
@click.option(
    "--stage",
    "stages",
    multiple=True,
    metavar="STAGE",
    help="Only this stage, such as update; may be given again. Default: all that were recorded.",
)
@click.option("--steps", metavar="STEPS", help="Only these steps, such as 1,100,500-600.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
def export(
    runs: tuple[str, ...],
    output: str,
    metrics: tuple[str, ...],
    stages: tuple[str, ...],
    steps: str | None,
    force: bool,
) -> None:
    """Write the numbers of some runs as one long table.

    A row is a number: run, step, matrix, stage, metric, value, to the last bit what the page and
    normuon_lens.table tell. What the training logged, such as the loss, has no matrix and no
    stage. Where there is no number there is no row; infinity is inf in CSV, the text "Infinity" in
    JSON. Parquet is the smallest, keeps types, and carries what each metric means.
    """
    from normuon_lens.analysis.export import export as export_runs
    from normuon_lens.analysis.table import ALL, opened

    recordings, path = opened(open_runs(runs)), Path(output)
    with _progress() as bar:
        task = bar.add_task(path.name, total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, refresh=True)

        count = export_runs(
            recordings,
            path,
            metrics or ALL,
            stages or ALL,
            None if steps is None else _recorded(recordings, steps),
            force=force,
            progress=progress,
        )
    size = path.stat().st_size
    shown = f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
    many = f"{len(recordings)} run" + "s" * (len(recordings) != 1)
    click.echo(f"{path}: {shown}, {count:,} numbers of {many}")


def _recorded(runs: Sequence[Run], text: str) -> np.ndarray:
    """Return the recorded steps that are among those of a text such as ``1,100,500-600``."""
    import numpy as np

    recorded = np.unique(np.concatenate([run.steps for run in runs]))
    wanted = np.zeros(len(recorded), bool)
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or not (last if dash else first).isdecimal():
            raise LensError(f"--steps {text}: expected steps and ranges, such as 1,100,500-600")
        wanted |= (recorded >= int(first)) & (recorded <= int(last or first))
    if not wanted.any():
        span = f"steps {recorded[0]} to {recorded[-1]}" if len(recorded) else "none yet"
        raise LensError(f"--steps {text}: none of these is recorded; there are {span}")
    return recorded[wanted]


def _progress() -> Any:
    """Return a progress bar on standard error, silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)
