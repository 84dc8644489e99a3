"""Trains one small GPT and records it: alone, or under torchrun by many processes (FSDP2).

What makes it fit for many processes is little: join them (`joined`), shard the model before the
optimizers are made (in `Training`), give each process its share of the batch (in `Batches`), and
let the first alone speak. The loop, and what records it, are the same for one.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import click
import torch

from normuon_lens.cli.main import run_command
from normuon_lens.hooks import attach

from .command import OneVoice
from .data import Batches, standard_library
from .places import free_place, prepare
from .progress import progress
from .ranks import decided_by_first, ended_by_sigterm, first_console, joined, together
from .training import BATCH, RECIPES, VALIDATION_BATCH, VALIDATION_EVERY, Training

NAME = "python -m normuon_lens.sample_runs.train"
BY_NAME = {recipe.name.lower(): recipe for recipe in RECIPES}

EXAMPLES = f"""\b
Example: {NAME} --optimizer normuon --steps 600 -o runs/x.h5
  by two processes:
    torchrun --standalone --nproc-per-node 2 -m normuon_lens.sample_runs.train --optimizer normuon
"""


@click.command(
    cls=OneVoice,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--optimizer",
    type=click.Choice(list(BY_NAME)),
    default="normuon",
    show_default=True,
    help="Of the matrices; embeddings, head and norms are always under AdamW.",
)
@click.option("--steps", type=click.IntRange(min=1), default=600, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of initial weights and batches.")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=BATCH,
    show_default=True,
    help="Windows of text a step, over all processes.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The recording.  [default: runs/OPTIMIZER.h5, or the next free runs/OPTIMIZER-2.h5, …]",
)
@click.option(
    "--every",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Record spectra and full matrices on every so many-th step.",
)
@click.option("--no-record", is_flag=True, help="Train, and record nothing.")
def train(
    optimizer: str,
    steps: int,
    seed: int,
    batch: int,
    output: Path | None,
    every: int,
    no_record: bool,
) -> None:
    """Train one small GPT on the Python standard library's own source, and record it."""

    def choose() -> Path:
        path = output or free_place(Path("runs") / f"{optimizer}.h5")
        prepare(path)
        return path

    torch.set_num_threads(1)  # faster than two on matrices this small
    with joined(), ended_by_sigterm(), ExitStack() as stack:
        path = None if no_record else decided_by_first(choose)
        training = Training(BY_NAME[optimizer], steps, seed)
        context = training.model.shape.context
        with together():
            text = standard_library()
            batches = Batches(text.train, batch, context, seed)
            validation = Batches(text.validation, VALIDATION_BATCH, context, seed)
            if path:
                # Steps this short may outrun the process that writes: rather wait than drop.
                recorder = attach(
                    training.model,
                    training.optimizers,
                    path,
                    every=every,
                    include="blocks.*",
                    name=training.recipe.name,
                    on_full="wait",
                )
                stack.enter_context(recorder)
        held_out = validation.next()
        report = stack.enter_context(progress(steps, first_console()))
        for step in range(1, steps + 1):
            loss = training.step(*batches.next(), batches.weight)
            scalars = {"loss": loss}
            if step % VALIDATION_EVERY == 0 or step == steps:
                scalars["val_loss"] = training.validate(*held_out, validation.weight)
            if path:
                recorder.log(**scalars)
            report(step, {training.recipe.name: loss})


if __name__ == "__main__":
    sys.exit(run_command(train, NAME))
