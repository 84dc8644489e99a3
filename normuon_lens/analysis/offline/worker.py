"""A worker process of an analysis: batches come on standard input, answers go on standard output.

Started with ``python -m`` by :mod:`normuon_lens.analysis.offline.engine`, never by hand. It holds
nothing that could be lost, and ends when its input does, also when whoever started it was killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress

from normuon_lens.analysis.offline.stored import Batch, measure_batch
from normuon_lens.errors import LensError


def main() -> int:
    """Answer batch after batch, in lines of JSON, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what happens then is decided by who started us
    # Numerical libraries print now and then: not among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with suppress(BrokenPipeError):
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            batch = Batch(**json.loads(line))
            try:
                answer: dict[str, object] = {"answer": measure_batch(batch)}
            except LensError as error:
                answer = {"refused": str(error)}
            print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
