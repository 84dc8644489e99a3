"""Batches over processes: all are answered, whatever becomes of a worker, and none outlives us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from normuon_lens.analysis.offline import engine
from normuon_lens.analysis.offline.engine import ONE_THREAD, spread, usable_cores
from normuon_lens.analysis.offline.stored import Batch, identity
from normuon_lens.errors import LensError
from normuon_lens.runfile import made_up_run

STAND_IN = """
import json, os, sys, time
ready = os.environ.get("STAND_IN", "ready")
if ready == "broken":
    sys.exit("ImportError: no numpy today")
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    steps = json.loads(line)["steps"]
    if 13 in steps:
        os.kill(os.getpid(), 9)
    if 21 in steps and not os.path.exists(ready):
        open(ready, "x").close()
        sys.exit(1)
    if 99 in steps:
        time.sleep(60)
    time.sleep(0.02)
    answer = {"answer": [{"pid": os.getpid()}] * len(steps)}
    text = json.dumps({"refused": "x.h5: gone"} if 77 in steps else answer)
    sys.stdout.write(text[:5]); sys.stdout.flush()  # an answer may come in pieces
    print(text[5:], flush=True)
"""
"""A worker that answers with its process id, unless a step tells it to do otherwise."""


def batch(*steps: int) -> Batch:
    return Batch("x.h5", "", "update", "w", steps, ("sigma_max",))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "WORKER", (sys.executable, "-c", STAND_IN))
    monkeypatch.setattr(engine, "BEAT_SECONDS", 0.02)


def lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.usefixtures("stand_in")
def test_every_batch_is_answered_once_by_several_processes() -> None:
    batches = [batch(i, i + 1000) for i in range(200, 240)]
    answers = [one for one in spread(batches, 3) if one]
    assert sorted(done for done, _ in answers) == batches
    pids = {found["pid"] for _, answer in answers for found in answer if isinstance(found, dict)}
    assert 1 < len(pids) <= 3
    assert not any(lives(int(pid)) for pid in pids)
    assert list(spread([], 3)) == []


@pytest.mark.usefixtures("stand_in")
def test_a_step_that_kills_its_process_is_given_up_and_all_others_are_done() -> None:
    answers = dict(one for one in spread([batch(12, 13, 14), batch(15)], 2) if one)
    assert set(answers) == {batch(12), batch(13), batch(14), batch(15)}
    assert answers[batch(13)] == [
        "3 processes in a row ended over it (killed by SIGKILL; too little memory?)"
    ]
    assert all("pid" in answers[batch(step)][0] for step in (12, 14, 15))


@pytest.mark.usefixtures("stand_in")
def test_a_process_that_dies_once_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", str(tmp_path / "died"))
    answers = dict(one for one in spread([batch(20, 21), batch(22)], 1) if one)
    assert (tmp_path / "died").exists()
    assert set(answers) == {batch(20), batch(21), batch(22)}
    assert all("pid" in answer[0] for answer in answers.values())


@pytest.mark.usefixtures("stand_in")
def test_what_no_worker_can_do_ends_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LensError, match=r"x\.h5: gone"):
        list(spread([batch(77), batch(99)], 2))
    monkeypatch.setenv("STAND_IN", "broken")
    with pytest.raises(LensError, match="end before they begin: ImportError: no numpy today"):
        list(spread([batch(1)], 1))
    monkeypatch.setattr(engine, "WORKER", ("/no/such/python",))
    with pytest.raises(LensError, match="cannot start a worker process: No such file"):
        list(spread([batch(1)], 1))


@pytest.mark.usefixtures("stand_in")
def test_closing_ends_what_is_still_at_work() -> None:
    pids = []
    with closing(spread([batch(1), batch(99), batch(99)], 3)) as answers:
        pids = [worker.pid for worker in _children(answers)]
        assert len(pids) == 3
    assert not any(lives(pid) for pid in pids)


def _children(answers: object) -> list[subprocess.Popen[bytes]]:
    next(answers)  # type: ignore[call-overload]
    frame = answers.gi_frame  # type: ignore[attr-defined]
    return [worker.process for worker in frame.f_locals["pool"]._workers]


def test_real_workers_have_one_thread_and_end_with_their_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_up_run(tmp_path / "x.h5", steps=3, every=1)
    one = Batch(str(run.path), identity(run), "update", run.matrices[0], (1, 3), ("sigma_max",))
    for name in ONE_THREAD:
        monkeypatch.delenv(name, raising=False)
    # As where a user's own modules lie: none of them may stand in for ours.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numpy.py").write_text("raise SystemExit('not this one')")
    with closing(spread([one, one], 1)) as answers:
        (worker,) = _children(answers)
        environment = Path(f"/proc/{worker.pid}/environ").read_text()
        assert "OMP_NUM_THREADS=1" in environment
        assert "OPENBLAS_NUM_THREADS=1" in environment
        for _ in range(2):
            _, found = next(answer for answer in answers if answer)
            assert found == [{"sigma_max": pytest.approx(1e-3)}] * 2
            os.kill(worker.pid, signal.SIGINT)  # when they end is for us to say
        assert worker.stdin is not None
        worker.stdin.close()  # as when the process that started it is killed
        assert worker.wait(10) == 0


def test_cores_of_a_container_are_those_that_it_is_lent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(engine, "CPU_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert usable_cores() == 8
    for text, cores in (("max 100000", 8), ("250000 100000", 2), ("5000 100000", 1), ("?", 8)):
        quota.write_text(text)
        assert usable_cores() == cores
