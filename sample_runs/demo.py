"""Three optimizers, one model, the same batches: trained side by side with hooks attached."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from normuon_lens.analysis import compare
from normuon_lens.cli.compare import print_comparison
from normuon_lens.cli.tables import console
from normuon_lens.errors import LensError
from normuon_lens.hooks import Recorder, attach
from normuon_lens.runfile import open_run

from .data import Batches, Text, standard_library
from .training import RECIPES, Training

BATCH = 16
VALIDATION_BATCH = 256
VALIDATION_EVERY = 50
SPECTRA_EVERY = 10
MATRICES_EVERY = 50
LINES_WITHOUT_TERMINAL = 12


def run_demo(folder: Path, steps: int, seed: int, dashboard: bool, browser: bool) -> None:
    """Train and record into `folder`, show the page meanwhile, print the comparison.

    Parameters
    ----------
    folder : Path
        Created if need be; must hold no recordings of the same names.
    steps, seed : int
    dashboard, browser : bool
        Whether to serve the page, and whether to open a browser on it.

    Raises
    ------
    LensError
        If the folder cannot be written or holds such recordings already.
    """
    to = console()
    _make(folder)
    with ExitStack() as stack:
        page = stack.enter_context(_dashboard(folder, browser)) if dashboard else None
        names = ", ".join(recipe.name for recipe in RECIPES)
        to.print(f"Training one small GPT under {names}: {steps} steps of the same batches each")
        try:
            paths = record(folder, steps, seed, to)
        except KeyboardInterrupt:
            to.print(
                f"Stopped. What was recorded is kept: normuon-lens dashboard {folder}",
                soft_wrap=True,
            )
            raise
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
    text = standard_library()
    trainings = [Training(recipe, steps, seed) for recipe in RECIPES]
    paths = [folder / f"{training.recipe.name.lower()}.h5" for training in trainings]
    with ExitStack() as stack:
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
                    on_full="wait",
                    store="float16" if compact else "float32",
                    compress=compact,
                    quiet=True,
                )
            )
            for training, path in zip(trainings, paths, strict=True)
        ]
        _train(trainings, recorders, text, steps, seed, to)
    for training, recorder, path in zip(trainings, recorders, paths, strict=True):
        rest = training.seconds - recorder.seconds
        to.print(
            f"{path}: {path.stat().st_size / 1e6:.1f} MB, {recorder.steps} steps, "
            f"{training.seconds:.1f} s, of which recording took {recorder.seconds:.1f} s "
            f"(+{recorder.seconds / rest:.0%})",
            soft_wrap=True,
        )
    return paths


def _train(
    trainings: list[Training],
    recorders: list[Recorder],
    text: Text,
    steps: int,
    seed: int,
    to: Console,
) -> None:
    context = trainings[0].model.shape.context
    batches = Batches(text.train, BATCH, context, seed)
    held_out = Batches(text.validation, VALIDATION_BATCH, context, seed).next()
    with _progress(steps, to) as report:
        for step in range(1, steps + 1):
            inputs, targets = batches.next()
            losses = {}
            for training, recorder in zip(trainings, recorders, strict=True):
                loss = training.step(inputs, targets)
                losses[training.recipe.name] = loss
                recorder.log(loss=loss, seconds=training.seconds)
                if step % VALIDATION_EVERY == 0 or step == steps:
                    recorder.log(val_loss=training.validate(*held_out))
            report(step, losses)


class _Reporter:
    """Tells how far the training is: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, steps: int, to: Console, progress: Progress) -> None:
        self._steps, self._to, self._progress = steps, to, progress
        self._task = progress.add_task("", total=steps, losses="")
        self._started = time.monotonic()

    def __call__(self, step: int, losses: dict[str, float]) -> None:
        shown = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        if self._to.is_terminal:
            self._progress.update(self._task, completed=step, losses=shown)
        elif step == self._steps or step % max(1, self._steps // LINES_WITHOUT_TERMINAL) == 0:
            left = (time.monotonic() - self._started) / step * (self._steps - step)
            line = f"step {step}/{self._steps}  loss {shown}  {left:.0f} s left"
            self._to.print(line, soft_wrap=True)


@contextmanager
def _progress(steps: int, to: Console) -> Iterator[_Reporter]:
    progress = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[losses]}"),
        TimeRemainingColumn(),
        console=to,
        disable=not to.is_terminal,
    )
    with progress:
        yield _Reporter(steps, to, progress)


@contextmanager
def _dashboard(folder: Path, browser: bool) -> Iterator[subprocess.Popen[bytes]]:
    """Serve the page in a process of its own: the training and the page do not share a lock."""
    command = [sys.executable, "-P", "-m", "normuon_lens.cli.main", "dashboard", str(folder)]
    command += ["--wait", *([] if browser else ["--no-browser"])]
    process = subprocess.Popen(command)
    # Python ends at once on SIGTERM; the page must not stay behind, nor a recording unfinished.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield process
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:
            process.terminate()
        process.wait()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LensError(f"{folder}: cannot record there ({error.strerror})") from None
