"""Opens the recordings that a command line names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from normuon_lens.runfile import Run

runs_argument = click.argument("runs", nargs=-1, required=True, metavar="RUN...")
# The number stands in analysis.settled too, which the help of a verb does not load.
skip_option = click.option(
    "--skip", default=20, show_default=True, help="Leave out the first N steps."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


def open_runs(arguments: Sequence[str]) -> list[Run]:
    """Open every recording among `arguments`, as :func:`find_recordings` finds them.

    Raises
    ------
    RunError
        If none is there, or one cannot be read.
    """
    from normuon_lens.runfile import open_run

    return [open_run(path) for path in find_recordings(arguments)]


def find_recordings(arguments: Sequence[str]) -> list[Path]:
    """Return every recording among `arguments`, run files and folders.

    What a shell's ``*`` added and is plainly no recording is left out, and named on standard
    error.

    Raises
    ------
    RunError
        If none is there.
    """
    from normuon_lens.runfile import find_runs

    found = find_runs(arguments)
    kept = {*found, *(path.parent for path in found)}
    left_out = [name for name in arguments if Path(str(name).removesuffix(".parts")) not in kept]
    if left_out:
        names = ", ".join(Path(name).name for name in left_out)
        click.echo(f"normuon-lens: no recordings, left out: {names}", err=True)
    return found
