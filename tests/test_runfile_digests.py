"""Whatever byte of a finished file flips, checking says so, or every number is still the same."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from normuon_lens.errors import RunError
from normuon_lens.runfile import Matrices, Matrix, Run, Writer, made_up_run, open_run
from normuon_lens.runfile.digests import BLOCK_BYTES, Digests
from normuon_lens.runfile.pack import write_packed
from normuon_lens.runfile.schema import LIBVER, parts_of

STEPS, EVERY = 24, 6


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "x.h5"
    made_up_run(path, steps=STEPS, every=EVERY, shapes={"up": (9, 6), "down": (6, 9)})
    return path


def numbers_of(run: Run) -> dict[tuple[Any, ...], Any]:
    """Return everything that can be read, by what it is and of which step."""
    found: dict[tuple[Any, ...], Any] = {("matrices",): tuple(run.table)}
    found["about",] = (run.metadata, run.status, run.dropped)
    for i, step in enumerate(run.steps.tolist()):
        found["step", step] = (run.times[i], run.void[i])
        found["scalars", step] = tuple(run.scalars[name][i] for name in sorted(run.scalars))
        found["norms", step] = run.all_neuron_norms()[i].tobytes()
    spectra = run.all_spectra()
    for i, step in enumerate(spectra.steps.tolist()):
        found["spectra", step] = tuple(part[i].tobytes() for part in spectra[1:])
    for name in run.matrices:
        for step in run.update_steps(name).tolist():
            found["update", name, step] = run.update(name, step).tobytes()
    return found


def is_nan(value: Any) -> bool:
    return bool(
        np.isnan(np.frombuffer(value, np.float32) if isinstance(value, bytes) else value).all()
    )


@pytest.mark.parametrize("compress", [False, True])
def test_flip_of_any_byte_is_found_or_changes_nothing(
    compress: bool, sound: Path, tmp_path: Path
) -> None:
    whole, path = tmp_path / "whole.h5", tmp_path / "x.h5"
    write_packed(open_run(sound), whole, "finished", compress=compress)
    content, expected = whole.read_bytes(), numbers_of(open_run(whole))
    rng = random.Random(0)
    found = saved = 0
    for at in rng.sample(range(len(content)), 60):
        flipped = bytearray(content)
        flipped[at] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            run = open_run(path)
        except RunError:
            continue
        flaws = list(run.flaws())
        if not flaws:
            assert numbers_of(run) == expected, at
            continue
        found += 1
        if not all(flaw.can_go for flaw in flaws):
            continue
        copy = tmp_path / f"{at}.h5"
        write_packed(run, copy, "finished", flaws=flaws)
        rescued = open_run(copy)
        assert not list(rescued.flaws())
        assert len([event for event in rescued.events if event.kind == "damaged"]) == len(flaws)
        kept = numbers_of(rescued)
        assert len(kept) >= len(expected) - 3 * 16, "one block is sixteen steps at most"
        for key, value in kept.items():
            assert value == expected[key] or (key[0] in ("norms", "scalars") and is_nan(value)), key
        saved += 1
    assert min(found, saved) > 5


def flip(path: Path, dataset: str, byte: int = 0) -> None:
    """Flip a bit of a dataset's stored bytes."""
    with h5py.File(path) as file:
        stored = file[dataset].id
        offset = stored.get_offset() if not file[dataset].chunks else stored.get_chunk_info(0)[2]
    content = bytearray(path.read_bytes())
    content[offset + byte] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("dataset", "says", "lost"),
    [
        ("neurons/update", "neurons/update (row norms), steps 1–2:", {("norms", 1), ("norms", 2)}),
        ("spectra/update/sigma", "spectra/update/sigma, step 1:", {("spectra", 1)}),
        ("updates/update/001", "(full matrix 'down'), step 1:", {("update", "down", 1)}),
        ("steps/scalars", "steps/scalars, steps 1–8:", {("scalars", i) for i in range(1, 9)}),
    ],
)
def test_only_what_is_damaged_is_named_and_left_out(
    dataset: str, says: str, lost: set[tuple[Any, ...]], sound: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.h5"
    path.write_bytes(sound.read_bytes())
    flip(path, dataset)
    run = open_run(path)
    (flaw,) = run.flaws()
    assert says in flaw.text
    write_packed(run, tmp_path / "y.h5", "finished", flaws=[flaw])
    expected, kept = numbers_of(open_run(sound)), numbers_of(open_run(tmp_path / "y.h5"))
    assert {key for key in expected if kept.get(key) != expected[key]} == lost


def test_damaged_chunk_costs_its_own_steps(tmp_path: Path) -> None:
    table = Matrices([Matrix("up", 300, 2)])
    writer = Writer(tmp_path / "x.h5", {}, table, compress=True)
    rng = np.random.default_rng(0)
    for step in range(1, 401):
        writer.step(step, 0.0, scalars={}, norms={"update": rng.random(300)})
    writer.close()
    with h5py.File(tmp_path / "x.h5") as file:
        chunk = file["neurons/update"].id.get_chunk_info(0)
        assert chunk.chunk_offset == (0, 0)
    content = bytearray((tmp_path / "x.h5").read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    (tmp_path / "x.h5").write_bytes(content)
    run = open_run(tmp_path / "x.h5")
    flaws = list(run.flaws())
    assert [(flaw.dataset, flaw.steps) for flaw in flaws] == [("neurons/update", (1, 256))]
    write_packed(run, tmp_path / "y.h5", "finished", flaws=flaws)
    norms = open_run(tmp_path / "y.h5").neuron_norms("up")
    assert np.isnan(norms[:256]).all()
    assert np.isfinite(norms[256:]).all()


def test_flip_in_a_segment_is_not_merged_or_packed(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    writer = Writer(path, {}, Matrices([Matrix("up", 4, 3)]))
    for step in range(1, 30):
        writer.step(step, 0.0, scalars={}, norms={"update": np.full(4, step)})
        writer.commit()
        if step == 2:
            newest = sorted(parts_of(path).glob("*.h5"))[-1]
            flip(newest, "neurons/update")
    closed = writer.close()
    assert f"kept in parts: {newest.name}: damaged in neurons/update" in closed.remark
    assert newest.exists()
    (flaw,) = open_run(path).flaws()
    assert (flaw.path.name, flaw.steps) == (newest.name, (2, 2))


def test_file_without_checksums_is_read_as_ever(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    path.write_bytes(sound.read_bytes())
    with h5py.File(path, "r+", libver=LIBVER) as file:
        del file["digests"]
    run = open_run(path)
    assert not run.has_checksums
    assert not list(run.flaws())


def corrupt(column: str, change: Callable[[np.ndarray], Any]) -> Callable[[h5py.File], None]:
    def of(file: h5py.File) -> None:
        values = change(file[f"digests/{column}"][()])
        del file[f"digests/{column}"]
        file[f"digests/{column}"] = values
        crc = 0
        for name in ("path", "rows", "crc32"):
            crc = zlib.crc32(file[f"digests/{name}"][()].tobytes(), crc)
        file["digests"].attrs["crc32"] = crc

    return of


@pytest.mark.parametrize(
    "change",
    [
        corrupt("rows", np.zeros_like),
        corrupt("rows", lambda rows: rows - 2**62),
        corrupt("rows", lambda rows: rows + 2**62),
        corrupt("rows", lambda rows: rows[:-1]),
        corrupt("rows", lambda rows: rows.astype(float) * np.nan),
        corrupt("crc32", lambda sums: sums[:-1]),
        corrupt("crc32", lambda sums: np.concatenate([sums, sums])),
        corrupt("path", lambda paths: np.full(len(paths), b"neurons/update")),
        corrupt("path", lambda paths: np.full(len(paths), b"../x")),
        corrupt("path", lambda paths: np.arange(len(paths))),
        lambda file: file.__delitem__("digests/rows"),
        lambda file: file["digests"].attrs.__delitem__("crc32"),
        lambda file: file["digests"].attrs.create("crc32", np.nan),
        lambda file: (file.__delitem__("digests"), file.__setitem__("digests", 3)),
    ],
)
def test_checksums_that_lie_are_damage(
    change: Callable[[h5py.File], None], sound: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.h5"
    path.write_bytes(sound.read_bytes())
    with h5py.File(path, "r+", libver=LIBVER) as file:
        change(file)
    (flaw,) = open_run(path).flaws()
    assert "damaged in its checksums: " in flaw.text
    assert not flaw.can_go


@pytest.mark.parametrize("pieces", [[10], [1] * 10, [3, 0, 7], [9, 1]])
@pytest.mark.parametrize("columns", [1, 5, 40])
def test_checksums_do_not_depend_on_the_pieces(
    pieces: list[int], columns: int, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).random((10, columns)).astype(np.float32)
    digests = Digests()
    start = 0
    for count in pieces:
        digests.add("x", values[start : start + count])
        start += count
    with h5py.File(tmp_path / "x.h5", "w") as file:
        digests.write(file, {})
        rows, sums = file["digests/rows"][0], file["digests/crc32"][()].tolist()
    assert rows == max(1, BLOCK_BYTES // (4 * columns))
    assert sums == [zlib.crc32(values[i : i + rows].tobytes()) for i in range(0, 10, rows)]
