"""The trainer's end of the helper process: hands over, never waits unless asked to.

Messages go through a ring in shared memory. When the ring is full a message is refused (the
recorder counts it as dropped), or, with ``wait=True``, held until there is room. If the helper
dies, :class:`FeedLost` is raised once and the recorder switches itself off. A ``KeyboardInterrupt``
may come out of any line here; whatever it cuts short, the next call finds nothing broken.
"""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from normuon_lens.runfile import wire

ALIGN = 64
HEARD_BYTES = 65536
WAIT_MILLISECONDS = 500
START_SECONDS = 60.0
# -P: a user's own numpy.py or hooks.py in the working directory is none of the helper's business.
HELPER = (sys.executable, "-P", "-m", "normuon_lens.runfile.helper")


class FeedLost(Exception):
    """The helper process is gone or reported an error; the text says why."""


class FeedSilent(FeedLost):
    """The helper process does not answer; it may still finish what it was handed."""


class FeedEnded(FeedLost):
    """The helper process has ended."""


class Feed:
    """A running helper process and the shared memory that feeds it.

    Parameters
    ----------
    capacity : int
        Bytes of shared memory; the bound on what may be in flight.

    Attributes
    ----------
    answers : dict
        The last answer of each name. From the opening on ``committed`` is among them: the last
        step of the first recording that is committed.

    Raises
    ------
    FeedLost
        If the memory or the process is not to be had.
    """

    def __init__(self, capacity: int) -> None:
        self.answers: dict[str, Any] = {}
        self._capacity = capacity
        # How much was taken of how much was written, positions that grow for ever. One value:
        # nothing can come between the two.
        self._span = (0, 0)
        self._unsure = False
        self._heard = bytearray(HEARD_BYTES + 1)  # what is unused is zero, its last byte always
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the helper
        # One BLAS thread, set before the helper's numpy loads: more would fight the training.
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        try:
            descriptor, self._memory = wire.create_memory(capacity)
            try:
                # A session of its own, so that a Ctrl-C meant for the training does not reach it.
                self._process = subprocess.Popen(
                    [*HELPER, str(os.getpid()), str(descriptor), str(capacity)],
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
        return self._send(kind, header, arrays or {}, math.inf if wait else 0.0)

    def poll(self) -> None:
        """Take the helper's answers so far; FeedLost if it is gone."""
        while True:
            self._hear()
            # Into a buffer of our own: what os.read returns would be lost if it were interrupted
            # before it is kept.
            free = memoryview(self._heard)[self._heard.find(0) : HEARD_BYTES]
            try:
                if not os.readv(self._from, [free]):
                    raise FeedEnded(self._last_words())
            except BlockingIOError:
                return

    def ask(self, kind: str, header: Mapping[str, Any], answer: str, seconds: float) -> Any:
        """Send a message and wait for the answer of that name.

        Raises
        ------
        FeedLost
            If the helper is gone, or does not answer within `seconds`.
        """
        deadline = time.monotonic() + seconds
        sent = self._send(kind, header, {}, deadline)
        if not sent and time.monotonic() < deadline:
            raise FeedLost(f"a {kind} message does not fit the shared memory")
        # An answer comes with the acknowledgement of its question.
        while not sent or self._span[0] < self._span[1]:
            if time.monotonic() >= deadline:
                raise FeedSilent(f"the helper process did not answer within {seconds:.0f} s")
            try:
                self._wait_for_answer()
            except FeedEnded:
                # With its last answer it may be gone already.
                if not sent or self._span[0] < self._span[1]:
                    raise
        return self.answers[answer]

    def close(self, seconds: float = 5.0) -> None:
        """Let the helper go, and wait so long for its end: it ends once its pipe is closed."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()
        try:
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            # It still packs: not ours to wait for here, only to bury. Popen is not to know.
            self._process.returncode = 0
            threading.Thread(target=_bury, args=(self.pid,), daemon=True).start()
        self._stderr.close()

    def _send(
        self, kind: str, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], until: float
    ) -> bool:
        """Hand a message over; False if there is no room for it `until` some monotonic time."""
        encoded = wire.encode_header(kind, header, arrays)
        size = wire.message_size(encoded, arrays)
        size = -(-size // ALIGN) * ALIGN
        if size > self._capacity:
            return False
        self.poll()
        # A message that was cut short may have been posted or not: an empty one settles it.
        if self._unsure:
            if not self._post(0, 0, self._span[1], until):
                return False
            self._unsure = False
        while (found := self._place_for(size)) is None:
            if time.monotonic() >= until:
                return False
            self._wait_for_answer()
        written, (taken, start) = self._span[1], found
        length = wire.write_message(self._memory, start % self._capacity, encoded, arrays)
        self._unsure = True
        # Before it is posted: the helper's reading must never be free to be written over.
        self._span = (taken, start + size)
        posted = self._post(start % self._capacity, length, start + size, until)
        if not posted:
            self._span = (min(self._span[0], written), written)
        self._unsure = False
        return posted

    def _place_for(self, size: int) -> tuple[int, int] | None:
        """Find room for `size` bytes that do not wrap around the ring's end.

        Returns
        -------
        tuple of int
            How much is taken when the message starts, and where it starts; None without room.
        """
        taken, written = self._span
        room = self._capacity - written % self._capacity
        if taken == written:  # empty: all of the ring is one piece again
            start = written if room == self._capacity else written + room
            return start, start
        start = written if size <= room else written + room
        return (taken, start) if start + size - taken <= self._capacity else None

    def _post(self, offset: int, length: int, position: int, until: float) -> bool:
        place = wire.PLACE.pack(offset, length, position)
        while True:
            try:
                os.write(self._to, place)  # below PIPE_BUF: all of it or nothing
                return True
            except BlockingIOError:
                if time.monotonic() >= until:
                    return False
                # Its answers are taken meanwhile, else both sides could wait for each other.
                self._wait_for_answer(or_room=True)
            except BrokenPipeError:
                self.poll()
                raise FeedLost(self._last_words()) from None

    def _hear(self) -> None:
        """Take the lines that are complete; interrupted, it takes them again, to no harm."""
        heard = self._heard[: self._heard.find(0)]
        *lines, rest = heard.split(b"\n")
        for line in lines:
            answer = json.loads(line)
            self._span = (max(answer.pop("ack", 0), self._span[0]), self._span[1])
            self.answers.update(answer)
        self._heard[: len(heard)] = rest.ljust(len(heard), b"\0")
        if "error" in self.answers:
            raise FeedLost(self.answers.pop("error"))

    def _wait_for_answer(self, *, or_room: bool = False) -> None:
        # Not select(), which knows no descriptor beyond 1023: data loaders open thousands.
        waiting = select.poll()
        waiting.register(self._from, select.POLLIN)
        if or_room:
            waiting.register(self._to, select.POLLOUT)
        waiting.poll(WAIT_MILLISECONDS)
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


def _bury(pid: int) -> None:
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)
