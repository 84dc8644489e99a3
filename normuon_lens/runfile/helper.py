"""The helper process: takes what the trainer sends, measures spectra, writes the recordings.

Started as ``python -m normuon_lens.runfile.helper`` by a recorder, never by hand. A separate
process, because a thread would slow the training down, because HDF5 on a full disk kills the
process it runs in, and because a recording must outlive its trainer: when the trainer is gone,
the helper takes what was sent, commits, packs and ends.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from normuon_lens.errors import LensError, RunError
from normuon_lens.metrics.spectrum import rounding_noise, singular_values
from normuon_lens.runfile.manifest import INTERRUPTED
from normuon_lens.runfile.schema import Matrices, Matrix, Shard
from normuon_lens.runfile.wire import PLACE, Message, read_message
from normuon_lens.runfile.writer import Closed, Writer

TICK_SECONDS = 0.5
MERGE_SECONDS = 30.0
"""How long the lead waits for other ranks to finish before it leaves a recording in parts."""
MAX_REASON = 1000
"""Characters of an error's text that are passed on."""


class Sample:
    """The spectra of one stage at one step, as they come in matrix by matrix."""

    def __init__(self, matrices: Matrices) -> None:
        self._matrices = matrices
        self._came = np.zeros(len(matrices), dtype=bool)
        self._sigma = np.full(matrices.total_sigmas, np.nan)
        self._floor = np.full(len(matrices), np.nan)
        self._weight_norm = np.full(len(matrices), np.nan)
        self._decay = np.full(len(matrices), np.nan)
        self._told: list[dict[str, np.ndarray]] = []

    def measure(self, message: Message) -> None:
        """Take the spectrum of a matrix."""
        header, values = message.header, message.arrays["values"]
        i = header["index"]
        noise = rounding_noise(values.shape, header["noise_norm"], header["noise_dtype"])
        # A spectrum that LAPACK cannot find stays NaN; the recording goes on.
        with suppress(np.linalg.LinAlgError):
            sigma, floor = singular_values(values, noise=noise)
            self._sigma[self._matrices.sigmas(i)] = sigma
            self._floor[i] = floor
        self._weight_norm[i] = header["weight_norm"]
        self._decay[i] = header["decay"]
        self._came[i] = True

    def weigh(self, message: Message) -> None:
        """Note norms and decays of weights that were not known where their matrices were."""
        self._told.append(message.arrays)

    def write(self, writer: Writer, stage: str, step: int, *, shard: bool) -> None:
        """Hand the spectra to the writer, if there are any; of a rank only what came."""
        if not self._came.any():
            return
        for told in self._told:
            index, decay = told["index"], told["decay"]
            self._weight_norm[index] = told["norm"]
            self._decay[index] = np.where(np.isfinite(decay), decay, self._decay[index])
        self._weight_norm[~self._came] = self._decay[~self._came] = np.nan
        of = np.flatnonzero(self._came) if shard else np.arange(len(self._came))
        writer.spectra(
            stage,
            step,
            self._sigma[np.repeat(np.isin(np.arange(len(self._came)), of), self._matrices.widths)],
            self._floor[of],
            weight_norm=self._weight_norm[of],
            decay=self._decay[of],
            of=of.tolist() if shard else None,
        )


class Recording:
    """One of the recordings that a helper keeps: its writer, and the samples still coming in.

    Parameters
    ----------
    path : str
        Where the finished recording shall lie.
    metadata : mapping
        What describes the run.
    matrices : sequence of mapping
        The table of matrices, row by row.
    options : mapping
        Further arguments of :class:`Writer`.
    shard : mapping, optional
        What this rank records of the matrices, as :meth:`Shard.to_json` says it.

    Raises
    ------
    RunError
        If it cannot be recorded there; nothing is left behind then.
    """

    def __init__(
        self,
        path: str,
        metadata: Mapping[str, Any],
        matrices: list[dict[str, Any]],
        options: Mapping[str, Any],
        shard: Mapping[str, Any] | None = None,
    ) -> None:
        self._matrices = Matrices([Matrix(**row) for row in matrices])
        self._samples: dict[tuple[str, int], Sample] = {}
        self._shard = Shard.from_json(shard) if shard else None
        self.writer = Writer(
            Path(path), metadata, self._matrices, shard=self._shard, apart=True, **options
        )

    def step(self, message: Message) -> None:
        """Add a step's row."""
        header = message.header
        self.writer.step(
            header["step"],
            header["time"],
            scalars=header["scalars"],
            norms=message.arrays,
            void=header["void"],
        )
        self.writer.dropped(header["dropped"])
        # A step's row follows its matrices, so whatever was sent of its sample has come.
        self._end_samples(header["step"])

    def matrix(self, message: Message) -> None:
        """Measure a matrix, keep it, or both."""
        header = message.header
        if header["spectrum"]:
            self._sample(header).measure(message)
        if header["keep"]:
            values = message.arrays["values"]
            self.writer.matrix(header["stage"], header["index"], header["step"], values)

    def weights(self, message: Message) -> None:
        """Add norms and decays of the weights whose spectra come, or came, at the same step."""
        self._sample(message.header).weigh(message)

    def event(self, message: Message) -> None:
        """Add an event."""
        header = message.header
        self.writer.event(header["step"], header["kind"], header["text"])

    @property
    def untouched(self) -> bool:
        """Whether nothing came since the opening."""
        return self.writer.untouched and not self._samples

    def close(self, status: str, merge_until: float | None = None) -> Closed:
        """Commit and pack; what several ranks recorded only if there is a time to wait for them."""
        self._end_samples()
        closed = self.writer.close(status)
        if self._shard is None or merge_until is None:
            return closed
        return self.writer.merge(max(0.0, merge_until - time.monotonic()))

    def _sample(self, header: Mapping[str, Any]) -> Sample:
        key = (header["stage"], header["step"])
        return self._samples.setdefault(key, Sample(self._matrices))

    def _end_samples(self, until: int | None = None) -> None:
        for stage, step in list(self._samples):
            if until is None or step <= until:
                sample = self._samples.pop((stage, step))
                sample.write(self.writer, stage, step, shard=self._shard is not None)


class Helper:
    """Takes messages one by one and keeps the recordings.

    Parameters
    ----------
    memory : mmap
        The shared memory that messages lie in.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._recordings: list[Recording] = []
        self._first: Recording | None = None
        self._told = -1

    def take(self, offset: int) -> dict[str, Any]:
        """Handle the message at `offset`; returns what to answer besides the acknowledgement."""
        message = read_message(self._memory, offset)
        if message.kind == "open":
            return self._open(message.header["recordings"])
        if message.kind == "flush":
            for recording in self._opened:
                recording.writer.commit()
            return {"flushed": message.header["ticket"]}
        if message.kind == "close":
            for recording, dropped in zip(self._opened, message.header["dropped"], strict=True):
                recording.writer.dropped(dropped)
            wait = MERGE_SECONDS if message.header.get("merge") else None
            return {"closed": self._discard() or self._close(message.header["status"], wait)}
        recording = self._opened[message.header["run"]]
        handle: dict[str, Callable[[Message], None]] = {
            "step": recording.step,
            "matrix": recording.matrix,
            "weights": recording.weights,
            "event": recording.event,
        }
        handle[message.kind](message)
        return {}

    def tick(self) -> None:
        """Commit what is due."""
        for recording in self._recordings:
            recording.writer.tick()

    def news(self) -> dict[str, Any]:
        """Return the last committed step of the first recording as an answer, once."""
        if self._first is None or self._told == self._first.writer.committed:
            return {}
        self._told = self._first.writer.committed
        return {"committed": self._told}

    def interrupted(self) -> None:
        """Commit and pack what came from a trainer that is gone; without a step, leave nothing."""
        self._discard()
        for recording in self._recordings:
            step = recording.writer.last_step
            text = "the training process ended without closing the recording; "
            text += f"everything handed over until step {step} is kept"
            recording.writer.event(step, INTERRUPTED, text)
        self._close(INTERRUPTED)

    def abandon(self, reason: str) -> None:
        """Stop without writing more: what is committed stays, each run's status says why."""
        for recording in self._recordings:
            recording.writer.abandon(reason)

    def _open(self, asked: list[dict[str, Any]]) -> dict[str, Any]:
        opened: list[Recording] = []
        try:
            for recording in asked:
                opened.append(Recording(**recording))
        except Exception:
            for recording_so_far in opened:
                recording_so_far.writer.discard()
            raise
        self._recordings, self._first = opened, opened[0]
        writers = [recording.writer for recording in opened]
        return {"opened": [{"last_step": x.last_step, "attempt": x.attempt} for x in writers]}

    def _discard(self) -> list[dict[str, Any]]:
        """Leave nothing of recordings without a step: they would only be in the way of the next."""
        if not all(recording.untouched for recording in self._recordings):
            return []
        discarded = []
        for recording in self._recordings:
            recording.writer.discard()
            path = str(recording.writer.path)
            discarded.append({"path": path, "bytes": 0, "steps": 0, "remark": ""})
        self._recordings = []
        return discarded

    def _close(self, status: str, wait: float | None = None) -> list[dict[str, Any]]:
        closed = []
        until = None if wait is None else time.monotonic() + wait
        while self._recordings:
            done = self._recordings[0].close(status, until)
            closed.append({**done._asdict(), "path": str(done.path)})
            del self._recordings[0]  # it is finished, whatever becomes of the others
        return closed

    @property
    def _opened(self) -> list[Recording]:
        if not self._recordings:
            raise RunError("the recording is not open")
        return self._recordings


class Trainer:
    """The process at the other end of our standard input and output.

    Parameters
    ----------
    pid : int
        Its process id: we are its child for as long as it lives.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        # Numerical libraries print now and then: not among the answers.
        self._output = os.dup(1)
        os.dup2(2, 1)
        os.set_blocking(self._output, False)

    @property
    def gone(self) -> bool:
        """Whether it ended. Its pipes may live on in a process that it forked."""
        return os.getppid() != self._pid

    def next_place(self) -> tuple[int, ...] | None:
        """Wait a moment for the place of a message; empty if none came, None at the end."""
        ready, _, _ = select.select([0], [], [], TICK_SECONDS)
        if not ready:
            return None if self.gone else ()
        content = b""
        while len(content) < PLACE.size:
            piece = os.read(0, PLACE.size - len(content))
            if not piece:
                return None
            content += piece
        return PLACE.unpack(content)

    def answer(self, **answer: Any) -> None:
        """Say something; when nobody listens any more, the recording goes on to its end."""
        line = json.dumps(answer).encode() + b"\n"
        with suppress(BrokenPipeError):
            while line:
                try:
                    line = line[os.write(self._output, line) :]
                except BlockingIOError:
                    if self.gone:
                        return
                    select.select([], [self._output], [], TICK_SECONDS)


def main(trainer_pid: int, descriptor: int, size: int) -> int:
    """Serve one trainer until it closes its recordings or is gone.

    Parameters
    ----------
    trainer_pid : int
        Process id of the trainer, from itself: one that died meanwhile is our parent no more.
    descriptor, size : int
        The inherited shared memory.

    Returns
    -------
    int
        Exit code: 0, or 1 after an error that was reported to the trainer.
    """
    # What ends a job goes to all of its processes: how the recording ends is the trainer's affair.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    trainer = Trainer(trainer_pid)
    helper = Helper(mmap.mmap(descriptor, size))
    try:
        return _serve(trainer, helper)
    except Exception as error:
        reason = _in_one_line(error)
        with suppress(Exception):
            helper.abandon(reason)
        trainer.answer(error=reason, **helper.news())
        return 1


def _serve(trainer: Trainer, helper: Helper) -> int:
    while (place := trainer.next_place()) is not None:
        if place:
            offset, length, position = place
            answer = helper.take(offset) if length else {}
            trainer.answer(ack=position, **answer, **helper.news())
            if "closed" in answer:
                return 0
        helper.tick()
        if news := helper.news():
            trainer.answer(**news)
    helper.interrupted()
    return 0


def _in_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    kind = type(error).__name__
    said = text if isinstance(error, LensError) and text else f"{kind}: {text}".rstrip(": ")
    return said[:MAX_REASON]


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
