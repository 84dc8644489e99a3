"""``normuon-lens check``: is a recording whole, and can every number in it be read?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from normuon_lens.cli.runs import json_option, open_runs, runs_argument
from normuon_lens.cli.tables import print_json
from normuon_lens.errors import RunError

if TYPE_CHECKING:
    from normuon_lens.runfile import Run


@click.command(epilog="Example: normuon-lens check runs/normuon.h5")
@runs_argument
@json_option
def check(runs: tuple[str, ...], as_json: bool) -> None:
    """Say whether a recording is whole.

    Reads it from end to end, and ends with exit code 2 if anything is damaged, or if one of
    several ranks left a hole. A RUN may also be a folder.
    """
    reports = [_read_everything(run) for run in open_runs(runs)]
    if as_json:
        print_json(reports)
    else:
        for report in reports:
            click.echo(
                f"{report['path']}: {report['status']}, {report['steps']} steps, "
                f"{report['spectra']} spectra, {report['matrices']} full matrices, "
                f"{report['dropped']} dropped: {_verdict(report)}"
            )
            for hole in report["holes"]:
                click.echo(f"  {hole}")
    wrong = [text for report in reports for text in report["damaged"] + report["holes"]]
    if wrong:
        raise RunError("; ".join(wrong) + "; the undamaged rest stays readable")


def _verdict(report: dict[str, Any]) -> str:
    if report["damaged"]:
        return "DAMAGED"
    return "HOLES" if report["holes"] else "whole"


def _read_everything(run: Run) -> dict[str, Any]:
    """Read every number of a run once; returns counts and what could not be read."""
    damaged = [f"{damage.path}: {damage.reason}" for damage in run.damaged]
    spectra = matrices = 0
    for stage in run.stages:
        try:
            run.all_neuron_norms(stage)
            spectra += run.all_spectra(stage).sigma.shape[0] * len(run.table)
            for name in run.matrices:
                for step in run.update_steps(name, stage):
                    run.update(name, int(step), stage)
                    matrices += 1
        except RunError as error:
            damaged.append(str(error))
    return {
        "path": str(run.path),
        "status": run.status,
        "steps": len(run.steps),
        "spectra": spectra,
        "matrices": matrices,
        "dropped": run.dropped,
        "damaged": damaged,
        "holes": [hole.text for hole in run.holes],
    }
