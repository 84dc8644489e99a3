"""What the callbacks of all frameworks have in common: attach, log, close with the right status."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .attachment import attach
from .recorder import Recorder


class Ride:
    """A recording for as long as a framework trains.

    Parameters
    ----------
    path : str or path-like
    options : mapping
        Further arguments of :func:`normuon_lens.hooks.attach`.

    Attributes
    ----------
    recorder : Recorder or None
        None before the first training.

    Raises
    ------
    TypeError
        For an option that `attach` does not have.
    """

    def __init__(self, path: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
        # Now, not when the training starts.
        inspect.signature(attach).bind(None, None, path, **options)
        self.recorder: Recorder | None = None
        self._path, self._options = path, dict(options)

    def begin(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        step: int,
    ) -> None:
        """Attach at the start of a training that has taken `step` steps; a second one is appended.

        What was left open is closed first: the training before ended without a word.
        """
        self.end(InterruptedError())
        options = {"step": step, **self._options}
        if self.recorder is not None:
            options["resume"] = True
        self.recorder = attach(model, optimizer, self._path, **options)

    def log(self, values: Mapping[str, Any]) -> None:
        """Log what is a number, or a tensor that holds one."""
        if self.recorder is not None:
            self.recorder.log(**{name: v for name, v in values.items() if _is_scalar(v)})

    def end(self, error: BaseException | None = None) -> None:
        """Close the recording, finished or interrupted by `error`; nothing if it is closed."""
        if self.recorder is not None:
            self.recorder.__exit__(type(error) if error else None, error, None)


def _is_scalar(value: object) -> bool:
    return isinstance(value, int | float) or (
        isinstance(value, torch.Tensor) and value.numel() == 1
    )
