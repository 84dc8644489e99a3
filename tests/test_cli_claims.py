"""The verb `claims`: every verdict in words, every figure, and the same in JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import normuon_lens.sample_runs
from normuon_lens.analysis.claims import check_claims
from normuon_lens.cli.main import main
from normuon_lens.runfile import Matrices, Matrix, Writer, open_run

SAMPLES = Path(normuon_lens.sample_runs.__file__).parent


def test_sample_runs_are_judged_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", str(SAMPLES)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert all(len(line) <= 100 for line in lines)
    found = check_claims([open_run(path) for path in sorted(SAMPLES.glob("*.h5"))])
    symbols = {"seen": "✓ SEEN", "not seen": "✗ NOT SEEN", "cannot tell": "? CANNOT TELL"}
    joined = " ".join(out.split())
    for claim in found:
        assert f"{symbols[claim.verdict]}  {claim.id}  {claim.source}" in lines
        for text in (claim.statement, f"Found: {claim.reason}", f"Rule: {claim.test}"):
            assert " ".join(text.split()) in joined
        assert all(finding.label in out for finding in claim.findings)
    verdicts = [claim.verdict for claim in found]
    assert lines[-1] == ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in symbols)
    # These are figures that the samples are known for, not verdicts that are wished for.
    assert "matrices in which it holds" in out
    assert "732 of 732" in out


def test_json_has_the_same_and_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    path = SAMPLES / "adamw.h5"
    assert main(["claims", str(path), "--json", "--skip", "300"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    expected = check_claims([open_run(path)], skip=300)
    assert [(x["id"], x["verdict"], x["reason"]) for x in told] == [
        (x.id, x.verdict, x.reason) for x in expected
    ]
    assert [f["value"] for f in told[0]["findings"]] == [f.value for f in expected[0].findings]


def test_names_are_text_and_an_empty_run_is_no_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = {"optimizer": "Adam", "name": "[red]ü[/red]"}
    Writer(tmp_path / "x.h5", metadata, Matrices([Matrix("w", 2, 2)])).close()
    assert main(["claims", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "[red]ü[/red]" in out
    assert out.splitlines()[-1] == "0 seen, 0 not seen, 9 cannot tell"


def test_a_path_that_is_none_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["claims", str(tmp_path / "none.h5")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
