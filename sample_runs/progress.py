"""How far a training is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES_WITHOUT_TERMINAL = 12


class Reporter:
    """Shows steps as they are taken; made by :func:`progress`."""

    def __init__(self, steps: int, to: Console, bar: Progress) -> None:
        self._steps, self._to, self._bar = steps, to, bar
        self._task = bar.add_task("", total=steps, losses="")
        self._started = time.monotonic()

    def __call__(self, step: int, losses: Mapping[str, float]) -> None:
        """Show that `step`, counted from 1, was taken, and the losses by name."""
        shown = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        if self._to.is_terminal:
            self._bar.update(self._task, completed=step, losses=shown)
        elif step == self._steps or step % max(1, self._steps // LINES_WITHOUT_TERMINAL) == 0:
            left = (time.monotonic() - self._started) / step * (self._steps - step)
            line = f"step {step}/{self._steps}  loss {shown}  {left:.0f} s left"
            self._to.print(line, soft_wrap=True)


@contextmanager
def progress(steps: int, to: Console) -> Iterator[Reporter]:
    """Show the progress of a training of so many steps, until the end of the ``with``."""
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[losses]}"),
        TimeRemainingColumn(),
        console=to,
        disable=not to.is_terminal,
    )
    with bar:
        yield Reporter(steps, to, bar)
