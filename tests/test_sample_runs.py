"""The demo trains, records and shows what it promises; the recorded runs show it too."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import normuon_lens.sample_runs
from normuon_lens.analysis import compare
from normuon_lens.cli.main import main, run_command
from normuon_lens.runfile import Run, open_run
from normuon_lens.sample_runs.data import Batches, standard_library
from normuon_lens.sample_runs.model import GPT, Shape
from normuon_lens.sample_runs.train import NAME, train
from normuon_lens.sample_runs.training import RECIPES, Recipe, Training

pytestmark = pytest.mark.usefixtures("forked_helpers")

HERE = Path(normuon_lens.sample_runs.__file__).parent
NAMES = ("adamw", "muon", "normuon")


@pytest.fixture(scope="module")
def recorded() -> list[Run]:
    return [open_run(HERE / f"{name}.h5") for name in NAMES]


def test_demo_records_three_runs_and_prints_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    assert main(["demo", "--steps", "12", "--no-dashboard", "-o", str(folder)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"step 12/12  loss AdamW \d\.\d{3}  Muon \d\.\d{3}  NorMuon \d\.\d{3}", said)
    assert "blocks.*.mlp.up" in said
    assert f"normuon-lens dashboard {folder}" in said
    runs = [open_run(folder / f"{name}.h5") for name in NAMES]
    for run in runs:
        assert run.steps.tolist() == list(range(1, 13))
        assert run.spectrum_steps().tolist() == [1, 10]
        assert len(run.matrices) == 12
        assert run.dropped == 0
        assert run.status == "finished"
        assert np.isfinite(run.scalars["loss"]).all()
    first_losses = {run.scalars["loss"][0] for run in runs}
    assert len(first_losses) == 1, "same weights, same first batch"
    lines = [line for line in said.splitlines() if "recording took" in line]
    assert len(lines) == 3


def test_demo_refuses_to_write_over_recordings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "muon.h5").write_bytes(b"precious")
    code = main(["demo", "--steps", "2", "--no-dashboard", "-o", str(tmp_path)])
    assert code == 2
    assert "muon.h5: exists already" in capsys.readouterr().err
    assert (tmp_path / "muon.h5").read_bytes() == b"precious"
    (tmp_path / "file").write_text("")
    assert main(["demo", "--no-dashboard", "-o", str(tmp_path / "file" / "x")]) == 2
    assert "cannot record there" in capsys.readouterr().err


def test_demo_takes_the_next_free_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["demo", "--steps", "1", "--no-dashboard"]) == 0
    assert {path.name for path in Path("runs").iterdir()} == {"demo", "demo-2"}


def test_script_records_one_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(train, NAME, ["--optimizer", "muon", "--steps", "12", "--every", "4"]) == 0
    told = capsys.readouterr()
    assert re.search(r"step 12/12  loss Muon \d\.\d{3}", told.out)
    assert told.err.splitlines()[-1] == "  look at it:  normuon-lens dashboard runs/muon.h5"
    run = open_run("runs/muon.h5")
    assert (run.optimizer, run.name, run.status) == ("Muon", "Muon", "finished")
    assert run.steps.tolist() == list(range(1, 13))
    assert run.spectrum_steps().tolist() == [1, 4, 8, 12]
    assert np.isfinite(run.scalars["loss"]).all()
    assert np.isfinite(run.scalars["val_loss"]).tolist() == [False] * 11 + [True]
    assert run_command(train, NAME, ["--steps", "1", "--no-record"]) == 0
    assert [path.name for path in Path("runs").iterdir()] == ["muon.h5"]


def test_script_trains_as_the_demo_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["--steps", "3", "--seed", "7"]
    assert main(["demo", *steps, "--no-dashboard", "-o", str(tmp_path)]) == 0
    script = tmp_path / "script.h5"
    assert run_command(train, NAME, [*steps, "-o", str(script)]) == 0
    losses = [open_run(path).scalars for path in (tmp_path / "normuon.h5", script)]
    assert losses[0]["loss"].tolist() == losses[1]["loss"].tolist()
    assert losses[0]["val_loss"][-1] == losses[1]["val_loss"][-1]


def test_script_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.h5").write_bytes(b"precious")
    for arguments, reason in (
        (["-o", str(tmp_path / "x.h5")], "x.h5: exists already"),
        (["-o", str(tmp_path / "x.h5" / "y.h5")], "cannot record there"),
        (["--optimizer", "sgd"], f"{NAME} --help"),
    ):
        assert run_command(train, NAME, arguments) == 2
        told = capsys.readouterr().err
        assert reason in told
        assert told.count("\n") == 1
    assert (tmp_path / "x.h5").read_bytes() == b"precious"


def test_helps_name_the_lines_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    many = "torchrun --standalone --nproc-per-node 2 -m"
    assert main(["demo", "--help"]) == 0
    assert f"{many} normuon_lens demo\n" in capsys.readouterr().out
    assert run_command(train, NAME, ["--help"]) == 0
    told = capsys.readouterr().out
    assert f"{NAME} --optimizer normuon --steps 600 -o runs/x.h5" in told
    assert f"{many} normuon_lens.sample_runs.train --optimizer normuon" in told


def test_module_is_the_command() -> None:
    command = [sys.executable, "-m", "normuon_lens", "--version"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.startswith("normuon-lens, version")


def test_recorded_runs_are_whole_and_small(recorded: list[Run]) -> None:
    assert main(["check", *(str(run.path) for run in recorded)]) == 0
    assert sum(run.path.stat().st_size for run in recorded) < 12e6
    for run, name in zip(recorded, ("AdamW", "Muon", "NorMuon"), strict=True):
        assert (run.optimizer, run.name, run.steps[-1]) == (name, name, 600)


def test_recorded_runs_show_the_phenomenon(recorded: list[Run]) -> None:
    comparison = compare(recorded)
    rows = {(row.group, row.metric): row.values for row in comparison.rows}
    condition = [value.median for value in rows["blocks.*.mlp.up", "condition_number"]]
    imbalance = [value.median for value in rows["blocks.*.mlp.up", "neuron_cv"]]
    assert condition[0] > 10 * condition[1], "Muon brings the condition number down"
    assert condition[2] < 5, "and NorMuon keeps it low"
    assert imbalance[1] > 2 * imbalance[2], "NorMuon evens the neurons out"


def test_recorded_runs_saw_the_same_batches(recorded: list[Run]) -> None:
    """Same model, data order and seed: the losses start equal and rise and fall together."""
    losses = [run.scalars["loss"] for run in recorded]
    assert losses[0][0] == losses[1][0] == losses[2][0]
    moves = np.diff([loss[300:] for loss in losses], axis=1)
    assert np.corrcoef(moves).min() > 0.9


def test_text_is_split_by_path_and_large_enough() -> None:
    text = standard_library()
    assert len(text.train) > 5_000_000
    assert 0.02 < len(text.validation) / len(text.train) < 0.15
    assert text.train.dtype == torch.uint8


def test_batches_are_shifted_windows_and_repeatable() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    inputs, targets = Batches(text, 4, 8, seed=3).next()
    assert inputs.shape == targets.shape == (4, 8)
    assert torch.equal(inputs + 1, targets)
    again = Batches(text, 4, 8, seed=3)
    assert torch.equal(again.next()[0], inputs)
    assert not torch.equal(again.next()[0], inputs)


def test_model_is_the_one_described() -> None:
    model = GPT()
    assert sum(parameter.numel() for parameter in model.parameters()) == 135_488
    assert model.blocks[1].mlp.up.weight.shape == (256, 64)
    tokens = torch.randint(256, (2, 64))
    assert model(tokens).shape == (2, 64, 256)
    assert model.loss(tokens, tokens).item() == pytest.approx(np.log(256), rel=0.2)


def test_model_does_not_look_ahead() -> None:
    model = GPT(Shape(width=16, heads=2, layers=1))
    tokens = torch.randint(256, (1, 20))
    changed = tokens.clone()
    changed[0, 12:] = 7
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[0, :12], after[0, :12])
    assert not torch.equal(before[0, 12:], after[0, 12:])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_parameter_has_one_optimizer_and_the_rate_decays(recipe: Recipe) -> None:
    training = Training(recipe, steps=40, seed=0)
    owned = [
        parameter
        for optimizer in training.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(owned) == len({id(parameter) for parameter in owned})
    assert {id(p) for p in owned} == {id(p) for p in training.model.parameters()}
    rates = []
    batches = Batches(standard_library().train, 4, 64, seed=0)
    for _ in range(40):
        rates.append(training.optimizers[0].param_groups[0]["lr"])
        training.step(*batches.next())
    peak = max(rates)
    assert rates.index(peak) in (1, 2), "warm-up over 5 % of the steps"
    assert rates[0] == pytest.approx(peak / 2)
    assert 0.1 * peak <= rates[-1] < 0.15 * peak
