"""Run files without our code: what docs/format.md says, and what other programs make of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray

from normuon_lens.analysis import measure
from normuon_lens.runfile import STAGES, Matrices, Matrix, Run, Writer, open_run
from normuon_lens.runfile.schema import Shard

PAGE = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
EXAMPLES = re.findall(r"^```py\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
ROW = r"^\| `(/[^`]+)` \| \(([^)|]*)\),? ([^|]*) \|"
"""A dataset of the page: its path, its shape, its type."""

TABLE = Matrices([Matrix("blocks.0.attn.q", 6, 6), Matrix("blocks.1.mlp.up", 8, 3, "bfloat16")])


def write(path: Path, shard: Shard | None = None) -> Writer:
    """Write a run that has everything: all stages, float16 matrices, scalars, an event."""
    writer = Writer(path, {"optimizer": "NorMuon"}, TABLE, store="float16", shard=shard)
    rng = np.random.default_rng(0)
    for step in range(1, 31):
        norms = rng.lognormal(-7, 0.5, (len(STAGES), TABLE.total_rows))
        scalars = {"loss": 4 / step, "lr": 0.01}
        writer.step(step, 1e9 + step, scalars=scalars, norms=dict(zip(STAGES, norms, strict=True)))
        if step == 1 or step % 10 == 0:
            for stage in STAGES:
                updates = [rng.standard_normal((x.m, x.n)) * 1e-3 for x in TABLE]
                sigma = np.concatenate([np.linalg.svd(x, compute_uv=False) for x in updates])
                floor = np.array([1e-12, 1.5e-3])
                writer.spectra(stage, step, sigma, floor, weight_norm=np.ones(2), decay=floor)
                for i, update in enumerate(updates):
                    writer.matrix(stage, i, step, update)
    writer.event(30, "dropped", "1 sample")
    return writer


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("open") / "runs" / "x.h5"
    write(path).close()
    return path


@pytest.fixture
def run(packed: Path, tmp_path: Path) -> Run:
    """Open a copy: within one process HDF5 opens a file with one way of locking only."""
    return open_run(shutil.copy(packed, tmp_path / "copy.h5"))


# -- the page ------------------------------------------------------------------------------------


def named(path: str) -> str:
    """Return the name by which the page calls a dataset."""
    general = re.sub(r"/\d{3}(?=_|$)", "/NNN", f"/{path}")
    return re.sub(rf"/({'|'.join(STAGES)})(?=/|$)", "/<stage>", general)


def check_page(file: h5py.File) -> None:
    """Hold the page against all datasets, attributes and shapes of a file."""
    rows = {name: said for name, *said in re.findall(ROW, PAGE, re.MULTILINE)}

    def visit(path: str, item: h5py.HLObject) -> None:
        for name in item.attrs:
            assert f"`{name}`" in PAGE, f"{path} has an attribute {name}"
        if isinstance(item, h5py.Dataset):
            shape, kinds = rows[named(path)]
            assert len(re.findall("[^, ]+", shape)) == item.ndim, f"{path} has shape {item.shape}"
            kind = "text" if item.dtype.kind == "S" else item.dtype.name
            assert kind in kinds.split(" or "), f"{path} is {kind}"

    visit("/", file["/"])
    file.visititems(visit)


def test_the_page_names_all_that_a_packed_file_holds(packed: Path) -> None:
    with h5py.File(packed) as file:
        check_page(file)


def test_the_page_names_all_that_segments_of_ranks_hold(tmp_path: Path) -> None:
    whole = tuple((0, matrix.m, 1) for matrix in TABLE)
    writer = write(tmp_path / "x.h5", Shard(0, (0,), None, dict.fromkeys(STAGES, whole)))
    writer.commit()
    (segment,) = [x for x in tmp_path.rglob("segment-*.h5") if x.stat().st_size > 20_000]
    with h5py.File(segment) as file:
        assert {"shard", "samples"} <= set(file)
        check_page(file)


def test_the_first_example_reads_what_we_read(
    packed: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(packed.parents[1])
    assert "normuon" not in EXAMPLES[0]
    found: dict[str, np.ndarray] = {}
    exec(EXAMPLES[0], found)
    np.testing.assert_array_equal(found["sampled"], [1, 10, 20, 30])
    np.testing.assert_array_equal(found["norms"], run.neuron_norms("blocks.1.mlp.up"))
    for name in ("condition_number", "condition_is_lower_bound"):
        ours = measure(run, name).values[:, run.matrices.index("blocks.1.mlp.up")]
        theirs = found["condition" if name == "condition_number" else "at_least"]
        np.testing.assert_array_equal(theirs, ours)
    assert set(found["at_least"]) == {False, True}
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_the_example_of_parts_reads_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "runs" / "x.h5").commit()
    monkeypatch.chdir(tmp_path)
    found: dict[str, dict[int, float]] = {}
    exec(EXAMPLES[1], found)
    assert found["losses"] == {step: 4 / step for step in range(1, 31)}


@pytest.mark.parametrize("name", ["blocks.0.attn.q", "blocks.1.mlp.up"])
def test_float16_times_its_scale_is_the_matrix(packed: Path, run: Run, name: str) -> None:
    i = run.matrices.index(name)
    with h5py.File(packed) as file:
        group = file["updates/momentum"]
        stored, scale = group[f"{i:03d}"][()], group[f"{i:03d}_scale"][()]
        assert stored.dtype == np.float16
        np.testing.assert_array_equal(np.abs(stored).max(axis=(1, 2)), 1)
        for row, step in enumerate(group[f"{i:03d}_step"]):
            matrix = stored[row].astype(np.float32) * scale[row]
            np.testing.assert_array_equal(matrix, run.update(name, int(step), "momentum"))


# -- other programs ------------------------------------------------------------------------------


def test_viewers_that_know_nexus_find_what_to_plot(packed: Path) -> None:
    with h5py.File(packed) as file:
        for start in ("/", "/spectra", "/steps", *(f"/spectra/{stage}" for stage in STAGES)):
            group = file[start]
            while "default" in group.attrs:
                group = group[group.attrs["default"].decode()]
            assert group.attrs["NX_class"] == b"NXdata"
            signal = group[group.attrs["signal"].decode()]
            axes = [name.decode() for name in group.attrs["axes"]]
            assert len(axes) == signal.ndim
            for length, name in zip(signal.shape, axes, strict=True):
                if name != ".":
                    assert group[name].shape == (length,)
                    assert (np.diff(group[name]) > 0).all()
                    assert group[name].attrs["long_name"]
            assert signal.attrs["long_name"]
        assert file.attrs["NX_class"] == b"NXroot"
        assert file[file.attrs["default"]].name == "/neurons"


@pytest.mark.parametrize("group", ["neurons", "spectra/update", "spectra/gradient"])
def test_xarray_needs_no_hint(packed: Path, run: Run, group: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = xarray.open_dataset(packed, engine="h5netcdf", group=group)
    with data:
        if group == "neurons":
            assert dict(data.sizes) == {"step": 30, "neuron": 14}
            np.testing.assert_array_equal(data["update"], run.all_neuron_norms())
            np.testing.assert_array_equal(data["update"].sel(step=7), run.all_neuron_norms()[6])
            return
        spectra = run.all_spectra(group.partition("/")[2])
        assert dict(data.sizes) == {"step": 4, "value": 9, "name": 2}
        np.testing.assert_array_equal(data["step"], spectra.steps)
        np.testing.assert_array_equal(data["sigma"], spectra.sigma)
        np.testing.assert_array_equal(data["floor"].sel(name=b"blocks.1.mlp.up"), 1.5e-3)


def test_the_example_of_xarray_runs(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(packed.parents[1])
    found: dict[str, xarray.Dataset] = {}
    exec(EXAMPLES[2], found)
    found["norms"].close()
    found["spectra"].close()


def test_xarray_knows_the_time_and_the_names_of_scalars(packed: Path) -> None:
    with xarray.open_dataset(packed, engine="h5netcdf", group="steps") as data:
        assert data["time"].values[0] == np.datetime64("2001-09-09T01:46:41")
        np.testing.assert_array_equal(
            data["scalars"].sel(scalar_names=b"loss"), 4 / np.arange(1, 31)
        )


@pytest.mark.skipif(not shutil.which("h5dump"), reason="no h5dump: apt install hdf5-tools")
def test_h5dump_shows_it(packed: Path, run: Run, tmp_path: Path) -> None:
    """A program of HDF5 1.10 and later opens it, and finds the numbers that are in it."""
    shown = subprocess.run(["h5dump", "-H", packed], check=True, capture_output=True, text=True)
    for name in ("neurons", "spectra", "orthogonalized", "scalar_names", "DIMENSION_LIST"):
        assert name in shown.stdout
    assert not shown.stderr
    raw = tmp_path / "norms"
    command = ["h5dump", "-d", "/neurons/update", "-b", "LE", "-o", str(raw), str(packed)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    norms = np.fromfile(raw, "<f4").reshape(30, 14)
    np.testing.assert_array_equal(norms, run.all_neuron_norms())
