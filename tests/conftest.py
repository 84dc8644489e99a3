"""Shared made-up runs: small, deterministic, with known answers."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Before any BLAS loads: tests run beside helper processes and browsers on few cores.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# In the background Ctrl-C is ignored, also by all processes that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from normuon_lens.runfile import made_up_run

CONDITIONS = {"AdamW": 200.0, "Muon": 1.7, "NorMuon": 2.2}


@pytest.fixture
def three_runs(tmp_path: Path) -> Path:
    """Return a folder with one finished run of each optimizer."""
    for optimizer, condition in CONDITIONS.items():
        path = tmp_path / "runs" / f"{optimizer.lower()}.h5"
        made_up_run(path, optimizer=optimizer, condition=condition)
    return tmp_path / "runs"
