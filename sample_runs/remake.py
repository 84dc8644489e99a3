"""Records the three runs beside this file anew: ``python -m normuon_lens.sample_runs.remake``."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from normuon_lens.cli.tables import console

from .demo import record

STEPS = 600
SEED = 0
NORMS_EVERY = 10
SPECTRA_EVERY = 10
MATRICES_EVERY = 300


def main() -> None:
    """Train, then replace the recordings together, so that they are always of one training."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        paths = record(
            Path(folder),
            STEPS,
            SEED,
            console(),
            norms_every=NORMS_EVERY,
            every=SPECTRA_EVERY,
            matrices_every=MATRICES_EVERY,
            compact=True,
        )
        for path in paths:
            shutil.move(path, here / path.name)


if __name__ == "__main__":
    main()
