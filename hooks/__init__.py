"""How numbers get out of a live optimizer, without the training noticing.

::

    from normuon_lens.hooks import attach

    with attach(model, optimizer, "runs/normuon.h5", every=10) as lens:
        for batch in data:
            loss = train_step(batch)
            lens.log(loss=loss)
"""

# ruff: noqa: E402, the imports below need torch
from normuon_lens.extras import require

require("torch", "torch")

from .recorder import Recorder, attach

__all__ = ["Recorder", "attach"]
