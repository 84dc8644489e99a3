"""A script run inside this process just as ``python script.py`` would run it.

Its arguments, ``__main__``, import path, traceback, exit code and signals are what they are under
plain Python; the difference is that somebody is told when it ends.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.machinery import PathFinder, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, TracebackType

from normuon_lens.errors import LensError

PYTHON_SUFFIXES = (".py", ".pyw")
HEAD_BYTES = 1 << 16


def check_script(script: str, *, module: bool = False) -> None:
    """See to it that there is a Python script to run.

    Parameters
    ----------
    script : str
        Path of a file, or the name of a module.
    module : bool
        Whether it is a module, as for ``python -m``.

    Raises
    ------
    LensError
        If there is no such file or module, or the file holds no Python. A ``.py`` file with a
        syntax error passes: that is for Python to show.
    """
    if module:
        top = script.partition(".")[0]
        if not top or not (find_spec(top) or PathFinder.find_spec(top, [os.getcwd()])):
            raise LensError(f"no module named {script!r}, here or installed")
        return
    path = Path(script)
    if path.is_dir():
        raise LensError(f"{script} is a folder; give a Python script, or a module by -m")
    try:
        with path.open("rb") as file:
            is_text = b"\0" not in file.read(HEAD_BYTES)
    except FileNotFoundError:
        raise LensError(f"there is no script {script}; expected: run SCRIPT [ARGUMENTS]") from None
    except OSError as error:
        raise LensError(f"{script} cannot be read: {error.strerror}") from None
    if not is_text or not (path.suffix in PYTHON_SUFFIXES or _compiles(path)):
        raise LensError(f"{script} is not a Python script")


def run_as_main(
    script: str,
    arguments: Sequence[str],
    at_end: Callable[[BaseException | None], None],
    *,
    module: bool = False,
) -> None:
    """Run a script as the main program of this process.

    Parameters
    ----------
    script : str
        Path of a file, or the name of a module.
    arguments : sequence of str
        ``sys.argv[1:]`` of the script.
    at_end : callable
        Called with the exception that ended the script, and with None at the interpreter's exit,
        when its threads are done and whatever it registered there has run.
    module : bool
        Whether it is a module, as for ``python -m``.

    Raises
    ------
    SystemExit
        If the script ended by it, or by any other exception; the traceback is then printed.
    """
    sys.argv = [script, *arguments]
    if not sys.flags.safe_path:
        sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.realpath(script))
    ending = _Ending()
    # What is registered first is called last.
    atexit.register(ending.die)
    atexit.register(at_end, None)
    try:
        if module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            _execute(script)
    except SystemExit as error:
        if error.code:
            # Often the script has caught what really ended it, such as Ctrl-C.
            at_end(error.__context__ or error)
        raise
    except BaseException as error:
        _show(error)
        try:
            at_end(error)
        except KeyboardInterrupt as again:
            error = again
        ending.by_interrupt = isinstance(error, KeyboardInterrupt)
        raise SystemExit(1) from None


class _Ending:
    """How the process is to end; Python has a process that Ctrl-C ended die of that signal."""

    by_interrupt = False

    def die(self) -> None:
        if not self.by_interrupt:
            return
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def _execute(script: str) -> None:
    # Not by runpy.run_path: it takes __main__ away again while threads, atexit functions and
    # whatever unpickles may still need it, and puts another path into sys.argv[0].
    path = os.path.abspath(script)
    main = ModuleType("__main__")
    main.__file__ = path
    main.__loader__ = SourceFileLoader("__main__", path)
    sys.modules["__main__"] = main
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, main.__dict__)


def _compiles(path: Path) -> bool:
    try:
        compile(path.read_bytes(), path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


def _show(error: BaseException) -> None:
    """Print an uncaught exception as Python does, without the frames that ran the script."""
    trace = _of_script(error.__traceback__)
    error.__traceback__ = trace
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, trace
    try:
        sys.excepthook(type(error), error, trace)
    except Exception:
        sys.__excepthook__(type(error), error, trace)


def _of_script(trace: TracebackType | None) -> TracebackType | None:
    while trace and trace.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
        trace = trace.tb_next
    return trace
