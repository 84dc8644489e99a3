"""The recorder: rides on an optimizer's step hooks and never gets in the way.

Every step runs the same short way: taps look at the matrices, tracks take their row norms and
hand them over. On sampled steps the matrices go too. Spectra, files and everything that may take
time or fail is the helper process's business.
"""

from __future__ import annotations

import atexit
import itertools
import math
import os
import shlex
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from normuon_lens.errors import AttachError
from normuon_lens.runfile import Matrices
from normuon_lens.runfile.schema import parts_of

from . import company
from .applied import Weights, update_tap
from .budget import Budget
from .company import NobodyCame
from .exchange import ExchangeLost
from .feed import Feed, FeedLost, FeedSilent
from .nesting import Nesting
from .opening import LEAVE_SECONDS, Opened, Plan, facts_of, open_alone, open_together
from .schedule import Schedule
from .selection import Watched
from .shadow import Shadow, describe_shadow, shadow_path
from .share import Share
from .stages import TorchMuonStages
from .state import state_bytes
from .steps import found_inf, gradients_vanish, is_capturing, may_be_phantom, steps_taken
from .tap import Gradients, Look, Tap
from .track import Track
from .uninterrupted import uninterrupted

CLOSE_SECONDS = 600.0
"""How long the helper may take to finish a recording."""

RECORDED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
"""Every optimizer that a recorder was attached to."""


class Recorder:
    """A recording in progress; made by :func:`normuon_lens.hooks.attach`.

    Attributes
    ----------
    path : Path
        Where the finished recording shall lie.
    steps : int
        The last optimizer step seen.
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
        ranks: list[int],
        replicated: bool,
        stages: bool,
        shadow: dict[str, dict[str, Any]],
        budget: Budget | None,
        step: int | None,
        options: dict[str, Any],
        on_error: str,
        wait: bool,
        quiet: bool,
    ) -> None:
        self.path = path
        self.seconds = 0.0
        self.steps = 0
        self._rules = list(shadow)
        self._paths = [path, *(shadow_path(path, rule) for rule in shadow)]
        self._optimizers = list(optimizers)
        self._watched = [[w for w in watched if w.optimizer == i] for i in range(len(optimizers))]
        self._schedule, self._budget = schedule, budget
        self._wanted = schedule
        self._on_error, self._quiet = on_error, quiet
        self._process = os.getpid()
        self._feed: Feed | None = None
        self._tracks: list[Track] = []
        self._taps: list[list[Tap]] = []
        self._handles: list[Any] = []
        self._closed: list[dict[str, Any]] = []
        self._failure = ""
        self._lost = 0
        self._share: Share | None = None
        self._met = self._mourning = False
        self._in_hook = False
        self._start = 0
        self._started = self._ended = self._counted = 0.0
        self._counted_seconds = 0.0
        self._clock = time.time() - time.perf_counter()
        self._begun: set[int] = set()
        self._stepped: set[int] = set()
        self._looks: dict[int, Look] = {}
        self._rates: dict[int, float] = {}
        self._nesting = [Nesting() for _ in optimizers]
        self._scalars: dict[str, Any] = {}
        self._at_exit = partial(_close_at_exit, weakref.ref(self), getattr(sys, "last_value", None))
        if not ranks and (rank := _rank()) > 0:
            self._failure = f"rank {rank} does not record: rank 0 does"
            return

        describing = [metadata, *(describe_shadow(metadata, *item) for item in shadow.items())]
        streams = (1 + 3 * stages) * len(self._paths)
        plan = Plan(self._paths, describing, matrices, options, streams)
        try:
            if ranks:
                facts = facts_of(matrices, schedule, budget, step, stages=stages, **options)
                patience = company.REPLICAS_SECONDS if replicated else company.MEET_SECONDS
                opened = open_together(plan, ranks, facts, watched, optimizers, patience)
            else:
                opened = open_alone(plan)
        except NobodyCame as error:
            if not replicated:
                if on_error == "raise":
                    raise AttachError(str(error)) from None
                self._failure = f"nothing is recorded at {path}: {error}"
                self._warn(self._failure)
                return
            if (rank := _rank()) != ranks[0]:
                self._failure = f"rank {rank} does not record: rank {ranks[0]} does"
                return
            opened = open_alone(plan)
        self._feed, self._paths, last_step, self._share = opened
        self.path = self._paths[0]
        self._quiet = quiet or not self._leads
        self._tracks = [
            Track(self._feed, run, matrices, wait=wait, share=self._share)
            for run in range(len(self._paths))
        ]
        self._abandoned: Any = weakref.finalize(self, _let_go, opened, self._tracks, os.getpid())
        self._abandoned.atexit = False
        self._taps = [
            self._taps_of(i, stages, shadow) if mine else [] for i, mine in enumerate(self._watched)
        ]
        if step is None:
            step = steps_taken(optimizers) or last_step
        self.steps = self._start = step
        self._schedule = self._wanted = replace(schedule, first=step + 1)
        RECORDED.update(optimizers)
        for i, optimizer in enumerate(optimizers):
            if self._watched[i]:
                self._handles += [
                    optimizer.register_step_pre_hook(self._hook(self._before, i)),
                    optimizer.register_step_post_hook(self._hook(self._after, i)),
                    optimizer.register_load_state_dict_post_hook(self._guarded(self._loaded)),
                ]
        atexit.register(self._at_exit)
        together = f", {len(ranks)} ranks together" if self._share else ""
        self._say(f"recording {_name_some(matrices)} to {path}{together}")

    # -- face --------------------------------------------------------------------------------

    def log(self, **scalars: float | torch.Tensor) -> None:
        """Record scalars of the step just taken, such as ``loss=loss``.

        Parameters
        ----------
        **scalars : float or single-element Tensor
            Before the first step they are kept for it. A tensor is copied now and read when the
            next step begins, so a GPU is not waited for.
        """
        if self.active:
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
    def _leads(self) -> bool:
        """Whether this process speaks for all that record together."""
        return self._share is None or self._share.company.leads

    @property
    def dropped(self) -> int:
        """Samples that there was no room for, those of shadows included."""
        return self._lost + sum(track.dropped for track in self._tracks)

    @property
    def overhead(self) -> float:
        """Time in hooks relative to the rest of the training so far, 0.03 for 3 %.

        From the first recorded step on; NaN before the second.
        """
        rest = self._ended - self._started - self.seconds
        return self.seconds / rest if rest > 0 else float("nan")

    @property
    def _cost(self) -> str:
        return "" if math.isnan(self.overhead) else f", overhead {self.overhead:.1%}"

    @property
    def summary(self) -> str:
        """Path, size, steps, overhead, and the command that opens the result."""
        if self._failure:
            return self._failure
        if self._closed and not any(closed["bytes"] for closed in self._closed):
            return f"no step was taken: nothing is recorded at {self.path}"
        if not self._closed:
            state = "recording" if self.active else "not recording"
            return f"{state} {self.path}, step {self.steps}{self._cost}"
        size = sum(closed["bytes"] for closed in self._closed) / 1e6
        count = len(self._closed) - 1
        shadows = f" with {count} shadow{'s' * (count > 1)}" if count else ""
        lost = f", {self.dropped} samples dropped" if self.dropped else ""
        remarks = dict.fromkeys(c["remark"] for c in self._closed if c["remark"])
        remark = f" ({'; '.join(remarks)})" if remarks else ""
        paths = " ".join(shlex.quote(str(path)) for path in self._paths)
        together = f", {len(self._share.shard.ranks)} ranks" if self._share else ""
        return (
            f"{self.path}{shadows}: {size:.1f} MB, {self._closed[0]['steps']} steps{together}"
            f"{self._cost}{lost}{remark}\n"
            f"  look at it:  normuon-lens dashboard {paths}"
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
        if self._nesting[i].enter():
            self._at_any_rate(self._approach, i, closure)

    def _after(self, i: int, closure: bool) -> None:
        if self._nesting[i].leave() and i in self._looks:
            self._at_any_rate(self._look, i)

    def _at_any_rate(self, body: Callable[..., None], *given: Any) -> None:
        """Do what a hook has to; if it fails, once more, for the ranks that wait for this one."""
        try:
            body(*given)
        except Exception as error:
            self._fail(error)
            if self._mourning:
                body(*given)
            raise

    def _approach(self, i: int, closure: bool) -> None:
        optimizer = self._optimizers[i]
        self._settle()
        if i in self._stepped:
            self._meet()  # now that an optimizer goes on without the others
            self._end_step()
        if self._is_phantom(optimizer) or is_capturing():
            return
        if not self._stepped:
            self._begin_step(i)
        self._begun.add(i)
        group = optimizer.param_groups[self._watched[i][0].group]
        self._rates[i] = float(group.get("lr", math.nan))
        recorded = self._schedule.norms(self.steps)
        if found_inf(optimizer):
            self._skip(i, recorded)
            return
        look = Look(recorded, self._schedule.sample(self.steps), closure)
        self._looks[i] = look
        for tap in self._taps[i]:
            if recorded or tap.every_step:
                tap.before(look)

    def _is_phantom(self, optimizer: torch.optim.Optimizer) -> bool:
        if not may_be_phantom(optimizer):
            return False
        vanish = gradients_vanish(optimizer)
        return self._share.is_phantom(vanish) if self._share else vanish

    def _settle(self) -> None:
        """Look at steps that were taken, but whose hook a Ctrl-C kept from looking."""
        for i in list(self._looks):
            if self._looks[i].recorded and any(tap.moved() for tap in self._taps[i]):
                self._look(i)

    def _look(self, i: int) -> None:
        look = self._looks[i]
        self._stepped.add(i)
        for tap in self._taps[i]:
            if look.recorded or tap.every_step:
                tap.after(look)
                self.seconds, tap.seconds = self.seconds + tap.seconds, 0.0
        for track in self._tracks:
            track.collect()
        del self._looks[i]
        self._meet_if_complete()

    def _begin_step(self, i: int) -> None:
        # A step that ended in an exception (Ctrl-C, out of memory) is taken once more.
        if not self._begun:
            self._begun.add(i)
            self.steps += 1
            self._started = self._started or time.perf_counter()
            self._counted = self._counted or self._started
        for track in self._tracks:
            track.begin(self.steps, self._schedule)

    def _skip(self, i: int, recorded: bool) -> None:
        """Take it that this step of optimizer `i` moves nothing: its gradients overflowed."""
        if recorded:
            for track in self._tracks:
                track.still(self._watched[i])
        # A scaler begins with overflows: the first step that moves something is to be sampled.
        if self.steps == self._schedule.first:
            self._schedule = replace(self._schedule, first=self.steps + 1)
        self._stepped.add(i)
        self._meet_if_complete()

    def _meet_if_complete(self) -> None:
        if len(self._stepped) == sum(map(bool, self._watched)):
            self._meet()

    @property
    def _due(self) -> bool:
        """Whether the other ranks count on this one to come by at the step at hand."""
        return self._share is not None and not self._met and self._schedule.sample(self.steps)

    def _meet(self) -> None:
        """Let the rows of a sampled step set out.

        All ranks come by at every sampled step, whatever became of it here, lest the others wait.
        """
        if self._share and self._due:
            self._met = True
            agreed = self._share.meet(self.steps, self._wanted, failed=self._mourning)
            agreed = replace(agreed, first=self._schedule.first)
            self._wanted = agreed
            if agreed != self._schedule:
                self._adapt(agreed)

    def _end_step(self) -> None:
        """Hand over the rows of the step just taken; its matrices went before."""
        when = self._clock + self._ended
        # The first optimizer's, as it was used: a scheduler has changed it by now.
        own = {"lr": self._rates[min(self._rates)]}
        logged = {name: float(value) for name, value in self._scalars.items()}
        if self._share and not self._mourning:
            for found in self._share.receive():
                self._tracks[0].take_together(found)
        for track in self._tracks:
            scalars = own | self._costs(track.run)
            # The loss is that of the real path, so no shadow may claim it.
            track.end(self.steps, when, scalars if track.run else scalars | logged)
        self._scalars = {}
        self._met = False
        self._begun.clear()
        self._stepped.clear()
        self._looks.clear()
        if self._budget:
            self._keep_within(self._budget)

    def _costs(self, run: int) -> dict[str, float]:
        """Return, on sampled steps, what recording and the state of the optimizers cost so far."""
        if not self._schedule.sample(self.steps):
            return {}
        if run:
            taps = itertools.chain.from_iterable(self._taps)
            rule = self._rules[run - 1]
            held = [t.state_bytes for t in taps if isinstance(t, Shadow) and t.rule == rule]
        else:
            pairs = zip(self._optimizers, self._watched, strict=True)
            held = [state_bytes(one, [w.parameter for w in mine]) for one, mine in pairs]
        return {"optimizer_state_bytes": sum(held), "recording_overhead": self.overhead}

    def _keep_within(self, budget: Budget) -> None:
        seconds, elapsed = self.seconds - self._counted_seconds, self._ended - self._counted
        self._counted_seconds, self._counted = self.seconds, self._ended
        budget.spent(self._schedule.kind(self.steps), seconds, elapsed)
        then = budget.affordable(self._schedule)
        if then != self._schedule:
            self._wanted = then
            if not self._share:  # or else once all ranks have agreed
                self._adapt(then)

    def _adapt(self, then: Schedule) -> None:
        """Go on with another schedule."""
        self._schedule = then
        share = self._budget.share if self._budget else math.nan
        text = (
            f"from here on norms every {then.norms_every}, spectra every {then.every}, "
            f"matrices every {then.matrices_every}, to keep recording within "
            f"{share:.1%} of the training's time"
        )
        if self._leads:
            self._tracks[0].event(self.steps, "schedule", text)

    def _loaded(self, *_: Any) -> None:
        """Count on from the step of a checkpoint that was loaded, if its state says."""
        if self._stepped:
            self._meet()
            self._end_step()
        self.steps = steps_taken(self._optimizers) or self.steps

    def _note(self, scalars: dict[str, Any]) -> None:
        for name, value in scalars.items():
            if isinstance(value, torch.Tensor):
                # A copy: the caller may add to it in place, and must not keep a graph alive.
                value = value.detach().clone()
            self._scalars[name] = value

    def _flush(self) -> None:
        assert self._feed is not None
        self._settle()
        # Not every rank need call this: a step at which they have yet to meet goes on.
        if self._stepped and not self._due:
            self._end_step()
        self._feed.ask("flush", {"ticket": self.steps}, "flushed", CLOSE_SECONDS)

    # -- life --------------------------------------------------------------------------------

    def _taps_of(self, i: int, stages: bool, shadow: dict[str, dict[str, Any]]) -> list[Tap]:
        optimizer, watched, track = self._optimizers[i], self._watched[i], self._tracks[0]
        taps: list[Tap] = [Gradients(optimizer, watched, track.take)] if stages else []
        if self._share:
            handed, own = self._share.shown(watched)
            if handed:  # what ours split among the ranks, each of them shows of its own
                taps.append(Weights(optimizer, handed, track.take, track.weigh))
                watched = own
        taps.append(update_tap(optimizer, watched, track.take, stages=stages))
        if stages and isinstance(optimizer, torch.optim.Muon):
            taps.append(TorchMuonStages(optimizer, watched, track.take))
        for beside, (rule, hyper) in zip(self._tracks[1:], shadow.items(), strict=True):
            taps.append(
                Shadow(optimizer, watched, beside.take, rule=rule, hyper=hyper, stages=stages)
            )
        return taps

    def _close(self, status: str) -> None:
        if os.getpid() != self._process:  # a forked child's copy
            self._unhook()
            return
        was_active = self.active
        try:
            if was_active:
                self._guarded(self._finish)(status)
        finally:
            self._mourning = False
            self._detach()
        if was_active:
            self._say(self.summary)

    def _finish(self, status: str) -> None:
        assert self._feed is not None
        self._settle()
        if self._stepped:
            self._end_step()
        # What all ranks finished, the first makes one file of.
        merge = {"merge": True} if self._share and self._leads and status == "finished" else {}
        self._closed = self._feed.ask(
            "close", _farewell(self._tracks, status) | merge, "closed", CLOSE_SECONDS
        )

    def _detach(self, seconds: float = 5.0) -> None:
        for tap in itertools.chain.from_iterable(self._taps):
            tap.release()
        self._taps = [[] for _ in self._optimizers]
        self._lost, self._tracks = self.dropped, []
        if not self._mourning:
            self._unhook()
        feed, self._feed = self._feed, None
        if feed is not None:
            self._abandoned.detach()
            feed.close(seconds)
        if self._share and not self._mourning:
            self._share.part()
        atexit.unregister(self._at_exit)

    def _unhook(self) -> None:
        # Not from within a hook: torch is going through the list that it would be taken from.
        if not self._in_hook:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def _guarded(self, body: Callable[..., None]) -> Callable[..., None]:
        """Wrap what runs inside the training: no exception of ours gets out of it."""

        def guarded(*given: Any) -> None:
            # A forked child inherits the hooks, but the recording is its parent's.
            if not self.active and not (self._mourning and os.getpid() == self._process):
                return
            try:
                body(*given)
            except Exception as error:
                self._fail(error)
                if self._on_error == "raise":
                    raise

        return guarded

    def _hook(self, body: Callable[[int, bool], None], i: int) -> Callable[..., None]:
        """Make a step hook of optimizer `i`: guarded, uninterrupted, its time counted."""
        guarded = self._guarded(body)

        def hook(_: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with uninterrupted():
                began = time.perf_counter()
                closure = any(value is not None for value in (*args[1:], kwargs.get("closure")))
                self._in_hook = True
                try:
                    with torch.no_grad():
                        guarded(i, closure)
                finally:
                    self._in_hook = False
                self._ended = time.perf_counter()
                self.seconds += self._ended - began

        # A compiled step would trace into it, and break into many graphs.
        untraced: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
        return untraced

    def _fail(self, error: Exception) -> None:
        if self._mourning and isinstance(error, ExchangeLost):  # the others know, none waits
            self._mourning = False
            self._detach()
        if self._feed is None:
            return
        reason = str(error) or type(error).__name__
        self._failure = f"recording of {self.path} stopped at step {self.steps}: {reason}"
        kept, where = self._feed.answers.get("committed", 0), parts_of(self.path)
        if not isinstance(error, FeedLost):
            # The helper is well: it finishes what it was handed, all but the step at hand.
            kept = self.steps - 1
            where = parts_of(self.path) if self._share else self.path
            _leave(self._feed, self._tracks, f"stopped at step {self.steps}: {reason}")
        if self._share and not isinstance(error, ExchangeLost):
            self._share.company.explain(reason)
            self._mourning = True
        self._detach(LEAVE_SECONDS)
        if self._on_error == "raise" or (isinstance(error, ExchangeLost) and not self._leads):
            return  # raising says it, or the first rank for all
        lost = self.steps - max(kept, self._start)
        said = f"Steps up to {kept} are kept in {where}" if kept > 0 else "Nothing is kept"
        hope = ", unless it goes on and finishes" if isinstance(error, FeedSilent) else ""
        self._warn(
            f"recording of {self.path} stopped at step {self.steps}, training goes on: {reason}. "
            f"{said}; {lost} later steps are lost{hope}."
        )

    def _warn(self, text: str) -> None:
        try:
            warnings.warn(f"normuon-lens: {text}", RuntimeWarning, stacklevel=_depth_of_user())
        except RuntimeWarning:  # made an error by the user's filters, who would not mean this one
            _print(text)

    def _say(self, text: str) -> None:
        if not self._quiet:
            _print(text)


def _let_go(opened: Opened, tracks: list[Track], process: int) -> None:
    """Finish what a recorder handed over that is gone, as is its training: all but a last row."""
    if os.getpid() != process:  # a forked child's copy
        return
    if opened.share:
        opened.share.part()
    _leave(opened.feed, tracks, "finished")
    opened.feed.close(LEAVE_SECONDS)


def _leave(feed: Feed, tracks: list[Track], status: str) -> None:
    """Have the helper finish what it was handed, without waiting; unasked, it does the same."""
    with suppress(Exception):
        feed.send("close", _farewell(tracks, status))


def _farewell(tracks: list[Track], status: str) -> dict[str, Any]:
    return {"status": status, "dropped": [track.dropped for track in tracks]}


def _print(text: str) -> None:
    # Standard error may be closed, or a pipe that nobody reads.
    with suppress(OSError, ValueError):
        print(f"normuon-lens: {text}", file=sys.stderr, flush=True)


def _close_at_exit(found: weakref.ref[Recorder], old_error: BaseException | None) -> None:
    """Close what a script left open: finished, unless an exception is what ended the script."""
    recorder, error = found(), getattr(sys, "last_value", None)
    if recorder is not None:
        # In a notebook an error ends a cell, not the training.
        failed = error is not None and error is not old_error and not hasattr(sys, "ps1")
        recorder._close(f"interrupted: {type(error).__name__}" if failed else "finished")


def _depth_of_user() -> int:
    """Return the `stacklevel` at which a warning names the user's own line, not torch's or ours."""
    inner = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
    depth, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(inner):
        depth, frame = depth + 1, frame.f_back
    return depth


def _rank() -> int:
    """Return this process's rank among those of one training, 0 if it is alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank: int = torch.distributed.get_rank()
        return rank
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


def _name_some(matrices: Matrices) -> str:
    names = matrices.names
    shown = ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, … {names[-1]}"
    return f"{len(names)} matrices ({shown})" if len(names) > 1 else f"1 matrix ({shown})"
