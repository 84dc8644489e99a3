"""The instrument that shows what an optimizer really does to every weight matrix.

::

    import normuon_lens as nl

    run = nl.open_run("runs/normuon.h5")
    run.spectrum("blocks.1.mlp.up", step=100)      # all singular values of that update
    nl.table(run, ["condition_number", "neuron_cv"], steps=[100, 200])    # one number a row
    nl.metrics.describe("neuron_cv")               # what it means, and what is healthy

Attach to a training with :func:`normuon_lens.hooks.attach`; train with
:class:`normuon_lens.optim.NorMuon`. The core needs NumPy, SciPy and h5py; torch is needed only by
``normuon_lens.optim`` and ``normuon_lens.hooks``, Dash only by ``normuon_lens.dashboard``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from normuon_lens.errors import AttachError, LensError, RunError

if TYPE_CHECKING:
    from normuon_lens import metrics
    from normuon_lens.analysis import table
    from normuon_lens.runfile import Run, open_run

__version__ = "0.1.0"

__all__ = [
    "AttachError",
    "LensError",
    "Run",
    "RunError",
    "__version__",
    "metrics",
    "open_run",
    "table",
]

_HOMES = {
    "Run": "normuon_lens.runfile",
    "open_run": "normuon_lens.runfile",
    "table": "normuon_lens.analysis",
}


def __getattr__(name: str) -> Any:
    # Loaded when first used: `import normuon_lens` alone stays quick.
    if name == "metrics":
        return import_module("normuon_lens.metrics")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
