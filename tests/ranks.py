"""Run a function on real gloo ranks, each a process of its own, and collect what it returns."""

import contextlib
import faulthandler
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

TESTS = Path(__file__).parent

SETTINGS = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1"}

# What ranks mostly need, imported once before they part: this takes seconds of every core.
IMPORTS = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor")

GRACE = 3
"""Seconds the others have left, to say what they know, once a rank has died without a result."""


def on_ranks(ranks, function, *args, timeout=120):
    """Call ``function(*args)`` on every rank with gloo ready; return the results by rank.

    `function` must be at the top level of a test file. A rank that raises, or does not end in time,
    fails the test with what it printed, and where the others were.
    """
    with tempfile.TemporaryDirectory() as folder:
        call = (function.__module__, function.__qualname__, args)
        Path(folder, "call").write_bytes(pickle.dumps(call))
        start = time.monotonic()
        with Path(folder, "told").open("wb") as told:
            launcher = subprocess.Popen(
                [sys.executable, __file__, folder, str(ranks)],
                stdout=told,
                stderr=subprocess.STDOUT,
                env=os.environ | SETTINGS,
                start_new_session=True,
            )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGUSR1)
                time.sleep(0.3)
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
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


def _launch(folder, ranks):
    """Be all the ranks; end when they have, or soon after one of them died."""
    faulthandler.register(signal.SIGUSR1)  # say where it hangs
    sys.path.insert(0, str(TESTS))
    module, name, args = pickle.loads(Path(folder, "call").read_bytes())
    for needed in (*IMPORTS, module):
        importlib.import_module(needed)
    function = getattr(sys.modules[module], name)
    for rank in range(ranks):
        if os.fork() == 0:
            told = os.open(Path(folder, f"told{rank}"), os.O_CREAT | os.O_WRONLY)
            os.dup2(told, 1)
            os.dup2(told, 2)
            _work(folder, rank, ranks, function, args)
    for _ in range(ranks):
        if os.wait()[1] != 0:
            time.sleep(GRACE)
            os._exit(1)
    os._exit(0)


def _work(folder, rank, ranks, function, args):
    import torch.distributed as dist

    try:
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
    _launch(sys.argv[1], int(sys.argv[2]))
