"""Which learning rates the demo's optimizers deserve: a grid, three seeds, validation loss.

Run it with the project's environment: ``python benchmarks/learning_rates.py`` (about 20 minutes on
one core). A comparison of optimizers is only as honest as the tuning of the one that loses.
"""

from __future__ import annotations

import itertools
import statistics

import torch

from normuon_lens.sample_runs.data import Batches, standard_library
from normuon_lens.sample_runs.training import Recipe, Training

STEPS = 600
SEEDS = (0, 1, 2)
MATRIX_LRS = {
    "AdamW": (2e-3, 4e-3, 8e-3, 1.6e-2),
    "Muon": (8e-3, 1.6e-2, 3.2e-2),
    "NorMuon": (8e-3, 1.6e-2, 3.2e-2),
}
OTHER_LRS = (1.6e-2, 3.2e-2, 6.4e-2)


def main() -> None:
    """Print mean and spread of the final validation loss at every point of the grid."""
    torch.set_num_threads(1)
    text = standard_library()
    print(f"{STEPS} steps, seeds {SEEDS}: validation loss, mean and standard deviation")
    print("optimizer  matrix lr  other lr    mean      sd")
    for name, rates in MATRIX_LRS.items():
        for matrix_lr, other_lr in itertools.product(rates, OTHER_LRS):
            losses = []
            for seed in SEEDS:
                training = Training(Recipe(name, matrix_lr, other_lr), STEPS, seed)
                context = training.model.shape.context
                held_out = Batches(text.validation, 256, context, seed=99).next()
                batches = Batches(text.train, 16, context, seed)
                for _ in range(STEPS):
                    training.step(*batches.next())
                losses.append(training.validate(*held_out))
            mean, spread = statistics.mean(losses), statistics.stdev(losses)
            row = f"{name:<9}  {matrix_lr:9.1e}  {other_lr:8.1e}  {mean:6.4f}  {spread:6.4f}"
            print(row, flush=True)


if __name__ == "__main__":
    main()
