"""Something to do once a module has been imported, by whoever imports it and when."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def on_import(name: str, then: Callable[[], None]) -> None:
    """Call `then` as soon as module `name` has been imported: at once if it has.

    Parameters
    ----------
    name : str
        A top-level module. It is not imported here: what a script sets before its own import of
        it, such as environment variables, must still count.
    then : callable
    """
    if sys.modules.get(name):
        then()
    else:
        sys.meta_path.insert(0, _Finder(name, then))


class _Finder(MetaPathFinder):
    """Finds nothing by itself; of one module it has the usual loader say when it is done."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name, self._then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader = spec.loader if spec else None
        if loader is None:
            return spec
        execute = loader.exec_module

        def execute_and_tell(module: ModuleType) -> None:
            # The loader stays what it was: others ask it for sources and resources.
            del loader.exec_module
            execute(module)
            self._then()

        loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec
