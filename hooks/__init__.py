"""How numbers get out of a live optimizer, without the training noticing.

::

    from normuon_lens.hooks import attach

    with attach(model, optimizer, "runs/normuon.h5", every=10) as lens:
        for batch in data:
            loss = train_step(batch)
            lens.log(loss=loss)

Or without a change to the script: ``normuon-lens run -o runs/normuon.h5 train.py``. For two
frameworks there is a callback: :class:`normuon_lens.hooks.lightning.LensCallback` and
:class:`normuon_lens.hooks.transformers.LensCallback`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from normuon_lens.extras import require

if TYPE_CHECKING:
    from .attachment import attach
    from .recorder import Recorder

__all__ = ["Recorder", "attach"]

_HOMES = {"Recorder": ".recorder", "attach": ".attachment"}


def __getattr__(name: str) -> Any:
    # Loaded when first used: the help of `normuon-lens run` needs no torch.
    if name in _HOMES:
        require("torch", "torch")
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
