"""Made-up runs with known answers, for tests, documentation and trying figures out.

Every update is U diag(σ) Vᵀ with chosen singular values, or rows of chosen norms, so what a
metric must say about it is known in closed form.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from normuon_lens.runfile.reader import Run, open_run
from normuon_lens.runfile.schema import Matrices, Matrix
from normuon_lens.runfile.writer import Writer

START = 1_700_000_000.0
"""Unix time at which made-up runs begin; one step takes one second."""

SHAPES: dict[str, tuple[int, int]] = {
    "blocks.0.attn.q": (16, 16),
    "blocks.0.mlp.up": (32, 16),
    "blocks.0.mlp.down": (16, 32),
    "blocks.1.attn.q": (16, 16),
    "blocks.1.mlp.up": (32, 16),
    "blocks.1.mlp.down": (16, 32),
}


def made_up_update(
    shape: tuple[int, int], condition: float, rng: np.random.Generator, size: float = 1e-3
) -> np.ndarray:
    """Return an (m, n) float64 matrix of exactly this condition number.

    Its singular values run geometrically from `size` down to ``size / condition``.
    """
    m, n = shape
    k = min(m, n)
    left, _ = np.linalg.qr(rng.standard_normal((m, k)))
    right, _ = np.linalg.qr(rng.standard_normal((n, k)))
    sigma = size * np.geomspace(1.0, 1.0 / condition, k)
    update: np.ndarray = (left * sigma) @ right.T
    return update


def made_up_run(
    path: str | Path,
    *,
    optimizer: str = "AdamW",
    condition: float = 100.0,
    steps: int = 40,
    every: int = 10,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    void: tuple[int, ...] = (),
    seed: int = 0,
    close: bool = True,
) -> Run:
    """Write a run whose every update has the given condition number, and open it.

    Parameters
    ----------
    path : str or Path
        Where to write; refused if something is there already.
    optimizer : str
        Recorded as the optimizer's class name.
    condition : float
        Condition number of every update.
    steps, every : int
        Recorded steps, and how often spectra and full matrices are taken (the first always).
    shapes : mapping of str to (int, int)
        The matrices.
    void : tuple of int
        Steps whose updates are zero.
    seed : int
        Of the random orthogonal factors.
    close : bool
        False leaves the recording in parts, as if it were still being made.

    Returns
    -------
    Run
        With the scalars ``loss`` = 4 / √step and ``lr`` = 0.01.
    """
    path = Path(path)
    matrices = Matrices([Matrix(name, m, n) for name, (m, n) in shapes.items()])
    metadata = {"optimizer": optimizer, "name": path.stem, "groups": [{"lr": 0.01}]}
    writer = Writer(path, metadata, matrices)
    rng = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        updates = [made_up_update((x.m, x.n), condition, rng) for x in matrices]
        if step in void:
            updates = [np.zeros_like(update) for update in updates]
        norms = np.concatenate([np.linalg.norm(update, axis=1) for update in updates])
        writer.step(
            step,
            START + step,
            scalars={"loss": 4.0 / np.sqrt(step), "lr": 0.01},
            norms={"update": norms},
            void=step in void,
        )
        if step == 1 or step % every == 0:
            sigma = [np.linalg.svd(update, compute_uv=False) for update in updates]
            writer.spectra(
                "update",
                step,
                np.concatenate(sigma),
                np.full(len(matrices), 1e-12),
                weight_norm=np.ones(len(matrices)),
                decay=np.zeros(len(matrices)),
            )
            for i, update in enumerate(updates):
                writer.matrix("update", i, step, update)
    if close:
        writer.close()
    else:
        writer.commit()
    return open_run(path)
