"""What several ranks record is read as one run with whole matrices, or with named holes."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normuon_lens.analysis import measure
from normuon_lens.errors import RunError
from normuon_lens.runfile import Matrices, Matrix, Run, Writer, open_run
from normuon_lens.runfile import claim as claim_module
from normuon_lens.runfile import pack as pack_module
from normuon_lens.runfile import rank_files as rank_files_module
from normuon_lens.runfile.manifest import Manifest
from normuon_lens.runfile.schema import Shard, parts_of
from normuon_lens.runfile.source import Hole

# Python 3.12 warns of forks beside threads, which a helper has none of.
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

TABLE = Matrices(
    [Matrix("up", 5, 3), Matrix("across", 3, 7), Matrix("square", 4, 4), Matrix("thin", 2, 6)]
)
ACROSS = 1
"""The matrix whose inputs are spread over the ranks, not its neurons."""
STAGES = ("momentum", "update")
EVERY = 3
METRICS = ("condition_number", "neuron_cv")
GONE = 2**22 + 1
"""Beyond the largest process id that Linux hands out."""


# -- one training, recorded by one process and by several ranks ----------------------------------


def update_of(stage: str, i: int, step: int, take: int = 0) -> np.ndarray:
    """Return a matrix: of a stage, at a step, in the `take`-th pass through this step."""
    rng = np.random.default_rng([STAGES.index(stage), i, step, take])
    return rng.standard_normal((TABLE[i].m, TABLE[i].n)).astype(np.float32)


def chunk(length: int, rank: int, world: int) -> tuple[int, int]:
    """Return what torch.chunk gives a rank of `length` rows: uneven, and empty at the end."""
    size = -(-length // world)
    return min(rank * size, length), min((rank + 1) * size, length)


def shard_of(rank: int, ranks: Sequence[int], attempt: int | None = None) -> Shard:
    rows = []
    place, world = list(ranks).index(rank), len(ranks)
    for i, matrix in enumerate(TABLE):
        if i == ACROSS:
            rows.append((0, matrix.m, world))
        else:
            rows.append((*chunk(matrix.m, place, world), 1))
    return Shard(rank, tuple(ranks), attempt, dict.fromkeys(STAGES, tuple(rows)))


def norms_of_rank(shard: Shard, stage: str, step: int, take: int) -> np.ndarray:
    """Return what a rank measures: norms of its rows, and over its inputs."""
    place = shard.ranks.index(shard.rank)
    norms = []
    for i, (start, stop, _) in enumerate(shard.rows[stage]):
        update = update_of(stage, i, step, take)[start:stop]
        if i == ACROSS:
            update = update[:, slice(*chunk(TABLE[i].n, place, len(shard.ranks)))]
        norms.append(np.linalg.norm(update, axis=1))
    return np.concatenate(norms)


def sampled(step: int) -> bool:
    return step % EVERY == 1


def sample_of(stage: str, i: int, step: int, take: int) -> dict[str, Any]:
    sigma = np.linalg.svd(update_of(stage, i, step, take).astype(float), compute_uv=False)
    return {"sigma": sigma, "floor": step * 1e-9 + i, "weight_norm": step + i / 8, "decay": i / 16}


def write_sample(writer: Writer, stage: str, step: int, take: int, of: Sequence[int]) -> None:
    samples = [sample_of(stage, i, step, take) for i in of]
    writer.spectra(
        stage,
        step,
        np.concatenate([sample["sigma"] for sample in samples]),
        np.array([sample["floor"] for sample in samples]),
        weight_norm=np.array([sample["weight_norm"] for sample in samples]),
        decay=np.array([sample["decay"] for sample in samples]),
        of=None if writer.attempt is None else of,
    )


class Training:
    """The same steps into one recording of one process, and one of several ranks."""

    def __init__(self, folder: Path, world: int, *, first: int = 0, **options: Any) -> None:
        self.ranks = range(first, first + world)
        self.whole, self.path = folder / "whole.h5", folder / "x.h5"
        self.options = options
        self.writers: dict[int, Writer] = {}
        self.known: dict[str, Any] | None = None
        self.open()

    def open(self, **options: Any) -> None:
        """Begin an attempt, of which the whole recording knows nothing but its steps."""
        metadata = {"optimizer": "SGD", "name": "run"}
        self.known = None
        self.reference = Writer(
            self.whole, metadata, TABLE, resume=self.whole.exists() or parts_of(self.whole).exists()
        )
        attempt = None
        for rank in self.ranks:
            shard = shard_of(rank, self.ranks, attempt)
            given = {**self.options, **options}
            self.writers[rank] = Writer(self.path, metadata, TABLE, shard=shard, **given)
            attempt = self.writers[rank].attempt

    def step(
        self,
        *steps: int,
        take: int = 0,
        on: Iterable[int] | None = None,
        row_first: bool = False,
        sample: bool = True,
    ) -> None:
        """Record steps on all ranks, or only `on` some of them."""
        for step in steps:
            for writer in [self.reference, *(self.writers[rank] for rank in on or self.ranks)]:
                if not row_first and sample:
                    self._matrices(writer, step, take)
                self._row(writer, step, take)
                if sampled(step) and sample and (owned := self._owned(writer, step)):
                    write_sample(writer, "update", step, take, owned)
                if row_first and sample:
                    self._matrices(writer, step, take)

    def commit(self, *ranks: int) -> None:
        for rank in ranks or self.ranks:
            self.writers[rank].commit()
        self.reference.commit()

    def close(self, *ranks: int, status: str = "finished") -> None:
        for rank in ranks or self.ranks:
            self.writers[rank].close(status)
        if self.reference.attempt is None and not ranks:
            self.reference.close(status)

    def truth(self) -> dict[str, Any]:
        """Read all of the recording of one process, if it is not known."""
        return self.known or everything(open_run(self.whole))

    def copied_to(self, folder: Path) -> Training:
        """Return what a closed training left behind as if it had been recorded in a folder."""
        shutil.copytree(self.path.parent, folder, dirs_exist_ok=True)
        other = copy.copy(self)
        other.whole, other.path = folder / self.whole.name, folder / self.path.name
        other.writers = {}
        return other

    def folder(self, rank: int, attempt: int = 0) -> Path:
        return parts_of(self.path) / shard_of(rank, self.ranks, attempt).folder

    def let_die(self, rank: int, attempt: int = 0) -> None:
        """Make what a rank left behind name a process that is gone."""
        for file, before in (("manifest.json", '"pid": '), ("lock", " ")):
            path = self.folder(rank, attempt) / file
            path.write_text(path.read_text().replace(f"{before}{os.getpid()}", f"{before}{GONE}"))

    def _owned(self, writer: Writer, step: int) -> list[int]:
        """Return whose matrices a writer has: the owners rotate from sample to sample."""
        if writer is self.reference:
            return list(range(len(TABLE)))
        place = next(n for n, rank in enumerate(self.ranks) if self.writers[rank] is writer)
        return [i for i in range(len(TABLE)) if (i + step // EVERY) % len(self.ranks) == place]

    def _matrices(self, writer: Writer, step: int, take: int) -> None:
        if sampled(step):
            for i in self._owned(writer, step):
                writer.matrix("update", i, step, update_of("update", i, step, take))

    def _row(self, writer: Writer, step: int, take: int) -> None:
        rank = next((r for r in self.ranks if self.writers[r] is writer), None)
        norms = {}
        for stage in STAGES[step % 2 :]:  # momenta on every second step
            if rank is None:
                rows = [np.linalg.norm(update_of(stage, i, step, take), axis=1) for i in range(4)]
                norms[stage] = np.concatenate(rows)
            else:
                shard = shard_of(rank, self.ranks)
                norms[stage] = norms_of_rank(shard, stage, step, take)
        lead = rank in (None, self.ranks[0])
        scalars = {"loss": step + take / 4} if lead else {"loss": -1.0, "mine": 1.0}
        writer.step(step, 1e9 + step, scalars=scalars, norms=norms, void=step % 5 == 0)


def everything(run: Run) -> dict[str, Any]:
    """Read all that a run gives, by name."""
    found: dict[str, Any] = {
        "steps": run.steps,
        "times": run.times,
        "void": run.void,
        "table": run.table,
        "metadata": run.metadata,
        "stages": run.stages,
        **{f"scalar {name}": values for name, values in run.scalars.items()},
    }
    for stage in run.stages:
        found[f"norms {stage}"] = run.all_neuron_norms(stage)
        for part, values in run.all_spectra(stage)._asdict().items():
            found[f"{part} {stage}"] = values
        for name in run.matrices:
            for part, values in run.spectra(name, stage)._asdict().items():
                found[f"{part} {stage} {name}"] = values
            found[f"norms {stage} {name}"] = run.neuron_norms(name, stage)
            for step in run.update_steps(name, stage).tolist():
                found[f"matrix {stage} {name} {step}"] = run.update(name, step, stage)
    for metric in METRICS if "update" in run.stages else ():
        found[metric] = measure(run, metric).values
    return found


def expect_same(run: Run, reference: Run | dict[str, Any]) -> None:
    """Hold all of `run` against the recording of one process; norms that were spread nearly."""
    mine = everything(run)
    theirs = reference if isinstance(reference, dict) else everything(reference)
    assert mine.keys() == theirs.keys()
    across = TABLE.rows(ACROSS)
    for name, values in theirs.items():
        if not isinstance(values, np.ndarray):
            assert mine[name] == values, name
        elif name == "neuron_cv":  # a small difference of norms, so of fewer digits
            np.testing.assert_allclose(mine[name], values, rtol=1e-4)
        elif name.startswith("norms"):
            np.testing.assert_allclose(mine[name], values, rtol=1e-6, err_msg=name)
            if name in ("norms update", "norms momentum"):
                exact = [i for i in range(TABLE.total_rows) if not across.start <= i < across.stop]
                np.testing.assert_array_equal(mine[name][:, exact], values[:, exact], name)
        else:
            np.testing.assert_array_equal(mine[name], values, name)


def with_holes(
    reference: dict[str, Any], ranks: Sequence[int], holes: Iterable[tuple[int, int]]
) -> dict[str, Any]:
    """Return all of a whole run but what the ranks of `holes` (rank, step) have of it."""
    expected = copy.deepcopy(reference)
    world = len(ranks)
    for rank, step in holes:
        shard, place = shard_of(rank, ranks), ranks.index(rank)
        at = expected["steps"].tolist().index(step)
        if place == 0:
            expected["scalar loss"][at] = np.nan
        for stage in STAGES:
            for i, (start, stop, _) in enumerate(shard.rows[stage]):
                rows = TABLE.rows(i)
                name = TABLE[i].name
                expected[f"norms {stage}"][at, rows.start + start : rows.start + stop] = np.nan
                expected[f"norms {stage} {name}"][at, start:stop] = np.nan
                if stage != "update" or not sampled(step) or (i + step // EVERY) % world != place:
                    continue
                row = expected[f"steps {stage}"].tolist().index(step)
                expected.pop(f"matrix {stage} {name} {step}", None)
                for part in ("sigma", "floor", "weight_norm"):
                    of = TABLE.sigmas(i) if part == "sigma" else slice(i, i + 1)
                    expected[f"{part} {stage}"][row, of] = np.nan
                    expected[f"{part} {stage} {name}"][row] = np.nan
    for metric in METRICS:
        expected.pop(metric)
    return expected


def expect_holes(run: Run, training: Training, holes: Iterable[tuple[int, int]]) -> None:
    """Hold all of `run` against the recording of one process without what ranks have not."""
    expected = with_holes(training.truth(), training.ranks, holes)
    found = everything(run)
    for metric in METRICS:
        found.pop(metric)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        if isinstance(values, np.ndarray):
            np.testing.assert_allclose(found[name], values, rtol=1e-6, err_msg=name)
            assert not (found[name] == 0).any() or name in ("void", "steps"), name
        elif name != "metadata":
            assert found[name] == values, name


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """Spare the disk: what must survive a crash of the machine is not tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def record_two(folder: Path) -> Training:
    training = Training(folder, 2)
    for start in range(1, 21, 4):
        training.step(*range(start, start + 4))
        training.commit()
    return training


@pytest.fixture
def two(tmp_path: Path) -> Training:
    """Return a training of two ranks with 20 steps in five segments, still being recorded."""
    return record_two(tmp_path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Training:
    training = record_two(tmp_path_factory.mktemp("recorded"))
    training.close()
    training.known = training.truth()
    return training


@pytest.fixture
def closed(recorded: Training, tmp_path: Path) -> Training:
    """Return the same training, closed, to do with as one likes: recorded once for all tests."""
    return recorded.copied_to(tmp_path)


@pytest.mark.parametrize(("world", "first"), [(1, 0), (2, 0), (2, 6), (3, 0), (4, 0)])
def test_what_ranks_recorded_is_the_training_of_one_process(
    world: int, first: int, tmp_path: Path
) -> None:
    training = Training(tmp_path, world, first=first)
    training.step(*range(1, 11))
    training.commit()
    training.step(*range(11, 21), row_first=True)
    training.commit()
    live = open_run(training.path)
    expect_same(live, open_run(training.whole))
    assert live.status == "recording"
    training.close()
    assert live.refresh()
    reference = open_run(training.whole)
    for run in (live, open_run(parts_of(training.path))):
        expect_same(run, reference)
        assert (run.status, run.holes, run.damaged, run.overlaps) == ("finished", [], [], 0)
        assert run.ranks == tuple(training.ranks)
        assert f"{world} ranks" in repr(run)
    assert not live.refresh()
    assert not parts_of(training.path).with_suffix("").exists()


@settings(max_examples=10, deadline=None)
@given(
    world=st.integers(1, 4),
    commits=st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=8),
)
def test_any_partition_into_segments_gives_the_same(
    world: int, commits: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    training = Training(tmp_path_factory.mktemp("runs"), world)
    for step, of in enumerate(commits, 1):
        training.step(step, row_first=bool(step % 2))
        for rank in {rank % world for rank in of}:
            training.writers[rank].commit()
    training.close()
    expect_same(open_run(training.path), open_run(training.whole))


def test_half_precision_is_read_as_it_was_written(tmp_path: Path) -> None:
    training = Training(tmp_path, 2, store="float16")
    training.step(*range(1, 9))
    training.close()
    run = open_run(training.path)
    for name in TABLE.names:
        i = TABLE.index(name)
        for step in run.update_steps(name).tolist():
            true = update_of("update", i, step)
            error = np.abs(run.update(name, step) - true).max()
            assert 0 < error <= np.abs(true).max() * 2.0**-11
    before = everything(run)
    pack_module.pack(training.path)
    expect_same(open_run(training.path), before)


def test_replicas_count_once(tmp_path: Path) -> None:
    """Of a norm that two ranks recorded, one is enough, and it is the first one's."""
    rows = {"update": tuple((0, matrix.m, 1) for matrix in TABLE)}
    writers = []
    for rank in range(2):
        shard = Shard(rank, (0, 1), 0 if rank else None, rows)
        writers.append(Writer(tmp_path / "x.h5", {}, TABLE, shard=shard))
    for step in range(1, 5):
        for rank, writer in enumerate(writers):
            if rank or step < 3:
                norms = np.full(TABLE.total_rows, step + rank / 4)
                writer.step(step, 0.0, scalars={}, norms={"update": norms})
    for writer in writers:
        writer.close()
    run = open_run(tmp_path / "x.h5")
    assert run.neuron_norms("up")[:, 0].tolist() == [1, 2, 3.25, 4.25]
    assert [hole[:2] for hole in run.holes] == [(0, (3, 4))]


# -- only what is asked for is read --------------------------------------------------------------


def test_only_what_is_asked_for_is_read(two: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int]] = []
    plain = rank_files_module.Handles.read

    def counting(self: Any, path: Path, stamp: Any, name: str, at: Any) -> np.ndarray:
        values = plain(self, path, stamp, name, at)
        read.append((name, values.size))
        return values

    run = open_run(two.path)
    monkeypatch.setattr(rank_files_module.Handles, "read", counting)
    run.neuron_norms("square")
    assert {name for name, _ in read} == {"neurons/update"}
    assert sum(size for _, size in read) == 20 * 4
    read.clear()
    run.spectra("square")
    assert {name for name, _ in read} == {"samples/update/sigma"}
    assert sum(size for _, size in read) == 7 * 4
    read.clear()
    run.all_spectra()
    assert sum(size for _, size in read) == 7 * TABLE.total_sigmas
    assert len(read) <= 10 * 2, "neighbours are read together"
    read.clear()
    run.update("up", 7)
    assert read == [("updates/update/000", 15)]


def test_few_files_stay_open(two: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_files_module, "OPEN_FILES", 2)
    before = len(os.listdir("/proc/self/fd"))
    run = open_run(two.path)
    expect_same(run, open_run(two.whole))
    assert len(run._handles._files) == 2
    assert len(os.listdir("/proc/self/fd")) < before + 8 + 6


# -- holes ---------------------------------------------------------------------------------------


def test_files_of_a_rank_that_are_gone_are_holes(closed: Training) -> None:
    for rank in closed.ranks:
        away = closed.folder(rank).with_name("away")
        closed.folder(rank).rename(away)
        run = open_run(closed.path)
        assert run.holes == [Hole(rank, (1, 20), "no files of this rank")]
        assert run.status == f"rank {rank}: no files of this rank"
        assert "1 holes" in repr(run)
        if rank == 1:
            expect_holes(run, closed, [(rank, step) for step in range(1, 21)])
        away.rename(closed.folder(rank))
    assert open_run(closed.path).holes == []


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("keep", [None, 0, 7, 100, 1000, 3000, -500, -1])
def test_segment_that_is_lost_or_cut_is_a_hole(
    rank: int, keep: int | None, closed: Training
) -> None:
    entry = manifest_of(closed, rank).segments[3]
    assert (entry.first, entry.last) == (9, 12)
    file = closed.folder(rank) / entry.file
    if keep is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:keep])
    run = open_run(closed.path)
    (hole,) = run.holes
    assert hole[:2] == (rank, (9, 12))
    assert f"{entry.file} is damaged" in hole.reason
    assert [(damage.path, damage.steps) for damage in run.damaged] == [(file, (9, 12))]
    expect_holes(run, closed, [(rank, step) for step in range(9, 13)])


def test_last_segments_that_a_dead_rank_never_wrote_are_holes(two: Training) -> None:
    two.step(21, 22, 23, on=[0])
    two.close(0)
    two.reference.close()
    assert open_run(two.path).steps.tolist() == list(range(1, 21)), "rank 1 lives"
    two.let_die(1)
    run = open_run(two.path)
    assert run.holes == [Hole(1, (21, 23), "interrupted")]
    assert run.status == "interrupted"
    expect_holes(run, two, [(1, 21), (1, 22), (1, 23)])


def test_rank_that_stopped_says_why(two: Training) -> None:
    two.step(21, 22)
    two.writers[0].close()
    two.writers[1].abandon("No space left on device")
    two.reference.close()
    run = open_run(two.path)
    said = "stopped at step 20: No space left on device; 2 steps after it are lost"
    assert run.holes == [Hole(1, (21, 22), said)]
    assert run.status == f"rank 1: {said}"


def test_rows_that_a_rank_dropped_are_holes_between_others(two: Training) -> None:
    two.step(21, 22, on=[0])
    two.step(23)
    two.step(24, on=[1])
    two.step(25)
    two.close()
    run = open_run(two.path)
    missing = [Hole(0, (24, 24), "missing"), Hole(1, (21, 22), "missing")]
    assert run.holes == missing
    expect_holes(run, two, [(1, 21), (1, 22), (0, 24)])


def test_packed_file_keeps_its_holes(two: Training) -> None:
    two.step(21, 22, on=[0])
    two.step(23)
    two.close()
    before = open_run(two.path)
    made = pack_module.pack(two.path, two.path.with_name("packed.h5"))
    run = open_run(made.path)
    assert run.holes == before.holes == [Hole(1, (21, 22), "missing")]
    expect_same(run, everything(before))
    assert [event.text for event in run.events if event.kind == "hole"] == [
        "rank 1: steps 21–22: missing"
    ]
    again = pack_module.pack(made.path, two.path.with_name("again.h5"))
    assert open_run(again.path).holes == before.holes


def manifest_of(training: Training, rank: int, attempt: int = 0) -> Manifest:
    manifest = Manifest.load(training.folder(rank, attempt))
    assert manifest
    return manifest


# -- trainings that go back, and begin again -----------------------------------------------------


@pytest.mark.parametrize("row_first", [False, True])
@pytest.mark.parametrize("back_to", [5, 12])
def test_training_that_goes_back_shows_its_last_pass(
    back_to: int, row_first: bool, tmp_path: Path
) -> None:
    training = Training(tmp_path, 2)
    training.step(*range(1, 13), row_first=row_first)
    training.commit()
    training.step(*range(back_to, 17), take=1, row_first=row_first)
    training.close()
    run, reference = open_run(training.path), open_run(training.whole)
    expect_same(run, reference)
    assert run.overlaps == reference.overlaps == 13 - back_to
    before = everything(run)
    pack_module.pack(training.path)
    expect_same(open_run(training.path), before)
    assert open_run(training.path).overlaps == 13 - back_to


def test_passes_through_a_step_are_never_mixed(tmp_path: Path) -> None:
    """A rank that lost its second pass has a hole there, though it has the first."""
    training = Training(tmp_path, 2)
    training.step(*range(1, 13))
    training.commit()
    training.step(*range(5, 9), take=1)
    training.commit()
    training.step(*range(9, 15), take=1)
    training.close()
    lost = manifest_of(training, 1).segments[2]
    assert (lost.first, lost.last) == (5, 8)
    (training.folder(1) / lost.file).unlink()
    run = open_run(training.path)
    assert [hole[:2] for hole in run.holes] == [(1, (5, 8))]
    expect_holes(run, training, [(1, step) for step in range(5, 9)])


def test_pass_without_samples_hides_those_of_the_pass_before(tmp_path: Path) -> None:
    training = Training(tmp_path, 2)
    training.step(*range(1, 13))
    training.step(*range(5, 16), take=1, sample=False)
    training.close()
    run = open_run(training.path)
    assert run.spectrum_steps().tolist() == [1, 4]
    assert run.update_steps("up").tolist() == [1, 4]
    before = everything(run)
    pack_module.pack(training.path)
    expect_same(open_run(training.path), before)


@pytest.mark.parametrize("packed", [False, True])
def test_later_attempt_wins_with_all_of_its_ranks(packed: bool, closed: Training) -> None:
    if packed:
        pack_module.pack(closed.path)
    closed.open(resume=True)
    assert [writer.attempt for writer in closed.writers.values()] == [0 if packed else 1] * 2
    assert closed.writers[0].last_step == 20
    closed.step(*range(15, 31), take=1)
    closed.close()
    run, reference = open_run(closed.path), open_run(closed.whole)
    expect_same(run, reference)
    assert run.overlaps == reference.overlaps == 6
    assert [event.text for event in run.events] == ["recording resumed"]
    shutil.rmtree(closed.folder(1, 0 if packed else 1))
    holed = open_run(closed.path)
    assert holed.holes == [Hole(1, (15, 30), "no files of this rank")]
    expect_holes(holed, closed, [(1, step) for step in range(15, 31)])
    before = everything(holed)
    again = pack_module.pack(closed.path, closed.path.with_name("again.h5")).path
    expect_same(open_run(again), before)
    assert open_run(again).holes == holed.holes


def test_attempt_of_other_ranks_is_read_too(tmp_path: Path) -> None:
    training = Training(tmp_path, 3)
    training.step(*range(1, 8))
    training.close()
    training.ranks = range(2)
    training.writers.clear()
    training.open(resume=True)
    training.step(*range(6, 12), take=1)
    training.close()
    run = open_run(training.path)
    assert (run.ranks, run.holes) == ((0, 1), [])
    expect_same(run, open_run(training.whole))


# -- while it is recorded ------------------------------------------------------------------------


def test_step_appears_when_all_living_ranks_have_it(tmp_path: Path) -> None:
    training = Training(tmp_path, 3)
    training.step(1, 2, 3, 4)
    run = open_run(training.path)
    for ranks, shown in (((0,), 0), ((2,), 0), ((1,), 4)):
        for rank in ranks:
            training.writers[rank].commit()
        run.refresh()
        assert len(run.steps) == shown
    training.step(5, 6, 7, on=[0, 1])
    training.writers[0].commit()
    training.writers[1].commit()
    assert run.refresh()
    assert run.steps.tolist() == [1, 2, 3, 4]
    assert run.spectrum_steps().tolist() == [1, 4]
    assert not run.refresh()
    training.let_die(2)
    assert run.refresh()
    assert run.steps.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert run.holes == [Hole(2, (5, 7), "interrupted")]
    assert run.live
    for rank in (0, 1):
        training.let_die(rank)
    assert run.refresh()
    assert run.status == "interrupted"


def test_rank_that_died_without_a_word_is_noticed(two: Training) -> None:
    process = subprocess.Popen(["sleep", "60"])
    two.step(21, on=[0])
    two.writers[0].commit()
    file = two.folder(1) / "manifest.json"
    file.write_text(file.read_text().replace(f'"pid": {os.getpid()}', f'"pid": {process.pid}'))
    run = open_run(two.path)
    assert len(run.steps) == 20
    assert not run.refresh()
    process.kill()
    process.wait()
    assert run.refresh()
    assert len(run.steps) == 21
    assert run.live


def test_silent_rank_does_not_hold_the_others_back_for_ever(two: Training) -> None:
    two.step(21, on=[0])
    two.writers[0].commit()
    assert len(open_run(two.path).steps) == 20
    file = two.folder(1) / "manifest.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "updated": content["updated"] - 61}))
    run = open_run(two.path)
    assert len(run.steps) == 21
    assert run.holes == [Hole(1, (21, 21), "not recorded yet")]


def test_new_ranks_and_attempts_are_found(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    lead = Writer(path, {}, TABLE, shard=shard_of(0, (0, 1)))
    run = open_run(path)
    assert run.ranks == (0, 1)
    other = Writer(path, {}, TABLE, shard=shard_of(1, (0, 1), lead.attempt))
    assert run.refresh()
    for attempt in range(2):
        for rank, writer in enumerate((lead, other)):
            norms = {"update": norms_of_rank(shard_of(rank, (0, 1)), "update", 1, attempt)}
            writer.step(1 + attempt, 0.0, scalars={}, norms=norms)
            writer.close()
        assert run.refresh()
        assert run.steps.tolist() == list(range(1, 2 + attempt))
        assert run.holes == []
        if not attempt:
            lead = Writer(path, {}, TABLE, shard=shard_of(0, (0, 1)), resume=True)
            other = Writer(path, {}, TABLE, shard=shard_of(1, (0, 1), lead.attempt))


def test_run_read_while_it_is_recorded_and_packed_is_never_half(tmp_path: Path) -> None:
    training = Training(tmp_path, 2)
    failures = []

    def record() -> None:
        try:
            for step in range(1, 16):
                time.sleep(0.15)  # a reader is to see some of it
                training.step(step)
                for writer in training.writers.values():
                    writer.commit()
            training.close()
            assert pack_module.pack_in_place(training.path) == ""
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=record)
    run = open_run(training.path)
    thread.start()
    seen = set()
    while thread.is_alive() or not training.path.exists():
        run.refresh()
        for view in (run, open_run(training.path)):
            assert not view.damaged
            assert not view.holes
            assert view.steps.tolist() == list(range(1, len(view.steps) + 1))
            if "update" in view.stages:
                assert np.isfinite(view.all_neuron_norms()).all()
            seen.add(len(view.steps))
        assert not failures
    thread.join()
    run.refresh()
    assert len(seen) > 3
    expect_same(run, open_run(training.whole))


# -- who may record where ------------------------------------------------------------------------


def lead(path: Path, **options: Any) -> Writer:
    return Writer(path, options.pop("metadata", {}), TABLE, shard=shard_of(0, (0, 1)), **options)


def test_finished_and_interrupted_recordings_are_not_overwritten(two: Training) -> None:
    with pytest.raises(RunError, match=f"being recorded by process {os.getpid()}"):
        lead(two.path, resume=True)
    two.close()
    with pytest.raises(RunError, match="remains of an interrupted recording"):
        lead(two.path)
    other = Matrices([Matrix("up", 1, 1)])
    shard = Shard(0, (0, 1), None, {"update": ((0, 1, 1),)})
    with pytest.raises(RunError, match="other matrices"):
        Writer(two.path, {}, other, shard=shard, resume=True)
    expect_same(open_run(two.path), open_run(two.whole))
    pack_module.pack(two.path)
    with pytest.raises(RunError, match="exists already"):
        lead(two.path)


def test_one_process_does_not_go_on_where_several_ranks_were(closed: Training) -> None:
    with pytest.raises(RunError, match="by several ranks: make it one file first: normuon-lens"):
        Writer(closed.path, {}, TABLE, resume=True)
    pack_module.pack(closed.path)
    writer = Writer(closed.path, {}, TABLE, resume=True)
    assert writer.last_step == 20
    writer.abandon("it rained")
    with pytest.raises(RunError, match="by one process: make it one file first: normuon-lens"):
        lead(closed.path, resume=True)
    pack_module.pack(closed.path)
    assert lead(closed.path, resume=True).attempt == 0


def test_rank_does_not_take_the_place_of_another(two: Training) -> None:
    with pytest.raises(RunError, match="is there already"):
        Writer(two.path, {}, TABLE, shard=shard_of(1, (0, 1), 0))
    expect_same(open_run(two.path), open_run(two.whole))


def test_recording_without_a_step_leaves_nothing(tmp_path: Path) -> None:
    training = Training(tmp_path, 2)
    for writer in training.writers.values():
        writer.discard()
    assert not parts_of(training.path).exists()
    training.reference.discard()
    assert list(tmp_path.iterdir()) == []


def test_discarded_attempt_leaves_the_one_before(closed: Training) -> None:
    found = sorted(parts_of(closed.path).rglob("*"))
    closed.open(resume=True)
    for writer in closed.writers.values():
        writer.discard()
    assert sorted(parts_of(closed.path).rglob("*")) == found


def job(restart: int, name: str = "a") -> dict[str, Any]:
    return {"job": {"id": name, "restart": restart}}


@pytest.mark.parametrize("living", [False, True])
def test_restarted_ranks_go_on_unasked(living: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    first = lead(path, metadata=job(0))
    first.step(1, 0.0, scalars={}, norms={})
    first.commit()
    if not living:
        first.close("interrupted")
    for metadata in ({}, job(0), job(1, "b"), {"job": None}):
        with pytest.raises(RunError, match="being recorded" if living else "remains"):
            lead(path, metadata=metadata)
    second = lead(path, metadata=job(2))
    assert (second.attempt, second.last_step) == (1, 1)
    second.close()
    assert [event.text for event in open_run(path).events] == ["restarted by torchrun: attempt 1"]


def test_restarted_process_goes_on_unasked_once_the_one_before_is_done(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    first = Writer(path, job(0), TABLE)
    first.step(1, 0.0, scalars={}, norms={})
    first.commit()

    def finish() -> None:
        time.sleep(0.5)
        first.close("interrupted")

    thread = threading.Thread(target=finish)
    thread.start()
    start = time.monotonic()
    second = Writer(path, job(1), TABLE)
    assert time.monotonic() - start > 0.4
    thread.join()
    second.step(2, 0.0, scalars={}, norms={})
    second.close()
    run = open_run(path)
    assert run.steps.tolist() == [1, 2]
    assert [event.text for event in run.events] == ["restarted by torchrun: attempt 1"]
    with pytest.raises(RunError, match="exists already"):
        Writer(path, job(1), TABLE)
    third = Writer(path, job(2), TABLE)
    assert third.last_step == 2
    third.close()


def test_restarted_process_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_module, "RESTART_SECONDS", 0.2)
    Writer(tmp_path / "x.h5", job(0), TABLE)
    with pytest.raises(RunError, match="being recorded by process"):
        Writer(tmp_path / "x.h5", job(1), TABLE)


# -- what the lead packs -------------------------------------------------------------------------


def test_lead_packs_once_all_ranks_have_finished(two: Training) -> None:
    two.writers[0].close()

    def finish() -> None:
        time.sleep(0.4)
        two.writers[1].close()

    thread = threading.Thread(target=finish)
    thread.start()
    closed = two.writers[0].merge(20)
    thread.join()
    two.reference.close()
    assert (closed.remark, closed.steps) == ("", 20)
    assert closed.bytes == two.path.stat().st_size
    assert not parts_of(two.path).exists()
    run = open_run(two.path)
    expect_same(run, open_run(two.whole))
    assert (run.status, run.ranks, run.holes) == ("finished", (), [])


@pytest.mark.parametrize(
    ("end", "says"),
    [
        (lambda two: None, "rank 1 has not finished"),
        (lambda two: two.let_die(1), "rank 1 has not finished"),
        (lambda two: two.writers[1].close("interrupted"), "rank 1: interrupted"),
        (lambda two: two.writers[1].abandon("it rained"), "rank 1: stopped at step 20: it rained"),
        (lambda two: shutil.rmtree(two.folder(1)), "rank 1: no files of this rank"),
        (lambda two: damage_list(two), "rank 1: .*manifest.json: damaged"),
    ],
)
def test_lead_leaves_what_is_not_complete(
    end: Callable[[Training], object], says: str, two: Training
) -> None:
    own = two.writers[0].close()
    end(two)
    found = sorted(parts_of(two.path).rglob("*"))
    start = time.monotonic()
    closed = two.writers[0].merge(0.3)
    assert time.monotonic() - start < 1.5
    assert re.match(f"kept in parts: {says}", closed.remark)
    assert closed.remark.endswith(f"; later: normuon-lens pack {two.path}")
    assert (closed.bytes, closed.steps) == own[1:3]
    assert sorted(parts_of(two.path).rglob("*")) == found


def damage_list(two: Training) -> None:
    (two.folder(1) / "manifest.json").write_text("{")


def test_lead_keeps_damaged_parts(two: Training) -> None:
    two.close()
    file = two.folder(1) / manifest_of(two, 1).segments[2].file
    file.write_bytes(b"")
    remark = two.writers[0].merge(0).remark
    assert remark.startswith(f"kept in parts: {file.name} is damaged")
    assert file.exists()
    assert not two.path.exists()


@pytest.mark.parametrize("after", ["written", "replaced", "listed", "rank 0"])
def test_packing_that_is_killed_loses_nothing_and_shows_nothing_twice(
    after: str, closed: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = everything(open_run(closed.path))

    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    def remove_one(parts: Path) -> None:
        shutil.rmtree(closed.folder(0))
        raise Killed

    with monkeypatch.context() as patch:
        if after == "written":
            patch.setattr(pack_module, "replace_durably", die)
        elif after == "replaced":
            patch.setattr(Manifest, "save", die)
        else:
            patch.setattr(pack_module, "remove_parts", die if after == "listed" else remove_one)
        with pytest.raises(Killed):
            pack_module.pack_in_place(closed.path)
    run = open_run(closed.path)
    expect_same(run, expected)
    assert run.status == "finished"
    assert run.holes == []
    closed.open(resume=True)
    closed.step(21)
    closed.close()
    expect_same(open_run(closed.path), open_run(closed.whole))


# -- whatever lies there -------------------------------------------------------------------------


def test_links_are_not_followed_out_of_the_parts(closed: Training, tmp_path: Path) -> None:
    away = tmp_path / "away"
    closed.folder(1).rename(away)
    closed.folder(1).symlink_to(away)
    run = open_run(closed.path)
    assert run.holes == [Hole(1, (1, 20), "a link, which is not followed")]
    assert [damage.path for damage in run.damaged] == [closed.folder(1)]
    closed.folder(1).unlink()
    away.rename(closed.folder(1))
    file = closed.folder(1) / manifest_of(closed, 1).segments[1].file
    file.rename(tmp_path / "segment.h5")
    file.symlink_to(tmp_path / "segment.h5")
    (hole,) = open_run(closed.path).holes
    assert hole[:2] == (1, (1, 4))
    assert "a link, which is not followed" in hole.reason


@pytest.mark.parametrize(
    "name",
    ["rank1", "rank00001.attempt0", "rank00001.attempt01", "rank99999999", "rank-0001", "rank"],
)
def test_other_folders_are_not_ranks(name: str, closed: Training) -> None:
    shutil.copytree(closed.folder(1), parts_of(closed.path) / name)
    expect_same(open_run(closed.path), closed.truth())
    assert not open_run(closed.path).damaged


@pytest.mark.parametrize("name", ["rank00007", "rank9999999", "rank00001.attempt3"])
def test_folder_of_another_rank_is_damaged(name: str, closed: Training) -> None:
    shutil.copytree(closed.folder(1), parts_of(closed.path) / name)
    run = open_run(closed.path)
    assert run.damaged
    assert "recorded by rank 1 in attempt 0" in run.damaged[0].reason
    assert len(run.steps) == 20
    assert run.holes == []


def test_rank_of_other_matrices_is_a_hole(closed: Training) -> None:
    shutil.rmtree(closed.folder(1))
    table = Matrices([dataclasses.replace(matrix, n=matrix.n + 1) for matrix in TABLE])
    shard = shard_of(1, closed.ranks, 0)
    writer = Writer(closed.path, {}, table, shard=shard)
    writer.step(3, 0.0, scalars={}, norms={})
    writer.close()
    run = open_run(closed.path)
    assert {hole.rank for hole in run.holes} == {1}
    assert "its matrices are not this run's" in run.damaged[0].reason
    assert np.isnan(run.neuron_norms("up")[:, 3:]).all()
    assert np.isfinite(run.neuron_norms("up")[:, :3]).all()


LIES: dict[str, Callable[[h5py.File], None]] = {
    "rows beyond the matrix": lambda f: f["shard/update"].__setitem__((0, 1), 6),
    "rows that end before they begin": lambda f: f["shard/update"].__setitem__((0, 0), 9),
    "no parts": lambda f: f["shard/update"].__setitem__((0, 2), 0),
    "more parts than ranks": lambda f: f["shard/update"].__setitem__((0, 2), 3),
    "fewer columns than rows": lambda f: f["shard/update"].__setitem__((0, 1), 4),
    "a matrix that is not there": lambda f: f["samples/update/matrix"].__setitem__(0, 4),
    "a matrix below zero": lambda f: f["samples/update/matrix"].__setitem__(0, -1),
    "another matrix's values": lambda f: f["samples/update/matrix"].__setitem__(0, other_width(f)),
    "a pass below zero": lambda f: f["steps/era"].__setitem__(0, -1),
    "too many passes": lambda f: f["samples/update/era"].__setitem__(0, 2**40),
    "ranks in disorder": lambda f: f["shard/ranks"].__setitem__(slice(None), [1, 0]),
    "ranks below zero": lambda f: f["shard/ranks"].__setitem__(0, -1),
    "a rank that is none": lambda f: f.attrs.modify("rank", 5),
    "an attempt below zero": lambda f: f.attrs.modify("attempt", -1),
    "no shard of the stage": lambda f: f.__delitem__("shard/update"),
    "no passes": lambda f: f.__delitem__("steps/era"),
    "no shard": lambda f: f.__delitem__("shard"),
    "no step of a matrix": lambda f: f.__delitem__(f"{a_matrix(f)}_era"),
}


def other_width(file: h5py.File) -> int:
    i = int(file["samples/update/matrix"][0])
    return next(j for j in range(4) if TABLE[j].k != TABLE[i].k)


def a_matrix(file: h5py.File) -> str:
    return f"updates/update/{sorted(file['updates/update'])[0][:3]}"


@pytest.mark.parametrize("lie", LIES)
def test_segment_that_lies_is_damaged(lie: str, closed: Training) -> None:
    file = closed.folder(1) / manifest_of(closed, 1).segments[1].file
    with h5py.File(file, "r+", libver=("v110", "v110")) as opened:
        LIES[lie](opened)
    run = open_run(closed.path)
    assert [damage.path for damage in run.damaged] == [file]
    assert [hole[:2] for hole in run.holes] == [(1, (1, 4))]
    assert "\n" not in run.damaged[0].reason
    expect_holes(run, closed, [(1, step) for step in range(1, 5)])


def test_segment_of_a_rank_is_no_run_of_its_own(closed: Training) -> None:
    file = closed.folder(1) / manifest_of(closed, 1).segments[1].file
    with pytest.raises(RunError, match="what one of several ranks recorded"):
        open_run(file)


def test_wrong_number_of_norms_is_refused(two: Training) -> None:
    with pytest.raises(ValueError, match="3 norms of stage update for "):
        two.writers[0].step(21, 0.0, scalars={}, norms={"update": np.ones(3)})


# -- through helper processes --------------------------------------------------------------------


def test_shard_survives_the_journey_to_the_helper() -> None:
    for attempt in (None, 0, 3):
        shard = shard_of(2, range(1, 5), attempt)
        assert Shard.from_json(json.loads(json.dumps(shard.to_json()))) == shard
        assert shard.folder == ("rank00002.attempt3" if attempt else "rank00002")
    assert shard.total("update") == sum(stop - start for start, stop, _ in shard.rows["update"])
    assert shard.columns("update", 1) == slice(2, 5)
