"""Spreads batches over the workers of a Dask cluster that is there already.

Only paths and numbers travel, so every worker must see the recording under the same path, and have
normuon-lens installed. A worker's BLAS threads are the cluster's own affair: Dask gives it one. A
batch whose worker dies is given to another by Dask itself, a few times.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Generator, Sequence
from types import ModuleType
from typing import Any

from normuon_lens.analysis.offline.stored import Answer, Batch, measure_batch
from normuon_lens.errors import LensError
from normuon_lens.extras import require

CONNECT_SECONDS = 5
BEAT_SECONDS = 0.25
LOOK_SECONDS = 2.0
"""How often we look how many threads the cluster has: it may grow."""
AHEAD = 4
"""Batches a thread that are handed in at once; the rest wait here, where they cost nothing."""


def spread_over_dask(
    batches: Sequence[Batch], address: str
) -> Generator[tuple[Batch, Answer] | None]:
    """Have batches measured by a cluster; as :func:`~normuon_lens.analysis.offline.engine.spread`.

    Parameters
    ----------
    batches : sequence of Batch
    address : str
        Of its scheduler, such as ``tcp://host:8786``.

    Raises
    ------
    LensError
        If the cluster cannot be reached or is lost, or its workers do not see the recording.
    """
    distributed = require("distributed", "dask")
    log = logging.getLogger("distributed.client")
    level = log.level
    log.setLevel(logging.CRITICAL)  # a lost connection is ours to tell, without its traceback
    try:
        yield from _spread(distributed, batches, address)
    finally:
        log.setLevel(level)


def _spread(
    distributed: ModuleType, batches: Sequence[Batch], address: str
) -> Generator[tuple[Batch, Answer] | None]:
    try:
        # First, for a client that fails over an address that is none lingers for ten seconds.
        distributed.comm.resolve_address(address)
        client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LensError(f"no Dask scheduler answers at {address}: {why}") from None
    waiting = deque(batches)
    handed: dict[Any, Batch] = {}
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    looked, room = -LOOK_SECONDS, 0
    try:
        while waiting or handed:
            if time.monotonic() - looked >= LOOK_SECONDS:
                looked, room = time.monotonic(), AHEAD * max(1, sum(client.nthreads().values()))
            while waiting and len(handed) < room:
                batch = waiting.popleft()
                future = client.submit(measure_batch, batch, pure=False)
                handed[future] = batch
                future.add_done_callback(done.put)
            try:
                future = done.get(timeout=BEAT_SECONDS)
            except queue.Empty:
                yield None
                continue
            batch = handed.pop(future)
            yield batch, _answer(future, batch, address)
    finally:
        client.cancel(list(handed))
        client.close()


def _answer(future: Any, batch: Batch, address: str) -> Answer:
    if future.status == "finished":
        answer: Answer = future.result()
        return answer
    if future.status != "error":
        raise LensError(f"the Dask scheduler at {address} is gone")
    error = future.exception()
    if isinstance(error, LensError):
        where = "every worker of the cluster must see the recording under this path"
        raise LensError(f"{error} ({where})")
    if isinstance(error, ImportError):
        raise LensError(f"the workers at {address} lack what it needs ({error}): install it there")
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return [text] * len(batch.steps)
