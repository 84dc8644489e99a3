"""Recordings that begin by themselves, when an optimizer takes its first step.

torch tells of every optimizer's step before it happens. An optimizer seen for the first time gets
a recorder there and then, which therefore sees that very step.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet, ref

from .on_import import on_import

# Nothing here loads torch or NumPy before the script has: it may first set their environment.
if TYPE_CHECKING:
    import torch

    from .discovery import Found
    from .recorder import Recorder


def numbered(path: Path, number: int) -> Path:
    """Return the path of the `number`-th recording: ``x.h5``, ``x-2.h5``, ``x-3.h5``, …."""
    return path.with_stem(f"{path.stem}-{number}") if number > 1 else path


def is_taken(path: Path) -> bool:
    """Whether there is a recording at `path`, or remains of one."""
    return path.exists() or path.with_name(f"{path.name}.parts").exists()


class _Open(NamedTuple):
    recorder: Recorder
    model: ref[torch.nn.Module]
    parameters: set[int]


class AutomaticRecorder:
    """Attaches to every optimizer with weight matrices that takes a step in this process.

    All optimizers of one model are one recording. A second model, or an optimizer that is made
    later, is a further one. Whatever goes wrong is said in one line, and training goes on.

    Parameters
    ----------
    path : Path
        Where the first recording shall lie; further ones are `numbered`.
    options : mapping
        Further arguments of :func:`normuon_lens.hooks.attach`.
    mute : bool
        Whether another rank speaks for this one.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], *, mute: bool = False) -> None:
        # The script may change the working directory.
        self._path, self._options = path.absolute(), dict(options)
        self._open: list[_Open] = []
        self._recordings = 0
        self._known: WeakSet[torch.optim.Optimizer] = WeakSet()
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._said: set[str] = set()
        self._mute = mute
        self._why_not = "the script did not import torch"
        self._untraced: Callable[[torch.optim.Optimizer], None] | None = None
        self._stop: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Watch the optimizers from now on, or from when torch is imported."""
        on_import("torch", self._watch)

    def finish(self, error: BaseException | None = None) -> None:
        """Close what is still open; say so if there was nothing to record.

        Parameters
        ----------
        error : BaseException, optional
            What interrupted the training.
        """
        if os.getpid() != self._process:
            return
        self._stop()
        for each in self._open:
            each.recorder.__exit__(type(error) if error else None, error, None)
        self._open.clear()
        if not self._recordings:
            self._say(f"nothing was recorded: {self._why_not}")

    def _watch(self) -> None:
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        self._why_not = (
            "no optimizer took a step in this process, and those that it starts are not recorded"
        )
        self._stop = register_optimizer_step_pre_hook(self._before_step).remove

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # A compiled step must not trace into this. Asked for only now, because it loads the
        # compiler, which a script may configure after importing torch; optimizers load it too.
        if self._untraced is None:
            import torch

            self._untraced = torch.compiler.disable(self._look)  # type: ignore[no-untyped-call]
        self._untraced(optimizer)

    def _look(self, optimizer: torch.optim.Optimizer) -> None:
        try:
            if optimizer not in self._known:
                self._meet(optimizer)
        except Exception as error:
            self._fail(optimizer, error)

    def _meet(self, optimizer: torch.optim.Optimizer) -> None:
        from .selection import leaf_optimizers
        from .uninterrupted import uninterrupted

        with self._lock, uninterrupted():
            is_part = self._is_part_of_known(optimizer)
            self._known.add(optimizer)
            # A forked child has the hook too, but the recordings are its parent's.
            if os.getpid() == self._process and not is_part:
                for leaf in leaf_optimizers(optimizer):
                    if leaf is optimizer or leaf not in self._known:
                        self._record(leaf)

    def _is_part_of_known(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether one that is recorded steps it inside its own step, as SAM and Lookahead do."""
        return any(held is optimizer for outer in self._known for held in vars(outer).values())

    def _record(self, optimizer: torch.optim.Optimizer) -> None:
        from .discovery import discover, trains_matrices
        from .recorder import RECORDED

        self._known.add(optimizer)
        if optimizer in RECORDED:
            self._why_not = "the script attaches a recorder itself"
            return
        found = discover(optimizer, self._known)
        if found is None:
            self._why_not = f"what {_kind(optimizer)} trains belongs to no torch.nn.Module"
            return
        self._known.update(found.optimizers)
        if not trains_matrices(found.optimizers):
            kinds = ", ".join(map(_kind, found.optimizers))
            self._why_not = f"{kinds} trains no weight matrix of {type(found.model).__name__}"
            return
        self._attach(found)

    def _attach(self, found: Found) -> None:
        from .attachment import attach
        from .discovery import parameters_of

        parameters = {id(p) for optimizer in found.optimizers for p in parameters_of(optimizer)}
        self._close_past(parameters)
        recorder = attach(found.model, found.optimizers, self._next_path(), **self._options)
        self._recordings += 1
        self._open.append(_Open(recorder, ref(found.model), parameters))

    def _close_past(self, parameters: set[int]) -> None:
        """Close recordings of models that are gone, and of those whose optimizer was replaced.

        A recorder keeps its optimizers alive: a script that trains one model after another must
        not be left with all of them.
        """
        for each in list(self._open):
            if each.model() is None or each.parameters & parameters:
                self._open.remove(each)
                each.recorder.close()

    def _next_path(self) -> Path:
        number = self._recordings + 1
        path = numbered(self._path, number)
        # The first is the one that was asked for; to resume, each model goes on with its own.
        while number > 1 and is_taken(path) and not self._options.get("resume"):
            number += 1
            path = numbered(self._path, number)
        here = Path.cwd()
        return path.relative_to(here) if path.is_relative_to(here) else path

    def _fail(self, optimizer: torch.optim.Optimizer, error: Exception) -> None:
        from normuon_lens.errors import LensError

        reason = str(error) if isinstance(error, LensError) else f"{type(error).__name__}: {error}"
        self._why_not = f"{_kind(optimizer)}: {reason}"
        self._say(f"not recorded, training goes on: {self._why_not}")

    def _say(self, text: str) -> None:
        if text not in self._said and not self._mute:
            self._said.add(text)
            # Nobody may be there to read it: the terminal is gone, the pipe closed.
            with suppress(OSError, ValueError):
                print(f"normuon-lens: {text}", file=sys.stderr, flush=True)


def _kind(optimizer: torch.optim.Optimizer) -> str:
    return type(optimizer).__name__
