"""Whatever a file holds, opening it gives a run or one line that says why not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from normuon_lens.errors import RunError
from normuon_lens.runfile import Matrices, Matrix, Run, Writer, guard, open_run
from normuon_lens.runfile.guard import MAX_EXPANSION, SMALL
from normuon_lens.runfile.schema import LIBVER

SECRET = b"nobody's business"
TABLE = Matrices([Matrix("a", 4, 3), Matrix("b", 3, 4)])

Change = Callable[[h5py.File, Path], None]


def write_run(path: Path, *, compress: bool = False, table: Matrices = TABLE) -> Path:
    """Record four steps of `table`, spectra and matrices on every second."""
    writer = Writer(path, {"optimizer": "SGD"}, table, compress=compress)
    for step in range(1, 5):
        norms = np.full(table.total_rows, step, np.float32)
        writer.step(step, 1e9 + step, scalars={"loss": 1 / step}, norms={"update": norms})
        if step % 2 == 0:
            writer.spectra("update", step, np.ones(table.total_sigmas), np.zeros(len(table)))
            for i, matrix in enumerate(table):
                writer.matrix("update", i, step, np.full((matrix.m, matrix.n), step))
    writer.event(4, "note", "four steps")
    writer.close()
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the bytes of a small sound run."""
    return write_run(tmp_path_factory.mktemp("sound") / "x.h5").read_bytes()


@pytest.fixture
def changed(sound: bytes, tmp_path: Path) -> Callable[[Change], Path]:
    """Return what makes a sound run's file after some change."""

    def make(change: Change) -> Path:
        path = tmp_path / "x.h5"
        path.write_bytes(sound)
        with h5py.File(path, "r+", libver=LIBVER) as file:
            change(file, tmp_path)
        return path

    return make


def read_all(run: Run) -> int:
    """Read everything that a run can be asked for; return how many values that was."""
    values = len(repr(run)) + len(run._repr_html_()) + len(run.events)
    for stage in run.stages:
        values += run.all_neuron_norms(stage).size
        values += sum(part.size for part in run.all_spectra(stage))
        for name in run.matrices:
            steps = run.update_steps(name, stage)
            values += sum(run.update(name, int(step), stage).size for step in steps)
    return values


def refusal(path: Path) -> str:
    """Return the one line with which `path` is refused."""
    with pytest.raises(RunError) as caught:
        open_run(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


def replace(file: h5py.File, path: str, **dataset: Any) -> None:
    """Put another dataset in the place of the one at `path`."""
    del file[path]
    file.create_dataset(path, **dataset)


def test_sound_run_is_read(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    path.write_bytes(sound)
    run = open_run(path)
    assert run.steps.tolist() == [1, 2, 3, 4]
    assert read_all(run) > 4 * 7 + 2 * 6 + 2 * 2 * 12


# -- what would make HDF5 read other files -------------------------------------------------------


def external_link(file: h5py.File, folder: Path) -> None:
    with h5py.File(folder / "other.h5", "w") as other:
        other["secret"] = np.ones((4, 7), np.float32)
    del file["neurons/update"]
    file["neurons/update"] = h5py.ExternalLink(str(folder / "other.h5"), "secret")


def soft_link(file: h5py.File, folder: Path) -> None:
    file["neurons/gradient"] = h5py.SoftLink("/neurons/update")


def dangling_link(file: h5py.File, folder: Path) -> None:
    file["anything"] = h5py.SoftLink("/nowhere")


def external_storage(file: h5py.File, folder: Path) -> None:
    (folder / "secret").write_bytes(SECRET * 20)
    where = [(str(folder / "secret"), 0, 4 * 7 * 4)]
    replace(file, "neurons/update", shape=(4, 7), dtype="f4", external=where)


def virtual_dataset(file: h5py.File, folder: Path) -> None:
    with h5py.File(folder / "other.h5", "w") as other:
        other["secret"] = np.ones((4, 7), np.float32)
    layout = h5py.VirtualLayout((4, 7), "f4")
    layout[:] = h5py.VirtualSource(folder / "other.h5", "secret", (4, 7))
    del file["neurons/update"]
    file.create_virtual_dataset("neurons/update", layout)


# -- what no run file has ------------------------------------------------------------------------


def variable_length_strings(file: h5py.File, folder: Path) -> None:
    replace(file, "matrices/name", data=["a", "b"], dtype=h5py.string_dtype())


def variable_length_attribute(file: h5py.File, folder: Path) -> None:
    file["steps"].attrs["note"] = "text of any length"


def compound_type(file: h5py.File, folder: Path) -> None:
    file["more"] = np.zeros(3, dtype=[("x", "i4"), ("y", "f4")])


def references(file: h5py.File, folder: Path) -> None:
    file.create_dataset("more", data=file["steps"].ref, dtype=h5py.ref_dtype)


def named_type(file: h5py.File, folder: Path) -> None:
    file["more"] = np.dtype("f8")


def unknown_filter(file: h5py.File, folder: Path) -> None:
    file.create_dataset("more", data=np.zeros(100), compression="lzf")


def no_shape(file: h5py.File, folder: Path) -> None:
    file.create_dataset("more", data=h5py.Empty("f4"))


def huge_chunk(file: h5py.File, folder: Path) -> None:
    file.create_dataset("more", (1 << 28,), "f4", chunks=(1 << 27,), compression="gzip")


def ten_terabytes(file: h5py.File, folder: Path) -> None:
    replace(file, "neurons/update", shape=(10**12 // 4, 10), dtype="f4", chunks=(1000, 10))


def overflowing_shape(file: h5py.File, folder: Path) -> None:
    # Multiplied in 64 bits this is 0.
    file.create_dataset("more", (1 << 33, 1 << 31), "f4", chunks=(1, 1024))


def many_sparse_datasets(file: h5py.File, folder: Path) -> None:
    for i in range(12):
        file.create_dataset(f"more{i}", (SMALL // 8,), "f8", chunks=(1024,))


def many_attributes(file: h5py.File, folder: Path) -> None:
    for i in range(100):
        file["steps"].attrs[f"a{i}"] = i


def large_attribute(file: h5py.File, folder: Path) -> None:
    file.attrs["more"] = np.zeros(1 << 18)


def crossed_bounds(file: h5py.File, folder: Path) -> None:
    group = file.create_group("more")
    for i in range(200):
        group[str(i)] = file["steps/step"]


REFUSED: dict[Change, str] = {
    external_link: "'update' is not a hard link",
    soft_link: "'gradient' is not a hard link",
    dangling_link: "'anything' is not a hard link",
    external_storage: "'update' is stored in another file",
    virtual_dataset: "'update' is a virtual dataset",
    variable_length_strings: "'name' is of a type that is neither numbers nor texts",
    variable_length_attribute: "'steps' has an attribute 'note' of an unknown type",
    compound_type: "'more' is of a type",
    references: "'more' is of a type",
    named_type: "'more' is neither a group nor a dataset",
    unknown_filter: "'more' needs the unknown filters",
    no_shape: "'more' has no shape",
    huge_chunk: "'more' has chunks of 512 MiB",
    ten_terabytes: "'update' declares 10000000000000 bytes and stores 0",
    overflowing_shape: "'more' declares",
    many_sparse_datasets: "'/' declares",
    many_attributes: "'steps' has more than 64 attributes",
    large_attribute: "'/' has an attribute 'more' of more than 1 MiB",
    crossed_bounds: "'/' has more than 150 objects",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_no_run_file_has_is_refused(
    change: Change, changed: Callable[[Change], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MAX_LINKS", 150)
    text = refusal(changed(change))
    assert text.startswith("refused, ")
    assert REFUSED[change] in text


def test_cycle_of_hard_links_ends(changed: Callable[[Change], Path]) -> None:
    def cycle(file: h5py.File, folder: Path) -> None:
        file["steps/up"] = file["/"]
        file["steps/self"] = file["steps"]
        file["matrices/steps"] = file["steps"]

    assert open_run(changed(cycle)).steps.tolist() == [1, 2, 3, 4]


def test_what_is_sparse_for_a_reason_is_read(tmp_path: Path) -> None:
    table = Matrices([Matrix("a", 2000, 1000)])
    writer = Writer(tmp_path / "x.h5", {}, table, compress=True)
    for step in range(1, 5):
        writer.step(step, 0.0, scalars={}, norms={"update": np.zeros(2000)}, void=True)
        writer.matrix("update", 0, step, np.zeros((2000, 1000)))
    writer.close()
    assert (tmp_path / "x.h5").stat().st_size < 4 * 8e6 / (MAX_EXPANSION / 2)
    assert not open_run(tmp_path / "x.h5").update("a", 4).any()


# -- what contradicts itself ---------------------------------------------------------------------

REQUIRED = (
    *(f"matrices/{name}" for name in ("name", "m", "n", "row_offset", "dtype", "group")),
    *(f"steps/{name}" for name in ("step", "time", "void", "scalars", "scalar_names")),
    *(f"spectra/update/{name}" for name in ("step", "sigma", "floor", "weight_norm", "decay")),
    *(f"updates/update/{name}" for name in ("000", "000_step", "001", "001_step")),
    *(f"events/{name}" for name in ("step", "kind", "text")),
)


@pytest.mark.parametrize("path", REQUIRED)
@pytest.mark.parametrize("instead", ["nothing", "group", "scalar", "longer", "words"])
def test_each_dataset_must_be_there_and_fit(
    path: str, instead: str, changed: Callable[[Change], Path]
) -> None:
    def change(file: h5py.File, folder: Path) -> None:
        values = file[path][()]
        del file[path]
        if instead == "group":
            file.create_group(path)
        elif instead == "scalar":
            file[path] = values.flat[0]
        elif instead == "longer":
            file[path] = np.concatenate([values, values])
        elif instead == "words":
            file[path] = np.full(values.shape, b"12") if values.dtype.kind != "S" else [1] * 2

    assert refusal(changed(change)).startswith("damaged (")


@pytest.mark.parametrize(
    "path", ["steps", "matrices", "spectra/update", "updates/update", "events"]
)
def test_dataset_in_the_place_of_a_group_is_refused(
    path: str, changed: Callable[[Change], Path]
) -> None:
    assert refusal(changed(lambda file, _: replace(file, path, data=np.arange(3)))).startswith(
        "damaged ("
    )


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("matrices/m", [-4, 3]),
        ("matrices/m", [0, 3]),
        ("matrices/n", [3, -(2**63)]),
        ("matrices/n", [3, 2**62]),
        ("matrices/m", [2**62, 2**62]),
        ("matrices/m", [np.nan, 3.0]),
        ("matrices/m", [5, 3]),
        ("matrices/n", [2, 4]),
        ("matrices/row_offset", [0, 2]),
        ("matrices/row_offset", [-4, 0]),
        ("matrices/name", np.array([b"a", b"a"])),
        ("matrices/name", np.array([[b"a"], [b"b"]])),
        ("steps/step", np.full(4, np.nan)),
        ("steps/scalar_names", np.array([b"loss", b"lr"])),
        ("neurons/update", np.zeros((4, 8), np.float32)),
        ("neurons/update", np.zeros((5, 7), np.float32)),
        ("neurons/update", np.full((4, 7), b"1.5")),
        ("spectra/update/sigma", np.zeros((2, 7))),
        ("spectra/update/sigma", np.zeros(2)),
        ("updates/update/001", np.zeros((2, 4, 3), np.float32)),
        ("updates/update/000_step", [2, 4, 6]),
    ],
)
def test_shapes_that_lie_are_refused(
    path: str, values: Any, changed: Callable[[Change], Path]
) -> None:
    text = refusal(changed(lambda file, _: replace(file, path, data=values)))
    assert text.startswith(("damaged (", "two matrices of one run"))


def test_matrix_beyond_the_table_is_refused(changed: Callable[[Change], Path]) -> None:
    def change(file: h5py.File, folder: Path) -> None:
        file["updates/update/999"] = file["updates/update/000"]
        file["updates/update/999_step"] = file["updates/update/000_step"]

    assert "999 is of no matrix" in refusal(changed(change))


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b"[" * 60_000, b"1" * 60_000],
    ids=lambda text: repr(text[:6]),
)
def test_metadata_that_is_no_table_is_refused(
    text: bytes, changed: Callable[[Change], Path]
) -> None:
    def change(file: h5py.File, folder: Path) -> None:
        file.attrs["run"] = np.bytes_(text)

    assert refusal(changed(change)).startswith("damaged (")


@pytest.mark.parametrize("schema", [2, 1 << 40])
def test_newer_schema_says_how_to_read_it(schema: int, changed: Callable[[Change], Path]) -> None:
    text = refusal(changed(lambda file, _: file.attrs.create("schema", schema)))
    assert f"schema {schema}" in text
    assert "pip install -U normuon-lens" in text


@pytest.mark.parametrize("schema", [b"one", np.inf, np.nan, np.ones(3), h5py.Empty("i8")])
def test_schema_that_is_no_number_is_refused(
    schema: Any, changed: Callable[[Change], Path]
) -> None:
    assert refusal(changed(lambda file, _: file.attrs.create("schema", schema))).startswith("damag")


# -- what is no run at all -----------------------------------------------------------------------


@pytest.mark.parametrize("libver", ["earliest", LIBVER])
def test_foreign_hdf5_is_refused(libver: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w", libver=libver) as file:
        file["steps/step"] = np.arange(3)
    assert "not one that normuon-lens wrote" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"loss,step\n1,2\n", b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n\x03", b"\0" * 9999],
)
def test_other_content_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_bytes(content)
    assert "not a readable HDF5 file" in refusal(tmp_path / "x.h5")


def test_truncated_file_is_refused(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    rng = random.Random(0)
    for length in sorted(rng.sample(range(1, len(sound)), 20)):
        path.write_bytes(sound[:length])
        assert "truncated" in refusal(path) or length < 100


def test_folder_and_pipe_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.h5").mkdir()
    assert refusal(tmp_path / "x.h5") == "not a file"
    os.mkfifo(tmp_path / "y.h5")
    assert refusal(tmp_path / "y.h5") == "not a file"
    assert refusal(tmp_path / "z.h5") == "no such recording"
    assert refusal(tmp_path / ("z" * 300)) == "File name too long"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission_is_refused(sound: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_bytes(sound)
    (tmp_path / "x.h5").chmod(0)
    assert refusal(tmp_path / "x.h5") == "no permission to read it"


def test_names_are_data(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "two\nlines", "é\x1b[31m" + "x" * 10_000, "../../etc", ""]
    table = Matrices([Matrix(name, 3, 2) for name in names])
    run = open_run(write_run(tmp_path / "x.h5", table=table))
    assert run.matrices == [names[0], "two?lines", "é?[31m" + "x" * 10_000, "../../etc", ""]
    page = run._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    for name in run.matrices:
        assert run.update(name, 4).shape == (3, 2)
    with pytest.raises(RunError) as caught:
        run.update("two lines", 4)
    assert "\n" not in str(caught.value)


# -- chance damage -------------------------------------------------------------------------------


def test_any_flipped_bytes_give_a_run_or_one_error(sound: bytes, tmp_path: Path) -> None:
    (tmp_path / "packed.h5").write_bytes(sound)
    write_run(tmp_path / "compressed.h5", compress=True)
    assert flips(tmp_path / "packed.h5", range(150)) > 20
    assert flips(tmp_path / "compressed.h5", range(150, 300)) > 10


def flips(path: Path, seeds: range) -> int:
    """Flip bytes in another process, for HDF5 might crash; return how many were still read."""
    command = [sys.executable, __file__, str(path), json.dumps([*seeds])]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stdout[-200:]}\n{result.stderr[-2000:]}"
    assert "second line: " not in result.stdout
    return int(result.stdout.split()[-1])


def flip_all(path: Path, seeds: list[int]) -> None:
    content = path.read_bytes()
    survived = 0
    for seed in seeds:
        print("seed", seed, flush=True)
        rng = random.Random(seed)
        flipped = bytearray(content)
        for _ in range(rng.choice([1, 1, 4, 16])):
            flipped[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        path.with_suffix(".flipped").write_bytes(flipped)
        signal.alarm(30)  # its default action ends even a loop inside HDF5
        try:
            read_all(open_run(path.with_suffix(".flipped")))
            survived += 1
        except RunError as error:
            print(*str(error).splitlines(), sep="\nsecond line: ")
        signal.alarm(0)
    print(survived)


if __name__ == "__main__":
    flip_all(Path(sys.argv[1]), json.loads(sys.argv[2]))
