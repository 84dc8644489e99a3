"""What recording costs a training: step time with each level of detail, against plain training.

Run it with the project's environment: ``python benchmarks/recording_overhead.py``. Every variant
trains its own copy of one model; the variants take turns step by step, so that a drift of the
machine's speed meets all of them alike. Ratios of median step times are the result; seconds are
there to judge by, not to quote. The naive logger is what one would write by hand: a float64 SVD of
every update, in the training process, on every sampled step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from normuon_lens.hooks import attach
from normuon_lens.sample_runs.data import Batches, standard_library
from normuon_lens.sample_runs.model import Shape
from normuon_lens.sample_runs.training import RECIPES, Training

SIZES = {
    "demo": (Shape(), 16),
    "medium": (Shape(width=256, heads=8, layers=4, context=128), 16),
}
EVERY = 10
WARM_UP = 10


class NaiveLogger:
    """Float64 SVDs in the training process on every EVERY-th step."""

    def __init__(self, training: Training) -> None:
        self._matrices = [p for n, p in training.model.named_parameters() if "blocks" in n]
        self._matrices = [p for p in self._matrices if p.ndim == 2]
        self._step = 0
        self.spectra: list[torch.Tensor] = []
        training.optimizers[0].register_step_pre_hook(self._before)
        training.optimizers[0].register_step_post_hook(self._after)

    def _before(self, *_: Any) -> None:
        self._step += 1
        if self._step % EVERY == 0:
            self._kept = [p.detach().clone() for p in self._matrices]

    def _after(self, *_: Any) -> None:
        if self._step % EVERY == 0:
            self.spectra = [
                torch.linalg.svdvals((p.detach() - kept).double())
                for p, kept in zip(self._matrices, self._kept, strict=True)
            ]


def recorder(**options: Any) -> Callable[[Training, Path], AbstractContextManager[Any]]:
    """Return a function that attaches a recorder with these options."""

    def begin(training: Training, folder: Path) -> AbstractContextManager[Any]:
        path = folder / f"{len(list(folder.iterdir()))}.h5"
        optimizers = training.optimizers
        return attach(training.model, optimizers, path, include="blocks.*", quiet=True, **options)

    return begin


VARIANTS: dict[str, Callable[[Training, Path], AbstractContextManager[Any]]] = {
    "plain training": lambda training, folder: nullcontext(),
    f"norms every {EVERY}": recorder(norms_every=EVERY, every=10**9, matrices_every=0),
    "norms every step": recorder(every=10**9, matrices_every=0),
    f"+ spectra every {EVERY}": recorder(every=EVERY, matrices_every=0),
    f"+ matrices every {EVERY} (default)": recorder(every=EVERY),
    "spectra and matrices every step": recorder(every=1),
    f"naive SVD logger every {EVERY}": lambda training, folder: nullcontext(NaiveLogger(training)),
}


def main() -> None:
    """Print the table of ratios for both model sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120, help="measured steps a variant")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    text = standard_library()
    for size, (shape, batch) in SIZES.items():
        recipe = RECIPES[0]
        trainings = [Training(recipe, steps + WARM_UP, 0, shape) for _ in VARIANTS]
        times: list[list[float]] = [[] for _ in VARIANTS]
        batches = Batches(text.train, batch, shape.context, 0)
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            attached = [
                stack.enter_context(begin(training, Path(folder)))
                for begin, training in zip(VARIANTS.values(), trainings, strict=True)
            ]
            for step in range(steps + WARM_UP):
                inputs, targets = batches.next()
                for training, mine in zip(trainings, times, strict=True):
                    began = time.perf_counter()
                    training.step(inputs, targets)
                    if step >= WARM_UP:
                        mine.append(time.perf_counter() - began)
            dropped = [getattr(item, "dropped", 0) for item in attached]
        weights = [list(training.model.parameters()) for training in trainings]
        equal = all(torch.equal(a, b) for w in weights for a, b in zip(weights[0], w, strict=True))
        print(f"\n{size}: {sum(p.numel() for p in weights[0]):,} parameters, AdamW, one thread")
        print(f"weights bitwise equal in all variants: {'yes' if equal else 'NO'}")
        print(f"{'variant':<36}{'mean ratio':>11}{'median ms':>11}{'dropped':>9}")
        for name, mine, lost in zip(VARIANTS, times, dropped, strict=True):
            ratio = sum(mine) / sum(times[0])
            median = 1e3 * statistics.median(mine)
            print(f"{name:<36}{ratio:>10.3f}x{median:>11.2f}{lost:>9}")


if __name__ == "__main__":
    main()
