"""Optional dependencies: there, or one line that says what to install."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from normuon_lens.errors import MissingExtra


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Parameters
    ----------
    module : str
        What to import, such as ``"torch"``.
    extra : str
        The extra that brings it: ``pip install "normuon-lens[extra]"``.

    Raises
    ------
    MissingExtra
        If it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise MissingExtra(
            f'this needs {module}: pip install "normuon-lens[{extra}]"', name=module
        ) from None
