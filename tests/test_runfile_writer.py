"""What is written is what is read, whatever happened in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normuon_lens.errors import RunError
from normuon_lens.runfile import Matrices, Matrix, Run, Writer, open_run, pack
from normuon_lens.runfile.manifest import Manifest
from normuon_lens.runfile.schema import parts_of

TABLE = Matrices([Matrix("up", 6, 3), Matrix("down", 3, 6, "bfloat16", 1)])


def norms_of(step: int) -> np.ndarray:
    return np.arange(9, dtype=np.float32) + 100 * step


def matrix_of(step: int, i: int) -> np.ndarray:
    rng = np.random.default_rng([step, i])
    return rng.standard_normal((TABLE[i].m, TABLE[i].n)).astype(np.float32) * 1e-6


def write_steps(writer: Writer, steps: range, sample: int = 3) -> None:
    for step in steps:
        writer.step(step, 1e9 + step, scalars={"loss": 1 / step}, norms={"update": norms_of(step)})
        if step % sample == 0:
            sigma = np.arange(6, 0, -1) * float(step)
            writer.spectra("update", step, sigma, np.full(2, 1e-9), weight_norm=np.ones(2))
            for i in range(2):
                writer.matrix("update", i, step, matrix_of(step, i))


def expect_steps(path: Path, steps: list[int], sample: int = 3) -> None:
    run = open_run(path)
    assert run.steps.tolist() == steps
    np.testing.assert_array_equal(run.times, 1e9 + run.steps)
    np.testing.assert_allclose(run.scalars["loss"], 1 / run.steps)
    expected = np.stack([norms_of(step) for step in steps])
    np.testing.assert_array_equal(run.neuron_norms("up"), expected[:, :6])
    np.testing.assert_array_equal(run.neuron_norms("down"), expected[:, 6:])
    sampled = [step for step in steps if step % sample == 0]
    assert run.spectrum_steps().tolist() == sampled
    for step in sampled:
        np.testing.assert_array_equal(run.spectrum("down", step), step * np.array([3.0, 2, 1]))
        np.testing.assert_array_equal(run.update("up", step), matrix_of(step, 0))
        np.testing.assert_array_equal(run.update("down", step), matrix_of(step, 1))
    assert run.matrices == ["up", "down"]
    assert run.table == TABLE
    assert not run.damaged


@pytest.mark.parametrize("close", [True, False])
def test_round_trip(tmp_path: Path, close: bool) -> None:
    writer = Writer(tmp_path / "x.h5", {"optimizer": "SGD"}, TABLE)
    write_steps(writer, range(1, 31))
    if close:
        closed = writer.close()
        assert closed.steps == 30
        assert closed.bytes == (tmp_path / "x.h5").stat().st_size
        assert not parts_of(tmp_path / "x.h5").exists()
    else:
        writer.commit()
    expect_steps(tmp_path / "x.h5", list(range(1, 31)))
    run = open_run(tmp_path / "x.h5")
    assert run.status == ("finished" if close else "recording")
    assert run.live is not close
    assert run.optimizer == "SGD"


def test_every_small_segment_is_read_and_merged(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    writer = Writer(path, {"optimizer": "SGD"}, TABLE)
    for step in range(1, 301):
        write_steps(writer, range(step, step + 1))
        writer.commit()
    manifest = Manifest.load(parts_of(path))
    assert manifest
    segments = manifest.segments
    # With the empty first one 301 = 1·256 + 2·16 + 13: a digit a level, as in base 16.
    assert [entry.level for entry in segments] == [2] + [1] * 2 + [0] * 13
    on_disk = {file.name for file in parts_of(path).glob("*.h5")}
    assert on_disk == {entry.file for entry in segments}
    expect_steps(path, list(range(1, 301)))
    writer.close()
    expect_steps(path, list(range(1, 301)))


@settings(max_examples=25, deadline=None)
@given(commits=st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_any_partition_into_segments_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory, commits: list[int]
) -> None:
    path = tmp_path_factory.mktemp("runs") / "x.h5"
    writer = Writer(path, {}, TABLE)
    step = 1
    for count in commits:
        write_steps(writer, range(step, step + count))
        writer.commit()
        step += count
    writer.close()
    if step > 1:
        expect_steps(path, list(range(1, step)))


def test_resumed_run_takes_the_later_record(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    first = Writer(path, {}, TABLE)
    for step in range(1, 21):
        first.step(step, 1e9, scalars={"loss": -1.0}, norms={"update": np.zeros(9)})
    first.close()
    second = Writer(path, {}, TABLE, resume=True)
    assert second.last_step == 20
    write_steps(second, range(1, 41))
    second.commit()
    expect_steps(path, list(range(1, 41)))  # the file and the parts as one
    assert open_run(path).overlaps == 20
    second.close()
    expect_steps(path, list(range(1, 41)))
    run = open_run(path)
    assert run.overlaps == 20, "both records are kept and counted"
    assert [event.kind for event in run.events] == ["resumed"]


@pytest.mark.parametrize("stores", [("float16", "float32"), ("float32", "float16")])
def test_training_resumed_with_another_store_loses_nothing(
    stores: tuple[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "x.h5"
    for store, steps in zip(stores, (range(1, 7), range(7, 13)), strict=True):
        writer = Writer(path, {}, TABLE, store=store, resume=True)
        write_steps(writer, steps)
        writer.close()
    run = open_run(path)
    assert run.update_steps("up").tolist() == [3, 6, 9, 12]
    for step in (3, 6, 9, 12):
        true = matrix_of(step, 0)
        half_unit = 2.0**-11 if stores[step > 6] == "float16" else 0.0
        error = np.abs(run.update("up", step) - true).max()
        assert error <= np.abs(true).max() * half_unit


def test_recording_killed_twice_goes_on_from_its_last_step(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    write_steps(writer := Writer(path, {}, TABLE), range(1, 21))
    writer.dropped(3)
    writer.commit()
    for expected in (20, 20):
        _let_the_writer_die(path)
        writer = Writer(path, {}, TABLE, resume=True)  # and killed before its first step
        assert writer.last_step == expected
    write_steps(writer, range(21, 24))
    writer.dropped(2)
    writer.close()
    expect_steps(path, list(range(1, 24)))
    assert open_run(path).dropped == 5
    writer = Writer(path, {}, TABLE, resume=True)
    assert writer.last_step == 23
    writer.close()
    assert open_run(path).dropped == 5


def test_middling_segments_are_merged_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.h5"
    monkeypatch.setattr("normuon_lens.runfile.writer.MERGE_LIMIT", limit := 60_000)
    writer = Writer(path, {}, TABLE)
    for step in range(1, 41):
        write_steps(writer, range(step, step + 1))
        writer.commit()
    sizes = [file.stat().st_size for file in parts_of(path).glob("*.h5")]
    assert limit // 16 < min(sizes), "sixteen of them would never have been merged by number"
    assert sum(size <= limit // 2 for size in sizes) < 16
    expect_steps(path, list(range(1, 41)))
    writer.close()
    expect_steps(path, list(range(1, 41)))


def test_damage_to_an_old_segment_does_not_stop_the_recording(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    writer = Writer(path, {}, TABLE)
    for step in range(1, 41):
        write_steps(writer, range(step, step + 1))
        writer.commit()
        if step == 3:
            manifest = Manifest.load(parts_of(path))
            assert manifest
            (parts_of(path) / manifest.segments[2].file).write_bytes(b"")
    assert "kept in parts" in writer.close().remark
    run = open_run(path)
    assert run.steps.tolist() == [1, *range(3, 41)]
    assert [damage.steps for damage in run.damaged] == [(2, 2)]
    assert len(list(parts_of(path).glob("*.h5"))) < 30, "the rest is merged all the same"


def test_float16_keeps_small_updates(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "x.h5", {}, TABLE, store="float16")
    write_steps(writer, range(3, 4))
    writer.matrix("update", 0, 4, np.zeros((6, 3)))
    writer.close()
    run = open_run(tmp_path / "x.h5")
    stored, true = run.update("up", 3), matrix_of(3, 0)
    # Half a unit in the last of float16's 11 digits, of the largest entry.
    assert np.abs(stored - true).max() <= np.abs(true).max() * 2.0**-11
    np.testing.assert_array_equal(run.update("up", 4), 0)


def test_steps_without_norms_are_nan_and_voids_are_marked(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "x.h5", {}, TABLE)
    writer.step(1, 0.0, scalars={"loss": 1.0}, norms={"update": norms_of(1)})
    writer.step(2, 0.0, scalars={"val": 2.0}, norms={})
    writer.step(3, 0.0, scalars={}, norms={"update": np.zeros(9)}, void=True)
    writer.commit()
    writer.step(4, 0.0, scalars={}, norms={})
    writer.close()
    run = open_run(tmp_path / "x.h5")
    assert np.isnan(run.neuron_norms("up")).all(axis=1).tolist() == [False, True, False, True]
    assert run.void.tolist() == [False, False, True, False]
    np.testing.assert_array_equal(run.scalars["loss"], [1, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(run.scalars["val"], [np.nan, 2, np.nan, np.nan])


def test_compressed_file_reads_the_same(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "x.h5", {}, TABLE, compress=True)
    write_steps(writer, range(1, 31))
    writer.close()
    expect_steps(tmp_path / "x.h5", list(range(1, 31)))
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["neurons/update"].compression == "gzip"


def test_empty_recording_can_be_opened(tmp_path: Path) -> None:
    Writer(tmp_path / "x.h5", {"optimizer": "SGD"}, TABLE).close()
    run = open_run(tmp_path / "x.h5")
    assert len(run.steps) == 0
    assert "no steps" in repr(run)


# -- never an existing recording by accident -----------------------------------------------------


def test_existing_file_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    path.write_bytes(b"precious")
    with pytest.raises(RunError, match="exists already"):
        Writer(path, {}, TABLE)
    assert path.read_bytes() == b"precious"
    assert not parts_of(path).exists()


def test_two_writers_cannot_share_a_recording(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "x.h5", {}, TABLE)
    write_steps(writer, range(1, 3))
    with pytest.raises(RunError, match=f"being recorded by process {os.getpid()}"):
        Writer(tmp_path / "x.h5", {}, TABLE, resume=True)
    writer.close()
    expect_steps(tmp_path / "x.h5", [1, 2])


def test_remains_of_a_crash_are_refused_and_can_be_resumed(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    write_steps(writer := Writer(path, {}, TABLE), range(1, 4))
    writer.commit()
    _let_the_writer_die(path)
    (parts_of(path) / "segment.h5.tmp").write_bytes(b"half")
    with pytest.raises(RunError, match="remains of an interrupted recording"):
        Writer(path, {}, TABLE)
    assert open_run(path).status == "interrupted"
    write_steps(writer := Writer(path, {}, TABLE, resume=True), range(4, 7))
    writer.close()
    expect_steps(path, list(range(1, 7)))


def test_resuming_other_matrices_is_refused(tmp_path: Path) -> None:
    write_steps(writer := Writer(tmp_path / "x.h5", {}, TABLE), range(1, 4))
    writer.close()
    with pytest.raises(RunError, match="other matrices"):
        Writer(tmp_path / "x.h5", {}, Matrices([Matrix("a", 2, 2)]), resume=True)
    expect_steps(tmp_path / "x.h5", [1, 2, 3])
    assert not parts_of(tmp_path / "x.h5").exists()


def test_recording_that_cannot_begin_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _disk_full)
        with pytest.raises(RunError, match="No space left"):
            Writer(tmp_path / "x.h5", {}, TABLE)
    assert list(tmp_path.iterdir()) == []
    Writer(tmp_path / "x.h5", {}, TABLE).close()


def test_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    write_steps(writer := Writer(path, {}, TABLE), range(1, 4))
    path.write_bytes(b"precious")
    assert "kept in parts" in writer.close().remark
    assert path.read_bytes() == b"precious"


def test_target_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot record there"):
        Writer(tmp_path / "file" / "x.h5", {}, TABLE)


def test_no_room_to_pack_keeps_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.h5"
    write_steps(writer := Writer(path, {}, TABLE), range(1, 31))
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage(free=100))
    closed = writer.close()
    assert "packing needs" in closed.remark
    assert not path.exists()
    expect_steps(path, list(range(1, 31)))
    assert open_run(path).status == "finished"


def test_failed_commit_leaves_what_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.h5"
    write_steps(writer := Writer(path, {}, TABLE), range(1, 11))
    writer.commit()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _disk_full)
        write_steps(writer, range(11, 21))
        with pytest.raises(OSError, match="No space"):
            writer.commit()
    writer.abandon("No space left on device")
    expect_steps(path, list(range(1, 11)))
    assert open_run(path).status == (
        "stopped at step 10: No space left on device; 10 steps after it are lost"
    )
    assert not list(parts_of(path).glob("*.tmp"))


@pytest.mark.parametrize(
    ("committed", "pending", "says"),
    [
        (0, 0, "stopped at step 0: it rained"),
        (3, 0, "stopped at step 3: it rained"),
        (3, 1, "stopped at step 3: it rained; 1 step after it is lost"),
        (3, 5, "stopped at step 3: it rained; 5 steps after it are lost"),
    ],
)
def test_abandoned_recording_says_how_far_it_came(
    committed: int, pending: int, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.h5"
    writer = Writer(path, {}, TABLE)
    write_steps(writer, range(1, 1 + committed))
    writer.commit()
    assert writer.committed == committed
    write_steps(writer, range(1 + committed, 1 + committed + pending))
    assert (writer.committed, writer.last_step) == (committed, committed + pending)
    writer.abandon("it rained")
    run = open_run(path)
    assert run.status == says
    assert run.steps.tolist() == list(range(1, 1 + committed))
    assert not {"lock", "reserve"} & {file.name for file in parts_of(path).iterdir()}


def test_recording_that_somebody_removed_keeps_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    write_steps(writer := Writer(path, {}, TABLE), range(1, 4))
    writer.commit()
    shutil.rmtree(parts_of(path))
    write_steps(writer, range(4, 6))
    with pytest.raises(FileNotFoundError):
        writer.commit()
    writer.abandon("No such file or directory")
    assert writer.committed == 0
    assert list(tmp_path.iterdir()) == []


def test_reserve_takes_its_room_until_the_recording_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    reserve = parts_of(path) / "reserve"
    writer = Writer(path, {}, TABLE)
    assert reserve.stat().st_blocks * 512 >= 64 << 10
    _let_the_writer_die(path)
    writer = Writer(path, {}, TABLE, resume=True)
    assert reserve.stat().st_blocks * 512 >= 64 << 10
    write_steps(writer, range(1, 4))
    writer.close(pack=False)
    assert not reserve.exists()
    expect_steps(path, [1, 2, 3])


@pytest.mark.parametrize("before", ["nothing", "a file", "parts"])
def test_discarded_opening_leaves_everything_as_it_was(before: str, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    if before != "nothing":
        writer = Writer(path, {}, TABLE)
        for step in range(1, 16):  # one more segment, and all of them are merged
            write_steps(writer, range(step, step + 1))
            writer.commit()
        if before == "a file":
            writer.close()
        else:
            writer.abandon("it rained")
    status = open_run(path).status if before != "nothing" else ""
    found = sorted(tmp_path.rglob("*"))
    Writer(path, {}, TABLE, resume=True).discard()
    assert sorted(tmp_path.rglob("*")) == found
    if before != "nothing":
        expect_steps(path, list(range(1, 16)))
        assert open_run(path).status == status
        assert not open_run(path).events
    write_steps(writer := Writer(path, {}, TABLE, resume=True), range(16, 18))
    writer.close()


def test_status_and_events_survive_packing(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    for text in ("first", "größer als π"):
        writer = Writer(path, {}, TABLE, resume=True)
        writer.event(3, "note", text)
        writer.close(f"interrupted: {text}")
    run = open_run(path)
    assert run.status == "interrupted: größer als π"
    assert [event.text for event in run.events] == ["first", "recording resumed", "größer als π"]
    assert not parts_of(path).exists()


# Python 3.12 warns of forks beside threads, which a helper has none of.
forking = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


@forking
def test_packing_in_a_fork_gives_the_same_file(tmp_path: Path) -> None:
    write_steps(writer := Writer(tmp_path / "x.h5", {}, TABLE, apart=True), range(1, 31))
    assert writer.close().remark == ""
    expect_steps(tmp_path / "x.h5", list(range(1, 31)))


@forking
@pytest.mark.parametrize(
    ("accident", "says"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "exit code -9"),
        (lambda: _disk_full(0), "No space left on device"),
    ],
)
def test_crash_of_packing_keeps_the_parts(
    accident: Callable[[], None], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.h5"
    write_steps(writer := Writer(path, {}, TABLE, apart=True), range(1, 31))

    def write_half(run: Run, temporary: Path, *_: object, **__: object) -> None:
        temporary.write_bytes(b"half")
        accident()

    monkeypatch.setattr(pack, "write_packed", write_half)
    remark = writer.close().remark
    assert "kept in parts: the packed file could not be written" in remark
    assert says in remark
    assert not list(tmp_path.rglob("*.tmp"))
    assert not path.exists()
    expect_steps(path, list(range(1, 31)))
    assert open_run(path).status == "finished"


def test_metadata_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="shorten the notes"):
        Writer(tmp_path / "x.h5", {"notes": "x" * 100_000}, TABLE)


# -- the file as others see it -------------------------------------------------------------------


def test_packed_file_is_one_that_generic_viewers_plot(tmp_path: Path) -> None:
    write_steps(writer := Writer(tmp_path / "x.h5", {"optimizer": "SGD"}, TABLE), range(1, 301))
    writer.close()
    with h5py.File(tmp_path / "x.h5") as file:
        assert file.attrs["format"] == b"normuon-lens"
        assert json.loads(file.attrs["run"]) == {"optimizer": "SGD"}
        group = file[file.attrs["default"]]
        assert group.attrs["NX_class"] == b"NXdata"
        signal = group[group.attrs["signal"]]
        axis = group[group.attrs["axes"][0]]
        assert signal.shape == (300, 9)
        assert signal.chunks == (256, 9)
        assert axis.shape == (300,)
        assert signal.dims[0][0] == file["steps/step"]
        assert file["updates/update/000"].chunks == (1, 6, 3)


def _disk_full(_: int) -> None:
    raise OSError(28, "No space left on device")


class _Usage(NamedTuple):
    free: int


def _let_the_writer_die(path: Path) -> None:
    """Make the manifest and lock name a process that is certainly gone."""
    gone = 2**22 + 1  # beyond the largest process id that Linux hands out
    for name, before in (("manifest.json", '"pid": '), ("lock", " ")):
        file = parts_of(path) / name
        file.write_text(file.read_text().replace(f"{before}{os.getpid()}", f"{before}{gone}"))
