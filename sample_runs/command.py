"""``normuon-lens demo``: the phenomenon on real text, on your machine, in three minutes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from normuon_lens.extras import require

EXAMPLES = """\b
Example: normuon-lens demo --steps 200 -o runs/first
  the same, trained by two processes:
    torchrun --standalone --nproc-per-node 2 -m normuon_lens demo
"""


class OneVoice(click.Command):
    """A command that torchrun may start many times: all but the first process are silent.

    A mistake in the arguments, or Ctrl-C, is told once.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; what is wrong with them is for the first process to say."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError:
            if _is_first():
                raise
            ctx.exit()

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if _is_first():
                raise
            ctx.exit(130)


def _is_first() -> bool:
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return not several or os.environ.get("RANK", "0") == "0"


@click.command(cls=OneVoice, epilog=EXAMPLES)
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

    Under torchrun each model is sharded over all processes (FSDP2), and trained on the same
    batches as by one.
    """
    require("torch", "torch")
    from .demo import run_demo

    run_demo(output, steps, seed, not no_dashboard, not no_browser)
