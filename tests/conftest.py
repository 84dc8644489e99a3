"""Shared made-up runs: small, deterministic, with known answers."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Before any BLAS loads: tests run beside helper processes and browsers on few cores.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# What the tests start is compiled once, wherever the environment says otherwise.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# In the background Ctrl-C is ignored, also by all processes that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from normuon_lens.runfile import made_up_run

DEAREST = (
    "test_browser",
    "test_hooks_company",
    "test_hooks_sharded",
    "test_browser_looks",
    "test_browser_taking",
    "test_sample_runs_sharded",
    "test_runfile_ranks",
    "test_optim_sharded",
    "test_hooks_cost",
    "test_docs",
    "test_kill",
    "test_hooks_failures",
    "test_hooks_places",
    "test_hooks_run",
    "test_hooks_loops",
    "test_hooks_recorder",
)
"""Two workers take file after file: the longest first, lest one of them waits for the other."""

CONDITIONS = {"AdamW": 200.0, "Muon": 1.7, "NorMuon": 2.2}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first; the rest keep their order."""
    place = {name: number for number, name in enumerate(DEAREST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture
def forked_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let recorders start their helpers by a fork, in a tenth of the time."""
    import forked  # loads torch, which many tests need not

    monkeypatch.setattr(forked.feed, "subprocess", forked)


@pytest.fixture
def three_runs(tmp_path: Path) -> Path:
    """Return a folder with one finished run of each optimizer."""
    for optimizer, condition in CONDITIONS.items():
        path = tmp_path / "runs" / f"{optimizer.lower()}.h5"
        made_up_run(path, optimizer=optimizer, condition=condition)
    return tmp_path / "runs"
