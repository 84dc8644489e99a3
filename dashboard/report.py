"""``normuon-lens report``: everything worth telling of some runs, as one file to pass on."""

from __future__ import annotations

import datetime
import os
import shlex
from pathlib import Path

import click

from normuon_lens.errors import LensError

SUFFIXES = {".html": "html", ".htm": "html", ".md": "md", ".markdown": "md"}
"""What a file's name says of its format."""


@click.command(epilog="Example: normuon-lens report runs/ -o report.html")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write FILE.  [default: report.html, or report.md]",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["html", "md"]),
    help="Page or Markdown text.  [default: as FILE's name ends]",
)
@click.option("--force", is_flag=True, help="Overwrite FILE.")
def report(paths: tuple[Path, ...], output: Path | None, kind: str | None, force: bool) -> None:
    """Write a report of runs: one file that needs no network.

    It holds the comparison, the paper's observations checked on these runs, the main figures, which
    can be zoomed in to, and where all of it comes from. As Markdown it holds the same in text and
    tables. A RUN may also be a folder: all its recordings are taken, the first is what the others
    are compared with.
    """
    if kind is None:
        kind = "html" if output is None else SUFFIXES.get(output.suffix.lower())
    if kind is None:
        raise LensError(f"{output}: no format is known by this name; choose --format html or md")
    target = output or Path(f"report.{kind}")
    _check(target, force)
    # Only now: the help of every verb is printed without loading Plotly.
    from rich.console import Console

    from .report_content import Shelf, report_of

    store = Shelf(paths)
    _spare(target, [entry.path for entry in store.entries])
    command = ["normuon-lens", "report", *map(str, paths)]
    command += ["-o", str(output)] if output else []
    command += ["--format", kind] if output is None or kind != SUFFIXES.get(output.suffix) else []
    now = datetime.datetime.now().astimezone()
    with Console(stderr=True).status("Measuring …"):  # silent where that is no terminal
        content = report_of(store, shlex.join(command), now)
    if kind == "html":
        from .report_html import html_of

        text = html_of(content)
    else:
        from .report_markdown import markdown_of

        text = markdown_of(content)
    size = _write(target, text)
    shown = f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{max(size / 1e3, 0.1):.1f} kB"
    count = len(content.runs)
    click.echo(f"{target}: {shown}, {count} run{'s' * (count != 1)}")


def _check(target: Path, force: bool) -> None:
    """Refuse before any work what could not be written, or must not."""
    try:
        if target.is_dir():
            raise LensError(f"{target}: a folder; name the file to write with -o")
        if not target.parent.is_dir():
            raise LensError(f"{target}: there is no folder {target.parent}")
        if target.exists() and not target.is_file():
            raise LensError(f"{target}: not a file")
        if target.exists() and not force:
            raise LensError(f"{target}: is there already; overwrite it with --force")
    except OSError as error:  # such as a name that is too long
        raise LensError(f"{target}: {error.strerror}") from None


def _spare(target: Path, recordings: list[Path]) -> None:
    """Refuse to write over what the report is about."""
    if target.exists() and any(path.exists() and path.samefile(target) for path in recordings):
        raise LensError(f"{target}: is one of the recordings; write elsewhere with -o")


def _write(target: Path, text: str) -> int:
    """Write all of a file or nothing, and return its size in bytes."""
    content = text.encode()
    draft = target.with_name(f".{os.getpid()}.tmp")
    try:
        try:
            with draft.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise LensError(f"{target}: {error.strerror}; nothing was written") from None
    return len(content)
