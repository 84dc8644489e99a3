"""Ctrl-C waits until a hook is done: it is run whole or not at all."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

HELD = (signal.SIGINT, signal.SIGTERM)

Handlers = dict[int, Callable[[int, FrameType | None], Any]]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back the handlers of Ctrl-C and SIGTERM, and call them at the end.

    Only handlers written in Python can raise in the midst of a hook; only in the main thread do
    they run. The same signal a second time comes through at once: whoever sends it means it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: dict[int, FrameType | None] = {}
    handlers: Handlers = {
        number: handler for number in HELD if callable(handler := signal.getsignal(number))
    }

    def hold(number: int, frame: FrameType | None) -> None:
        if number in caught:
            handlers[number](number, frame)
        caught[number] = frame

    try:
        for held in handlers:
            signal.signal(held, hold)
        yield
    finally:
        _put_back(dict(handlers))
        for number, frame in caught.items():
            handlers[number](number, frame)


def _put_back(handlers: Handlers) -> None:
    """Install every handler again, whatever the first of them raises meanwhile."""
    if handlers:
        number, handler = handlers.popitem()
        try:
            signal.signal(number, handler)
        finally:
            _put_back(handlers)
