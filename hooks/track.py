"""One recording as the training sees it: the step in the making, handed over piece by piece.

Neuron norms are taken where the matrix is and come to the CPU in one transfer a step; on sampled
steps the matrix itself goes to the helper process at once, so no copy of it is kept.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from normuon_lens.runfile import Matrices

from .feed import Feed
from .schedule import Schedule
from .selection import Watched

NARROW = (torch.bfloat16, torch.float16)


class Track:
    """Takes the matrices of one recording, step by step.

    Parameters
    ----------
    feed : Feed
        Takes them to the helper process.
    run : int
        Which of the helper's recordings this is.
    matrices : Matrices
    wait : bool
        Whether to wait where there is no room, instead of dropping a sample.

    Attributes
    ----------
    run : int
        As given; 0 is the training itself, the others are its shadows.
    dropped : int
        Samples that there was no room for.
    """

    def __init__(self, feed: Feed, run: int, matrices: Matrices, *, wait: bool) -> None:
        self.dropped = 0
        self._feed = feed
        self.run = run
        self._matrices = matrices
        self._wait = wait
        self._reported = 0
        self._norms: list[tuple[Watched, str, torch.Tensor]] = []
        self._rows: dict[str, np.ndarray] = {}

    def begin(self, step: int, schedule: Schedule) -> None:
        """Say which step is at hand; called before anything of it is taken."""
        self._step = step
        self._norms.clear()
        self._spectra, self._keep = schedule.spectra(step), schedule.matrices(step)

    def take(
        self,
        item: Watched,
        stage: str,
        matrix: torch.Tensor,
        *,
        scale: float = 1.0,
        decay: float = math.nan,
        weight_norm: float = math.nan,
        rounded: str | None = None,
    ) -> None:
        """Take a matrix's row norms, and on sampled steps hand it over whole.

        See :class:`normuon_lens.hooks.tap.Take`.
        """
        matrix = item.by_neurons(matrix)
        if matrix.dtype in NARROW:
            matrix = matrix.float()
        norms = torch.linalg.vector_norm(matrix, dim=1)
        self._norms.append((item, stage, norms if scale == 1.0 else norms * abs(scale)))
        if not (self._spectra or self._keep):
            return
        if scale != 1.0:
            matrix = matrix * scale
        # What was rounded last: the weight, where the matrix is a difference of weights, or else
        # the matrix itself.
        norm = weight_norm if rounded else abs(scale) * float(torch.linalg.vector_norm(norms))
        header = {
            "run": self.run,
            "stage": stage,
            "step": self._step,
            "index": item.index,
            "spectrum": self._spectra,
            "keep": self._keep,
            "weight_norm": weight_norm,
            "decay": decay,
            "noise_norm": norm,
            "noise_dtype": rounded or "float32",
        }
        if not self._feed.send("matrix", header, {"values": matrix.cpu().numpy()}, wait=self._wait):
            self.dropped += 1

    def still(self, items: list[Watched]) -> None:
        """Take it that these matrices did not move."""
        row = self._row("update")
        for item in items:
            row[self._matrices.rows(item.index)] = 0.0

    def collect(self) -> None:
        """Bring the row norms taken so far to the CPU, in one transfer, and into their rows."""
        if not self._norms:
            return
        norms = torch.cat([norm for _, _, norm in self._norms]).to("cpu", torch.float32).numpy()
        start = 0
        for item, stage, norm in self._norms:
            self._row(stage)[self._matrices.rows(item.index)] = norms[start : start + len(norm)]
            start += len(norm)
        self._norms.clear()

    def end(self, step: int, time: float, scalars: dict[str, float]) -> None:
        """Hand over the row of a step; its matrices went before."""
        header = {
            "run": self.run,
            "step": step,
            "time": time,
            "scalars": scalars,
            "void": "update" in self._rows and bool((self._rows["update"] == 0).all()),
            "dropped": self.dropped,
        }
        rows, self._rows = self._rows, {}
        if not self._feed.send("step", header, rows, wait=self._wait):
            self.dropped += 1
        elif self.dropped > self._reported:
            count, self._reported = self.dropped - self._reported, self.dropped
            self.event(step, "dropped", f"{count} samples: the helper process could not keep up")

    def event(self, step: int, kind: str, text: str) -> None:
        """Note something that happened to the recording."""
        header = {"run": self.run, "step": step, "kind": kind, "text": text}
        self._feed.send("event", header, wait=self._wait)

    def _row(self, stage: str) -> np.ndarray:
        if stage not in self._rows:
            self._rows[stage] = np.full(self._matrices.total_rows, np.nan, np.float32)
        return self._rows[stage]
