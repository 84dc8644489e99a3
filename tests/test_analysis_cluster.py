"""A Dask cluster computes what processes of this machine would; what it cannot is said."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from normuon_lens.analysis.offline import cluster
from normuon_lens.analysis.offline.cluster import spread_over_dask
from normuon_lens.analysis.offline.stored import Batch, identity, measure_batch
from normuon_lens.errors import LensError
from normuon_lens.runfile import Run, made_up_run

METRICS = ("condition_number", "neuron_cv")


@pytest.fixture(scope="module")
def dask() -> Iterator[Any]:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
    ) as made:
        yield made


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return made_up_run(tmp_path / "x.h5", steps=4, every=2)


def batches(run: Run) -> list[Batch]:
    path, recording = str(run.path), identity(run)
    return [Batch(path, recording, "update", name, (1, 2, 4), METRICS) for name in run.matrices]


def test_a_cluster_finds_what_this_process_finds(run: Run, dask: Any) -> None:
    asked = batches(run) * 3  # more than are handed in at once
    answers = [one for one in spread_over_dask(asked, dask.scheduler_address) if one]
    assert sorted(batch for batch, _ in answers) == sorted(asked)
    for batch, answer in answers:
        assert answer == measure_batch(batch)


def test_a_worker_that_does_not_see_the_recording_is_told(run: Run, dask: Any) -> None:
    asked = batches(run)
    run.path.unlink()
    text = r"x\.h5: no such recording \(every worker of the cluster must see"
    with pytest.raises(LensError, match=text):
        list(spread_over_dask(asked, dask.scheduler_address))


def test_what_a_worker_cannot_do_is_a_failure_of_that_batch(
    run: Run, dask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "measure_batch", broken)
    answers = dict(one for one in spread_over_dask(batches(run), dask.scheduler_address) if one)
    assert [one for one, answer in answers.items() if isinstance(answer[0], str)] == [
        batches(run)[0]
    ]
    assert answers[batches(run)[0]] == ["ZeroDivisionError: no way"] * 3


def broken(batch: Batch) -> object:
    if batch.matrix == "blocks.0.attn.q":
        raise ZeroDivisionError("no\nway")
    return measure_batch(batch)


def test_no_scheduler_is_one_line_soon(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.1)
    with socket.socket() as bound:  # but nobody listens
        bound.bind(("127.0.0.1", 0))
        nobody = f"tcp://127.0.0.1:{bound.getsockname()[1]}"
        for address in (nobody, "here", "smoke://signal:1"):
            with pytest.raises(LensError, match=f"no Dask scheduler answers at {address}: "):
                list(spread_over_dask(batches(run), address))


def test_without_dask_it_says_what_to_install(run: Run) -> None:
    code = (
        "import sys; sys.modules['distributed'] = None\n"
        "from normuon_lens.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "analyze", str(run.path), "--dask", "tcp://x:1"]
    done = subprocess.run(command, capture_output=True, text=True)
    text = 'normuon-lens: this needs distributed: pip install "normuon-lens[dask]"\n'
    assert (done.returncode, done.stderr) == (2, text)
