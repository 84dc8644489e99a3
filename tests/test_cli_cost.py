"""``normuon-lens cost``: its tables, its JSON, its refusals, and the page that shows it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from normuon_lens.cli.cost import PAPER_STATE, cost
from normuon_lens.cli.main import main
from normuon_lens.optim.cost import RULES
from normuon_lens.optim.cost import cost as count_cost
from normuon_lens.optim.presets import PRESETS

DOCS = Path(__file__).parents[1] / "docs" / "cost.md"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["cost", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["cost", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("normuon-lens: ")
    assert err.count("\n") == 1
    return err


def row(out: str, *words: str) -> list[str]:
    """Return the cells of the first line that has all these words."""
    line = next(line for line in out.splitlines() if all(word in line for word in words))
    return re.split(r"\s{2,}", line.strip())


def test_a_model_on_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "--model", "1.1B", "--ranks", 16)
    assert out.startswith("gpt-1.1b: 16 layers × 2,048, 32 heads (8 of keys and values), ")
    assert "973 M parameters in 112 matrices\n131 M in embeddings" in out
    assert row(out, "FP32", "2mn")[2:] == (
        ["2mn", "8.000", "100.0%", "7.25 GiB", "8.23 GiB", "527 MiB"]
    )
    assert row(out, "NorMuon ", "m(n+1)")[1:3] == ["m(n+1): half", "4.002"]
    # 12 (W-1)/W, then 8 (W-1)/W² and 4 (W-1)/W more; 12 to 16 bytes in the paper.
    assert row(out, "FP32", "11.25") == ["FP32", "AdamW", "11.25", "12"]
    assert row(out, " Muon, by")[1:] == ["11.72", "+4.2%", "+435 MiB", "16", "+33%"]
    assert row(out, " Muon, everywhere")[1:] == ["15.00", "+33.3%", "+3.40 GiB"]
    assert row(out, "BF16", "7.50") == ["BF16", "AdamW", "7.50", "8"]
    assert "12  +50%" in out
    assert row(out, "by owners ", "45.7") == (
        ["by owners", "45.7 TFLOP", "2.86 TFLOP", "2.86 TFLOP", "1.00", "0"]
    )
    assert row(out, "everywhere ", "732") == (
        ["everywhere", "732 TFLOP", "45.7 TFLOP", "45.7 TFLOP", "1.00", "0"]
    )


def test_one_rank_sends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "--model", "gpt-124m", "--steps", 10)
    assert "Newton-Schulz: 3.26 TFLOP in a step, 10 iterations" in out
    assert "With --ranks 16" in out
    assert "Traffic" not in out
    assert "a rank" not in out


def test_the_order_of_owners_changes_the_balance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "two.txt"
    path.write_text("2 8\n4 4\n8 8")
    dealt = row(said(capsys, "--shapes", path, "--ranks", 2), "by owners ", "FLOP")
    turned = row(
        said(capsys, "--shapes", path, "--ranks", 2, "--owners", "snake"), "by owners ", "FLOP"
    )
    assert float(turned[4]) < float(dealt[4])
    idle = row(said(capsys, "--shapes", path, "--ranks", 5), "by owners ", "FLOP")
    assert idle[5] == "2"


def test_shapes_from_a_file_have_no_other_parameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "one.txt"
    path.write_text("2 2")
    out = said(capsys, "--shapes", path)
    assert "4 parameters in one matrix\n" in out
    assert row(out, "FP32")[-1] == "32 B"
    assert "model" not in out
    assert "embeddings" not in out


def test_without_a_model_there_is_an_overview(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys)
    assert row(out, "gpt-5.4b")[1:] == ["5.14 B", "40.0 GiB", "20.9 GiB", "427 TFLOP"]
    out = said(capsys, "--ranks", 16)
    assert row(out, "gpt-5.4b")[-2:] == ["2.35 GiB", "1.09"]
    for name in PRESETS:
        assert name in out
    assert "Look closer: normuon-lens cost --model" in out


def test_json_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--ranks", 12, "--steps", 3, "--owners", "snake", "--json")
    content = json.loads(said(capsys, *options))
    assert [model["name"] for model in content["models"]] == list(PRESETS)
    assert (content["ranks"], content["steps"], content["owners"]) == (12, 3, "snake")
    assert content["paper"]["traffic_per_parameter"]["bfloat16"] == (
        {"AdamW": 8, "Muon": 12, "NorMuon": 12}
    )
    assert content["paper"]["state"] == PAPER_STATE
    assert tuple(PAPER_STATE) == RULES
    preset = PRESETS["gpt-350m"]
    (model,) = json.loads(said(capsys, "--model", "350m", *options))["models"]
    assert model == content["models"][1]
    assert model["matrix_elements"] + model["other_elements"] == preset.parameters
    matrices = [shape for _, shape in preset.matrices()]
    others = [shape for _, shape in preset.others()]
    assert model["matrices"] == len(matrices)
    counted = count_cost(matrices, others, ranks=12, steps=3, order="snake")
    for found, expected in zip(model["costs"], counted, strict=True):
        balance = expected.balance if expected.scheme else None
        derived = {"sent_per_parameter": expected.sent_per_parameter, "balance": balance}
        assert found == json.loads(json.dumps(asdict(expected) | derived))


def test_every_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no model named 'gpt-1b': did you mean gpt-1.1b?" in refused(capsys, "--model", "gpt-1b")
    both = refused(capsys, "--model", "1.1b", "--shapes", tmp_path)
    assert "give --model or --shapes, not both (see: normuon-lens cost --help)" in both
    assert "Is a directory" in refused(capsys, "--shapes", tmp_path)
    path = tmp_path / "bad.txt"
    path.write_text("8 8\n8")
    assert f"{path}:2: '8' is no matrix; expected" in refused(capsys, "--shapes", path)
    for option, value in (("--ranks", 0), ("--ranks", 10**12), ("--steps", 0), ("--steps", "x")):
        assert f"Invalid value for '{option}'" in refused(capsys, option, value)
    assert "not one of 'round_robin', 'snake'" in refused(capsys, "--owners", "zigzag")


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "--help")
    assert "Example: normuon-lens cost --model gpt-1.1b --ranks 16" in out
    for name in PRESETS:
        assert name in out
    assert all(parameter.help for parameter in cost.params)


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from normuon_lens.cli.cost import cost\n"
        "cost(['--model', '1.1b', '--ranks', '16'], standalone_mode=False)\n"
        "assert not {'dash', 'plotly', 'h5py', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.findall(
        r"^```console\n\$ normuon-lens cost (.*)\n((?s:.*?))^```", DOCS.read_text(), re.M
    )
    assert len(shown) == 1
    for arguments, expected in shown:
        lines = [line.rstrip() for line in said(capsys, *arguments.split()).splitlines()]
        assert lines == expected.splitlines()
        assert max(map(len, lines)) <= 120


def test_the_page_shows_a_list_that_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (listing,) = re.findall(r"^```\n(# 24 layers(?s:.*?))^```", DOCS.read_text(), re.M)
    path = tmp_path / "list.txt"
    path.write_text(listing)
    assert "in 144 matrices" in said(capsys, "--shapes", path)
