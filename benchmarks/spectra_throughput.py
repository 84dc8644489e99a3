"""Spectra a second: ours against loops over torch, SciPy and NumPy, on real updates.

Run it with the project's environment: ``python benchmarks/spectra_throughput.py`` (some ten minutes
on two cores that do nothing else). Real updates: the last step of a short training of one layer of
a GPT on the standard library's own source, under AdamW, Muon and NorMuon, recorded with our hooks
and read back from the run files: 768 x 768, 3072 x 768 and 768 x 3072 of a layer of width 768,
256 x 256 of one of width 256.

Every contestant gets the same float32 matrix and gives all its singular values. Blocks of one
contestant after the other, round by round: a ratio is of blocks of the same round, its median over
the rounds with half the range of the quartiles. Peers are in double precision (``float64``), as
accurate as ours, or in single (``float32``), which is not. Of a wide matrix they also get the
transpose, which LAPACK likes better; the fastest of all is what ours is held against.

Errors are against a float64 SVD by QR iteration (LAPACK's gesvd): the worst relative one over all
values above our floor, that of the condition number, and the worst absolute one in units of the
noise that the matrix has of its rounding to float32: what is far below 1 changes nothing that
the matrix can tell. The floor of the time: the operations of the Gram
matrix and of its tridiagonal form, at the rate at which this machine multiplies float64 matrices.

Parallel: as many processes with one BLAS thread each, each over all matrices of the shape; and our
``analyze``, from the recording to its results, with one worker and with two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import torch

from normuon_lens.analysis.offline.engine import ONE_THREAD, spread
from normuon_lens.analysis.offline.stored import Batch, identity
from normuon_lens.hooks import attach
from normuon_lens.metrics import condition_number, rounding_noise, singular_values
from normuon_lens.runfile import open_run
from normuon_lens.sample_runs.data import Batches, standard_library
from normuon_lens.sample_runs.model import Shape
from normuon_lens.sample_runs.training import RECIPES, Training

SHAPES = ((768, 768), (3072, 768), (768, 3072), (256, 256))
NAMES = {"blocks.0.attn.q": (1, 1), "blocks.0.mlp.up": (4, 1), "blocks.0.mlp.down": (1, 4)}
"""Matrices of the layer, and their sides in units of its width."""

TRAINED_STEPS, BATCH = 12, 16

GOALS = {(768, 768): 2.0, (3072, 768): 2.5, (768, 3072): 2.5}
"""How many times as fast as the fastest float64 peer."""
WIDE_GOAL = 10.0
"""How many times as fast as torch.linalg.svdvals of a wide matrix as it is."""
FLOAT32_GOAL, CORES_GOAL = 1.0, 1.8

Matrix = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Contestant:
    """One way to all singular values.

    Attributes
    ----------
    key : str
    dtype : str
        In which it computes.
    run : callable
        float32 matrix to its singular values, descending.
    """

    key: str
    dtype: str
    run: Callable[[Matrix], Matrix]


def noise_in(matrix: Matrix) -> float:
    """Return the noise of its rounding to float32, as our recorder and ``analyze`` tell it."""
    norm = float(np.linalg.norm(matrix))
    return rounding_noise((len(matrix), matrix.shape[1]), norm, "float32")


def ours(matrix: Matrix) -> Matrix:
    """Return what ours gives, its floor aside."""
    return singular_values(matrix, noise=noise_in(matrix))[0]


def by_torch(matrix: Matrix) -> Matrix:
    """Return what torch.linalg.svdvals gives."""
    sigma: Matrix = torch.linalg.svdvals(torch.from_numpy(matrix)).numpy()
    return sigma


def by_scipy(matrix: Matrix) -> Matrix:
    """Return what scipy.linalg.svdvals gives."""
    sigma: Matrix = scipy.linalg.svdvals(matrix)
    return sigma


def by_numpy(matrix: Matrix) -> Matrix:
    """Return what numpy.linalg.svd gives."""
    return np.linalg.svd(matrix, compute_uv=False)


def cast(run: Callable[[Matrix], Matrix], dtype: str, transposed: bool, matrix: Matrix) -> Matrix:
    """Give a peer the matrix, or its transpose, in the precision that it is to work in."""
    return run(np.ascontiguousarray(matrix.T if transposed else matrix, dtype=dtype))


PEERS = {
    "torch.linalg.svdvals": by_torch,
    "scipy.linalg.svdvals": by_scipy,
    "numpy.linalg.svd": by_numpy,
}


def contestants(shape: tuple[int, int]) -> Iterator[Contestant]:
    """Yield all of them for a shape, ours first."""
    yield Contestant("normuon-lens", "float64", ours)
    for dtype in ("float64", "float32"):
        for transposed in (False, True) if shape[0] < shape[1] else (False,):
            for name, run in PEERS.items():
                key = f"{name}{' (transpose)' if transposed else ''}, {dtype}"
                yield Contestant(key, dtype, partial(cast, run, dtype, transposed))


def record(folder: Path) -> list[Path]:
    """Train a layer of each width under each optimizer, and record its last updates."""
    paths = []
    for width in (768, 256):
        for recipe in RECIPES:
            print(f"training: width {width}, {recipe.name}", file=sys.stderr, flush=True)
            shape = Shape(width=width, layers=1)
            training = Training(recipe, TRAINED_STEPS, 0, shape)
            batches = Batches(standard_library().train, BATCH, shape.context, 0)
            path = folder / f"{recipe.name.lower()}-{width}.h5"
            names = list(NAMES) if width == 768 else list(NAMES)[:1]
            options = {"every": TRAINED_STEPS, "on_full": "wait", "include": names, "quiet": True}
            with attach(training.model, training.optimizers, path, **options):
                for _ in range(TRAINED_STEPS):
                    training.step(*batches.next())
            paths.append(path)
    return paths


def real_updates(paths: Sequence[Path]) -> dict[tuple[int, int], list[Matrix]]:
    """Return the recorded updates of the last step by shape, one an optimizer."""
    found: dict[tuple[int, int], list[Matrix]] = {shape: [] for shape in SHAPES}
    for run in map(open_run, paths):
        for name in run.matrices:
            found[run.shape(name)].append(run.update(name, TRAINED_STEPS))
    return found


class Ratio(NamedTuple):
    """Median over the rounds, and half the range of the quartiles."""

    median: float
    spread: float


def ratio(others: Sequence[float], mine: Sequence[float]) -> Ratio:
    """Relate the blocks of two contestants, round by round."""
    ratios = [a / b for a, b in zip(others, mine, strict=True)]
    if len(ratios) == 1:
        return Ratio(ratios[0], 0.0)
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, (high - low) / 2)


class Accuracy(NamedTuple):
    """Worst errors over matrices.

    Attributes
    ----------
    sigma, condition : float
        Relative.
    noise : float
        Absolute, in units of the noise that the matrix has of its rounding to float32.
    beyond : bool
        Whether a condition number is larger than its floor allows.
    """

    sigma: float
    condition: float
    noise: float
    beyond: bool


def accuracy(contestant: Contestant, matrices: Sequence[Matrix]) -> Accuracy:
    """Hold a contestant against the SVD by QR iteration."""
    sigma_errors, condition_errors, noises, beyond = [], [], [], False
    for matrix in matrices:
        tall = matrix if len(matrix) >= matrix.shape[1] else matrix.T
        exact = scipy.linalg.svd(
            tall.astype(np.float64), compute_uv=False, lapack_driver="gesvd", check_finite=False
        )
        noise = noise_in(matrix)
        floor = singular_values(matrix, noise=noise)[1]
        sigma = contestant.run(matrix).astype(np.float64)
        known = exact > floor
        sigma_errors.append(float(np.max(np.abs(sigma / exact - 1)[known])))
        noises.append(float(np.max(np.abs(sigma - exact)[known])) / noise)
        condition = sigma[0] / sigma[-1]
        if contestant.key == "normuon-lens":
            condition = float(condition_number(sigma, floor).value)
            beyond |= condition > sigma[0] / floor * (1 + 1e-12)
        condition_errors.append(abs(condition * exact[-1] / exact[0] - 1))
    return Accuracy(max(sigma_errors), max(condition_errors), max(noises), beyond)


def timed(run: Callable[[Matrix], Matrix], matrices: Sequence[Matrix]) -> float:
    """Seconds a matrix."""
    began = time.perf_counter()
    for matrix in matrices:
        run(matrix)
    return (time.perf_counter() - began) / len(matrices)


def floor_seconds(shape: tuple[int, int], rounds: int) -> float:
    """Return the time of our operations at the rate of products of float64 matrices."""
    m, k = max(shape), min(shape)
    a, b = np.random.default_rng(0).standard_normal((2, m, k))
    rate = max(2 * m * k * k / timed(lambda _: a.T @ b, [a]) for _ in range(3 * rounds))
    return (m * k * k + 4 / 3 * k**3) / rate


def serially(
    shape: tuple[int, int], matrices: Sequence[Matrix], rounds: int
) -> dict[str, list[float]]:
    """Return seconds a matrix of every contestant, one a round."""
    rows = list(contestants(shape))
    blocks: dict[str, list[float]] = {row.key: [] for row in rows}
    repeats = max(1, round(3e8 / (shape[0] * shape[1] * min(shape))))
    for number in range(-1, rounds):
        for place in range(len(rows)):
            row = rows[(place + number) % len(rows)]
            seconds = timed(row.run, matrices * repeats)
            if number >= 0:  # the first round is for warming up
                blocks[row.key].append(seconds)
        print(f"{shape}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return blocks


class Team:
    """Processes that run one contestant side by side.

    Parameters
    ----------
    size : int
    key : str
    file : Path
        Of the matrices.
    """

    def __init__(self, size: int, key: str, file: Path) -> None:
        command = [sys.executable, __file__, "--member", key, str(file)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._members = [subprocess.Popen(command, **pipes) for _ in range(size)]  # type: ignore[call-overload]
        for member in self._members:
            member.stdout.readline()

    def rate(self) -> float:
        """Return matrices a second of all together, over one pass of each."""
        began = time.perf_counter()
        for member in self._members:
            member.stdin.write("go\n")
            member.stdin.flush()
        done = sum(int(member.stdout.readline()) for member in self._members)
        return done / (time.perf_counter() - began)

    def end(self) -> None:
        """Let them go."""
        for member in self._members:
            member.communicate()


def be_member(key: str, file: Path) -> None:
    """Run one contestant over all matrices of a file, as often as a line says so."""
    matrices = list(np.load(file))
    shape = matrices[0].shape
    (row,) = [row for row in contestants(shape) if row.key == key]
    repeats = max(1, round(1.5e9 / (shape[0] * shape[1] * min(shape))))
    timed(row.run, matrices)
    print("ready", flush=True)
    for _ in sys.stdin:
        timed(row.run, matrices * repeats)
        print(len(matrices) * repeats, flush=True)


def in_parallel(key: str, file: Path, rounds: int) -> tuple[float, Ratio]:
    """Return matrices a second of two processes, and how many times that of one."""
    one, two = Team(1, key, file), Team(2, key, file)
    rates: list[tuple[float, float]] = []
    for number in range(rounds):
        pair = (one, two) if number % 2 else (two, one)
        found = {team: team.rate() for team in pair}
        rates.append((found[one], found[two]))
    one.end()
    two.end()
    alone, together = zip(*rates, strict=True)
    return statistics.median(together), ratio(together, alone)


def analyzed(paths: Sequence[Path], workers: int, repeats: int) -> float:
    """Return matrices a second of ``analyze``'s engine, from the file on, its start aside."""
    batches = []
    for run in map(open_run, paths):
        place = (str(run.path), identity(run), "update")
        metrics = ("condition_number", "neuron_cv")
        batches += [Batch(*place, name, (TRAINED_STEPS,), metrics) for name in run.matrices]
    done, began = 0, 0.0
    # Each process has opened the recordings and warmed up when the first two rounds are over.
    warm = 2 * len(batches)
    with closing(spread(batches * (repeats + 2), workers)) as answers:
        for one in answers:
            if one:
                done += 1
                began = time.perf_counter() if done == warm else began
    return (done - warm) / (time.perf_counter() - began)


def print_goal(name: str, found: Ratio, goal: float) -> None:
    """Print one line of the goals."""
    verdict = "met" if found.median >= goal else "NOT MET"
    print(f"  {name:<56}{found.median:>7.2f}x ±{found.spread:<6.2f}goal {goal:.1f}x  {verdict}")


def fastest(blocks: dict[str, list[float]], dtype: str) -> str:
    """Return the peer of this precision that took least, in the median."""
    peers = [key for key in blocks if key.endswith(dtype)]
    return min(peers, key=lambda key: statistics.median(blocks[key]))


def report(
    shape: tuple[int, int],
    blocks: dict[str, list[float]],
    errors: dict[str, Accuracy],
    parallel: dict[str, tuple[float, Ratio]],
    floor: float,
) -> None:
    """Print the table of one shape, and how ours stands to the goals."""
    mine = blocks["normuon-lens"]
    print(f"\n{shape[0]} x {shape[1]}")
    print(
        f"{'':<44}{'ms':>9}{'1/s':>9}{'of ours':>16}{'error σ':>10}{'cond':>9}{'of noise':>10}"
        f"{'2 cores 1/s':>14}"
    )
    for key, seconds in blocks.items():
        median, found = statistics.median(seconds), ratio(seconds, mine)
        cores = (
            f"{parallel[key][0]:>8.1f} {parallel[key][1].median:.2f}x" if key in parallel else ""
        )
        print(
            f"{key:<44}{1e3 * median:>9.2f}{1 / median:>9.1f}"
            f"{found.median:>9.2f}x ±{found.spread:<5.2f}"
            f"{errors[key].sigma:>10.0e}{errors[key].condition:>9.0e}{errors[key].noise:>10.0e}"
            f"{cores:>14}"
        )
    print(f"{'floor of ours: operations / rate of dgemm':<44}{1e3 * floor:>9.2f}")
    if shape in GOALS:
        key = fastest(blocks, "float64")
        print_goal(f"the fastest in float64: {key}", ratio(blocks[key], mine), GOALS[shape])
    if shape[0] < shape[1]:
        key = "torch.linalg.svdvals, float64"
        print_goal(f"{key}, as it is", ratio(blocks[key], mine), WIDE_GOAL)
    key = fastest(blocks, "float32")
    print_goal(f"the fastest in float32: {key}", ratio(blocks[key], mine), FLOAT32_GOAL)
    if "normuon-lens" in parallel:
        print_goal("two processes, of one", parallel["normuon-lens"][1], CORES_GOAL)
    if errors["normuon-lens"].beyond:
        print("  A CONDITION NUMBER IS BEYOND ITS FLOOR")


def main() -> None:
    """Measure, with progress on standard error, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="blocks a contestant (9)")
    parser.add_argument("--no-parallel", action="store_true", help="leave two cores out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the numbers")
    parser.add_argument("--member", nargs=2, metavar=("KEY", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ONE_THREAD.items()):
        # A BLAS that is loaded has its threads: begin again with one.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ONE_THREAD})
    torch.set_num_threads(1)
    if given.member:
        be_member(given.member[0], Path(given.member[1]))
        return
    facts = {"numpy": np.__version__, "scipy": scipy.__version__, "torch": torch.__version__}
    facts |= {"cores": str(os.cpu_count()), "rounds": str(given.rounds)}
    print(", ".join(f"{name}: {value}" for name, value in facts.items()))
    kept: dict[str, Any] = {"machine": facts, "shapes": {}}
    with tempfile.TemporaryDirectory() as folder:
        paths = record(Path(folder))
        for shape, matrices in real_updates(paths).items():
            blocks = serially(shape, matrices, given.rounds)
            rows = list(contestants(shape))
            errors = {row.key: accuracy(row, matrices) for row in rows}
            file = Path(folder) / "matrices.npy"
            np.save(file, np.array(matrices))
            chosen = ["normuon-lens", fastest(blocks, "float64"), fastest(blocks, "float32")]
            parallel = {
                key: in_parallel(key, file, given.rounds)
                for key in ([] if given.no_parallel else chosen)
            }
            floor = floor_seconds(shape, given.rounds)
            report(shape, blocks, errors, parallel, floor)
            kept["shapes"]["x".join(map(str, shape))] = {
                "seconds": blocks,
                "errors": {key: found._asdict() for key, found in errors.items()},
                "parallel": parallel,
                "floor": floor,
            }
        if not given.no_parallel:
            repeats = 6
            pairs = [(analyzed(paths, 2, repeats), analyzed(paths, 1, repeats)) for _ in range(3)]
            two, one = zip(*pairs, strict=True)
            print(f"\nanalyze: {statistics.median(two):.1f} matrices of all shapes a second")
            print_goal("two workers, of one", ratio(two, one), CORES_GOAL)
            kept["analyze"] = pairs
    if given.json:
        given.json.write_text(json.dumps(kept, indent=1, default=lambda number: number.item()))


if __name__ == "__main__":
    main()
