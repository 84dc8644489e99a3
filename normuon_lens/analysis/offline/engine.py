"""Spreads batches over worker processes, of which any may die: its batch is given to another.

The workers are started as processes of their own, neither forked (BLAS threads do not survive
that) nor by :mod:`multiprocessing` (which runs a user's script again in each of them). Each has
one BLAS thread: several workers with several threads each would fight over the cores.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from normuon_lens.analysis.offline.stored import Answer, Batch
from normuon_lens.errors import LensError

# -P: a user's own numpy.py in the working directory is none of a worker's business.
WORKER = (sys.executable, "-P", "-m", "normuon_lens.analysis.offline.worker")

ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "VECLIB_MAXIMUM")}
"""Set before a worker starts: a BLAS that is loaded has its threads."""

BEAT_SECONDS = 0.25
TRIES = 3
"""So many workers may die over a batch; and so many in a row before they are ready for any."""

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Return how many cores this process may use: of those it is bound to, as many as it is lent.

    A container may see all cores of its machine, and be slowed down when it uses more than a few.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such thing here, or "max"
        return cores


def spread(batches: Sequence[Batch], workers: int) -> Generator[tuple[Batch, Answer] | None]:
    """Have batches measured by processes of this machine.

    Parameters
    ----------
    batches : sequence of Batch
        Begun in this order.
    workers : int
        How many processes.

    Yields
    ------
    tuple of (Batch, Answer), or None
        As they are done, in any order; parts of a batch on its own where a worker died over it.
        None when nothing was done for a while. When the iterator is closed, all processes end.

    Raises
    ------
    LensError
        If workers cannot be started, or a recording is gone.
    """
    waiting = deque((batch, 0) for batch in batches)
    pool = _Pool()
    try:
        for _ in range(min(workers, len(batches))):
            pool.start()
        while waiting or pool.busy:
            for worker in pool.idle:
                if waiting:
                    worker.give(*waiting.popleft())
            heard = False
            for worker in pool.heard(BEAT_SECONDS):
                while (answer := worker.next_answer()) is not None:
                    batch, _ = worker.take_back()
                    heard = True
                    yield batch, answer
                if worker.dead:
                    yield from _again(pool, worker, waiting)
            if not heard:
                yield None
    finally:
        pool.end()


def _again(
    pool: _Pool, worker: _Worker, waiting: deque[tuple[Batch, int]]
) -> Iterator[tuple[Batch, Answer]]:
    """Replace a dead worker; what it was at is done again, a step at a time, or given up."""
    why = pool.bury(worker)
    if worker.task:
        batch, tries = worker.take_back()
        if tries + 1 < TRIES:
            alone = [batch._replace(steps=(step,)) for step in batch.steps]
            waiting.extendleft((one, tries + 1) for one in reversed(alone))
        else:
            text = f"{TRIES} processes in a row ended over it ({why}; too little memory?)"
            yield batch, [text] * len(batch.steps)
    pool.start()


class _Pool:
    """The workers that live, and the ear to all of them."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._stillborn = 0

    @property
    def idle(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.ready and not worker.task]

    @property
    def busy(self) -> bool:
        return any(worker.task for worker in self._workers)

    def start(self) -> None:
        worker = _Worker()
        self._workers.append(worker)
        self._selector.register(worker.output, selectors.EVENT_READ, worker)

    def heard(self, seconds: float) -> Iterator[_Worker]:
        """Yield the workers that said something, or ended, within a time."""
        for key, _ in self._selector.select(seconds):
            key.data.listen()
            yield key.data

    def bury(self, worker: _Worker) -> str:
        """Forget a worker that is dead; returns how it ended. LensError if none gets ready."""
        self._selector.unregister(worker.output)
        self._workers.remove(worker)
        why = worker.end()
        self._stillborn = 0 if worker.ready else self._stillborn + 1
        if self._stillborn == TRIES:
            raise LensError(f"the worker processes end before they begin: {why}")
        return why

    def end(self) -> None:
        for worker in self._workers:
            worker.process.kill()  # it holds nothing that could be lost
        for worker in self._workers:
            worker.end()
        self._selector.close()


class _Worker:
    """A process, and what it is at."""

    def __init__(self) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the process
        try:
            # A session of its own: a Ctrl-C reaches only us, and we end it.
            self.process = subprocess.Popen(
                WORKER,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env={**os.environ, **ONE_THREAD},
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            self._stderr.close()
            raise LensError(f"cannot start a worker process: {error.strerror}") from None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._input, self.output = self.process.stdin, self.process.stdout
        self._heard = b""
        self.ready = self.dead = False
        self.task: tuple[Batch, int] | None = None

    def give(self, batch: Batch, tries: int) -> None:
        """Hand it a batch; if it is dead, we hear of it soon."""
        self.task = (batch, tries)
        line = json.dumps(batch._asdict()).encode() + b"\n"
        try:
            while line:
                line = line[self._input.write(line) :]
        except BrokenPipeError:
            pass

    def take_back(self) -> tuple[Batch, int]:
        """Return what it was at."""
        assert self.task is not None
        task, self.task = self.task, None
        return task

    def listen(self) -> None:
        """Take what it said, or that it ended."""
        piece = os.read(self.output.fileno(), 1 << 16)
        self._heard += piece
        self.dead = not piece

    def next_answer(self) -> Answer | None:
        """Return the next answer; LensError if it cannot work on this recording at all."""
        while b"\n" in self._heard:
            line, _, self._heard = self._heard.partition(b"\n")
            said: dict[str, Any] = json.loads(line)
            if "refused" in said:
                raise LensError(said["refused"])
            if "answer" in said:
                answer: Answer = said["answer"]
                return answer
            self.ready = True
        return None

    def end(self) -> str:
        """Wait for its end, and return how it was."""
        code = self.process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").split("\n")
        for file in (self._stderr, self._input, self.output):
            file.close()
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return next((line for line in reversed(said) if line.strip()), f"exit code {code}")
