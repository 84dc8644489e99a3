"""What one optimizer step costs: ours, the others', and the matrix products it consists of.

Run it with the project's environment: ``python benchmarks/optimizer_step.py`` (half an hour on a
CPU that is slow in bfloat16; `--quick` takes minutes). A step is over 12 matrices of 768 x 768 and
6 of 3072 x 768 in float32. The optimizers take turns, a block each, in an order that rotates, and a
ratio is between two blocks of one round; the median over the rounds is the result. So a drift of
the machine's speed meets all alike. ± is half the range between the quartiles.

Some CPUs multiply bfloat16 tens of times slower than float32, and what forces bfloat16 takes
minutes a step there. So every optimizer first steps a single matrix. If a whole step would then
take longer than `--limit` seconds, it steps a sixth of the matrices, which counts six times (~),
and if that is still too long, only once. The honest peers on such a machine are the rows "in
float32": the same code with its casts to bfloat16 giving float32, or the package's own option.

The bare products are those of plain Newton-Schulz, fifteen a matrix on its smaller side. Who gets
along with less arithmetic can be below them.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orthogonalization_accuracy as accuracy
import torch
from peers import OTHER_NORMUONS, Unavailable, Variant, variants
from torch.nn import Parameter

from normuon_lens.optim.orthogonalize import fast_dtype

SHAPES = [(768, 768)] * 12 + [(3072, 768)] * 6


class Part(NamedTuple):
    """Some of the matrices, and how many times their step makes a whole one."""

    matrices: Sequence[int]
    times: int


# A tall matrix takes three times the arithmetic of a square one.
WHOLE, SIXTH, ONE = Part(range(18), 1), Part((0, 1, 12), 6), Part((0,), 30)

BLOCK_SECONDS = 0.25
"""A block has as many steps as fill this time, at least one."""

REFERENCES = {
    "torch-muon": ("torch Muon", "as it is"),
    "torch-muon-float32": ("torch Muon", "in float32"),
    "floor-float32": ("products", "in float32"),
    "floor-bfloat16": ("products", "in bfloat16"),
}
"""Rows that all others are related to, and how the table's head calls them."""

GOALS = (
    dict.fromkeys(("torch-muon", "torch-muon-float32"), 0.85)
    | dict.fromkeys(OTHER_NORMUONS, 0.7)
    | {"muon": 1.05}
)
"""What our NorMuon may take at most, in units of other rows."""

WARM_UP_GOAL = 3.0
"""A first step that makes its state takes less than that; one that compiles, tens of times more."""


class Gradients:
    """One gradient a matrix, handed out anew before every step: some optimizers write into it."""

    def __init__(self, device: str) -> None:
        self.drawn = [torch.randn(shape, device=device) for shape in SHAPES]
        self.handed_out = [gradient.clone() for gradient in self.drawn]

    def hand_out(self, weights: Sequence[Parameter], matrices: Sequence[int]) -> None:
        """Give these matrices their gradient, and the others none: no optimizer steps those."""
        for weight in weights:
            weight.grad = None
        for i in matrices:
            weights[i].grad = self.handed_out[i].copy_(self.drawn[i])


class Contestant:
    """One optimizer with weights of its own.

    Parameters
    ----------
    variant : Variant
    gradients : Gradients

    Attributes
    ----------
    part : Part
        What a step is over.
    once : bool
        Too slow for more than one block.
    blocks : list of float
        Seconds of a whole step, one a block.
    warm_up : float
        The very first step of one matrix over its second: building state, compiling.
    """

    def __init__(self, variant: Variant, gradients: Gradients) -> None:
        self.variant, self.gradients = variant, gradients
        self.weights = [Parameter(0.02 * torch.randn_like(drawn)) for drawn in gradients.drawn]
        self.optimizer = variant.make(self.weights)
        self.part, self.once, self.steps = WHOLE, False, 1
        self.blocks: list[float] = []
        self.warm_up = self.step(ONE) / self.step(ONE)

    def step(self, part: Part) -> float:
        """Take one step over a part of the matrices; returns seconds of a whole step."""
        self.gradients.hand_out(self.weights, part.matrices)
        with self.variant.around():
            seconds = timed_on_gpu if self.weights[0].is_cuda else timed
            return part.times * seconds(self.optimizer.step)

    def rehearse(self, parts: Sequence[Part], limit: float) -> None:
        """Decide what can be measured in the time there is, and take that step once."""
        whole = self.step(ONE)
        fitting = [part for part in parts if whole / part.times <= limit]
        self.part, self.once = (fitting or parts[-1:])[0], not fitting
        self.blocks, self.steps = [], 1
        if not self.once:
            taken = self.step(self.part) / self.part.times
            self.steps = max(1, round(BLOCK_SECONDS / taken))

    def measure(self) -> None:
        """Take the steps of one block."""
        gc.collect()
        self.blocks.append(statistics.fmean(self.step(self.part) for _ in range(self.steps)))


def timed(step: Any) -> float:
    """Seconds that a step takes on the clock."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def timed_on_gpu(step: Any) -> float:
    """Seconds between two events around a step, the waits for its launches included."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    step()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3


class Ratio(NamedTuple):
    """One row against another: median over the rounds, and half the range of the quartiles."""

    median: float
    spread: float


def ratio(row: Contestant, other: Contestant) -> Ratio:
    """Relate the blocks of two rows, round by round."""
    ratios = [a / b for a, b in zip(row.blocks, other.blocks, strict=False)]
    if len(ratios) == 1:
        return Ratio(ratios[0], math.nan)
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, (high - low) / 2)


def enter(chosen: Sequence[Variant], device: str) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Make everyone that can run here; returns them, and why the others cannot."""
    gradients = Gradients(device)
    entered, absent = {}, {}
    for variant in chosen:
        print(f"first steps of {variant.name}", file=sys.stderr, flush=True)
        try:
            entered[variant.key] = Contestant(variant, gradients)
        except Unavailable as reason:
            absent[variant.name] = str(reason)
        except Exception as problem:  # other people's code may fail in any way
            absent[variant.name] = f"failed: {problem}".splitlines()[0]
    return entered, absent


def take_turns(
    rows: Sequence[Contestant], rounds: int, parts: Sequence[Part], limit: float
) -> None:
    """Measure all in turns."""
    for row in rows:
        row.rehearse(parts, limit)
    for number in range(rounds):
        began = time.monotonic()
        for place in range(len(rows)):
            row = rows[(place + number) % len(rows)]
            if number == 0 or not row.once:
                row.measure()
        taken = time.monotonic() - began
        print(f"round {number + 1} of {rounds}: {taken:.0f} s", file=sys.stderr, flush=True)


def machine(device: str) -> dict[str, Any]:
    """Facts that the figures depend on."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "chosen dtype": str(fast_dtype(device)).removeprefix("torch."),
    }


def print_rows(rows: dict[str, Contestant], absent: dict[str, str]) -> None:
    """Print one line a row."""
    references = {key: head for key, head in REFERENCES.items() if key in rows}
    heads = [("ms a step", "median"), ("", "min")]
    heads += [*references.values(), ("first step", "/ second")]
    for line in zip(*heads, strict=True):
        print(" " * 42 + "".join(f"{word:>13}" for word in line))
    for row in rows.values():
        mark = "~" if row.once or row.part.times > 1 else " "
        ratios = [ratio(row, rows[key]).median for key in references]
        print(
            f"{row.variant.name:<42}{mark}{1e3 * statistics.median(row.blocks):>12.1f}"
            f"{1e3 * min(row.blocks):>13.1f}"
            + "".join(f"{value:>12.3f}x" for value in ratios)
            + f"{row.warm_up:>12.1f}x"
        )
    for name, reason in absent.items():
        print(f"{name:<42}{reason}")


def print_goals(rows: dict[str, Contestant]) -> None:
    """Print how our NorMuon stands to its goals."""
    if "normuon" not in rows:
        return
    ours = rows["normuon"]
    print("\nour NorMuon, in units of")
    for key, goal in GOALS.items():
        if key in rows:
            found = ratio(ours, rows[key])
            print_goal(rows[key].variant.name, found.median, f"±{found.spread:.3f}", goal)
    print_goal("first step, of the second", ours.warm_up, "", WARM_UP_GOAL)


def print_goal(name: str, found: float, spread: str, goal: float) -> None:
    """Print one line of the goals."""
    verdict = "met" if found <= goal else "NOT MET"
    print(f"  {name:<40}{found:>12.3f}x {spread:<8}goal {goal:.2f}x  {verdict}")


def as_json(rows: dict[str, Contestant]) -> dict[str, Any]:
    """Return everything measured, by row."""
    return {
        key: {
            "name": row.variant.name,
            "seconds": row.blocks,
            "warm_up": row.warm_up,
            "share_of_matrices": 1 / row.part.times,
            "steps_a_block": row.steps,
            "ratios": {
                other: ratio(row, rows[other]).median for other in REFERENCES if other in rows
            },
        }
        for key, row in rows.items()
    }


def main() -> None:
    """Measure, with progress on standard error, and print the tables."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="rows: " + ", ".join(variant.key for variant in variants("cpu")),
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9, help="blocks a row (9)")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds a step may take (20)")
    parser.add_argument("--quick", action="store_true", help="step a sixth of the matrices, ~")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help='these rows, "normuon*"')
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-accuracy", action="store_true", help="leave that table out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the numbers")
    given = parser.parse_args()
    torch.manual_seed(0)
    parts = (SIXTH, ONE) if given.quick else (WHOLE, SIXTH)
    chosen = [
        variant
        for variant in variants(given.device)
        if any(fnmatch.fnmatch(variant.key, pattern) for pattern in given.only or ["*"])
    ]
    facts = machine(given.device)
    print(", ".join(f"{name}: {value}" for name, value in facts.items()))
    kept: dict[str, Any] = {"machine": facts, "threads": {}}
    torch.set_num_threads(given.threads[0])
    rows, absent = enter(chosen, given.device)
    for threads in given.threads if given.device == "cpu" else given.threads[:1]:
        torch.set_num_threads(threads)
        take_turns(list(rows.values()), given.rounds, parts, given.limit)
        print(f"\nthreads: {threads}, rounds: {given.rounds}\n")
        print_rows(rows, absent)
        print_goals(rows)
        kept["threads"][threads] = as_json(rows)
    if not given.no_accuracy:
        found = accuracy.measure(given.device)
        accuracy.print_tables(found)
        kept["accuracy"] = [one._asdict() for one in found]
    if given.json:
        given.json.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
