"""Tells the step that a training takes from steps that it takes within itself.

An optimizer that inherits its ``step`` and calls the inherited one may have both hooked by torch:
two calls of every hook, one within the other, for one step.
"""

from __future__ import annotations

import sys
from types import FrameType

import torch.optim.optimizer as torch_optimizer


class Nesting:
    """Where one optimizer's steps stand on the call stack."""

    def __init__(self) -> None:
        self._frame: FrameType | None = None
        self._depth = 0

    def enter(self) -> bool:
        """Tell, in a hook before a step, whether it is the outermost."""
        frame = _calling_step()
        # A step that ended in an exception left its frame here, but is on no stack any more.
        if self._frame is not None and _is_within(frame, self._frame):
            self._depth += 1
            return False
        self._frame, self._depth = frame, 0
        return True

    def leave(self) -> bool:
        """Tell, in a hook after a step, whether it was the outermost."""
        if self._depth:
            self._depth -= 1
            return False
        self._frame = None
        return True


def _calling_step() -> FrameType | None:
    """Return the frame of torch's that is calling the hook."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != torch_optimizer.__file__:
        frame = frame.f_back
    return frame


def _is_within(frame: FrameType | None, outer: FrameType) -> bool:
    while frame is not None and frame is not outer:
        frame = frame.f_back
    return frame is outer
