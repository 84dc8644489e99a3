"""What recording costs a training whose weights are sharded over two ranks, and what it sends.

Run it with the project's environment: ``python benchmarks/sharded_overhead.py`` (about ten
minutes); it starts its ranks itself. Every variant trains its own copy of one model by FSDP2. As in
`recording_overhead.py` they take turns in blocks, each between two blocks of plain training, and
the median over the blocks is the result; ± is half the range between the quartiles. Ranks wait for
each other in every step, so the measure is the clock of the slowest rank, beside the CPU time of
all ranks. Where two ranks and their helper processes share two cores, the clock also counts what
the helpers take.

Bytes are counted by the operating system, on the loopback interface that all ranks talk through: a
recorded block's less those of its plain neighbours, per sampled step, headers of the network
included. The formula beside them is what the rows of all matrices come to: 4 bytes for every entry
that is not on its owner already.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from recording_overhead import (
    BLOCK,
    EVERY,
    NEVER,
    SHAPE,
    Block,
    Plain,
    measure,
    recorded,
    spread,
)
from torch import Tensor
from torch.distributed.tensor import DTensor

from normuon_lens.sample_runs.data import Batches, standard_library
from normuon_lens.sample_runs.training import RECIPES, Training

BATCH = 8
VARIANTS = {
    "norms every step": recorded(every=NEVER, matrices_every=0),
    f"default: + spectra, matrices every {EVERY}th": recorded(every=EVERY),
    "spectra, matrices every step": recorded(every=1),
}
SAMPLES = (0, 1, BLOCK)
"""Sampled steps in a block of each variant."""
LOOPBACK = "/sys/class/net/lo/statistics/tx_bytes"


class Turn(NamedTuple):
    """One block: seconds on the slowest rank's clock, CPU seconds of all ranks, bytes sent."""

    wall: float
    cpu: float
    machine: float
    sent: float


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=80, help="measured steps a variant")
    parser.add_argument("--ranks", type=int, default=2)
    given = parser.parse_args()
    if "RANK" not in os.environ:
        torchrun = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={given.ranks}",
        ]
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])
    dist.init_process_group("gloo")
    for recipe in (RECIPES[0], RECIPES[2]):
        folder = [tempfile.mkdtemp(prefix="sharded-overhead-") if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(folder)
        try:
            compare(recipe.name, max(2, given.steps // BLOCK), Path(folder[0]))
        finally:
            dist.barrier()
            shutil.rmtree(folder[0], ignore_errors=True)
    dist.destroy_process_group()


def compare(optimizer: str, rounds: int, folder: Path) -> None:
    """Train all variants under one optimizer in turns, and print what they cost."""
    recipe = next(recipe for recipe in RECIPES if recipe.name == optimizer)
    text = standard_library()

    def begin(name: str, make: Callable[[Training, Path], Plain]) -> Plain:
        place = folder / name.replace(" ", "-")
        place.mkdir(exist_ok=True)
        return make(Training(recipe, rounds * BLOCK + EVERY, 0, SHAPE), place)

    plain, baseline = begin("plain", Plain), begin("baseline", Plain)
    watched = [begin(name, make) for name, make in VARIANTS.items()]
    source = Batches(text.train, BATCH, SHAPE.context, 0)
    warm = [source.next() for _ in range(EVERY)]
    for one in (plain, *watched, baseline):
        together(one, warm)
    turns: list[list[Turn]] = [[] for _ in watched]
    around: list[list[Turn]] = [[] for _ in watched]
    for number in range(rounds):
        batches = [source.next() for _ in range(BLOCK)]
        together(plain, batches)
        before = together(baseline, batches)
        for place in range(len(watched)):
            i = (place + number) % len(watched)
            turns[i].append(together(watched[i], batches))
            after = together(baseline, batches)
            around[i] += [before, after]
            before = after
        if dist.get_rank() == 0:
            print(f"{optimizer}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    for one in watched:
        one.close()
    equal = all(same_weights(plain, one) for one in watched)
    if dist.get_rank() == 0:
        report(optimizer, plain.training, watched, turns, around, equal)


def together(one: Plain, batches: Sequence[tuple[Tensor, Tensor]]) -> Turn:
    """Train on the batches on all ranks at once, and add up what it took."""
    dist.barrier()
    sent = int(Path(LOOPBACK).read_text())
    block: Block = measure(one, batches)
    dist.barrier()
    sent = int(Path(LOOPBACK).read_text()) - sent
    dist.barrier()  # nobody sends before everybody has read
    slowest = torch.tensor([block.wall], dtype=torch.float64)
    total = torch.tensor([block.cpu, block.cpu + block.helpers], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return Turn(slowest.item(), *total.tolist(), sent)


def same_weights(one: Plain, other: Plain) -> bool:
    """Whether two trainings hold bitwise equal weights, on all ranks."""
    pairs = zip(one.training.model.parameters(), other.training.model.parameters(), strict=True)
    equal = torch.tensor([all(torch.equal(local(a), local(b)) for a, b in pairs)], dtype=torch.int)
    dist.all_reduce(equal, dist.ReduceOp.MIN)
    return bool(equal)


def local(parameter: Tensor) -> Tensor:
    """Return the rows on this rank."""
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


def report(
    optimizer: str,
    training: Training,
    watched: Sequence[Plain],
    turns: Sequence[Sequence[Turn]],
    around: Sequence[Sequence[Turn]],
    equal: bool,
) -> None:
    """Print one row a variant."""
    ranks = dist.get_world_size()
    shapes = [
        tuple(p.shape)
        for name, p in training.model.named_parameters()
        if name.startswith("blocks.") and p.ndim == 2
    ]
    step = statistics.median(turn.wall for turns_of in around for turn in turns_of) / BLOCK
    print(
        f"\n{optimizer} on {ranks} ranks (FSDP2, gloo), {sum(m * n for m, n in shapes):,} recorded "
        f"parameters, plain step {1e3 * step:.0f} ms\n"
        f"weights bitwise equal in all variants: {'yes' if equal else 'NO'}\n"
        f"{'against plain training':<42}{'clock':>18}{'ranks CPU':>12}{'machine CPU':>13}"
        f"{'dropped':>9}{'kB a sample':>13}{'formula':>10}"
    )
    for name, one, mine, beside, samples in zip(
        VARIANTS, watched, turns, around, SAMPLES, strict=True
    ):
        base = [
            Turn(*(statistics.mean(pair) for pair in zip(before, after, strict=True)))
            for before, after in zip(beside[::2], beside[1::2], strict=True)
        ]
        both = list(zip(mine, base, strict=True))
        clock = [turn.wall / plain.wall for turn, plain in both]
        training = statistics.median(turn.cpu / plain.cpu for turn, plain in both)
        machine = statistics.median(turn.machine / plain.cpu for turn, plain in both)
        row = (
            f"{name:<42}{statistics.median(clock):>10.3f}x ±{spread(clock):<5.3f}"
            f"{training:>11.3f}x{machine:>12.3f}x{one.dropped:>9}"
        )
        if samples:
            sent = statistics.median(turn.sent - plain.sent for turn, plain in both) / samples
            row += f"{sent / 1e3:>13.1f}{formula(optimizer, shapes, ranks) / 1e3:>10.1f}"
        print(row)


def formula(optimizer: str, shapes: Sequence[tuple[int, int]], ranks: int) -> float:
    """Bytes that all ranks send in a sampled step, if every rank holds as many rows as the others.

    Every entry of a matrix in 4 bytes, but those on its owner; none of what our optimizers hand
    over whole. For every matrix each rank but the owner says the norm of its rows of the weight, in
    8 bytes; and every rank tells every other 6 numbers of 8 bytes.
    """
    entries = 0 if optimizer in ("Muon", "NorMuon") else sum(m * n for m, n in shapes)
    rows = 4 * entries * (ranks - 1) / ranks
    return rows + 8 * len(shapes) * (ranks - 1) + 48 * ranks * (ranks - 1)


if __name__ == "__main__":
    main()
