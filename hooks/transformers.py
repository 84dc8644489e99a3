"""A callback of the Hugging Face `Trainer`: names of the model, its global step, what it logs."""

# ruff: noqa: E402, the imports below need torch and Transformers
from __future__ import annotations

import os
from typing import Any

from normuon_lens.extras import require

require("torch", "torch")
require("transformers", "transformers")

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .callback import Ride
from .recorder import Recorder

SUMMARY = "train_runtime"
"""The trainer's last log speaks of the whole training, not of a step; it has this key."""


class LensCallback(TrainerCallback):
    """Records what the optimizer of a Hugging Face `Trainer` does.

    ::

        from transformers import Trainer
        from normuon_lens.hooks.transformers import LensCallback

        lens = LensCallback("runs/normuon.h5", every=10)
        Trainer(model, arguments, train_dataset=data, callbacks=[lens]).train()

    Whatever the trainer logs (``loss``, ``grad_norm``, …: as often as its ``logging_steps`` say)
    is recorded too.

    Parameters
    ----------
    path : str or path-like
        Where the finished recording shall lie. A second ``train`` with this callback is appended.
    **options
        Further arguments of :func:`normuon_lens.hooks.attach`.

    Raises
    ------
    TypeError
        For an option that `attach` does not have.
    """

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        self._ride = Ride(path, options)

    @property
    def recorder(self) -> Recorder | None:
        """The recording; None before the training starts."""
        return self._ride.recorder

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Attach to the trainer's optimizer."""
        self._ride.begin(kwargs["model"], kwargs["optimizer"], state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log the trainer's figures."""
        if logs and SUMMARY not in logs:
            self._ride.log(logs)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Close the recording as finished."""
        self._ride.end()
