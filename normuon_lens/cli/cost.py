"""``normuon-lens cost``: memory, traffic and work of an optimizer, before training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from normuon_lens.cli.runs import json_option
from normuon_lens.cli.tables import console, figure, new_table, print_json
from normuon_lens.optim.cost import PAPER_TRAFFIC, RULES, Cost, Shape
from normuon_lens.optim.cost import cost as count_cost
from normuon_lens.optim.owners import ORDERS
from normuon_lens.optim.presets import PRESETS, Preset, find_preset, read_shapes

PAPER = "arXiv 2510.05491"
PAPER_STATE = {"AdamW": "2mn", "Muon": "mn", "NorMuon": "m(n+1)"}
PRECISIONS = {"float32": "FP32", "bfloat16": "BF16"}
SCHEMES = {"owners": "by owners", "everywhere": "everywhere"}


@dataclass(frozen=True)
class Subject:
    """A model: its name, a line about it, and the shapes of its parameters."""

    name: str
    about: str
    matrices: Sequence[Shape]
    others: Sequence[tuple[int, ...]] = ()

    @classmethod
    def of(cls, preset: Preset) -> Subject:
        """Return a known model."""
        matrices = [shape for _, shape in preset.matrices()]
        return cls(preset.name, preset.about, matrices, [shape for _, shape in preset.others()])


@click.command(epilog="Example: normuon-lens cost --model gpt-1.1b --ranks 16")
@click.option("--model", metavar="NAME", help=f"One of {', '.join(PRESETS)}.")
@click.option(
    "--shapes",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Or your own matrices: 'name m n' on each line, '48 * m n' for 48 of them, or JSON.",
)
@click.option(
    "--ranks",
    type=click.IntRange(1, 2**16),
    default=1,
    show_default=True,
    metavar="N",
    help="Processes that share the model, each with some rows of every parameter (FSDP).",
)
@click.option(
    "--steps",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    metavar="N",
    help="Newton-Schulz iterations.",
)
@click.option(
    "--owners",
    type=click.Choice(ORDERS),
    default=ORDERS[0],
    show_default=True,
    help="How matrices are dealt out to the ranks that orthogonalize them.",
)
@json_option
def cost(
    model: str | None, shapes: Path | None, ranks: int, steps: int, owners: str, as_json: bool
) -> None:
    """Count what an optimizer costs, before training.

    Memory of its state, traffic between ranks, and the work of Newton-Schulz, under AdamW, Muon
    and NorMuon, in FP32 and BF16, beside the figures of the NorMuon paper. All of it is counted
    from the shapes of the weights. Without --model or --shapes: an overview of the known models.
    """
    if model is not None and shapes is not None:
        raise click.UsageError("give --model or --shapes, not both")
    if shapes is not None:
        subjects = [Subject(str(shapes), "matrices from a file", read_shapes(shapes))]
    else:
        presets = PRESETS.values() if model is None else [find_preset(model)]
        subjects = [Subject.of(preset) for preset in presets]
    counted = [
        (each, count_cost(each.matrices, each.others, ranks=ranks, steps=steps, order=owners))
        for each in subjects
    ]
    if as_json:
        settings = {"ranks": ranks, "steps": steps, "owners": owners, "paper": _paper()}
        print_json(settings | {"models": [_content(*each) for each in counted]})
    elif model is None and shapes is None:
        _print_overview(counted, ranks, console())
    else:
        _print_one(*counted[0], ranks, steps, console())


def _paper() -> dict[str, Any]:
    traffic = {
        precision: {rule: _paper_traffic(rule, precision) for rule in RULES}
        for precision in PAPER_TRAFFIC
    }
    return {"source": PAPER, "state": PAPER_STATE, "traffic_per_parameter": traffic}


def _paper_traffic(rule: str, precision: str) -> int:
    return PAPER_TRAFFIC[precision][rule != "AdamW"]


def _content(subject: Subject, costs: Sequence[Cost]) -> dict[str, Any]:
    return {
        "name": subject.name,
        "about": subject.about,
        "matrices": len(subject.matrices),
        "matrix_elements": _elements(subject.matrices),
        "other_elements": _elements(subject.others),
        "costs": [
            asdict(row) | {"sent_per_parameter": row.sent_per_parameter, "balance": row.balance}
            for row in costs
        ],
    }


def _print_overview(
    counted: Sequence[tuple[Subject, Sequence[Cost]]], ranks: int, to: Console
) -> None:
    columns = ["model", "in matrices", "AdamW state", "NorMuon state", "NorMuon work"]
    if ranks > 1:
        columns += ["a rank sends", "busiest / average"]
    table = new_table(f"Known models in FP32, on {_ranks(ranks)}", columns)
    for subject, costs in counted:
        adamw = _row(costs, "AdamW", None)
        normuon = _row(costs, "NorMuon", "owners")
        cells = [
            _count(_elements(subject.matrices)),
            _memory(sum(adamw.rank_state)),
            _memory(sum(normuon.rank_state)),
            _flops(sum(normuon.rank_flops)),
        ]
        if ranks > 1:
            cells += [_memory(max(normuon.rank_sent)), f"{normuon.balance:.2f}"]
        table.add_row(subject.name, *cells)
    to.print(table)
    to.print("Look closer: normuon-lens cost --model gpt-1.1b --ranks 16")


def _print_one(
    subject: Subject, costs: Sequence[Cost], ranks: int, steps: int, to: Console
) -> None:
    to.print(f"{subject.name}: {subject.about}")
    many = "one matrix" if len(subject.matrices) == 1 else f"{len(subject.matrices):,} matrices"
    to.print(f"{_count(_elements(subject.matrices))} parameters in {many}")
    if subject.others:
        rest = _count(_elements(subject.others))
        to.print(f"{rest} in embeddings, norms and head, which are AdamW's under every rule")
    _print_state(costs, ranks, to, whole_model=bool(subject.others))
    if ranks > 1:
        _print_traffic(costs, ranks, to)
        _print_work(costs, steps, to)
    for note in _notes(costs, steps, ranks):
        to.print(note)


def _notes(costs: Sequence[Cost], steps: int, ranks: int) -> Iterator[str]:
    if ranks == 1:
        work = _flops(sum(_row(costs, "NorMuon", "owners").rank_flops))
        yield f"Newton-Schulz: {work} in a step, {steps} iterations of plain products."
        yield "With --ranks 16: traffic, and balance of the work, on sixteen ranks."
    else:
        yield (
            "by owners: one rank gets all rows of a matrix and sends back their update; "
            "everywhere: every rank gets them."
        )
    yield (
        f"paper: NorMuon, {PAPER}: state of an m × n matrix; traffic with every pass over the "
        "parameters counted whole."
    )
    yield "BF16 state is for comparison: our own optimizers keep at least FP32."


def _print_state(costs: Sequence[Cost], ranks: int, to: Console, *, whole_model: bool) -> None:
    columns = ["", "optimizer", "paper", "B/param", "of AdamW", "matrices"]
    columns += ["model"] if whole_model else []
    columns += ["a rank"] if ranks > 1 else []
    table = new_table("State: what is kept from step to step", columns, text_columns=3)
    for precision, short in PRECISIONS.items():
        table.add_section()
        adamw = _row(costs, "AdamW", None, precision)
        muon, normuon = (_row(costs, rule, "owners", precision) for rule in RULES[1:])
        for row in (adamw, muon, normuon):
            first = row is adamw
            cells = [
                short if first else "",
                row.rule,
                PAPER_STATE[row.rule] + ("" if first else ": half"),
                f"{row.matrix_state / row.parameters:.3f}",
                f"{row.matrix_state / adamw.matrix_state:.1%}",
                _memory(row.matrix_state),
            ]
            cells += [_memory(sum(row.rank_state))] if whole_model else []
            cells += [_memory(max(row.rank_state))] if ranks > 1 else []
            table.add_row(*cells)
    to.print(table)


def _print_traffic(costs: Sequence[Cost], ranks: int, to: Console) -> None:
    table = new_table(
        "Traffic: what a rank sends in a step, FSDP's share included",
        ["", "optimizer", "B/param", "more", "busiest rank", "paper", "more"],
        text_columns=2,
    )
    for row in costs:
        fsdp, paper = (_paper_traffic(rule, row.precision) for rule in ("AdamW", row.rule))
        # Of each pass over the parameters a rank sends what it does not keep.
        sent = fsdp * (ranks - 1) / ranks
        if row.scheme is None:
            table.add_section()
            table.add_row(PRECISIONS[row.precision], row.rule, f"{sent:.2f}", "", "", str(fsdp))
            continue
        cells = [
            f"{sent + row.sent_per_parameter:.2f}",
            f"+{row.sent_per_parameter / sent:.1%}",
            f"+{_memory(max(row.rank_sent))}",
        ]
        if row.scheme == "owners":
            cells += [str(paper), f"+{paper / fsdp - 1:.0%}"]
        table.add_row("", f"{row.rule}, {SCHEMES[row.scheme]}", *cells)
    to.print(table)


def _print_work(costs: Sequence[Cost], steps: int, to: Console) -> None:
    columns = ["all ranks", "busiest rank", "average", "busiest / average", "idle ranks"]
    table = new_table(
        f"Newton-Schulz: work in a step, {steps} iterations of plain products",
        ["orthogonalized", *columns],
    )
    for scheme, shown in SCHEMES.items():
        row = _row(costs, "NorMuon", scheme)
        work = row.rank_flops
        average = sum(work) / len(work)
        figures = map(_flops, (sum(work), max(work), average))
        table.add_row(shown, *figures, f"{row.balance:.2f}", str(work.count(0)))
    to.print(table)


def _row(costs: Sequence[Cost], rule: str, scheme: str | None, precision: str = "float32") -> Cost:
    wanted = (rule, scheme, precision)
    return next(row for row in costs if (row.rule, row.scheme, row.precision) == wanted)


def _elements(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes))


def _ranks(ranks: int) -> str:
    return "one rank" if ranks == 1 else f"{ranks:,} ranks"


def _count(number: float) -> str:
    return _scaled(number, 1000, ("", " K", " M", " B", " T"))


def _memory(number: float) -> str:
    return _scaled(number, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB", " EiB"))


def _flops(number: float) -> str:
    return _scaled(
        number, 1000, (" FLOP", " KFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP", " EFLOP")
    )


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    """Return three significant digits of a number, in the largest unit that it fills."""
    power = 0
    while number >= base and power < len(units) - 1:
        number /= base
        power += 1
    return f"{figure(number) if power else round(number)}{units[power]}"
