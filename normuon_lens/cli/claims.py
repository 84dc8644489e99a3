"""``normuon-lens claims``: the paper's observations, checked on one's own runs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.text import Text

from normuon_lens.cli.runs import json_option, open_runs, runs_argument, skip_option
from normuon_lens.cli.tables import console, figure, print_json

if TYPE_CHECKING:
    from normuon_lens.analysis.claims import Claim, Finding

SYMBOLS = {"seen": "✓", "not seen": "✗", "cannot tell": "?"}
COLOURS = {"seen": "green", "not seen": "red", "cannot tell": "yellow"}

WIDTH = 100
"""Lines are not longer than that: longer ones are hard to read."""


@click.command(epilog="Example: normuon-lens claims runs/adamw.h5 runs/muon.h5 runs/normuon.h5")
@runs_argument
@skip_option
@json_option
def claims(runs: tuple[str, ...], skip: int, as_json: bool) -> None:
    """Check what the paper on NorMuon says, on these runs.

    For each of its observations: the figures found here, and whether it is seen, not seen, or
    cannot be told from these runs, and why. The rule stands beside each verdict, and is the same
    for all runs. A RUN may also be a folder: all its recordings are taken.
    """
    from normuon_lens.analysis.claims import check_claims

    opened = open_runs(runs)
    found = check_claims(opened, skip=skip)
    if as_json:
        print_json([asdict(claim) for claim in found])
        return
    to = console()
    names = ", ".join(run.name for run in opened)
    left_out = f"the first {skip} steps left out of medians"
    to.print(f"arXiv 2510.05491 checked on {names}; {left_out}\n", soft_wrap=True)
    print_claims(found, to)


def print_claims(found: Sequence[Claim], to: Console) -> None:
    """Print each claim with its verdict, reason, figures and rule, then how many are what."""
    for claim in found:
        verdict = f"{SYMBOLS[claim.verdict]} {claim.verdict.upper()}"
        colour = f"bold {COLOURS[claim.verdict]}"
        head = Text.assemble((verdict, colour), f"  {claim.id}  ", (claim.source, "dim"))
        to.print(head, soft_wrap=True)
        to.print(_wrapped("", claim.statement), style="bold", soft_wrap=True)
        to.print(_wrapped("Found: ", claim.reason), soft_wrap=True)
        width = max((len(finding.label) for finding in claim.findings), default=0)
        for finding in claim.findings:
            to.print(f"    {finding.label:{width}}  {_value(finding)}", soft_wrap=True)
        to.print(_wrapped("Rule: ", claim.test), style="dim", soft_wrap=True)
        to.print()
    counts = [
        f"{sum(claim.verdict == verdict for claim in found)} {verdict}" for verdict in SYMBOLS
    ]
    to.print(", ".join(counts))


def _wrapped(word: str, text: str) -> str:
    return textwrap.fill(word + text, WIDTH, initial_indent="  ", subsequent_indent="    ")


def _value(finding: Finding) -> str:
    whole = float(finding.value).is_integer() and abs(finding.value) < 1e15
    value = f"{finding.value:,.0f}" if whole else figure(finding.value)
    if finding.unit == "at least":
        value = f"≥ {value}"
    unit = "" if finding.unit in ("ratio", "at least") else finding.unit
    return f"{value:>9} {unit}".rstrip()
