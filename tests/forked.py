"""Stands in for `subprocess` where recorders start their helpers: here each is a fork.

A helper that is started as users start it first imports NumPy and HDF5, which takes longer than all
else it does in most tests. A fork has them. It is a process all the same, with pipes and a session
of its own, and runs the same code; how a helper is started is for other tests. To be put in place
by ``setattr(feed, "subprocess", forked)``.
"""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from subprocess import PIPE, TimeoutExpired
from typing import IO, Any, NoReturn

from normuon_lens.hooks import feed
from normuon_lens.runfile import helper

__all__ = ["PIPE", "Popen", "TimeoutExpired"]

USUAL = feed.HELPER


def Popen(command: Sequence[str], **options: Any) -> Any:  # noqa: N802, as in subprocess
    """Start a helper as a fork; whatever a test put in its place, as it is."""
    usual = tuple(command[: len(USUAL)]) == USUAL
    return Forked(command, **options) if usual else subprocess.Popen(command, **options)


class Forked:
    """A helper process as a fork of this one, with what a feed needs of a `subprocess.Popen`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stderr: IO[bytes],
        pass_fds: tuple[int],
        env: Mapping[str, str],
        **_: object,
    ) -> None:
        orders, to = os.pipe()
        of, answers = os.pipe()
        self.stdin, self.stdout = os.fdopen(to, "wb", 0), os.fdopen(of, "rb", 0)
        self.returncode: int | None = None
        with warnings.catch_warnings():
            # Python 3.12 warns of forks beside threads. They are torch's, and no helper needs them.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            _be_helper(command, {0: orders, 1: answers, 2: stderr.fileno()}, pass_fds[0], env)
        os.close(orders)
        os.close(answers)

    def wait(self, timeout: float = math.inf) -> int:
        deadline = time.monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                raise TimeoutExpired("helper", timeout)
            else:
                time.sleep(0.001)
        return self.returncode


def _be_helper(
    command: Sequence[str], streams: Mapping[int, int], memory: int, env: Mapping[str, str]
) -> NoReturn:
    code = 1
    try:
        sys.settrace(None)
        gc.freeze()  # what the trainer has is not to be looked at, and so copied, again
        os.setsid()
        for number, stream in streams.items():
            os.dup2(stream, number)
        os.closerange(3, memory)
        os.closerange(memory + 1, os.sysconf("SC_OPEN_MAX"))
        os.environ.update(env)
        code = helper.main(*map(int, command[len(USUAL) :]))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
