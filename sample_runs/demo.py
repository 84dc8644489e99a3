"""Three optimizers, one model, the same batches: trained side by side with hooks attached."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from rich.console import Console

from normuon_lens.analysis import compare
from normuon_lens.cli.compare import print_comparison
from normuon_lens.hooks import Recorder, attach
from normuon_lens.runfile import open_run

from .data import Batches, standard_library
from .places import free_place, prepare
from .progress import progress
from .ranks import decided_by_first, ended_by_sigterm, first_console, joined, rank, ranks, together
from .training import BATCH, RECIPES, VALIDATION_BATCH, VALIDATION_EVERY, Training

SPECTRA_EVERY = 10
MATRICES_EVERY = 50


def run_demo(output: Path | None, steps: int, seed: int, dashboard: bool, browser: bool) -> None:
    """Train and record, show the page meanwhile, print the comparison.

    Parameters
    ----------
    output : Path or None
        Folder, created if need be; must hold no recordings of the same names. The next free one
        if None.
    steps, seed : int
    dashboard, browser : bool
        Whether to serve the page, and whether to open a browser on it.

    Raises
    ------
    LensError
        If the folder cannot be written or holds such recordings already.
    """
    with ExitStack() as stack:
        with joined():
            stack.enter_context(ended_by_sigterm())
            folder = decided_by_first(lambda: _make(output))
            to, first = first_console(), rank() == 0
            page = stack.enter_context(_dashboard(folder, browser)) if dashboard and first else None
            names = ", ".join(recipe.name for recipe in RECIPES)
            by = f" by {ranks()} processes" if ranks() > 1 else ""
            to.print(
                f"Training one small GPT under {names}{by}: {steps} steps of the same batches each"
            )
            try:
                paths = record(folder, steps, seed, to)
            except KeyboardInterrupt:
                to.print(
                    f"Stopped. What was recorded is kept: normuon-lens dashboard {folder}",
                    soft_wrap=True,
                )
                raise
        if not first:
            return
        print_comparison(compare([open_run(path) for path in paths]), to)
        if page is None or page.poll() is not None:
            to.print(f"Look at it:  normuon-lens dashboard {folder}", soft_wrap=True)
            return
        to.print("The page stays up until you press Ctrl-C.")
        with suppress(KeyboardInterrupt):
            page.wait()


def record(
    folder: Path,
    steps: int,
    seed: int,
    to: Console,
    *,
    norms_every: int = 1,
    every: int = SPECTRA_EVERY,
    matrices_every: int = MATRICES_EVERY,
    compact: bool = False,
) -> list[Path]:
    """Train every recipe side by side and return the paths of the recordings.

    Parameters
    ----------
    norms_every, every, matrices_every : int
        As of :func:`normuon_lens.hooks.attach`.
    compact : bool
        Keep matrices as float16 and compress the files.
    """
    # Matrices this small are slower on two threads than on one, and the other core has the
    # helpers and the page to serve.
    torch.set_num_threads(1)
    trainings = [Training(recipe, steps, seed) for recipe in RECIPES]
    paths = _paths(folder)
    with ExitStack() as stack:
        with together():
            text = standard_library()
            context = trainings[0].model.shape.context
            batches = Batches(text.train, BATCH, context, seed)
            validation = Batches(text.validation, VALIDATION_BATCH, context, seed)
            recorders = [
                stack.enter_context(
                    attach(
                        training.model,
                        training.optimizers,
                        path,
                        include="blocks.*",
                        name=training.recipe.name,
                        notes=f"normuon-lens demo, {steps} steps, seed {seed}",
                        norms_every=norms_every,
                        every=every,
                        matrices_every=matrices_every,
                        stages=True,
                        on_full="wait",
                        store="float16" if compact else "float32",
                        compress=compact,
                        quiet=True,
                    )
                )
                for training, path in zip(trainings, paths, strict=True)
            ]
        _train(trainings, recorders, batches, validation, steps, to)
    if rank() == 0:
        _tell(trainings, recorders, paths, to)
    return paths


def _tell(
    trainings: list[Training], recorders: list[Recorder], paths: list[Path], to: Console
) -> None:
    for training, recorder, path in zip(trainings, recorders, paths, strict=True):
        if not path.exists():
            to.print(recorder.summary, soft_wrap=True)
            continue
        rest = training.seconds - recorder.seconds
        to.print(
            f"{path}: {path.stat().st_size / 1e6:.1f} MB, {recorder.steps} steps, "
            f"{training.seconds:.1f} s, of which recording took {recorder.seconds:.1f} s "
            f"(+{recorder.seconds / rest:.0%})",
            soft_wrap=True,
        )


def _train(
    trainings: list[Training],
    recorders: list[Recorder],
    batches: Batches,
    validation: Batches,
    steps: int,
    to: Console,
) -> None:
    held_out = validation.next()
    with progress(steps, to) as report:
        for step in range(1, steps + 1):
            inputs, targets = batches.next()
            losses = {}
            for training, recorder in zip(trainings, recorders, strict=True):
                loss = training.step(inputs, targets, batches.weight)
                losses[training.recipe.name] = loss
                recorder.log(loss=loss, seconds=training.seconds)
                if step % VALIDATION_EVERY == 0 or step == steps:
                    recorder.log(val_loss=training.validate(*held_out, validation.weight))
            report(step, losses)


def _make(output: Path | None) -> Path:
    """Choose the folder and make it."""
    folder = output or free_place(Path("runs/demo"))
    prepare(*_paths(folder))
    return folder


def _paths(folder: Path) -> list[Path]:
    return [folder / f"{recipe.name.lower()}.h5" for recipe in RECIPES]


@contextmanager
def _dashboard(folder: Path, browser: bool) -> Iterator[subprocess.Popen[bytes]]:
    """Serve the page in a process of its own: the training and the page do not share a lock."""
    command = [sys.executable, "-P", "-m", "normuon_lens.cli.main", "dashboard", str(folder)]
    command += ["--wait", *([] if browser else ["--no-browser"])]
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
