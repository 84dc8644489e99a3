"""``normuon-lens summary``: one run, matrix by matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from normuon_lens.cli.runs import json_option, open_runs, runs_argument, skip_option
from normuon_lens.cli.tables import console, figure, new_table, print_json

if TYPE_CHECKING:
    from normuon_lens.runfile import Run

COLUMNS = ("condition_number", "spread_p95_p5", "neuron_cv", "neuron_max_min", "neuron_starved")
BOUND = "condition_is_lower_bound"


@click.command(epilog="Example: normuon-lens summary runs/normuon.h5")
@runs_argument
@skip_option
@json_option
def summary(runs: tuple[str, ...], skip: int, as_json: bool) -> None:
    """Show one run, matrix by matrix.

    Figures are medians over the recorded steps. A RUN may also be a folder.
    """
    summaries = [_summarise(run, skip) for run in open_runs(runs)]
    if as_json:
        print_json(summaries)
        return
    for content in summaries:
        _print(content, skip)


def _summarise(run: Run, skip: int) -> dict[str, Any]:
    from normuon_lens.analysis import measure
    from normuon_lens.analysis.crossing import final_loss
    from normuon_lens.analysis.remarks import remarks
    from normuon_lens.analysis.settled import finite_median, is_bound, settled

    measured = {
        name: settled(measure(run, name), skip=skip)
        for name in (*COLUMNS, BOUND)
        if "update" in run.stages  # not even one step may have been written
    }
    matrices = [
        {
            "matrix": matrix.name,
            "shape": [matrix.m, matrix.n],
            **{metric: finite_median(measured[metric][:, i]) for metric in COLUMNS},
            BOUND: is_bound(measured["condition_number"][:, i], measured[BOUND][:, i]),
        }
        for i, matrix in enumerate(run.table if measured else [])
    ]
    return {
        "path": str(run.path),
        "name": run.name,
        "optimizer": run.optimizer,
        "shadow_of": run.metadata.get("shadow_of", ""),
        "groups": run.metadata.get("groups", []),
        "status": run.status,
        "steps": len(run.steps),
        "last_step": int(run.steps[-1]) if len(run.steps) else 0,
        "void_steps": int(run.void.sum()),
        "repeated_steps": run.overlaps,
        "sampled_steps": len(run.spectrum_steps()),
        "dropped": run.dropped,
        "remarks": remarks(run),
        "loss": final_loss(run),
        "matrices": matrices,
    }


def _print(content: dict[str, Any], skip: int) -> None:
    from normuon_lens.metrics import describe

    to = console()
    counts = [f"{content['steps']} steps", f"{content['sampled_steps']} sampled", content["status"]]
    if content["void_steps"]:
        counts.append(f"{content['void_steps']} void steps")
    shadow = f" (shadow of {content['shadow_of']})" if content["shadow_of"] else ""
    said = f"{content['path']}: {content['optimizer']}{shadow}, {', '.join(counts)}"
    to.print(said, soft_wrap=True)
    for group in content["groups"]:
        known = {key: value for key, value in group.items() if value is not None}
        name = known.pop("optimizer", content["optimizer"])
        settings = ", ".join(f"{key}={value}" for key, value in known.items() if value is not False)
        to.print(f"  {name}: {settings}", soft_wrap=True)
    for remark in content["remarks"]:
        to.print(f"  {remark}", soft_wrap=True)
    if not content["matrices"]:
        return
    labels = [describe(metric).label for metric in COLUMNS]
    title = f"Updates (medians; first {skip} steps left out)"
    table = new_table(title, ["matrix", "shape", *labels])
    for row in content["matrices"]:
        cells = [figure(row[metric]) for metric in COLUMNS]
        if row[BOUND]:
            cells[0] = f"≥ {cells[0]}"
        table.add_row(row["matrix"], " × ".join(map(str, row["shape"])), *cells)
    to.print(table)
