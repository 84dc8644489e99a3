"""``normuon-lens check``: is a recording whole, and is every number the one that was written?"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normuon_lens.cli.pack import escaped, progress_bar
from normuon_lens.cli.runs import find_recordings, json_option, runs_argument
from normuon_lens.cli.tables import print_json
from normuon_lens.errors import RunError

if TYPE_CHECKING:
    from normuon_lens.runfile import Run

MOST = 20
"""Lines for one run; --json has them all."""


@click.command(epilog="Example: normuon-lens check runs/normuon.h5")
@runs_argument
@json_option
def check(runs: tuple[str, ...], as_json: bool) -> None:
    """Say whether a recording is whole.

    Reads it from end to end and compares every block of numbers with its checksum. Says what is
    damaged, what is still good and how to save that, and ends with exit code 2 if anything is
    damaged, or if one of several ranks left a hole. A RUN may also be a folder.
    """
    from normuon_lens.runfile.pack import in_short

    reports = []
    with progress_bar() as bar:
        for path in find_recordings(runs):
            task = bar.add_task(escaped(path.name), total=None)

            def progress(done: int, total: int, task: Any = task) -> None:
                bar.update(task, completed=done, total=total, refresh=True)

            reports.append(_report(path, progress))
            bar.remove_task(task)
    if as_json:
        print_json(reports)
    else:
        for report in reports:
            _print(report)
    wrong = [text for report in reports for text in report["damaged"] + report["holes"]]
    if wrong:
        raise RunError(in_short(wrong))


def _report(path: Path, progress: Callable[[int, int], None]) -> dict[str, Any]:
    from normuon_lens.runfile import open_run
    from normuon_lens.runfile.pack import leftovers

    try:
        run = open_run(path)
    except RunError as error:
        return {"path": str(path), "status": "unreadable", "damaged": [str(error)], "holes": []}
    total = max(1, run.size)
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        progress(min(done, total), total)

    counts = _count(run)
    report: dict[str, Any] = {
        "path": str(run.path),
        "status": run.status,
        "steps": len(run.steps),
        "spectra": sum(len(run.spectrum_steps(stage)) for stage in run.stages) * len(run.table),
        "matrices": sum(
            len(run.update_steps(name, stage)) for stage in run.stages for name in run.matrices
        ),
        "dropped": run.dropped,
        "checksums": run.has_checksums,
        "damaged": [
            f"{damage.path.name}: {_span(damage.steps)}{damage.reason}" for damage in run.damaged
        ],
        "flaws": [],
        "holes": [hole.text for hole in run.holes],
        "leftovers": [] if run.live else leftovers(run.path),
    }
    flaws = list(run.flaws(more))
    if not flaws:
        return report
    report["damaged"] += [flaw.text for flaw in flaws]
    report["flaws"] = [
        {
            "file": str(flaw.path),
            "dataset": flaw.dataset,
            "rows": flaw.rows,
            "steps": flaw.steps,
            "reason": flaw.reason,
        }
        for flaw in flaws
    ]
    run.leave_out(flaws)
    left = _count(run)
    # Rows of norms stay, as NaN.
    left["row norms"] -= sum(
        flaw.rows[1] - flaw.rows[0] for flaw in flaws if flaw.dataset.startswith("neurons/")
    )
    report["good"] = {name: [max(0, left[name]), counts[name]] for name in counts}
    return report


def _span(steps: tuple[int, int] | None) -> str:
    return f"steps {steps[0]}–{steps[1]}: " if steps else ""


def _count(run: Run) -> dict[str, int]:
    """Count the records of a run, those of repeated steps too."""
    counts = {"steps": 0, "row norms": 0, "spectra": 0, "full matrices": 0}
    for segment in run.segments():
        for path, array in segment.arrays.items():
            if path == "steps/step":
                counts["steps"] += len(array)
            elif path.startswith("neurons/"):
                counts["row norms"] += len(array)
            elif path.startswith("spectra/") and path.endswith("/step"):
                counts["spectra"] += len(array) * len(run.table)
            elif path.startswith("updates/") and path.endswith("_step"):
                counts["full matrices"] += len(array)
    return counts


def _print(report: dict[str, Any]) -> None:
    if report["status"] == "unreadable":
        click.echo(f"{report['path']}: UNREADABLE")
    else:
        click.echo(
            f"{report['path']}: {report['status']}, {report['steps']} steps, "
            f"{report['spectra']} spectra, {report['matrices']} full matrices, "
            f"{report['dropped']} dropped: {_verdict(report)}"
        )
    wrong = report["damaged"] + report["holes"]
    for line in wrong[:MOST]:
        click.echo(f"  {line}")
    if len(wrong) > MOST:
        click.echo(f"  and {len(wrong) - MOST} more, see --json")
    if good := report.get("good"):
        left = [f"{count} of {total} {name}" for name, (count, total) in good.items() if total]
        click.echo(f"  still good: {', '.join(left)}")
    if wrong and report["status"] != "unreadable":
        path = Path(report["path"])
        saved = path.with_name(f"{path.stem}-saved.h5")
        click.echo(
            "  to save what is good: normuon-lens pack "
            f"{shlex.quote(str(path))} -o {shlex.quote(str(saved))}"
        )
    for line in report.get("leftovers", [])[:MOST]:
        click.echo(f"  left over, {line}")


def _verdict(report: dict[str, Any]) -> str:
    if report["damaged"]:
        return "DAMAGED"
    if report["holes"]:
        return "HOLES"
    if not report["checksums"]:
        return "whole (no checksums in it: only what HDF5 itself checks)"
    return "whole"
