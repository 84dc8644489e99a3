"""What recording costs a training: every level of detail, and what one would write by hand.

Run it with the project's environment: ``python benchmarks/recording_overhead.py`` (a quarter of an
hour on one core). Every variant trains its own copy of one model on the same batches. They take
turns in blocks of one sampling period, in an order that rotates, each block between two blocks of
plain training; a block's ratio is against the mean of those two neighbours, and the median over
the blocks is the result. So a drift of the machine's speed meets both sides alike, and other
people's work on it spoils a few blocks, not the median. ± is half the range between the quartiles.

CPU seconds are the measure, because they do not count the time that others take. The training
process's are all its threads'; the whole machine's are those and its helper processes'. A block
ends when the helper has finished what it was sent, so nobody pays for a neighbour; within its own
block the helper is the training's neighbour, and where two "cores" are one core's two threads, a
good part of the training's ratio is just that.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from normuon_lens.hooks import attach
from normuon_lens.sample_runs.data import Batches, standard_library
from normuon_lens.sample_runs.model import Shape
from normuon_lens.sample_runs.training import RECIPES, Training

SHAPE = Shape(width=192, heads=4, layers=4)
BATCH = 8
EVERY = 10
BLOCK = EVERY
NEVER = 10**9
GOALS = {"norms": 1.05, "default": 1.10}


class Block(NamedTuple):
    """What one block of steps took: CPU seconds of training and helpers, seconds on the clock."""

    cpu: float
    helpers: float
    wall: float


class Plain:
    """Training as it is, and the base of what watches it."""

    dropped = 0

    def __init__(self, training: Training, folder: Path) -> None:
        self.training, self.folder = training, folder
        self.helpers: set[int] = set()
        self.written = 0

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """Take one step of the training."""
        self.training.step(inputs, targets)

    def settle(self) -> None:
        """Wait until everything that the steps so far gave to do is done."""

    def close(self) -> None:
        """End the recording and count what it wrote."""
        self.sweep()

    def sweep(self) -> None:
        """Count the files written so far and remove them: a long measurement fills a disk."""
        for path in self.folder.rglob("*"):
            if path.is_file():
                self.written += path.stat().st_size
                path.unlink()


class Recorded(Plain):
    """Training with the hooks attached."""

    def __init__(self, training: Training, folder: Path, **options: Any) -> None:
        super().__init__(training, folder)
        before = children()
        self.lens = attach(
            training.model,
            training.optimizers,
            folder / "run.h5",
            include="blocks.*",
            quiet=True,
            on_error="raise",
            **options,
        )
        self.helpers = children() - before

    def settle(self) -> None:
        """Let the helper process finish and commit."""
        self.lens.flush()

    def close(self) -> None:
        """Pack the recording."""
        self.lens.close()
        self.dropped = self.lens.dropped
        super().close()


class ByHand(Plain):
    """What one would write by hand: keep the weights, step, subtract, and do something with it."""

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        self.matrices = {
            name: parameter
            for name, parameter in training.model.named_parameters()
            if name.startswith("blocks.") and parameter.ndim == 2
        }
        self.steps = 0

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """Take one step and look at every update."""
        before = {name: p.detach().clone() for name, p in self.matrices.items()}
        self.training.step(inputs, targets)
        self.steps += 1
        self.look({name: p.detach() - before[name] for name, p in self.matrices.items()})

    def look(self, updates: dict[str, Tensor]) -> None:
        """Do with the updates what this variant is about."""
        raise NotImplementedError


class Histograms(ByHand):
    """TensorBoard histograms of every update."""

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        self.writer = SummaryWriter(str(folder))

    def look(self, updates: dict[str, Tensor]) -> None:
        """Add one histogram a matrix."""
        for name, update in updates.items():
            self.writer.add_histogram(name, update, self.steps)

    def settle(self) -> None:
        """Let its writing thread finish."""
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()
        super().close()


class SingularValues(ByHand):
    """Singular values of every update, in the training process."""

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        self.spectra: list[dict[str, Tensor]] = []

    def look(self, updates: dict[str, Tensor]) -> None:
        """Take one decomposition a matrix."""
        self.spectra.append({name: torch.linalg.svdvals(u) for name, u in updates.items()})


class Saved(ByHand):
    """Every update in a file of its step."""

    def look(self, updates: dict[str, Tensor]) -> None:
        """Write one file."""
        torch.save(updates, self.folder / f"{self.steps:06d}.pt")

    def settle(self) -> None:
        """Make room: what it wrote is counted and removed."""
        self.sweep()


def recorded(**options: Any) -> Callable[[Training, Path], Plain]:
    """Return a variant that attaches a recorder with these options."""
    return lambda training, folder: Recorded(training, folder, **options)


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes
    ----------
    key : str
        What --only calls it.
    name : str
    begin : callable
        Makes it from a training and an empty folder.
    """

    key: str
    name: str
    begin: Callable[[Training, Path], Plain]


VARIANTS = (
    Variant("norms", "norms every step", recorded(every=NEVER, matrices_every=0)),
    Variant("default", f"default: + spectra, matrices every {EVERY}th", recorded(every=EVERY)),
    Variant("spectra", "spectra every step", recorded(every=1, matrices_every=0)),
    Variant("everything", "spectra, matrices every step", recorded(every=1)),
    Variant("stages", "the same with stages", recorded(every=1, stages=True)),
    Variant(
        "shadow",
        "default with three shadows",
        recorded(every=EVERY, shadow=("adamw", "muon", "normuon")),
    ),
    Variant("histogram", "TensorBoard add_histogram every step", Histograms),
    Variant("svdvals", "torch.linalg.svdvals every step", SingularValues),
    Variant("save", "torch.save every step", Saved),
)

PRICES = (
    ("neuron norms, a step", "norms", None),
    ("spectra, a sampled step", "spectra", "norms"),
    ("full matrices, a sampled step", "everything", "spectra"),
    ("stages, a sampled step", "stages", "everything"),
    ("three shadows, a step (sampled every 10th)", "shadow", "default"),
)
"""What has a price, the variant that has it, and the one that has all but it."""


def children() -> set[int]:
    """Return the process ids of this process's children; empty where there is no /proc."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        fields = _stat(path)
        if fields and int(fields[1]) == os.getpid():
            found.add(int(path.parent.name))
    return found


def cpu_seconds(processes: set[int]) -> float:
    """CPU time that these processes have taken so far, seconds."""
    ticks = 0
    for process in processes:
        fields = _stat(Path(f"/proc/{process}/stat"))
        ticks += sum(map(int, fields[11:13])) if fields else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def _stat(path: Path) -> list[str]:
    """Return the fields of a /proc stat file from the state on; none if the process is gone."""
    try:
        return path.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def measure(variant: Plain, batches: Sequence[tuple[Tensor, Tensor]]) -> Block:
    """Train on the batches and return what it took."""
    gc.collect()
    helpers, cpu, wall = cpu_seconds(variant.helpers), time.process_time(), time.perf_counter()
    for inputs, targets in batches:
        variant.step(inputs, targets)
    wall = time.perf_counter() - wall
    variant.settle()
    return Block(time.process_time() - cpu, cpu_seconds(variant.helpers) - helpers, wall)


class Ratios(NamedTuple):
    """One variant against plain training: ratios, one a block, and milliseconds a step."""

    training: list[float]
    wall: list[float]
    machine: list[float]
    training_ms: float
    helpers_ms: float


def against(blocks: Sequence[Block], neighbours: Sequence[Block]) -> Ratios:
    """Relate each block to the mean of the plain blocks before and after it.

    Parameters
    ----------
    blocks : sequence of Block
        One variant's.
    neighbours : sequence of Block
        Twice as many: the plain blocks before and after each.
    """
    cpu = [(a.cpu + b.cpu) / 2 for a, b in zip(neighbours[::2], neighbours[1::2], strict=True)]
    wall = [(a.wall + b.wall) / 2 for a, b in zip(neighbours[::2], neighbours[1::2], strict=True)]
    more = [b.cpu - plain for b, plain in zip(blocks, cpu, strict=True)]
    return Ratios(
        [b.cpu / plain for b, plain in zip(blocks, cpu, strict=True)],
        [b.wall / plain for b, plain in zip(blocks, wall, strict=True)],
        [(b.cpu + b.helpers) / plain for b, plain in zip(blocks, cpu, strict=True)],
        1e3 * statistics.median(more) / BLOCK,
        1e3 * statistics.median(b.helpers for b in blocks) / BLOCK,
    )


def spread(values: Sequence[float]) -> float:
    """Half the range between the quartiles."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def main() -> None:
    """Measure, with progress on standard error, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=160, help="measured steps a variant")
    parser.add_argument("--threads", type=int, default=1, help="of the training process")
    parser.add_argument("--optimizer", default="AdamW", choices=[r.name for r in RECIPES])
    parser.add_argument(
        "--only", nargs="+", choices=[v.key for v in VARIANTS], help="these variants"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    chosen = [v for v in VARIANTS if not given.only or v.key in given.only]
    rounds = max(2, given.steps // BLOCK)
    recipe = next(recipe for recipe in RECIPES if recipe.name == given.optimizer)
    text = standard_library()

    folder = Path(tempfile.mkdtemp(prefix="recording-overhead-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)

        def begin(name: str, make: Callable[[Training, Path], Plain]) -> Plain:
            (folder / name).mkdir()
            return make(Training(recipe, rounds * BLOCK + EVERY, 0, SHAPE), folder / name)

        plain, baseline = begin("plain", Plain), begin("baseline", Plain)
        watched = [begin(v.key, v.begin) for v in chosen]
        blocks, neighbours = take_turns(plain, baseline, watched, rounds, text.train)
        for one in watched:
            one.close()
    results = [against(mine, around) for mine, around in zip(blocks, neighbours, strict=True)]
    step = statistics.median(b.cpu for around in neighbours for b in around) / BLOCK
    print_heading(given, [plain, *watched], step, rounds)
    print_ratios(chosen, watched, results, rounds * BLOCK + EVERY)
    by_key = {v.key: r for v, r in zip(chosen, results, strict=True)}
    print_prices(by_key, recorded_parameters(plain), step)


def take_turns(
    plain: Plain, baseline: Plain, watched: Sequence[Plain], rounds: int, text: Tensor
) -> tuple[list[list[Block]], list[list[Block]]]:
    """Train all in turns; returns the blocks of each and those of the baseline around them.

    The baseline takes more steps than the others, so it is `plain` that their weights are
    compared with.
    """
    source = Batches(text, BATCH, SHAPE.context, 0)
    # Warm-up: allocations, the optimizer's state, and the first step, which is always sampled.
    warm = [source.next() for _ in range(EVERY)]
    for one in (plain, *watched, baseline):
        measure(one, warm)
    blocks: list[list[Block]] = [[] for _ in watched]
    neighbours: list[list[Block]] = [[] for _ in watched]
    began = time.monotonic()
    for number in range(rounds):
        batches = [source.next() for _ in range(BLOCK)]
        measure(plain, batches)
        before = measure(baseline, batches)
        for place in range(len(watched)):
            i = (place + number) % len(watched)
            blocks[i].append(measure(watched[i], batches))
            after = measure(baseline, batches)
            neighbours[i] += [before, after]
            before = after
        left = (time.monotonic() - began) / (number + 1) * (rounds - number - 1)
        print(f"round {number + 1} of {rounds}, {left:.0f} s left", file=sys.stderr, flush=True)
    return blocks, neighbours


def recorded_parameters(plain: Plain) -> int:
    """Count the parameters that the recorders watch."""
    named = plain.training.model.named_parameters()
    return sum(p.numel() for name, p in named if name.startswith("blocks.") and p.ndim == 2)


def print_heading(
    given: argparse.Namespace, everyone: Sequence[Plain], step: float, rounds: int
) -> None:
    """Print what was measured, and whether all variants trained the same weights."""
    weights = [list(one.training.model.parameters()) for one in everyone]
    equal = all(torch.equal(a, b) for w in weights for a, b in zip(weights[0], w, strict=True))
    print(
        f"\nGPT of {sum(p.numel() for p in weights[0]):,} parameters, "
        f"{recorded_parameters(everyone[0]):,} of them recorded\n"
        f"{given.optimizer}, {BATCH} x {SHAPE.context} tokens a step, threads: {given.threads}, "
        f"plain step: {1e3 * step:.0f} ms of CPU\n"
        f"{rounds} blocks of {BLOCK} steps a variant\n"
        f"weights bitwise equal in all variants: {'yes' if equal else 'NO'}\n"
    )


def print_ratios(
    chosen: Sequence[Variant], watched: Sequence[Plain], results: Sequence[Ratios], steps: int
) -> None:
    """Print one row a variant."""
    print(
        f"{'against plain training':<42}{'training CPU':>18}{'wall':>9}{'machine CPU':>13}"
        f"{'dropped':>9}{'MB a step':>11}"
    )
    for variant, one, ratios in zip(chosen, watched, results, strict=True):
        goal = GOALS.get(variant.key)
        print(
            f"{variant.name:<42}"
            f"{statistics.median(ratios.training):>10.3f}x ±{spread(ratios.training):<5.3f}"
            f"{statistics.median(ratios.wall):>9.3f}x"
            f"{statistics.median(ratios.machine):>12.3f}x"
            f"{one.dropped:>9}{one.written / steps / 1e6:>11.2f}"
            + (f"   goal {goal:.2f}x" if goal else "")
        )


def print_prices(results: dict[str, Ratios], parameters: int, step: float) -> None:
    """Print what each thing recorded adds to a step."""
    rows = [
        (name, results[more], results[less] if less else None)
        for name, more, less in PRICES
        if more in results and (less is None or less in results)
    ]
    if not rows:
        return
    print(
        f"\n{'what it adds, CPU milliseconds':<42}{'training':>10}{'helper':>10}{'of a step':>12}"
    )
    print(f"{'':<42}{'per million parameters':>20}{'training':>12}")
    for name, with_it, without in rows:
        training = with_it.training_ms - (without.training_ms if without else 0.0)
        helper = with_it.helpers_ms - (without.helpers_ms if without else 0.0)
        each = parameters / 1e6
        share = training / 1e3 / step
        print(f"{name:<42}{training / each:>10.2f}{helper / each:>10.2f}{share:>12.1%}")


if __name__ == "__main__":
    main()
