"""A run says what is recorded, while it grows, after accidents, and of whatever it is asked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from normuon_lens.errors import RunError
from normuon_lens.runfile import Matrices, Matrix, Run, Writer, find_runs, made_up_run, open_run
from normuon_lens.runfile import source as source_module
from normuon_lens.runfile.manifest import Manifest
from normuon_lens.runfile.schema import parts_of

TABLE = Matrices([Matrix("up", 4, 2), Matrix("down", 2, 4)])


def write(writer: Writer, *steps: int, attempt: int = 0) -> None:
    """Record steps whose every number tells the step and the attempt."""
    for step in steps:
        value = step + attempt / 8
        norms = np.full(TABLE.total_rows, value, np.float32)
        writer.step(step, value, scalars={"loss": value}, norms={"update": norms})
        if step % 2 == 0:
            writer.spectra("update", step, np.full(4, value), np.full(2, value))
            writer.matrix("update", 1, step, np.full((2, 4), value))


def expect(run: Run, steps: list[int], attempts: dict[int, int] | None = None) -> None:
    """Hold everything in `run` against what :func:`write` wrote, each step once."""
    assert run.steps.tolist() == steps
    values = np.array([step + (attempts or {}).get(step, 0) / 8 for step in steps])
    np.testing.assert_array_equal(run.times, values)
    np.testing.assert_array_equal(run.scalars.get("loss", np.empty(0)), values)
    even = values[[step % 2 == 0 for step in steps]]
    assert run.spectrum_steps().tolist() == [step for step in steps if step % 2 == 0]
    if steps:
        np.testing.assert_array_equal(run.neuron_norms("down"), values[:, None].repeat(2, 1))
    if len(even):
        spectra = run.spectra("up")
        np.testing.assert_array_equal(spectra.sigma, even[:, None].repeat(2, 1))
        np.testing.assert_array_equal(spectra.floor, even)
        for step, value in zip(run.update_steps("down"), even, strict=True):
            assert (run.update("down", int(step)) == value).all()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.h5"


@pytest.fixture
def parts(path: Path) -> Path:
    """Leave a recording of steps 1 to 8 in four segments, as if it were still being made."""
    writer = Writer(path, {"optimizer": "SGD"}, TABLE)
    for step in (1, 3, 5, 7):
        write(writer, step, step + 1)
        writer.commit()
    return parts_of(path)


def segment_of(parts: Path, step: int) -> Path:
    manifest = Manifest.load(parts)
    assert manifest
    entry = next(x for x in manifest.segments if x.rows and x.first <= step <= x.last)
    return parts / entry.file


def edit_manifest(parts: Path, **changes: Any) -> None:
    file = parts / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# -- while it grows ------------------------------------------------------------------------------


def test_refresh_opens_only_what_is_new(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def counting(file: Path) -> h5py.File:
        opened.append(file.name)
        return open_guarded(file)

    open_guarded = source_module.open_guarded
    monkeypatch.setattr(source_module, "open_guarded", counting)
    writer = Writer(path, {}, TABLE)
    write(writer, 1, 2)
    writer.commit()
    run = open_run(path)
    assert len(opened) == 2
    assert not run.refresh()
    write(writer, 3)
    assert not run.refresh(), "what is not committed is not there yet"
    writer.commit()
    assert run.refresh()
    assert len(opened) == 3
    expect(run, [1, 2, 3])
    writer.close()
    opened.clear()  # packing opens them too
    assert run.refresh()
    assert opened == ["x.h5"]
    assert not run.live
    expect(run, [1, 2, 3])


def test_run_read_while_it_is_merged_and_packed_has_every_step_once(path: Path) -> None:
    last, failures = 70, []
    writer = Writer(path, {}, TABLE)

    def record() -> None:
        try:
            for step in range(1, last + 1):
                write(writer, step)
                writer.commit()
            writer.close()
        except Exception as error:
            failures.append(error)

    run = open_run(path)
    seen = {0}
    thread = threading.Thread(target=record)
    thread.start()
    while len(run.steps) < last or run.live:
        run.refresh()
        for view in (run, open_run(path)):
            assert not view.damaged
            assert len(view.steps) >= max(seen) or view is run
            expect(view, list(range(1, len(view.steps) + 1)))
            seen.add(len(view.steps))
        assert thread.is_alive() or path.exists(), failures
    thread.join()
    assert not failures
    assert len(seen) > 5, "the recording was over before it was watched"


@pytest.mark.parametrize("what", ["merged", "packed"])
def test_list_that_is_out_of_date_when_it_is_read_is_read_again(
    what: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(path, {}, TABLE)
    for step in range(1, 15):
        write(writer, step)
        writer.commit()
    load = Manifest.load
    waiting = [True]

    def slow(folder: Path) -> Manifest | None:
        manifest = load(folder)
        if waiting.pop() if waiting else False:
            if what == "merged":
                write(writer, 15)
                writer.commit()
            else:
                writer.close()
        return manifest

    monkeypatch.setattr(Manifest, "load", slow)
    run = open_run(path)
    assert not waiting
    assert not run.damaged
    expect(run, list(range(1, 16 if what == "merged" else 15)))


def test_recording_that_is_deleted_while_it_is_read_is_gone(
    path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Manifest.load

    def delete(folder: Path) -> Manifest | None:
        manifest = load(folder)
        shutil.rmtree(folder, ignore_errors=True)
        return manifest

    monkeypatch.setattr(Manifest, "load", delete)
    with pytest.raises(RunError, match="no such recording"):
        open_run(path)


# -- after accidents -----------------------------------------------------------------------------


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-500])


def garble(file: Path) -> None:
    file.write_bytes(b"\0" * file.stat().st_size)


def take_another(file: Path) -> None:
    other = Writer(file.with_name("other.h5"), {}, Matrices([Matrix("other", 3, 3)]))
    other.close()
    (file.with_name("other.h5")).rename(file)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (Path.unlink, "no such file"),
        (cut, "truncated"),
        (garble, "not a readable HDF5 file"),
        (take_another, "not this run's"),
    ],
)
def test_damaged_segment_is_named_and_the_rest_is_read(
    harm: Callable[[Path], None], reason: str, path: Path, parts: Path
) -> None:
    damaged = segment_of(parts, 3)
    harm(damaged)
    run = open_run(path)
    expect(run, [1, 2, 5, 6, 7, 8])
    assert [(damage.path, damage.steps) for damage in run.damaged] == [(damaged, (3, 4))]
    assert reason in run.damaged[0].reason
    assert "1 damaged segment" in repr(run)


def test_run_without_a_sound_segment_is_refused(path: Path, parts: Path) -> None:
    for file in parts.glob("*.h5"):
        garble(file)
    with pytest.raises(RunError, match="not a readable HDF5 file"):
        open_run(path)


def test_run_keeps_what_it_has_when_a_refresh_fails(path: Path, parts: Path) -> None:
    run = open_run(path)
    (parts / "manifest.json").write_text("{")
    with pytest.raises(RunError, match="no list of segments"):
        run.refresh()
    expect(run, [1, 2, 3, 4, 5, 6, 7, 8])


ENTRY = {"file": "s.h5", "rows": 1, "first": 1, "last": 1, "bytes": 1, "level": 0}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no list of segments"),
        ("null", "no list of segments"),
        ("[]", "no list of segments"),
        ("[" * 100_000, "no list of segments"),
        ("\0" * 100, "no list of segments"),
        ({"segments": None}, "no list of segments"),
        ({"segments": [{}]}, "no list of segments"),
        ({"segments": [{**ENTRY, "file": 7}]}, "no list of segments"),
        ({"segments": [{**ENTRY, "first": "1"}]}, "no list of segments"),
        ({"segments": [{**ENTRY, "more": 1}]}, "no list of segments"),
        ({"segments": [ENTRY, ENTRY]}, "no list of segments"),
        ({"dropped": float("inf")}, "no list of segments"),
        ({"format": "other"}, "not a recording that this version can read"),
        ({"schema": 2}, "not a recording that this version can read"),
        ({"segments": [{**ENTRY, "file": "../x.h5"}]}, "outside its folder"),
        ({"segments": [{**ENTRY, "file": "/etc/passwd"}]}, "outside its folder"),
        ({"segments": [{**ENTRY, "file": ".."}]}, "outside its folder"),
    ],
)
def test_damaged_list_of_segments_is_refused(
    text: str | dict[str, Any], reason: str, path: Path, parts: Path
) -> None:
    if isinstance(text, str):
        (parts / "manifest.json").write_text(text)
    else:
        edit_manifest(parts, **text)
    with pytest.raises(RunError, match=reason) as caught:
        open_run(path)
    assert "\n" not in str(caught.value)


def test_missing_list_of_segments_is_refused(path: Path, parts: Path) -> None:
    (parts / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"damaged, it has no manifest\.json"):
        open_run(path)


def test_recording_is_interrupted_once_its_writer_is_gone(path: Path, parts: Path) -> None:
    writer = subprocess.Popen(["sleep", "60"])
    edit_manifest(parts, pid=writer.pid)
    run = open_run(path)
    assert run.live
    assert not run.refresh()
    writer.kill()
    # Dead but not buried: nobody waits for it where containers have no init.
    os.waitid(os.P_PID, writer.pid, os.WEXITED | os.WNOWAIT)
    assert run.refresh()
    assert run.status == "interrupted"
    writer.wait()
    assert not run.refresh()
    assert open_run(path).status == "interrupted"


@pytest.mark.parametrize("pid", [0, -1, 10**30])
def test_impossible_process_does_not_record(pid: int, path: Path, parts: Path) -> None:
    edit_manifest(parts, pid=pid)
    assert open_run(path).status == "interrupted"


def test_recording_on_another_machine_counts_as_live(path: Path, parts: Path) -> None:
    edit_manifest(parts, host="elsewhere", pid=2**22 + 1)
    assert open_run(path).live


def test_resumed_run_shows_the_later_record_of_each_step(path: Path) -> None:
    writer = Writer(path, {}, TABLE)
    write(writer, *range(1, 9))
    writer.close()
    writer = Writer(path, {}, TABLE, resume=True)
    attempts = dict.fromkeys(range(5, 13), 1)
    for step in attempts:
        write(writer, step, attempt=1)
        writer.commit()
    for run in (open_run(path), open_run(parts_of(path))):
        expect(run, list(range(1, 13)), attempts)
        assert run.overlaps == 4
        assert run.all_neuron_norms(after=7)[:, 0].tolist() == [
            8.125,
            9.125,
            10.125,
            11.125,
            12.125,
        ]
        assert run.all_spectra(after=8).steps.tolist() == [10, 12]
    writer.close()
    expect(open_run(path), list(range(1, 13)), attempts)


def test_parts_left_behind_by_a_crash_while_packing_add_nothing(path: Path, parts: Path) -> None:
    writer = Writer(path.with_name("y.h5"), {"optimizer": "SGD"}, TABLE)
    write(writer, *range(1, 9))
    writer.close()
    path.with_name("y.h5").rename(path)
    edit_manifest(parts, status="finished")
    run = open_run(path)
    expect(run, list(range(1, 9)))
    assert run.status == "finished"
    edit_manifest(parts, segments=[])
    expect(open_run(path), list(range(1, 9)))


# -- whatever it is asked ------------------------------------------------------------------------


@pytest.fixture
def run(path: Path) -> Run:
    return made_up_run(path, steps=40, every=10)


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (lambda run: run.spectrum("blocks.0.mlp.up", 12), "at step 12; the nearest is step 10"),
        (lambda run: run.spectrum("blocks.0.mlp.up", 16), "at step 16; the nearest is step 20"),
        (lambda run: run.spectrum("blocks.0.mlp.up", -7), "at step -7; the nearest is step 1"),
        (lambda run: run.update("blocks.0.mlp.up", 9999), "step 9999; the nearest is step 40"),
        (lambda run: run.neuron_norms("blocks.0.mpl.up"), "did you mean 'blocks.0.mlp.up'"),
        (lambda run: run.shape("?"), "no matrix '?'"),
        (lambda run: run.neuron_norms("blocks.0.mlp.up", "momentum"), "it has update"),
        (lambda run: run.all_spectra("momentum"), "no spectra of stage 'momentum'"),
        (lambda run: run.spectrum("blocks.0.mlp.up", 1, "momentum"), "is recorded at all"),
        (lambda run: run.update("blocks.0.mlp.up", 1, "momentum"), "is recorded at all"),
    ],
)
def test_message_names_what_there_is_instead(
    ask: Callable[[Run], object], answer: str, run: Run
) -> None:
    with pytest.raises(RunError) as caught:
        ask(run)
    assert answer in str(caught.value)
    assert str(run.path) in str(caught.value)


def test_spectra_and_norms_are_those_of_the_stored_updates(run: Run) -> None:
    for name in run.matrices:
        spectra, norms = run.spectra(name), run.neuron_norms(name)
        assert spectra.steps.tolist() == run.update_steps(name).tolist() == [1, 10, 20, 30, 40]
        for row, step in enumerate(spectra.steps.tolist()):
            update = run.update(name, step).astype(np.float64)
            sigma = np.linalg.svd(update, compute_uv=False)
            np.testing.assert_allclose(spectra.sigma[row], sigma, rtol=1e-4)
            np.testing.assert_allclose(spectra.sigma[row, 0] / spectra.sigma[row, -1], 100)
            at = run.steps.tolist().index(step)
            np.testing.assert_allclose(norms[at], np.linalg.norm(update, axis=1), rtol=1e-5)


def test_representations_escape_what_the_file_says(path: Path) -> None:
    table = Matrices([Matrix('<img src=x onerror="alert(1)">', 2, 2, dtype="<b>")])
    writer = Writer(path, {"optimizer": "<script>1</script>", "name": "<i>"}, table)
    writer.close()
    run = open_run(path)
    assert run.name == "<i>"
    assert "<script>" in repr(run)
    page = run._repr_html_()
    assert not any(tag in page for tag in ("<img", "<script", "<b>", "<i>"))
    assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;" in page


# -- which runs there are ------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Make a folder with a finished and an unfinished recording, and other things."""
    folder = tmp_path / "runs"
    made_up_run(folder / "b.h5", steps=1)
    made_up_run(folder / "a.h5", steps=1, close=False)
    made_up_run(folder / "deeper" / "c.h5", steps=1)
    made_up_run(folder / "named", steps=1)
    (folder / "notes.txt").write_text("nothing")
    return folder


def test_folder_gives_its_recordings_by_name(folder: Path) -> None:
    assert find_runs([folder]) == [folder / "a.h5", folder / "b.h5"]


def test_given_order_is_kept_and_each_comes_once(folder: Path) -> None:
    given = [folder / "b.h5", folder, str(folder / "a.h5.parts"), folder / "deeper"]
    expected = [folder / "b.h5", folder / "a.h5", folder / "deeper" / "c.h5"]
    assert find_runs(given) == expected


def test_what_a_shell_star_gives_is_sorted_out(folder: Path) -> None:
    found = find_runs([folder / "b.h5", folder / "named", folder / "notes.txt"])
    assert found == [folder / "b.h5", folder / "named"]


def test_recording_is_opened_by_its_parts_too(folder: Path) -> None:
    assert open_run(folder / "a.h5.parts").path == folder / "a.h5"


def test_path_without_a_recording_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such file or folder"):
        find_runs([folder / "nothing.h5"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="no recordings there"):
        find_runs([tmp_path / "empty"])
    with pytest.raises(RunError, match="no recordings there"):
        find_runs([folder / "notes.txt", tmp_path / "empty", folder / "notes.txt"])
    # One that was meant is for open_run to refuse: it knows better what it is.
    assert find_runs([folder / "notes.txt"]) == [folder / "notes.txt"]
