"""The trainer's end of the helper process: hands over, never waits unless asked to.

Messages go through a ring in shared memory. When the ring is full a message is refused (the
recorder counts it as dropped), or, with ``wait=True``, held until there is room. If the helper
dies, :class:`FeedLost` is raised once and the recorder switches itself off.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from normuon_lens.runfile import wire

ALIGN = 64
START_SECONDS = 60.0
# -P: a user's own numpy.py or hooks.py in the working directory is none of the helper's business.
HELPER = (sys.executable, "-P", "-m", "normuon_lens.runfile.helper")


class FeedLost(Exception):
    """The helper process is gone or reported an error; the text says why."""


class Feed:
    """A running helper process and the shared memory that feeds it.

    Parameters
    ----------
    capacity : int
        Bytes of shared memory; the bound on what may be in flight.

    Raises
    ------
    FeedLost
        If the memory or the process is not to be had.
    """

    def __init__(self, capacity: int) -> None:
        self.answers: dict[str, Any] = {}
        self._capacity = capacity
        self._written = self._freed = 0
        self._pending = b""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the helper
        # One BLAS thread, set before the helper's numpy loads: more would fight the training.
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        try:
            descriptor, self._memory = wire.create_memory(capacity)
            try:
                # A session of its own, so that a Ctrl-C meant for the training does not reach it.
                self._process = subprocess.Popen(
                    [*HELPER, str(descriptor), str(capacity)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._stderr,
                    pass_fds=(descriptor,),
                    env={**os.environ, **threads},
                    start_new_session=True,
                    bufsize=0,
                )
            finally:
                os.close(descriptor)
        except OSError as error:
            self._stderr.close()
            raise FeedLost(f"cannot start the helper process ({error})") from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)

    @property
    def pid(self) -> int:
        """Process id of the helper."""
        return self._process.pid

    def send(
        self,
        kind: str,
        header: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray] | None = None,
        *,
        wait: bool = False,
    ) -> bool:
        """Hand a message over.

        Returns
        -------
        bool
            False if there was no room for it and `wait` is false, or it can never fit.

        Raises
        ------
        FeedLost
            If the helper is gone.
        """
        arrays = arrays or {}
        encoded = wire.encode_header(kind, header, arrays)
        size = wire.message_size(encoded, arrays)
        size = -(-size // ALIGN) * ALIGN
        if size > self._capacity:
            return False
        self.poll()
        start = self._start_for(size)
        while start + size - self._freed > self._capacity:
            if not wait:
                return False
            self._wait_for_answer()
            start = self._start_for(size)
        length = wire.write_message(self._memory, start % self._capacity, encoded, arrays)
        place = wire.PLACE.pack(start % self._capacity, length, start + size)
        if not self._post(place, wait):
            return False
        self._written = start + size
        return True

    def poll(self) -> None:
        """Take the helper's answers so far; FeedLost if it is gone."""
        while True:
            try:
                piece = os.read(self._from, 65536)
            except BlockingIOError:
                return
            if not piece:
                raise FeedLost(self._last_words())
            *lines, self._pending = (self._pending + piece).split(b"\n")
            for line in lines:
                answer = json.loads(line)
                self._freed = answer.pop("ack", self._freed)
                if "error" in answer:
                    raise FeedLost(answer["error"])
                self.answers.update(answer)

    def ask(self, kind: str, header: Mapping[str, Any], answer: str, seconds: float) -> Any:
        """Send a message and wait for the answer of that name.

        Raises
        ------
        FeedLost
            If the helper is gone, or does not answer within `seconds`.
        """
        self.answers.pop(answer, None)
        if not self.send(kind, header, wait=True):
            raise FeedLost(f"a {kind} message does not fit the shared memory")
        deadline = time.monotonic() + seconds
        while answer not in self.answers:
            if time.monotonic() > deadline:
                raise FeedLost(f"the helper process did not answer within {seconds:.0f} s")
            self._wait_for_answer()
        return self.answers[answer]

    def close(self) -> None:
        """Let the helper go: it ends by itself once its pipe is closed."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            # It still packs; it is not ours to wait for. Keeps Popen from warning about it.
            self._process.returncode = 0
        self._stderr.close()

    def _start_for(self, size: int) -> int:
        """Return where a message of `size` may start: it never wraps around the ring's end."""
        if self._freed == self._written:
            self._freed = self._written = 0  # empty: all of the ring is one piece again
        room = self._capacity - self._written % self._capacity
        return self._written if size <= room else self._written + room

    def _post(self, place: bytes, wait: bool) -> bool:
        while True:
            try:
                os.write(self._to, place)  # below PIPE_BUF: all of it or nothing
                return True
            except BlockingIOError:
                if not wait:
                    return False
                select.select([], [self._to], [], 1.0)
            except BrokenPipeError:
                self.poll()
                raise FeedLost(self._last_words()) from None

    def _wait_for_answer(self) -> None:
        select.select([self._from], [], [], 0.5)
        self.poll()

    def _last_words(self) -> str:
        try:
            code: int | None = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            code = None
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip().splitlines()
        reason = f": {said[-1]}" if said else ""
        return f"the helper process ended with exit code {code}{reason}"
