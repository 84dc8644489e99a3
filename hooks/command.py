"""``normuon-lens run``: records a training script that was not written for it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import click

from normuon_lens.errors import RunError

from .automatic import AutomaticRecorder, is_taken, numbered
from .script import check_script, run_as_main

SHADOWS = ("adamw", "muon", "normuon")
FOLDER = Path("runs")

EXAMPLES = """\b
Example: normuon-lens run -o runs/x.h5 train.py --lr 0.02
  a module, as python -m:    normuon-lens run -m package.train
  with what NorMuon would do:  normuon-lens run --shadow normuon train.py
  on several processes:
    torchrun --nproc-per-node 2 --no-python normuon-lens run -o runs/x.h5 train.py
"""


@click.command(context_settings={"allow_interspersed_args": False}, epilog=EXAMPLES)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The recording.  [default: runs/SCRIPT.h5, or the next free runs/SCRIPT-2.h5, …]",
)
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a module, as for python -m.")
@click.option(
    "--every",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Spectra on every so many-th step.",
)
@click.option(
    "--norms-every",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Neuron norms on every so many-th step.",
)
@click.option(
    "--matrices-every",
    type=click.IntRange(min=0),
    help="Full matrices on every so many-th step; 0 is never.  [default: as --every]",
)
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Only parameters of such names, as 'blocks.*'. Repeatable.",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="No parameters of such names. Repeatable.",
)
@click.option("--stages", is_flag=True, help="Also the matrices on their way to the update.")
@click.option(
    "--shadow",
    multiple=True,
    metavar="RULE",
    help=f"Also what another rule would do: {', '.join(SHADOWS)}. Repeatable, or by commas.",
)
@click.option(
    "--budget",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SHARE",
    help="Share of the training's time to stay within, as 0.05; records less often if need be.",
)
@click.option("--resume", is_flag=True, help="Append to the recording that is there.")
@click.option("--name", help="Name shown with the run.")
@click.option("--notes", help="Notes shown with the run.")
@click.option("--quiet", is_flag=True, help="Say nothing about what is recorded and where it is.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENTS]...")
def run(
    script: str,
    arguments: tuple[str, ...],
    module: bool,
    output: Path | None,
    shadow: tuple[str, ...],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    **options: Any,
) -> None:
    """Record a training script, without a change to it.

    SCRIPT runs just as under python, with its ARGUMENTS, exit code and signals. Whenever one of
    its optimizers takes a first step, the matrices that it trains are recorded from that step on,
    under the names that they have in the model. All optimizers of one model are one recording; a
    second model's is RUN-2.h5. Options stand before SCRIPT.

    Processes that SCRIPT starts are not recorded: with torchrun or accelerate launch, this command
    stands inside. Sharded weights (FSDP2) are then recorded by all ranks, others by rank 0.
    """
    check_script(script, module=module)
    rules = _rules(shadow)
    path = output or _default(script, module, options["resume"])
    # Of several ranks the first says where the recording is, and what becomes of it.
    is_first = not _is_other_rank()
    if is_first:
        _check_output(path, rules, options["resume"])
    options |= {"include": include or None, "exclude": exclude or None, "shadow": rules}
    recorder = AutomaticRecorder(path, options, mute=not is_first)
    recorder.start()
    run_as_main(script, arguments, recorder.finish, module=module)


def _rules(shadow: tuple[str, ...]) -> tuple[str, ...]:
    rules = [rule.strip() for given in shadow for rule in given.split(",")]
    for rule in rules:
        if rule not in SHADOWS:
            raise click.BadParameter(
                f"{rule!r}: expected {', '.join(SHADOWS)}", param_hint="--shadow"
            )
    return tuple(dict.fromkeys(rules))


def _is_other_rank() -> bool:
    """Whether this is one of several processes of a training, and not the first."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and int(os.environ.get("RANK", "0")) > 0


def _default(script: str, module: bool, resume: bool) -> Path:
    name = script.rpartition(".")[2] if module else Path(script).stem
    path, number = FOLDER / f"{name}.h5", 1
    while not resume and is_taken(numbered(path, number)):
        number += 1
    return numbered(path, number)


def _check_output(path: Path, rules: tuple[str, ...], resume: bool) -> None:
    """Refuse now what would otherwise fail at the first step, perhaps after an hour's loading."""
    stem = path.name.removesuffix(".h5")
    for each in (path, *(path.with_name(f"{stem}.shadow-{rule}.h5") for rule in rules)):
        if is_taken(each) and not resume:
            raise RunError(
                f"{each}: there is a recording already; choose another by -o, delete it, or append "
                "by --resume"
            )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror})") from None
