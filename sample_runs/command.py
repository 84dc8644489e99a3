"""``normuon-lens demo``: the phenomenon on real text, on your machine, in three minutes."""

from __future__ import annotations

from pathlib import Path

import click

from normuon_lens.extras import require


@click.command(epilog="Example: normuon-lens demo --steps 200 -o runs/first")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the three recordings.  [default: runs/demo, or the next free runs/demo-2, …]",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=600,
    show_default=True,
    help="Steps of each training.",
)
@click.option("--seed", default=0, show_default=True, help="Of initial weights and batches.")
@click.option("--no-dashboard", is_flag=True, help="Train and print the table, open no page.")
@click.option("--no-browser", is_flag=True, help="Serve the page, but open no browser.")
def demo(output: Path | None, steps: int, seed: int, no_dashboard: bool, no_browser: bool) -> None:
    """Train one small GPT under three optimizers, and watch.

    AdamW, Muon and NorMuon advance side by side on the same batches, with hooks attached.
    The text is the Python standard library's own source, so nothing is downloaded. The page opens
    at once and grows with the runs; the table at the end is what `normuon-lens compare` prints.
    """
    require("torch", "torch")
    from .demo import run_demo

    run_demo(
        output or _free_folder(Path("runs/demo")), steps, seed, not no_dashboard, not no_browser
    )


def _free_folder(wanted: Path) -> Path:
    """Return `wanted`, or the first of wanted-2, wanted-3, … that does not exist."""
    folder, number = wanted, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder
