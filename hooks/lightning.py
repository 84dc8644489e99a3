"""A callback of the Lightning `Trainer`: names of the module, its global step, what it logs."""

# ruff: noqa: E402, the imports below need torch and Lightning
from __future__ import annotations

import os
from typing import Any

from normuon_lens.extras import require

require("torch", "torch")
require("lightning", "lightning")

from lightning.pytorch import Callback, LightningModule, Trainer

from .callback import Ride
from .recorder import Recorder


class LensCallback(Callback):
    """Records what the optimizers of a `LightningModule` do, while a `Trainer` fits it.

    ::

        from lightning.pytorch import Trainer
        from normuon_lens.hooks.lightning import LensCallback

        trainer = Trainer(callbacks=[LensCallback("runs/normuon.h5", every=10)])
        trainer.fit(module, data)

    Whatever the module logs by ``self.log`` is recorded on every optimizer step. It works with a
    `Trainer` imported from ``pytorch_lightning`` as well.

    Parameters
    ----------
    path : str or path-like
        Where the finished recording shall lie. A second ``fit`` with this callback is appended.
    **options
        Further arguments of :func:`normuon_lens.hooks.attach`.

    Raises
    ------
    TypeError
        For an option that `attach` does not have.
    """

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        self._ride = Ride(path, options)
        self._logged_step = 0

    @property
    def recorder(self) -> Recorder | None:
        """The recording; None before the training starts."""
        return self._ride.recorder

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the trainer's optimizers."""
        self._logged_step = trainer.global_step
        # Lightning counts the steps of each optimizer, a recording their rounds.
        rounds = trainer.global_step // max(1, len(trainer.optimizers))
        self._ride.begin(pl_module, trainer.optimizers, rounds)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the module's metrics, if this batch completed a step."""
        if trainer.global_step != self._logged_step:
            self._logged_step = trainer.global_step
            self._ride.log(trainer.callback_metrics)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Close the recording as interrupted."""
        self._ride.end(exception)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the recording as finished."""
        self._ride.end()
