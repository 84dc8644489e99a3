"""How accurate Newton-Schulz is, ours and the others', on matrices that are easy and hard.

Run it with the project's environment: ``python benchmarks/orthogonalization_accuracy.py`` (a few
minutes on a CPU that is slow in bfloat16). Each scheme is held against its own coefficients in
float64, so an error is what rounding and rearranging did, not what a scheme is meant to do: the
Frobenius norm of the difference over that of the exact result, and, beside it, the smallest and
the largest singular value of what came out. An exclamation mark: less accurate on this matrix than
torch.optim.Muon's bfloat16, for which no speed makes up.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from peers import NS_STEPS, Unavailable, in_float32, peer
from torch import Tensor

from normuon_lens.optim import orthogonalize
from normuon_lens.optim.orthogonalize import COEFFICIENTS, fast_dtype
from normuon_lens.sample_runs.data import Batches, standard_library
from normuon_lens.sample_runs.model import Shape
from normuon_lens.sample_runs.training import RECIPES, Training

SHAPES = {"square": (256, 256), "tall": (1024, 256), "wide": (256, 1024)}

# One layer whose matrices have just those shapes.
MODEL = Shape(width=256, layers=1)
REAL = {
    "square": "blocks.0.attn.q.weight",
    "tall": "blocks.0.mlp.up.weight",
    "wide": "blocks.0.mlp.down.weight",
}
TRAINED_STEPS, BATCH = 40, 8

Coefficients = Sequence[tuple[float, float, float]]

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Of the original Muon, torch's and the paper's: written here, to be held against, not taken."""

YARDSTICK = "torch.optim.Muon"

CHANCE = 1.2
"""Two orders of the same bfloat16 sums differ by up to this factor in their error."""


@dataclass(frozen=True)
class Scheme:
    """One implementation of Newton-Schulz.

    Attributes
    ----------
    name : str
    run : callable
    coefficients : sequence of three floats
        Of its quintic, one triple an iteration.
    margin : float
        The matrix is divided by so many times its norm.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    coefficients: Coefficients = (QUINTIC,) * NS_STEPS
    margin: float = 1.0


class Accuracy(NamedTuple):
    """One scheme on one matrix."""

    matrix: str
    shape: str
    scheme: str
    error: float
    smallest: float
    largest: float


def exact(matrix: Tensor, coefficients: Coefficients, margin: float) -> Tensor:
    """Newton-Schulz as it is written down, in float64."""
    X = matrix.double()
    X = X / (margin * X.norm())
    for a, b, c in coefficients:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


def torch_muon(matrix: Tensor) -> Tensor:
    """Newton-Schulz of torch.optim.Muon, in bfloat16."""
    eps = 1e-7
    return torch.optim._muon._zeropower_via_newtonschulz(matrix, QUINTIC, NS_STEPS, eps)


def torch_muon_in_float32(matrix: Tensor) -> Tensor:
    """Return what it gives without its cast."""
    with in_float32():
        return torch_muon(matrix)


def our_schemes(device: str) -> Iterator[Scheme]:
    """Yield ours in each dtype, the chosen one first."""
    fast = fast_dtype(device)
    for dtype in (fast, *({torch.float32, torch.bfloat16} - {fast})):
        chosen = ", chosen here" if dtype == fast else ""
        name = f"normuon-lens ({str(dtype).removeprefix('torch.')}{chosen})"
        yield Scheme(name, partial(orthogonalize, steps=NS_STEPS, dtype=dtype))
    polar_express = partial(orthogonalize, steps=NS_STEPS, coefficients="polar_express")
    name = "normuon-lens, Polar Express (float32)"
    run = partial(polar_express, dtype=torch.float32)
    yield Scheme(name, run, tuple(COEFFICIENTS["polar_express"][:NS_STEPS]))


def torch_schemes() -> Iterator[Scheme]:
    """Yield that of torch, in bfloat16, and what it would be in float32."""
    yield Scheme(YARDSTICK, torch_muon)
    yield Scheme(f"{YARDSTICK} (in float32)", torch_muon_in_float32)


def pytorch_optimizer_schemes() -> Iterator[Scheme]:
    """Yield that of pytorch-optimizer, always in bfloat16."""
    module = peer("pytorch_optimizer.optimizer.utils.matrix")
    yield Scheme("pytorch-optimizer", module.zero_power_via_newton_schulz_5)


def optimuon_schemes() -> Iterator[Scheme]:
    """Yield those of optimuon, on the Gram matrix, by default in float16."""
    module = peer("optimuon._newton_schulz")
    kind = partial(
        Scheme,
        coefficients=module.NS_COEFFICIENTS_POLAR_EXPRESS,
        margin=module.NS_NORM_SCALE_POLAR_EXPRESS,
    )
    run = partial(module.gram_newton_schulz, ns_norm_scale=module.NS_NORM_SCALE_POLAR_EXPRESS)
    yield kind("optimuon", run)
    yield kind("optimuon (in float32)", partial(run, ns_dtype=torch.float32))


def emerging_schemes() -> Iterator[Scheme]:
    """Yield that of emerging-optimizers in bfloat16, as its optimizers run it."""
    module = peer("emerging_optimizers.orthogonalized_optimizers.muon_utils")
    utils = peer("emerging_optimizers.utils")

    def run(matrix: Tensor) -> Tensor:
        with utils.fp32_matmul_precision("medium"):
            result: Tensor = module.newton_schulz(matrix, NS_STEPS)
            return result

    yield Scheme("emerging-optimizers", run, module._COEFFICIENT_SETS["quintic"])


def schemes(device: str) -> list[Scheme]:
    """Everyone that is installed, ours first."""
    found = [*our_schemes(device), *torch_schemes()]
    for others in (pytorch_optimizer_schemes, optimuon_schemes, emerging_schemes):
        try:
            found += others()
        except Unavailable as reason:
            print(reason, file=sys.stderr)
    return found


def real_momenta() -> dict[str, Tensor]:
    """Momentum of the demo's NorMuon after some steps, by shape."""
    recipe = next(recipe for recipe in RECIPES if recipe.name == "NorMuon")
    training = Training(recipe, TRAINED_STEPS, 0, MODEL)
    batches = Batches(standard_library().train, BATCH, MODEL.context, 0)
    for _ in range(TRAINED_STEPS):
        training.step(*batches.next())
    named = dict(training.model.named_parameters())
    state = training.optimizers[0].state
    return {shape: state[named[name]]["momentum_buffer"] for shape, name in REAL.items()}


def with_spectrum(shape: tuple[int, int], sigma: Tensor) -> Tensor:
    """Return a random matrix with these singular values."""
    left, _ = torch.linalg.qr(torch.randn(shape[0], len(sigma), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(shape[1], len(sigma), dtype=torch.float64))
    return ((left * sigma) @ right.mT).float()


def matrices() -> Iterator[tuple[str, str, Tensor]]:
    """Yield what they are tried on: name, shape, matrix."""
    torch.manual_seed(0)
    for shape, momentum in real_momenta().items():
        yield f"momentum after {TRAINED_STEPS} steps", shape, momentum
    for name, make in MADE_UP.items():
        for shape, size in SHAPES.items():
            yield name, shape, make(size)


def geometric(shape: tuple[int, int], condition: float) -> Tensor:
    """Singular values evenly spaced on a logarithmic scale."""
    k = min(shape)
    return with_spectrum(shape, torch.logspace(0, -math.log10(condition), k, dtype=torch.float64))


def rank_deficient(shape: tuple[int, int]) -> Tensor:
    """Half of the singular values are zero."""
    k = min(shape)
    return with_spectrum(shape, (torch.arange(k) < k // 2).double())


def rank_one_and_noise(shape: tuple[int, int]) -> Tensor:
    """One direction a hundred times as strong as the noise in all others."""
    m, n = shape
    noise = torch.randn(shape)
    strong = 100 * (m**0.5 + n**0.5) / (m * n) ** 0.5
    return noise + strong * torch.randn(m, 1) * torch.randn(1, n)


def uneven_rows(shape: tuple[int, int]) -> Tensor:
    """Rows of norms between one and a millionth."""
    return torch.randn(shape) * torch.logspace(0, -6, shape[0])[:, None]


MADE_UP: dict[str, Callable[[tuple[int, int]], Tensor]] = {
    "geometric spectrum, condition 1e4": partial(geometric, condition=1e4),
    "geometric spectrum, condition 1e8": partial(geometric, condition=1e8),
    "half of the singular values zero": rank_deficient,
    "rank one and noise": rank_one_and_noise,
    "Gaussian": torch.randn,
    "rows from 1 to 1e-6": uneven_rows,
}


def measure(device: str) -> list[Accuracy]:
    """Run every scheme on every matrix."""
    everyone = schemes(device)
    found = []
    for name, shape, matrix in matrices():
        print(f"accuracy: {name}, {shape}", file=sys.stderr, flush=True)
        for scheme in everyone:
            target = exact(matrix, scheme.coefficients, scheme.margin)
            result = scheme.run(matrix.to(device, copy=True)).cpu().double()
            sigma = torch.linalg.svdvals(result if shape != "wide" else result.mT)
            error = ((result - target).norm() / target.norm()).item()
            found.append(
                Accuracy(name, shape, scheme.name, error, sigma[-1].item(), sigma[0].item())
            )
    return found


def print_tables(found: Sequence[Accuracy]) -> None:
    """Print one table a matrix, then how ours stand to the yardstick."""
    by_place = {(one.matrix, one.shape, one.scheme): one for one in found}
    names = dict.fromkeys(one.scheme for one in found)
    for matrix in dict.fromkeys(one.matrix for one in found):
        heads = [f"{kind} {size[0]} x {size[1]}" for kind, size in SHAPES.items()]
        print(f"\n{matrix:<40}" + "".join(f"{head:<32}" for head in heads).rstrip())
        print(" " * 40 + (f"{'error':<10}{'singular values':<22}" * len(heads)).rstrip())
        for name in names:
            cells = [by_place[matrix, shape, name] for shape in SHAPES]
            marks = [
                "!" if one.error > CHANCE * by_place[matrix, one.shape, YARDSTICK].error else " "
                for one in cells
            ]
            print(
                f"{name:<40}"
                + "".join(
                    f"{one.error:<8.1e}{mark} {f'{one.smallest:.2g} to {one.largest:.3f}':<22}"
                    for one, mark in zip(cells, marks, strict=True)
                )
            )
    print(f"\nerror in units of that of {YARDSTICK}, the worst of all matrices")
    for name in names:
        worst = max(
            one.error / by_place[one.matrix, one.shape, YARDSTICK].error
            for one in found
            if one.scheme == name
        )
        verdict = "as accurate" if worst <= CHANCE else "LESS ACCURATE"
        print(f"  {name:<40}{worst:>10.2g}x  {verdict}")


def main() -> None:
    """Measure, with progress on standard error, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    print_tables(measure(given.device))


if __name__ == "__main__":
    main()
