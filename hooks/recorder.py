"""The recorder: rides on an optimizer's step hooks and never gets in the way.

Every step runs the same short way: keep the weights, let the optimizer step, subtract, take row
norms, hand them over. On sampled steps the matrices go too. Spectra, files and everything that
may take time or fail is the helper process's business.
"""

from __future__ import annotations

import atexit
import math
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch

import normuon_lens
from normuon_lens.errors import AttachError
from normuon_lens.runfile import Matrices
from normuon_lens.runfile.schema import parts_of

from .applied import AppliedUpdate
from .feed import START_SECONDS, Feed, FeedLost
from .schedule import Schedule
from .selection import Watched, select
from .stages import StageTap

CLOSE_SECONDS = 600.0
SAMPLES_IN_FLIGHT = 4
RING_BYTES = (8 << 20, 512 << 20)
"""Least and most shared memory between the trainer and the helper process."""


def attach(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    path: str | os.PathLike[str],
    *,
    every: int = 10,
    norms_every: int = 1,
    matrices_every: int | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    stages: bool = False,
    name: str | None = None,
    notes: str | None = None,
    resume: bool = False,
    on_error: Literal["warn", "raise"] = "warn",
    on_full: Literal["drop", "wait"] = "drop",
    store: Literal["float32", "float16"] = "float32",
    compress: bool = False,
    quiet: bool = False,
) -> Recorder:
    """Record what `optimizer` does to every weight matrix of `model`, from now on.

    Parameters
    ----------
    model : torch.nn.Module
        Whose parameters the optimizer trains; it gives the matrices their names.
    optimizer : torch.optim.Optimizer or sequence of them
        Any optimizer with step hooks. With several (matrix optimizer + AdamW) a step is one round.
    path : str or path-like
        Where the finished recording shall lie, such as ``runs/normuon.h5``.
    every : int
        Spectra on every so many-th step.
    norms_every : int
        Neuron norms on every so many-th step.
    matrices_every : int, optional
        Full matrices on every so many-th step; as `every` if None, never if 0.
    include, exclude : str or iterable of str, optional
        Glob patterns on parameter names, such as ``"blocks.*"``. All matrices if None.
    stages : bool
        Record the matrices on their way too: the gradient under any optimizer; momentum,
        orthogonalized and normalized under ours. About as much again for each.
    name, notes : str, optional
        Shown with the run.
    resume : bool
        Append to the recording at `path`; without it an existing one is refused.
    on_error : {"warn", "raise"}
        Whether a failure while recording is one warning (training goes on) or raised.
    on_full : {"drop", "wait"}
        Whether a sample that the helper process has no room for is dropped and counted, or the
        training waits.
    store : {"float32", "float16"}
        How full matrices are kept; float16 with one scale a matrix and step.
    compress : bool
        Compress the finished file (shuffle and gzip).
    quiet : bool
        Say nothing on standard error about what is recorded and where it went.

    Returns
    -------
    Recorder
        Also a context manager. Without ``with``, close it, or leave that to the interpreter's
        exit.

    Raises
    ------
    AttachError
        If there is no matrix to record, the patterns match none, a number makes no sense, or the
        recording cannot be made at `path`.

    Notes
    -----
    It takes the memory of one more copy of the recorded weights, beside them, and shared memory
    for four samples (8 MB to 512 MB, or one sample of the largest matrix).
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizers = [optimizer]
    else:
        optimizers = list(optimizer) if isinstance(optimizer, Iterable) else []
    if not optimizers or not all(isinstance(o, torch.optim.Optimizer) for o in optimizers):
        raise AttachError(
            f"attach needs a torch.optim.Optimizer or a list of them, got {optimizer!r}"
        )
    for choice, given, known in (
        ("on_error", on_error, ("warn", "raise")),
        ("on_full", on_full, ("drop", "wait")),
        ("store", store, ("float32", "float16")),
    ):
        if given not in known:
            raise AttachError(f"{choice}={given!r}: expected one of {', '.join(known)}")
    schedule = Schedule(every, norms_every, every if matrices_every is None else matrices_every)
    matrices, watched = select(model, optimizers, include, exclude)
    metadata = _describe(model, optimizers, watched, schedule, name, notes)
    return Recorder(
        Path(path),
        optimizers,
        matrices,
        watched,
        schedule,
        metadata,
        stages=stages,
        options={"resume": resume, "store": store, "compress": compress},
        on_error=on_error,
        wait=on_full == "wait",
        quiet=quiet,
    )


class Recorder:
    """A recording in progress; made by :func:`attach`.

    Attributes
    ----------
    path : Path
        Where the finished recording shall lie.
    steps : int
        The last optimizer step seen.
    dropped : int
        Samples that there was no room for.
    seconds : float
        Time spent in the hooks so far, seconds.
    """

    def __init__(
        self,
        path: Path,
        optimizers: Sequence[torch.optim.Optimizer],
        matrices: Matrices,
        watched: Sequence[Watched],
        schedule: Schedule,
        metadata: dict[str, Any],
        *,
        stages: bool,
        options: dict[str, Any],
        on_error: str,
        wait: bool,
        quiet: bool,
    ) -> None:
        self.path = path
        self.dropped = 0
        self.seconds = 0.0
        self._matrices = matrices
        self._watched = [[w for w in watched if w.optimizer == i] for i in range(len(optimizers))]
        self._applied = [
            AppliedUpdate(o, mine) for o, mine in zip(optimizers, self._watched, strict=True)
        ]
        self._on_error, self._wait, self._quiet = on_error, wait, quiet
        self._process = os.getpid()
        self._closed: dict[str, Any] | None = None
        self._failure = ""
        self._started = self._ended = 0.0
        self._clock = time.time() - time.perf_counter()
        self._stepped: set[int] = set()
        self._copied: set[int] = set()
        self._norms: list[tuple[Watched, str, torch.Tensor]] = []
        self._rows: dict[str, np.ndarray] = {}
        self._scalars: dict[str, Any] = {}
        self._reported_drops = 0
        self._taps = [
            StageTap(o, mine, self._take)
            for o, mine in zip(optimizers if stages else (), self._watched, strict=False)
        ]
        self._feed, last_step = self._open(metadata, options)
        self.steps = _steps_taken(optimizers) or last_step
        self._schedule = Schedule(
            schedule.every, schedule.norms_every, schedule.matrices_every, self.steps + 1
        )
        self._handles = []
        for i, optimizer in enumerate(optimizers):
            if self._watched[i]:
                before = optimizer.register_step_pre_hook(self._timed(self._before, i))
                after = optimizer.register_step_post_hook(self._timed(self._after, i))
                self._handles += [before, after]
        atexit.register(self.close)
        self._say(f"recording {_name_some(matrices)} to {path}")

    # -- face --------------------------------------------------------------------------------

    def log(self, **scalars: float | torch.Tensor) -> None:
        """Record scalars of the step just taken, such as ``loss=loss``.

        Parameters
        ----------
        **scalars : float or single-element Tensor
            Before the first step they are kept for it. A tensor is copied now and read when the
            next step begins, so a GPU is not waited for.
        """
        self._guarded(self._note)(scalars)

    def flush(self) -> None:
        """Write everything up to the last step to disk; what is logged later belongs to the next.

        Raises nothing: a failure switches recording off like any other.
        """
        self._guarded(self._flush)()

    def close(self) -> None:
        """Finish the recording: wait for the helper process, pack, say where the result is."""
        self._close("finished")

    @property
    def active(self) -> bool:
        """Whether steps are being recorded."""
        return self._feed is not None and os.getpid() == self._process

    @property
    def overhead(self) -> float:
        """Time in hooks relative to the rest of the training so far, 0.03 for 3 %.

        From the first recorded step on; NaN before the second.
        """
        rest = self._ended - self._started - self.seconds
        return self.seconds / rest if rest > 0 else float("nan")

    @property
    def summary(self) -> str:
        """One line: path, size, steps, overhead, and the command that opens the result."""
        if self._failure:
            return f"recording stopped at step {self.steps}: {self._failure}"
        if self._closed is None:
            state = "recording" if self.active else "not recording"
            return f"{state} {self.path}, step {self.steps}, overhead {self.overhead:.1%}"
        size = self._closed["bytes"] / 1e6
        lost = f", {self.dropped} samples dropped" if self.dropped else ""
        remark = f" ({self._closed['remark']})" if self._closed["remark"] else ""
        return (
            f"{self.path}: {size:.1f} MB, {self._closed['steps']} steps, "
            f"overhead {self.overhead:.1%}{lost}{remark}\n"
            f"  look at it:  normuon-lens dashboard {shlex.quote(str(self.path))}"
        )

    def __repr__(self) -> str:
        return f"<Recorder {self.summary}>"

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close("finished" if kind is None else f"interrupted: {kind.__name__}")

    # -- hooks -------------------------------------------------------------------------------

    def _before(self, i: int, closure: bool) -> None:
        if i in self._stepped:
            self._end_step()
        if not self._stepped:
            self.steps += 1
            self._started = self._started or time.perf_counter()
        if self._schedule.norms(self.steps):
            self._applied[i].before()
            self._copied.add(i)
            if self._taps:
                self._taps[i].open(closure=closure)

    def _after(self, i: int, closure: bool) -> None:
        self._stepped.add(i)
        if i not in self._copied:
            return
        self._copied.discard(i)
        if self._taps:
            self._taps[i].close(closure=closure)
        applied, mine = self._applied[i], self._watched[i]
        sampled = self._schedule.sample(self.steps)
        weight_norms = applied.weight_norms() if sampled else [math.nan] * len(mine)
        for item, update, decay, weight_norm in zip(
            mine, applied.after(), applied.decay, weight_norms, strict=True
        ):
            self._take(item, "update", update, decay=decay, weight_norm=weight_norm)
        self._collect_norms()

    def _take(
        self,
        item: Watched,
        stage: str,
        matrix: torch.Tensor,
        *,
        decay: float = math.nan,
        weight_norm: float = math.nan,
    ) -> None:
        """Take a matrix's row norms, and on sampled steps hand it over whole."""
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        norms = torch.linalg.vector_norm(matrix, dim=1)
        self._norms.append((item, stage, norms))
        if not self._schedule.sample(self.steps):
            return
        assert self._feed is not None
        # What was rounded is the weight, when the optimizer added the update to it; any other
        # stage is handed over just as it is.
        rounded = weight_norm if stage == "update" else float(torch.linalg.vector_norm(norms))
        kind = self._matrices[item.index].dtype if stage == "update" else "float32"
        header = {
            "stage": stage,
            "step": self.steps,
            "index": item.index,
            "spectrum": self._schedule.spectra(self.steps),
            "keep": self._schedule.matrices(self.steps),
            "weight_norm": weight_norm,
            "decay": decay,
            "noise_norm": rounded,
            "noise_dtype": kind,
        }
        if not self._feed.send("matrix", header, {"values": matrix.cpu().numpy()}, wait=self._wait):
            self.dropped += 1

    def _collect_norms(self) -> None:
        """Bring the row norms taken so far to the CPU, in one transfer, and into their rows."""
        norms = torch.cat([norm for _, _, norm in self._norms]).to("cpu", torch.float32).numpy()
        start = 0
        for item, stage, norm in self._norms:
            if stage not in self._rows:
                self._rows[stage] = np.full(self._matrices.total_rows, np.nan, np.float32)
            self._rows[stage][self._matrices.rows(item.index)] = norms[start : start + len(norm)]
            start += len(norm)
        self._norms.clear()

    def _end_step(self) -> None:
        """Hand over the row of the step just taken; its matrices went before."""
        assert self._feed is not None
        scalars = {"lr": self._lr(), **self._scalars}
        header = {
            "step": self.steps,
            "time": self._clock + self._ended,
            "scalars": {name: float(value) for name, value in scalars.items()},
            "void": "update" in self._rows and bool((self._rows["update"] == 0).all()),
            "dropped": self.dropped,
        }
        norms, self._scalars, self._rows = self._rows, {}, {}
        self._stepped.clear()
        if not self._feed.send("step", header, norms, wait=self._wait):
            self.dropped += 1
        elif self.dropped > self._reported_drops:
            count, self._reported_drops = self.dropped - self._reported_drops, self.dropped
            text = f"{count} samples dropped: the helper process could not keep up"
            self._feed.send("event", {"step": self.steps, "kind": "dropped", "text": text})

    def _lr(self) -> float:
        i = next(i for i, mine in enumerate(self._watched) if mine)
        return float(self._applied[i].optimizer.param_groups[self._watched[i][0].group]["lr"])

    def _note(self, scalars: dict[str, Any]) -> None:
        for name, value in scalars.items():
            if isinstance(value, torch.Tensor):
                # A copy: the caller may add to it in place, and must not keep a graph alive.
                value = value.detach().clone()
            self._scalars[name] = value

    def _flush(self) -> None:
        assert self._feed is not None
        if self._stepped:
            self._end_step()
        self._feed.ask("flush", {"ticket": self.steps}, "flushed", CLOSE_SECONDS)

    # -- life --------------------------------------------------------------------------------

    def _open(self, metadata: dict[str, Any], options: dict[str, Any]) -> tuple[Feed | None, int]:
        sizes = [x.m * x.n * (8 if x.dtype == "float64" else 4) for x in self._matrices]
        least, most = RING_BYTES
        largest = max(sizes) + (1 << 20)
        header = {
            "path": str(self.path.absolute()),
            "metadata": metadata,
            "matrices": [vars(matrix) for matrix in self._matrices],
            "options": options,
        }
        try:
            feed = Feed(max(largest, min(most, max(least, SAMPLES_IN_FLIGHT * sum(sizes)))))
        except FeedLost as error:
            raise AttachError(str(error)) from None
        try:
            return feed, feed.ask("open", header, "opened", START_SECONDS)
        except FeedLost as error:
            feed.close()
            raise AttachError(str(error)) from None

    def _close(self, status: str) -> None:
        if not self.active:
            return
        self._guarded(self._finish)(status)
        self._detach()
        self._say(self.summary)

    def _finish(self, status: str) -> None:
        assert self._feed is not None
        if self._stepped:
            self._end_step()
        header = {"status": status, "dropped": self.dropped}
        self._closed = self._feed.ask("close", header, "closed", CLOSE_SECONDS)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        feed, self._feed = self._feed, None
        if feed is not None:
            feed.close()
        atexit.unregister(self.close)

    def _guarded(self, body: Callable[..., None]) -> Callable[..., None]:
        """Wrap what runs inside the training: no exception of ours gets out of it."""

        def guarded(*given: Any) -> None:
            # A forked child inherits the hooks, but the recording is its parent's.
            if not self.active:
                return
            try:
                body(*given)
            except Exception as error:
                self._fail(error)

        return guarded

    def _timed(self, body: Callable[[int, bool], None], i: int) -> Callable[..., None]:
        """Guard a step hook of optimizer `i` and count its time as overhead."""
        guarded = self._guarded(body)

        def hook(_: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            began = time.perf_counter()
            guarded(i, any(value is not None for value in (*args, kwargs.get("closure"))))
            self._ended = time.perf_counter()
            self.seconds += self._ended - began

        return hook

    def _fail(self, error: Exception) -> None:
        self._failure = str(error) or type(error).__name__
        self._detach()
        if self._on_error == "raise":
            raise error
        kept = parts_of(self.path)
        warnings.warn(
            f"normuon-lens: recording of {self.path} stopped at step {self.steps}, training goes "
            f"on: {self._failure}. What is committed is in {kept}",
            RuntimeWarning,
            stacklevel=4,
        )

    def _say(self, text: str) -> None:
        if not self._quiet:
            print(f"normuon-lens: {text}", file=sys.stderr, flush=True)


def _steps_taken(optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Return how many steps the optimizers have taken, as far as their state says; else 0."""
    taken = [
        int(state["step"])
        for optimizer in optimizers
        for state in optimizer.state.values()
        if isinstance(state, dict) and "step" in state
    ]
    return max(taken, default=0)


def _describe(
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    watched: Sequence[Watched],
    schedule: Schedule,
    name: str | None,
    notes: str | None,
) -> dict[str, Any]:
    """Collect what a reader of the run wants to know about the training."""
    main = max(range(len(optimizers)), key=lambda i: sum(w.optimizer == i for w in watched))
    return {
        "optimizer": type(optimizers[main]).__name__,
        "name": name,
        "notes": notes,
        "groups": [
            {"optimizer": type(optimizer).__name__, **_plain(group)}
            for optimizer in optimizers
            for group in optimizer.param_groups
        ],
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seed": torch.initial_seed(),
        "world_size": 1,
        "schedule": {
            "every": schedule.every,
            "norms_every": schedule.norms_every,
            "matrices_every": schedule.matrices_every,
        },
        "versions": {
            "normuon-lens": normuon_lens.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "created": time.time(),
    }


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """Keep the hyper-parameters of a parameter group that can be written down."""
    plain: dict[str, Any] = {}
    for key, value in group.items():
        if key == "params":
            continue
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool | int | float | str | None):
            plain[key] = value
        elif isinstance(value, tuple | list) and all(isinstance(v, int | float) for v in value):
            plain[key] = list(value)
    return plain


def _name_some(matrices: Matrices) -> str:
    names = matrices.names
    shown = ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, … {names[-1]}"
    return f"{len(names)} matrices ({shown})" if len(names) > 1 else f"1 matrix ({shown})"
