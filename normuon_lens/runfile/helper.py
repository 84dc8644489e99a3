"""The helper process: takes what the trainer sends, measures spectra, writes the recording.

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
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from normuon_lens.errors import LensError, RunError
from normuon_lens.metrics.spectrum import rounding_noise, singular_values
from normuon_lens.runfile.manifest import INTERRUPTED
from normuon_lens.runfile.schema import Matrices, Matrix
from normuon_lens.runfile.wire import PLACE, Message, read_message
from normuon_lens.runfile.writer import Writer

TICK_SECONDS = 0.5


class Sample:
    """The spectra of one stage at one step, as they come in matrix by matrix."""

    def __init__(self, matrices: Matrices) -> None:
        self.sigma = np.full(matrices.total_sigmas, np.nan)
        self.floor = np.full(len(matrices), np.nan)
        self.weight_norm = np.full(len(matrices), np.nan)
        self.decay = np.full(len(matrices), np.nan)


class Helper:
    """Takes messages one by one and keeps the recording.

    Parameters
    ----------
    memory : mmap
        The shared memory that messages lie in.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._writer: Writer | None = None
        self._matrices = Matrices([])
        self._samples: dict[tuple[str, int], Sample] = {}

    def take(self, offset: int) -> dict[str, Any]:
        """Handle the message at `offset`; returns what to answer besides the acknowledgement."""
        message = read_message(self._memory, offset)
        answer: dict[str, Any] | None = getattr(self, f"_on_{message.kind}")(message)
        return answer or {}

    def tick(self) -> None:
        """Commit what is due."""
        if self._writer:
            self._writer.tick()

    def finish(self, status: str) -> dict[str, Any]:
        """Commit and pack; returns what was recorded."""
        if self._writer is None:
            return {}
        writer = self._writer
        self._end_samples(writer)
        closed = writer.close(status)
        self._writer = None
        return {"closed": {**closed._asdict(), "path": str(closed.path)}}

    def abandon(self, reason: str) -> None:
        """Stop without writing more: what is committed stays, the run's status says why."""
        if self._writer:
            self._writer.abandon(f"stopped: {reason}")

    def _on_open(self, message: Message) -> dict[str, Any]:
        header = message.header
        self._matrices = Matrices([Matrix(**row) for row in header["matrices"]])
        self._writer = Writer(
            Path(header["path"]), header["metadata"], self._matrices, **header["options"]
        )
        return {"opened": self._writer.last_step}

    def _on_step(self, message: Message) -> None:
        header = message.header
        self._open_writer.step(
            header["step"],
            header["time"],
            scalars=header["scalars"],
            norms=message.arrays,
            void=header["void"],
        )
        self._open_writer.dropped(header["dropped"])
        # A step's row follows its matrices, so whatever was sent of its sample has come.
        self._end_samples(self._open_writer, header["step"])

    def _on_matrix(self, message: Message) -> None:
        header, values = message.header, message.arrays["values"]
        stage, step, i = header["stage"], header["step"], header["index"]
        if header["spectrum"]:
            sample = self._samples.setdefault((stage, step), Sample(self._matrices))
            noise = rounding_noise(values.shape, header["noise_norm"], header["noise_dtype"])
            # A spectrum that LAPACK cannot find stays NaN; the recording goes on.
            with suppress(np.linalg.LinAlgError):
                sigma, floor = singular_values(values, noise=noise)
                sample.sigma[self._matrices.sigmas(i)] = sigma
                sample.floor[i] = floor
            sample.weight_norm[i] = header["weight_norm"]
            sample.decay[i] = header["decay"]
        if header["keep"]:
            self._open_writer.matrix(stage, i, step, values)

    def _on_event(self, message: Message) -> None:
        self._open_writer.event(**message.header)

    def _on_flush(self, message: Message) -> dict[str, Any]:
        self._open_writer.commit()
        return {"flushed": message.header["ticket"]}

    def _on_close(self, message: Message) -> dict[str, Any]:
        self._open_writer.dropped(message.header["dropped"])
        return self.finish(message.header["status"])

    @property
    def _open_writer(self) -> Writer:
        if self._writer is None:
            raise RunError("the recording is not open")
        return self._writer

    def _end_samples(self, writer: Writer, until: int | None = None) -> None:
        for stage, step in list(self._samples):
            if until is None or step <= until:
                sample = self._samples.pop((stage, step))
                writer.spectra(
                    stage,
                    step,
                    sample.sigma,
                    sample.floor,
                    weight_norm=sample.weight_norm,
                    decay=sample.decay,
                )


def main(descriptor: int, size: int) -> int:
    """Serve one trainer until it closes the recording or is gone.

    Parameters
    ----------
    descriptor, size : int
        The inherited shared memory.

    Returns
    -------
    int
        Exit code: 0, or 1 after an error that was reported to the trainer.
    """
    # Ctrl-C is the trainer's affair; it tells us how the recording ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(10)
    trainer = os.getppid()
    helper = Helper(mmap.mmap(descriptor, size))
    try:
        while True:
            # A forked child of the trainer may hold the pipe open, so the parent is watched too.
            ready, _, _ = select.select([0], [], [], TICK_SECONDS)
            if ready:
                place = _read_exactly(PLACE.size)
                if place is None:
                    break
                offset, _, position = PLACE.unpack(place)
                answer = helper.take(offset)
                _answer(ack=position, **answer)
                if "closed" in answer:
                    return 0
            elif os.getppid() != trainer:
                break
            helper.tick()
        helper.finish(INTERRUPTED)
        return 0
    except (LensError, OSError, MemoryError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        helper.abandon(reason or type(error).__name__)
        _answer(error=reason or type(error).__name__)
        return 1


def _read_exactly(size: int) -> bytes | None:
    """Read `size` bytes from the trainer; None when it is gone."""
    content = b""
    while len(content) < size:
        piece = os.read(0, size - len(content))
        if not piece:
            return None
        content += piece
    return content


def _answer(**answer: Any) -> None:
    # When nobody listens any more, the recording goes on to its end.
    with suppress(BrokenPipeError):
        os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
