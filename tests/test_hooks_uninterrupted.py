"""Ctrl-C in the midst of a hook comes through, a moment later."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

import pytest

from normuon_lens.hooks.uninterrupted import uninterrupted


def test_ctrl_c_waits_for_the_end() -> None:
    done = []

    def body() -> None:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("all of it")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        body()
    assert done == ["all of it"]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_twice_does_not_wait() -> None:
    done = []

    def body() -> None:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            done.append("the rest")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        body()
    assert done == []
    assert signal.getsignal(signal.SIGINT) is before


def test_the_users_own_handler_is_called_once_with_its_arguments() -> None:
    calls: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        calls.append(number)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            assert calls == []
        assert calls == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_the_system_handles_is_left_to_it() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with uninterrupted():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_error_passes_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), uninterrupted():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_are_not_meant() -> None:
    done = []

    def run() -> None:
        with uninterrupted():
            done.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [True]
