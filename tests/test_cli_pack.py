"""``pack`` makes one file where that loses nothing, and says in one line why where it would."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest

from normuon_lens.cli.main import main
from normuon_lens.runfile import Matrices, Matrix, Shard, Writer, made_up_run, open_run
from normuon_lens.runfile.manifest import Manifest
from normuon_lens.runfile.schema import parts_of

# Python 3.12 warns of forks beside threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

TABLE = Matrices([Matrix("up", 4, 3)])


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def expect_refusal(
    capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], *says: str
) -> None:
    code, out, err = run(capsys, "pack", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("normuon-lens: ")
    assert err.count("\n") == 1, "one line"
    for text in says:
        assert text in err


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Leave an interrupted recording of steps 1 to 6, in three segments."""
    writer = Writer(tmp_path / "x.h5", {"optimizer": "SGD"}, TABLE)
    for step in range(1, 7):
        writer.step(step, 1e9, scalars={}, norms={"update": np.full(4, step)})
        if step % 2 == 0:
            writer.commit()
    writer.close("interrupted", pack=False)
    return parts_of(tmp_path / "x.h5")


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """Leave a recording of two ranks, of which the second stopped at step 3 of 5."""
    path = tmp_path / "x.h5"
    for rank in range(2):
        rows = {"update": ((2 * rank, 2 * rank + 2, 1),)}
        shard = Shard(rank, (0, 1), 0 if rank else None, rows)
        writer = Writer(path, {"optimizer": "SGD"}, TABLE, shard=shard)
        for step in range(1, 4 if rank else 6):
            writer.step(step, 1e9, scalars={}, norms={"update": np.full(2, step)})
        if rank:
            writer.commit()
            writer.abandon("No space left on device")
        else:
            writer.close()
    return path


def damage(parts: Path) -> Path:
    manifest = Manifest.load(parts)
    assert manifest
    file = parts / manifest.segments[2].file
    file.write_bytes(b"")
    return file


def test_interrupted_recording_becomes_one_file(
    parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = parts.with_suffix("")
    code, out, err = run(capsys, "pack", parts)
    assert (code, err) == (0, "")
    assert out == f"{path}: 0.0 MB, 6 steps\n"
    assert not parts.exists()
    packed = open_run(path)
    assert packed.status == "interrupted"
    assert packed.neuron_norms("up")[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    expect_refusal(capsys, (path,), "is one file already", "-o OTHER.h5 or --compress")


def test_copy_leaves_the_recording_as_it_is(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.read_bytes() for file in parts.iterdir()}
    copy = tmp_path / "copy.h5"
    assert run(capsys, "pack", parts, "-o", copy)[0] == 0
    assert {file: file.read_bytes() for file in parts.iterdir()} == before
    assert open_run(copy).steps.tolist() == [1, 2, 3, 4, 5, 6]
    expect_refusal(capsys, (parts, "-o", copy), "copy.h5: exists already")
    expect_refusal(capsys, (parts, "-o", tmp_path / "no" / "x.h5"), "no: no such folder")


def test_finished_file_can_be_compressed_in_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up_run(tmp_path / "x.h5", steps=60)
    before = open_run(tmp_path / "x.h5")
    size = (tmp_path / "x.h5").stat().st_size
    norms = before.all_neuron_norms()
    assert run(capsys, "pack", tmp_path / "x.h5", "--compress")[0] == 0
    assert (tmp_path / "x.h5").stat().st_size < size
    np.testing.assert_array_equal(open_run(tmp_path / "x.h5").all_neuron_norms(), norms)
    assert [file.name for file in tmp_path.iterdir()] == ["x.h5"]


def test_what_is_still_recorded_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up_run(tmp_path / "x.h5", steps=3, close=False)
    expect_refusal(capsys, (tmp_path / "x.h5",), "x.h5: still being recorded")
    expect_refusal(capsys, (tmp_path / "none.h5",), "none.h5: no such recording")


def test_damage_is_named_and_only_a_copy_leaves_it_out(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = damage(parts)
    expect_refusal(capsys, (parts,), file.name, "-o OTHER.h5 saves what is whole")
    assert file.exists()
    code, _, err = run(capsys, "pack", parts, "-o", tmp_path / "copy.h5")
    assert code == 0
    assert err.startswith(f"normuon-lens: left out: {file.name}: ")
    copy = open_run(tmp_path / "copy.h5")
    assert copy.steps.tolist() == [1, 2, 5, 6]
    assert [event.kind for event in copy.events] == ["damaged"]
    assert "steps 3–4 left out" in run(capsys, "summary", tmp_path / "copy.h5")[1]


def test_holes_of_a_rank_are_named_by_every_verb(
    ranks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hole = "rank 1: steps 4–5: stopped at step 3: No space left on device"
    expect_refusal(capsys, (ranks,), hole, "-o OTHER.h5 saves what is whole")
    code, out, err = run(capsys, "check", ranks)
    assert code == 2
    assert "0 dropped: HOLES" in out
    assert f"  {hole}\n" in out
    assert hole in err
    assert json.loads(run(capsys, "check", "--json", ranks)[1])[0]["holes"] == [hole]
    assert f"hole: {hole}" in " ".join(run(capsys, "summary", ranks)[1].split())
    code, out, err = run(capsys, "pack", ranks, "-o", tmp_path / "copy.h5")
    assert (code, err) == (0, f"normuon-lens: left out: {hole}\n")
    assert out.endswith("5 steps, 2 ranks\n")
    assert run(capsys, "check", tmp_path / "copy.h5")[0] == 2
    norms = open_run(tmp_path / "copy.h5").neuron_norms("up")
    assert norms[:3].tolist() == [[1] * 4, [2] * 4, [3] * 4]
    assert np.isnan(norms[3:, 2:]).all()


class Usage(NamedTuple):
    free: int


def disk_full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("what", ["too small", "full"])
def test_full_disk_loses_nothing(
    what: str, parts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(parts.iterdir())
    with monkeypatch.context() as patch:
        if what == "full":
            patch.setattr(os, "fsync", disk_full)
            expect_refusal(capsys, (parts,), "x.h5: No space left on device")
        else:
            patch.setattr("shutil.disk_usage", lambda _: Usage(free=100))
            expect_refusal(capsys, (parts,), "packing needs 0 MiB, 0 MiB are free")
    assert sorted(parts.iterdir()) == before
    assert run(capsys, "pack", parts)[0] == 0


def test_check_says_what_is_damaged_what_is_good_and_how_to_save_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.h5"
    made_up_run(path, steps=6, every=3)
    with h5py.File(path) as file:
        offset = file["updates/update/001"].id.get_chunk_info(1).byte_offset
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    (tmp_path / "a.h5").write_bytes(content[:1000])
    code, out, err = run(capsys, "check", tmp_path)
    assert code == 2
    assert err.count("\n") == 1
    assert f"{tmp_path / 'a.h5'}: UNREADABLE\n" in out
    assert "x.h5: damaged in updates/update/001 (full matrix 'blocks.0.mlp.up'), step 3: " in out
    assert "still good: 6 of 6 steps, 6 of 6 row norms, 18 of 18 spectra, 17 of 18 full" in out
    saved = tmp_path / "x-saved.h5"
    assert f"normuon-lens pack {path} -o {saved}\n" in out
    report = json.loads(run(capsys, "check", "--json", path)[1])[0]
    assert report["flaws"][0]["dataset"] == "updates/update/001"
    assert report["good"]["full matrices"] == [17, 18]
    expect_refusal(capsys, (path, "--compress"), "damaged in updates/update/001", "-o OTHER.h5")
    assert run(capsys, "pack", path, "-o", saved)[0] == 0
    assert run(capsys, "check", saved)[0] == 0
    assert "001" in open_run(saved).events[-1].text


def test_check_names_what_is_left_over(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Manifest.load(parts)
    assert manifest
    last = manifest.segments.pop()
    manifest.save(parts)
    (parts / "segment-1.h5.tmp").write_bytes(b"half")
    code, out, _ = run(capsys, "check", parts)
    assert code == 0
    assert f"left over, {last.file}: not in manifest.json, so nothing of it is read\n" in out
    assert "left over, segment-1.h5.tmp: half of a file, never committed; delete it\n" in out
