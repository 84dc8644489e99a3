"""Run a function on real gloo ranks, each a process of its own, and collect what it returns."""

import atexit
import contextlib
import faulthandler
import importlib
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

TESTS = Path(__file__).parent

SETTINGS = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1"}

# What ranks mostly need: this takes seconds, so one process imports it, once for all tests, and is
# forked for every launch. It does nothing else, so every launch begins as if it were the first.
IMPORTS = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "pytest",
    "forked",
)

START = 120
"""Seconds to import this, or to fork, that only a hang takes, also on a busy machine."""

GRACE = 3
"""Seconds the others have left, to say what they know, once a rank has died without a result."""


def on_ranks(ranks, function, *args, timeout=300):
    """Call ``function(*args)`` on every rank with gloo ready; return the results by rank.

    `function` must be at the top level of a test file. A rank that raises, or does not end in time,
    fails the test with what it printed, and where the others were.
    """
    with tempfile.TemporaryDirectory() as folder:
        call = (function.__module__, function.__qualname__, args)
        Path(folder, "call").write_bytes(pickle.dumps(call))
        process = Path(folder, "process")
        process.write_bytes(pickle.dumps((ranks, os.getcwd(), dict(os.environ) | SETTINGS)))
        nursery = _Nursery.ready()
        start = time.monotonic()
        launcher = nursery.launch(folder)
        ended = None
        try:
            ended = nursery.hear(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher, signal.SIGUSR1)
                time.sleep(0.3)
                os.killpg(launcher, signal.SIGKILL)
            if ended is None:
                nursery.hear(START)
        results = [Path(folder, f"result{rank}") for rank in range(ranks)]
        missing = [rank for rank, path in enumerate(results) if not path.exists()]
        if missing:
            texts = [Path(folder, "told"), *sorted(Path(folder).glob("told?*"))]
            raise AssertionError(
                f"no result from ranks {missing} after {time.monotonic() - start:.0f} s:\n"
                + "\n".join(
                    f"--- {path.name}\n{path.read_text('utf8', 'replace')}" for path in texts
                )
            )
        return [pickle.loads(path.read_bytes()) for path in results]


class _Nursery:
    """The process that has imported what ranks need; this process has one, when it needs it."""

    one = None

    @classmethod
    def ready(cls):
        """Return the one that there is, or a new one."""
        if cls.one is None or cls.one.owner != os.getpid() or cls.one.process.poll() is not None:
            cls.one = cls()
            atexit.register(cls.one.end)
            assert cls.one.hear(START) == "ready", "what ranks need cannot be imported"
        return cls.one

    def __init__(self):
        self.owner = os.getpid()  # a fork of this process must not use it
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | SETTINGS,
            bufsize=0,
            start_new_session=True,
        )

    def hear(self, timeout):
        """Return the next line it says; None after so many seconds."""
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            return None
        line = self.process.stdout.readline()
        assert line, "the process that launches ranks has died"
        return line.decode().strip()

    def launch(self, folder):
        """Have ranks launched; return the launcher's process id, which is that of its group."""
        self.process.stdin.write(f"{folder}\n".encode())
        launcher = self.hear(START)
        assert launcher, "no ranks were launched"
        return int(launcher)

    def end(self):
        if self.owner == os.getpid():
            self.process.communicate()  # it ends when nobody can tell it anything


def _serve():
    """Launch ranks whenever told a folder; say which process launches them, and that it ended."""
    for needed in IMPORTS:
        importlib.import_module(needed)
    _say("ready")
    while folder := sys.stdin.readline().rstrip("\n"):
        launcher = os.fork()
        if launcher == 0:
            os.setsid()
            _say(os.getpid())
            _launch(folder)
        os.waitpid(launcher, 0)
        _say("ended")


def _say(word):
    os.write(1, f"{word}\n".encode())


def _launch(folder):
    """Be all the ranks; end when they have, or soon after one of them died."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what is told there is not for ranks
    _redirect(Path(folder, "told"))
    try:
        ranks, place, environment = pickle.loads(Path(folder, "process").read_bytes())
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(place)
        faulthandler.register(signal.SIGUSR1)  # say where it hangs
        sys.path.insert(0, str(TESTS))
        module, name, args = pickle.loads(Path(folder, "call").read_bytes())
        function = getattr(importlib.import_module(module), name)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    for rank in range(ranks):
        if os.fork() == 0:
            _redirect(Path(folder, f"told{rank}"))
            _work(folder, rank, ranks, function, args)
    for _ in range(ranks):
        if os.wait()[1] != 0:
            time.sleep(GRACE)
            os._exit(1)
    os._exit(0)


def _redirect(path):
    told = os.open(path, os.O_CREAT | os.O_WRONLY)
    os.dup2(told, 1)
    os.dup2(told, 2)


def _work(folder, rank, ranks, function, args):
    import forked
    import torch.distributed as dist

    from normuon_lens.hooks import feed

    try:
        feed.subprocess = forked
        store = dist.FileStore(str(Path(folder, "store")), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        result = function(*args)
        unfinished = Path(folder, f"unfinished{rank}")
        unfinished.write_bytes(pickle.dumps(result))
        unfinished.rename(Path(folder, f"result{rank}"))
        with contextlib.suppress(Exception):  # a rank may have left in the middle of a collective
            dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    _serve()
