"""Which steps are recorded, and how much of each."""

from __future__ import annotations

from dataclasses import dataclass

from normuon_lens.errors import AttachError


@dataclass(frozen=True)
class Schedule:
    """Neuron norms often, spectra sometimes, full matrices as often as there is room.

    Attributes
    ----------
    every : int
        Spectra on every so many-th step.
    norms_every : int
        Neuron norms on every so many-th step.
    matrices_every : int
        Full matrices on every so many-th step; 0 is never.
    first : int
        The first step that can be recorded; it always is.
    """

    every: int = 10
    norms_every: int = 1
    matrices_every: int = 10
    first: int = 1

    def __post_init__(self) -> None:
        for name in ("every", "norms_every"):
            if getattr(self, name) < 1:
                raise AttachError(f"{name}={getattr(self, name)}: expected a whole number from 1")
        if self.matrices_every < 0:
            raise AttachError(f"matrices_every={self.matrices_every}: expected 0 (never) or more")

    def norms(self, step: int) -> bool:
        """Whether neuron norms are taken at `step`; on every sampled step too."""
        return self._due(step, self.norms_every) or self.sample(step)

    def spectra(self, step: int) -> bool:
        """Whether spectra are taken at `step`."""
        return self._due(step, self.every)

    def matrices(self, step: int) -> bool:
        """Whether full matrices are kept at `step`."""
        return self.matrices_every > 0 and self._due(step, self.matrices_every)

    @property
    def sample_every(self) -> int:
        """Whole matrices leave the training on about every so many-th step."""
        return min(self.every, self.matrices_every or self.every)

    def kind(self, step: int) -> str:
        """Return what is recorded of `step`: ``"sample"``, ``"norms"`` or nothing, ``""``."""
        return "sample" if self.sample(step) else "norms" if self.norms(step) else ""

    def sample(self, step: int) -> bool:
        """Whether whole matrices leave the training at `step`."""
        return self.spectra(step) or self.matrices(step)

    def _due(self, step: int, every: int) -> bool:
        return step == self.first or step % every == 0
