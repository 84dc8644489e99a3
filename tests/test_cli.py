"""Every verb: its help, its table, its JSON, and one line for every mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import h5py
import numpy as np
import pytest

from normuon_lens.analysis.settled import SKIP
from normuon_lens.cli.main import main
from normuon_lens.cli.runs import skip_option
from normuon_lens.cli.tables import factor, figure
from normuon_lens.runfile import Matrices, Matrix, Writer, made_up_run

VERBS = (
    *("analyze", "check", "claims", "compare", "cost", "dashboard", "demo", "export", "pack"),
    *("report", "run", "summary"),
)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def expect_refusal(
    capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], *says: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == "" or arguments[0] == "check"
    assert err.count("\n") == 1, "one line"
    assert err.startswith("normuon-lens: ")
    for text in says:
        assert text in err


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    listed = re.findall(r"^  (\w+)  ", out, flags=re.MULTILINE)
    assert listed == list(VERBS)
    assert run(capsys)[1] == out.rstrip("\n") + "\n", "no verb at all shows the help"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    assert f"Example: normuon-lens {verb}" in out


def test_compare_leaves_out_what_a_shell_star_adds(
    three_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (three_runs / "README.md").write_text("three runs")
    (three_runs / "__pycache__").mkdir()
    code, out, err = run(capsys, "compare", *sorted(three_runs.iterdir()))
    assert code == 0
    assert "AdamW" in out
    assert err == "normuon-lens: no recordings, left out: README.md, __pycache__\n"


def test_summary_shows_matrices_and_settings(
    three_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "summary", three_runs / "muon.h5")
    assert code == 0
    assert "Muon, 40 steps, 5 sampled, finished" in out
    assert "lr=0.01" in out
    assert re.search(r"blocks\.1\.mlp\.up\s+32 × 16\s+1\.70", out)
    content = json.loads(run(capsys, "summary", "--json", three_runs / "muon.h5")[1])[0]
    assert content["matrices"][1]["shape"] == [32, 16]
    assert content["matrices"][1]["condition_number"] == pytest.approx(1.7)


def test_summary_marks_a_lower_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_up_run(tmp_path / "x.h5", condition=1e12)
    assert "≥ " in run(capsys, "summary", tmp_path / "x.h5")[1]


def test_check_reads_everything(three_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "check", three_runs)
    assert code == 0
    assert out.count(": finished, 40 steps, 30 spectra, 30 full matrices, 0 dropped: whole") == 3


def test_check_finds_a_damaged_value_deep_inside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file opens; only reading it to the end shows that a compressed chunk is broken."""
    path = tmp_path / "x.h5"
    writer = Writer(path, {"optimizer": "SGD"}, Matrices([Matrix("up", 8, 4)]), compress=True)
    for step in range(1, 30):
        norms = np.random.default_rng(step).random(8)
        writer.step(step, 0.0, scalars={}, norms={"update": norms})
    writer.close()
    with h5py.File(path) as file:
        chunk = file["neurons/update"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(content)
    expect_refusal(capsys, ("check", path), "x.h5: damaged", "neurons/update")


def test_paths_that_are_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.h5").write_text("not HDF5")
    h5py.File(tmp_path / "foreign.h5", "w").close()
    for verb in ("summary", "compare", "check"):
        expect_refusal(capsys, (verb, tmp_path / "none.h5"), "none.h5: no such file or folder")
        expect_refusal(capsys, (verb, tmp_path / "empty"), "no recordings", "normuon-lens demo")
        expect_refusal(capsys, (verb, tmp_path / "text.h5"), "text.h5: not a readable HDF5 file")
        expect_refusal(capsys, (verb, tmp_path / "foreign.h5"), "not one that normuon-lens wrote")


def test_help_names_the_first_steps_that_analysis_leaves_out() -> None:
    command = click.Command("any", params=[])
    assert skip_option(command).params[0].default == SKIP


def test_words_that_are_no_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    expect_refusal(capsys, ("shwo",), "No such command 'shwo'", "normuon-lens --help")
    expect_refusal(capsys, ("compare",), "Missing argument", "normuon-lens compare --help")
    expect_refusal(capsys, ("demo", "--steps", "0"), "--steps", "normuon-lens demo --help")


def test_names_are_text_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_up_run(tmp_path / "x.h5", shapes={"[red]evil[/red]": (8, 4)})
    assert "[red]evil[/red]" in run(capsys, "summary", tmp_path / "x.h5")[1]


def test_installed_command_answers(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("normuon-lens")
    done = subprocess.run([command, "summary", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (197.4, "197"),
        (34796.2, "34,796"),
        (99.96, "100"),
        (999.7, "1,000"),
        (0.05634, "0.0563"),
        (3.2e-5, "3.20e-05"),
        (2.5e7, "2.50e+07"),
        (float("nan"), "–"),
        (float("inf"), "∞"),
    ],
)
def test_figures_have_three_digits(value: float, shown: str) -> None:
    assert figure(value) == shown


def test_factors_read_as_a_person_says_them() -> None:
    assert factor(1 / 118) == "÷118"
    assert factor(1.5) == "×1.50"
    assert factor(float("nan")) == ""


def test_summary_of_a_run_that_could_not_even_write_a_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = Writer(tmp_path / "x.h5", {"optimizer": "AdamW"}, Matrices([Matrix("w", 4, 3)]))
    writer.abandon("No space left on device")
    code, out, _ = run(capsys, "summary", tmp_path / "x.h5")
    assert code == 0
    said = " ".join(out.split())
    assert "AdamW, 0 steps, 0 sampled, stopped at step 0: No space left on device" in said


def test_summary_says_what_a_reader_must_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Matrices([Matrix("w", 4, 3, "bfloat16")])
    metadata = {"optimizer": "Muon", "shadow_of": "SGD", "groups": [{"update": "difference"}]}
    writer = Writer(tmp_path / "x.h5", metadata, table)
    for step in range(1, 31):
        norms = {"update": np.ones(4, np.float32)}
        writer.step(step, 1e9, scalars={}, norms=norms)
        weight_norm = np.array([100.0])
        writer.spectra("update", step, np.ones(3), np.zeros(1), weight_norm=weight_norm)
    writer.event(10, "schedule", "norms every 2")
    writer.event(20, "schedule", "norms every 4")
    writer.dropped(7)
    writer.close()
    out = run(capsys, "summary", tmp_path / "x.h5")[1]
    assert "x.h5: Muon (shadow of SGD), 30 steps" in out
    assert "7 samples dropped" in out
    assert "at step 20: norms every 4" in out
    assert "at step 10" not in out, "the last word counts"
    # 0.4 u ‖W‖ / ‖U‖ = 0.4 · 2^-8 · 100 / 2
    assert "differences of bfloat16 weights, of which rounding makes about 8% (median)" in out
