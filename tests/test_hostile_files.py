"""Through every door a stranger's file gives a result or one error: soon, in little memory.

All of it happens in one forked process, for HDF5 might crash it, and its memory is limited.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import normuon_lens as nl
from normuon_lens.cli.main import main
from normuon_lens.dashboard.store import Store
from normuon_lens.errors import LensError
from normuon_lens.runfile import Matrices, Matrix, Shard, Writer, made_up_run, open_run
from normuon_lens.runfile.manifest import NAME, Manifest
from normuon_lens.runfile.schema import LIBVER, parts_of

# Python 3.12 warns of forks beside threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

SECONDS, BYTES = 1.0, 200 << 20
"""What one door may take, in CPU time and in memory, for a file of at most a megabyte or two."""
SHAPES = {"up": (8, 4), "down": (4, 8)}
STEPS = 12


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "sound.h5"
    made_up_run(path, steps=STEPS, every=4, shapes=SHAPES)
    return path


# -- doors ---------------------------------------------------------------------------------------


def read_all(path: Path, sound: Path) -> None:
    run = open_run(path)
    assert "\n" not in repr(run)
    run._repr_html_()
    run.refresh()
    json.dumps([run.name, run.optimizer, run.status, run.dropped, run.events, run.holes])
    for stage in run.stages:
        run.all_neuron_norms(stage)
        run.all_spectra(stage)
        for matrix in run.matrices:
            for step in run.update_steps(matrix, stage).tolist():
                run.update(matrix, step, stage)


def verb(*arguments: object) -> None:
    """Run a verb; it must end with 0, or with 2 and one line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    said = err.getvalue().removesuffix("\n").splitlines()
    assert code in (0, 2), code
    assert code == 0 or said[-1].startswith("normuon-lens: "), said


def pack_copy(path: Path, sound: Path) -> None:
    copy = path.with_name("copy.h5")
    copy.unlink(missing_ok=True)
    verb("pack", path, "-o", copy)
    if copy.exists():
        assert not list(open_run(copy).flaws()), "what was saved is whole"


DOORS: dict[str, Callable[[Path, Path], Any]] = {
    "open": read_all,
    "table": lambda path, sound: nl.table([path]),
    "compare": lambda path, sound: verb("compare", sound, path),
    "check": lambda path, sound: verb("check", path),
    "summary": lambda path, sound: verb("summary", path),
    "pack": pack_copy,
    "dashboard": lambda path, sound: Store([path, sound]).refresh(),
}


# -- a process that may crash --------------------------------------------------------------------


def in_a_fork(work: Callable[[Callable[[str], None]], None]) -> None:
    """Do `work` in a forked process; what it says last is told if it fails or crashes."""
    of, to = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(of)
            limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (limit + (2 << 30), limit + (2 << 30)))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            work(lambda text: (os.write(to, f"{text}\n".encode()), None)[1])
            code = 0
        except BaseException:
            os.write(to, traceback.format_exc().encode(errors="replace"))
        finally:
            os._exit(code)
    os.close(to)
    with open(of, errors="replace") as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"exit code {code}:\n{said[-3000:]}"


def go_through(path: Path, sound: Path, say: Callable[[str], None]) -> None:
    """Try every door; AssertionError for one that takes too long, too much, or raises wrongly."""
    try:
        open_run(path)
        doors = list(DOORS)
    except LensError:
        doors = ["open", "check"]  # the others refuse it as these do
    for name in doors:
        say(f"{path.name}: {name}")
        signal.alarm(60)  # its default action ends even a loop inside HDF5
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
        before, began = memory("VmRSS"), time.process_time()
        with contextlib.suppress(LensError):
            DOORS[name](path, sound)
        took, more = time.process_time() - began, memory("VmHWM") - before
        assert took < SECONDS, f"{name}: {took:.2f} s"
        assert more < BYTES, f"{name}: {more >> 20} MiB"
    signal.alarm(0)


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10


# -- files ---------------------------------------------------------------------------------------

Change = Callable[[h5py.File], Any]


def replace(path: str, values: Any = None, **options: Any) -> Change:
    def change(file: h5py.File) -> None:
        if path in file:
            del file[path]
        file.create_dataset(path, data=values, **options)

    return change


def about(content: Any) -> Change:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda file: file.attrs.create("run", np.bytes_(text))


def deep_groups(file: h5py.File) -> None:
    group = file
    for _ in range(3000):
        group = group.create_group("d")


def crossed_groups(file: h5py.File) -> None:
    groups = [file.create_group(f"more/{i}") for i in range(20)]
    for group in groups:
        for i, other in enumerate(groups):
            group[str(i)] = other


def many_events(file: h5py.File) -> None:
    for name, value in (("step", 1), ("kind", b"note"), ("text", b"x")):
        values = np.full(3_000_000, value)
        replace(f"events/{name}", values, compression="gzip", chunks=(1_000_000,))(file)


def many_scalars(file: h5py.File) -> None:
    count = 200_000
    replace("steps/scalar_names", np.array([b"%06d" % i for i in range(count)]))(file)
    replace("steps/scalars", np.zeros((STEPS, count)), compression="gzip")(file)


def unallocated(path: str, *shape: int) -> Change:
    def change(file: h5py.File) -> None:
        if path in file:
            del file[path]
        space = h5py.h5s.create_simple(shape)
        h5py.h5d.create(file.id, path.encode(), h5py.h5t.NATIVE_INT64, space)

    return change


def many_attributes(file: h5py.File) -> None:
    for i in range(1000):
        file["steps"].attrs.create(f"a{i}", i)


KINDS = ("model", "schedule", "versions", "notes", "job", "host", "seed", "world_size")

CHANGES: dict[str, Change] = {
    "deep groups": deep_groups,
    "crossed groups": crossed_groups,
    "many attributes": many_attributes,
    "text of any length": lambda file: file.attrs.create("x", "text"),
    "enumeration": lambda file: file.attrs.create("x", 1, dtype=h5py.enum_dtype({"a": 1})),
    "opaque": lambda file: file.attrs.create("x", np.void(b"abc")),
    "reference": lambda file: file.attrs.create("x", file["steps"].ref),
    "bool": replace("more", np.ones(3, bool)),
    "complex": replace("neurons/update", np.zeros((STEPS, 12), complex)),
    "shape of 2^60": unallocated("more", 1 << 60),
    "shape that overflows": unallocated("more", 1 << 31, 1 << 31, 1 << 2),
    "steps without storage": unallocated("steps/step", 1 << 40),
    "scale-offset": replace("steps/step", np.arange(1, 1 + STEPS), scaleoffset=0, chunks=(12,)),
    "fill value": replace("steps/step", shape=(STEPS,), dtype="i8", chunks=(12,), fillvalue=7),
    "big-endian": replace("steps/step", np.arange(1, 1 + STEPS, dtype=">i8")),
    "one byte": replace("steps/step", np.arange(1, 1 + STEPS, dtype="u1")),
    "float steps": replace("steps/step", np.arange(1.0, 1 + STEPS)),
    "negative steps": replace("steps/step", np.arange(-STEPS, 0)),
    "descending steps": replace("steps/step", np.arange(STEPS, 0, -1)),
    "one step": replace("steps/step", np.ones(STEPS, int)),
    "late steps": replace("steps/step", np.arange(STEPS) + 2**52),
    "impossible steps": replace("steps/step", np.arange(STEPS) + 2**62),
    "steps beyond int64": replace("steps/step", np.full(STEPS, 2**64 - 1, np.uint64)),
    "impossible samples": replace("spectra/update/step", [-(2**63), 1, 2, 2**63 - 1]),
    "times not a number": replace("steps/time", np.full(STEPS, np.nan)),
    "infinite norms": replace("neurons/update", np.full((STEPS, 12), np.inf, np.float32)),
    "negative sigma": replace("spectra/update/sigma", np.full((4, 8), -1e308)),
    "sigma not a number": replace("spectra/update/sigma", np.full((4, 8), np.nan)),
    "negative floors": replace("spectra/update/floor", np.full((4, 2), -1.0)),
    "bomb": replace("more", np.zeros(25 << 20, "u1"), chunks=(1 << 20,), compression="gzip"),
    "many events": many_events,
    "wide events": replace("events/text", shape=(1,), dtype="S200000000"),
    "many scalars": many_scalars,
    "scalar twice": replace("steps/scalar_names", np.array([b"loss", b"loss"])),
    "status": lambda file: file.attrs.create("status", np.bytes_(b"\xff\x1b[31m")),
    "dropped": lambda file: file.attrs.create("dropped", np.nan),
    "dropped much": lambda file: file.attrs.create("dropped", 1e300),
    "groups of numbers": about({"optimizer": "SGD", "groups": [1, 2]}),
    "groups of text": about({"optimizer": "SGD", "groups": "text"}),
    "groups of lists": about({"optimizer": "SGD", "groups": [[1, 2], ["lr", 3]]}),
    "settings": about({"groups": [{"betas": "x", "lr": "y", "weight_decay": [], "eps": {}}]}),
    "no number": about(b'{"groups": [{"lr": NaN, "eps": Infinity, "momentum": -Infinity}]}'),
    "long number": about(b'{"groups": [{"lr": ' + b"9" * 4000 + b"}]}"),
    "names": about({"optimizer": ["a"], "name": {"a": 1}, "created": [], "shadow_of": {}}),
    "nothing": about({"optimizer": None, "name": None, "groups": None, "job": None}),
    "half characters": about(b'{"optimizer": "\\ud800", "groups": [{"\\udfff": "\\udead"}]}'),
    "deep": about(b'{"groups": ' + b"[" * 900 + b"]" * 900 + b"}"),
    "deeper": about(b'{"groups": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"),
    "kinds": about(dict.fromkeys(KINDS, 5)),
    "lists": about({name: [{}] for name in KINDS}),
}


def test_no_file_crashes_hangs_or_takes_much(sound: Path, tmp_path: Path) -> None:
    def work(say: Callable[[str], None]) -> None:
        for door in DOORS.values():  # what a door loads when it is opened first is not counted
            door(sound, sound)
        path = tmp_path / "x.h5"
        for name, change in CHANGES.items():
            say(name)
            path.write_bytes(sound.read_bytes())
            with h5py.File(path, "r+", libver=LIBVER) as file:
                change(file)
            go_through(path, sound, say)

    in_a_fork(work)


# -- half files ----------------------------------------------------------------------------------


def damaged_copies(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield a file cut at every hundredth of its length, and with some of its bytes flipped."""
    for percent in range(100):
        yield f"cut at {percent} %", content[: len(content) * percent // 100]
    rng = random.Random(0)
    for seed in range(25):
        flipped = bytearray(content)
        for _ in range(rng.choice([1, 4, 16])):
            flipped[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        yield f"flips {seed}", bytes(flipped)


def test_cut_and_flipped_files(sound: Path, tmp_path: Path) -> None:
    made_up_run(tmp_path / "y.h5", steps=6, every=3, shapes=SHAPES, close=False)
    manifest = Manifest.load(parts_of(tmp_path / "y.h5"))
    assert manifest
    segment = parts_of(tmp_path / "y.h5") / manifest.segments[-1].file
    path = tmp_path / "x.h5"

    def work(say: Callable[[str], None]) -> None:
        for file, recording in ((path, path), (segment, tmp_path / "y.h5")):
            content = (sound if file == recording else file).read_bytes()
            for name, copy in damaged_copies(content):
                say(f"{file.name}, {name}")
                file.write_bytes(copy)
                signal.alarm(60)
                began = time.process_time()
                with contextlib.suppress(LensError):
                    run = open_run(recording)
                    list(run.flaws())
                    read_all(recording, sound)
                    assert file == recording or run.damaged or not name.startswith("cut")
                assert time.process_time() - began < SECONDS

    in_a_fork(work)


# -- manifests and links -------------------------------------------------------------------------

ENTRY = {"file": "a.h5", "rows": 1, "first": 1, "last": 1, "bytes": 1, "level": 0}


@pytest.mark.parametrize(
    "content",
    [
        {"segments": [{**ENTRY, "file": "../x.h5"}]},
        {"segments": [{**ENTRY, "file": "/etc/passwd"}]},
        {"segments": [{**ENTRY, "file": "a\0b"}]},
        {"segments": [{**ENTRY, "file": "a" * 5000}]},
        {"segments": [{**ENTRY, "file": 5}]},
        {"segments": [{**ENTRY, "file": ""}]},
        {"segments": [{**ENTRY, "rows": "1"}]},
        {"segments": {"a": 1}},
        {"segments": [[]]},
        {"status": {"a": [1]}},
        {"dropped": float("nan")},
        {"dropped": 10**400},
        {"updated": 10**400},
        {"pid": 10**30},
        {"host": None},
        {"more": 1},
    ],
    ids=lambda content: repr(content)[:40],
)
def test_manifest_that_lies(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    made_up_run(path, steps=3, shapes=SHAPES, close=False)
    file = parts_of(path) / NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), **content}))
    with contextlib.suppress(LensError):
        read_all(path, path)
        list(open_run(path).flaws())


@pytest.mark.parametrize("text", ["[" * 10**6, "9" * 10**6, '{"a":' * 10**5, "\ud800"])
def test_manifest_that_is_a_bomb(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    made_up_run(path, steps=3, shapes=SHAPES, close=False)
    (parts_of(path) / NAME).write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(LensError):
        open_run(path)


def test_manifest_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    made_up_run(path, steps=3, shapes=SHAPES, close=False)
    os.truncate(parts_of(path) / NAME, 1 << 30)  # a hole, which takes no room
    began = time.process_time()
    with pytest.raises(LensError, match="more than any list of segments"):
        open_run(path)
    assert time.process_time() - began < SECONDS


@pytest.mark.parametrize("target", ["pipe", "device", "other", "loop"])
@pytest.mark.parametrize("what", ["segment", NAME])
def test_link_or_pipe_in_the_parts_is_not_followed(what: str, target: str, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    made_up_run(path, steps=3, shapes=SHAPES, close=False)
    parts = parts_of(path)
    manifest = Manifest.load(parts)
    assert manifest
    file = parts / (NAME if what == NAME else manifest.segments[-1].file)
    (tmp_path / "other").write_bytes(file.read_bytes())
    file.unlink()
    if target == "pipe":
        os.mkfifo(file)
    else:
        place = {"device": "/dev/zero", "other": tmp_path / "other", "loop": file}[target]
        file.symlink_to(place)
    signal.alarm(60)
    if what == NAME:
        with pytest.raises(LensError):
            open_run(path)
    else:
        assert [damage.path for damage in open_run(path).damaged] == [file]
    signal.alarm(0)


# -- several ranks -------------------------------------------------------------------------------


def test_ranks_that_claim_much_take_little(tmp_path: Path) -> None:
    """A table of many rows and a list of many ranks cost nothing; norms of them would."""
    path = tmp_path / "x.h5"
    table = Matrices([Matrix("up", 3_000_000, 1)])
    ranks = tuple(range(60_000))
    shard = Shard(0, ranks, None, {"update": ((0, 1, 1),)})
    writer = Writer(path, {}, table, shard=shard)
    for step in range(1, 3001):
        writer.step(step, 0.0, scalars={}, norms={"update": np.ones(1)})
    writer.close()

    def work(say: Callable[[str], None]) -> None:
        say(str(sum(file.stat().st_size for file in parts_of(path).rglob("*.h5"))))
        with pytest.raises(LensError, match="tell of more than files of"):
            open_run(path)
        go_through(path, path, say)

    in_a_fork(work)
