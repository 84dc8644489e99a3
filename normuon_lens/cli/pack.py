"""``normuon-lens pack``: one file of a recording that lies in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command(epilog="Example: normuon-lens pack runs/normuon.h5")
@click.argument("run", metavar="RUN")
@click.option("-o", "--output", metavar="FILE", help="Write FILE and leave RUN as it is.")
@click.option("--compress", is_flag=True, help="Shuffle and gzip, which every HDF5 reads.")
def pack(run: str, output: str | None, compress: bool) -> None:
    """Make one file of a recording in parts.

    A recording is left in parts by an interrupted training, by several ranks that did not all
    finish, or for lack of room. If something in it is damaged or missing, only -o makes a file:
    of what is whole.
    """
    from normuon_lens.runfile.pack import pack as pack_run

    with progress_bar() as bar:
        task = bar.add_task(escaped(Path(run).name), total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, refresh=True)

        made = pack_run(run, Path(output) if output else None, compress=compress, progress=progress)
    for text in made.left_out:
        click.echo(f"normuon-lens: left out: {text}", err=True)
    for text in made.kept:
        click.echo(f"normuon-lens: kept, though damaged: {text}", err=True)
    ranks = f", {len(made.ranks)} ranks" if made.ranks else ""
    click.echo(f"{made.path}: {made.bytes / 1e6:.1f} MB, {made.steps} steps{ranks}")


def progress_bar() -> Any:
    """Return a progress bar on standard error, silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    # It draws when it is told to: a thread of its own would be forked along.
    return Progress(
        console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
    )


def escaped(name: str) -> str:
    """Return a name as text without markup."""
    from rich.markup import escape

    return escape(name)
