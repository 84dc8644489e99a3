"""Runs of made-up trainings: losses, times, settings and spectra as a test says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from normuon_lens.runfile import Matrices, Matrix, Run, Writer, open_run
from normuon_lens.runfile.synthetic import START

SHAPES = {"blocks.0.up": (6, 3), "blocks.1.up": (6, 3), "out": (3, 6)}


def training(
    path: Path,
    losses: Sequence[float] | np.ndarray,
    *,
    optimizer: str = "AdamW",
    seed: int | None = 0,
    groups: Sequence[Mapping[str, Any]] = ({"lr": 0.01},),
    steps: Sequence[int] | None = None,
    every: int = 10,
    condition: float = 10.0,
    floor: float = 1e-12,
    seconds_a_step: float = 1.0,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    scalars: Mapping[str, Sequence[float] | np.ndarray] | None = None,
    close: bool = True,
    **metadata: Any,
) -> Run:
    """Write a run that logged these losses, and open it.

    Parameters
    ----------
    losses : sequence of float
        One a step; NaN where none was logged.
    steps : sequence of int, optional
        1, 2, … if None.
    every : int
        How often spectra are taken, at steps that it divides.
    condition, floor : float
        Of every spectrum, which runs geometrically down from 1.
    scalars : mapping of str to sequence of float, optional
        Logged beside the loss.
    close : bool
        False leaves the recording in parts, as if its training still went on.
    **metadata
        More of what a run says of itself.
    """
    matrices = Matrices([Matrix(name, m, n) for name, (m, n) in shapes.items()])
    about = {"optimizer": optimizer, "name": path.stem, "groups": list(groups), "seed": seed}
    writer = Writer(path, about | metadata, matrices)
    rng = np.random.default_rng(0)
    sigma = np.concatenate([np.geomspace(1, 1 / condition, x.k) for x in matrices])
    for i, step in enumerate(range(1, len(losses) + 1) if steps is None else steps):
        logged = {name: float(values[i]) for name, values in (scalars or {}).items()}
        writer.step(
            step,
            START + step * seconds_a_step,
            scalars={"loss": float(losses[i]), **logged},
            norms={"update": rng.uniform(0.5, 1.5, matrices.total_rows)},
        )
        if step % every == 0:
            count = len(matrices)
            writer.spectra(
                "update",
                step,
                sigma * rng.uniform(0.5, 2),
                np.full(count, floor),
                weight_norm=np.ones(count),
                decay=np.zeros(count),
            )
    if close:
        writer.close(pack=False)  # reads the same, in half the time
    else:
        writer.commit()
    return open_run(path)
