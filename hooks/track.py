"""One recording as the training sees it: the step in the making, handed over piece by piece.

Neuron norms are taken where the matrix is and come to the CPU in one transfer a step; on sampled
steps the matrix itself goes to the helper process at once, so no copy of it is kept.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from normuon_lens.runfile import Matrices

from .exchange import Weight, Whole
from .feed import Feed
from .schedule import Schedule
from .selection import Watched
from .share import Share

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
    share : Share, optional
        What this rank records of matrices that it holds together with others.

    Attributes
    ----------
    run : int
        As given; 0 is the training itself, the others are its shadows.
    dropped : int
        Samples that there was no room for.
    """

    def __init__(
        self, feed: Feed, run: int, matrices: Matrices, *, wait: bool, share: Share | None = None
    ) -> None:
        self.dropped = 0
        self._feed = feed
        self.run = run
        self._matrices = matrices
        self._wait = wait
        self._share = share
        self._reported = 0
        self._norms: list[tuple[Watched, str, torch.Tensor]] = []
        self._rows: dict[str, np.ndarray] = {}

    def begin(self, step: int, schedule: Schedule) -> None:
        """Say which step is at hand; called before anything of it is taken."""
        self._step = step
        self._norms.clear()
        self._recorded = schedule.norms(step)
        self._spectra, self._keep = schedule.spectra(step), schedule.matrices(step)
        if self._share and (self._spectra or self._keep):
            self._share.exchange.begin()

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
        sampled = self._spectra or self._keep
        if not (sampled or self._width(stage, item)):
            return
        if matrix.dtype in NARROW:
            matrix = matrix.float()
        neurons = item.by_neurons(matrix)
        norms = torch.linalg.vector_norm(neurons, dim=1)
        if self._width(stage, item):
            self._norms.append((item, stage, norms if scale == 1.0 else norms * abs(scale)))
        if not sampled:
            return
        if self._share and not self._share.is_whole(item, stage):
            offer = self._share.exchange.offer
            offer(item, stage, matrix, scale=scale, decay=decay, rounded=rounded)
            if stage == "update":
                self._share.exchange.weigh(item, weight_norm)
            return
        if self._share:
            weight_norm = math.nan  # of the rows here: the whole one comes by the exchange
        # What was rounded last: the weight, where the matrix is a difference of weights, or else
        # the matrix itself.
        noise = weight_norm if rounded else abs(scale) * float(torch.linalg.vector_norm(norms))
        self._send(
            item,
            stage,
            (neurons if scale == 1.0 else neurons * scale).cpu().numpy(),
            decay=decay,
            weight_norm=weight_norm,
            noise_norm=noise,
            noise_dtype=rounded or "float32",
        )

    def take_together(self, found: Whole | Weight) -> None:
        """Hand over what came together from several ranks of the step at hand."""
        if isinstance(found, Weight):
            header = {"run": self.run, "step": self._step, "stage": "update"}
            arrays = {
                "index": np.array([found.item.index]),
                "norm": np.array([found.norm]),
                "decay": np.array([math.nan]),
            }
            self._feed.send("weights", header, arrays, wait=self._wait)
            return
        # See `take`; a norm that the rounding of weights makes needless is not computed.
        noise = found.weight_norm
        if not found.rounded:
            noise = float(np.linalg.norm(found.values.astype(np.float64)))
        self._send(
            found.item,
            found.stage,
            found.values,
            decay=found.decay,
            weight_norm=found.weight_norm if found.stage == "update" else math.nan,
            noise_norm=noise,
            noise_dtype=found.rounded or "float32",
        )

    def weigh(self, item: Watched, norm: float) -> None:
        """Take ‖W‖_F of the rows here of a weight whose update its owner sees whole."""
        if (self._spectra or self._keep) and self._share:
            self._share.exchange.weigh(item, norm)

    def _send(self, item: Watched, stage: str, values: np.ndarray, **measures: Any) -> None:
        """Hand a matrix (m, n) over, to be measured, kept or both."""
        header = {
            "run": self.run,
            "stage": stage,
            "step": self._step,
            "index": item.index,
            "spectrum": self._spectra,
            "keep": self._keep,
            **measures,
        }
        if not self._feed.send("matrix", header, {"values": values}, wait=self._wait):
            self.dropped += 1

    def still(self, items: list[Watched]) -> None:
        """Take it that these matrices did not move."""
        row = self._row("update")
        for item in items:
            row[self._columns("update", item)] = 0.0

    def collect(self) -> None:
        """Bring the row norms taken so far to the CPU, in one transfer, and into their rows."""
        if not self._norms:
            return
        norms = torch.cat([norm for _, _, norm in self._norms]).to("cpu", torch.float32).numpy()
        # NaN stands for what was not taken: a norm that is NaN is told apart from it.
        norms[np.isnan(norms)] = np.inf
        start = 0
        for item, stage, norm in self._norms:
            self._row(stage)[self._columns(stage, item)] = norms[start : start + len(norm)]
            start += len(norm)
        self._norms.clear()

    def end(self, step: int, time: float, scalars: dict[str, float]) -> None:
        """Hand over the row of a step; its matrices went before."""
        header = {
            "run": self.run,
            "step": step,
            "time": time,
            "scalars": scalars,
            "void": self._is_void(),
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

    def _is_void(self) -> bool:
        """Whether nothing that is recorded here moved: a rank may have no row at all."""
        nothing = (
            np.empty(0) if self._recorded and not self._total("update") else np.array([np.nan])
        )
        return bool((self._rows.get("update", nothing) == 0).all())

    def _row(self, stage: str) -> np.ndarray:
        if stage not in self._rows:
            self._rows[stage] = np.full(self._total(stage), np.nan, np.float32)
        return self._rows[stage]

    def _total(self, stage: str) -> int:
        """Neurons whose norms are recorded here."""
        return self._share.shard.total(stage) if self._share else self._matrices.total_rows

    def _columns(self, stage: str, item: Watched) -> slice:
        """Where in a row a matrix's norms stand."""
        if self._share:
            return self._share.shard.columns(stage, item.index)
        return self._matrices.rows(item.index)

    def _width(self, stage: str, item: Watched) -> int:
        columns = self._columns(stage, item)
        width: int = columns.stop - columns.start
        return width
