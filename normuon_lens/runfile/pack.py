"""One file of the parts: whoever packs a recording, packs it this way.

The file is written beside the parts, then renamed to its place, then the parts are removed. At
every moment in between a reader finds each step once.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from normuon_lens.errors import RunError
from normuon_lens.runfile.claim import LOCK, lock, remove_parts
from normuon_lens.runfile.flaws import Flaw
from normuon_lens.runfile.guard import reason_of
from normuon_lens.runfile.manifest import FINISHED, NAME, RECORDING, Manifest, replace_durably
from normuon_lens.runfile.reader import Run, open_run
from normuon_lens.runfile.schema import (
    HOLE,
    LIBVER,
    Event,
    Shard,
    parts_of,
    rank_folder,
    rank_folders,
    to_json,
)
from normuon_lens.runfile.segment import Segment, write_segment

PACK_LIMIT = 16 << 30
"""A recording beyond this many bytes stays in parts on close."""
ROOM = 16 << 20
"""Bytes that must stay free beside the packed file."""
LOOK_SECONDS = 0.1


def pack_in_place(
    path: Path, status: str = FINISHED, *, compress: bool = False, apart: bool = False
) -> str:
    """Make one file of a recording in parts and remove them; the caller holds their lock.

    Parameters
    ----------
    path : Path
        Of the recording, where the file shall lie.
    status : str
        The run's status, to be seen whenever this is interrupted.
    compress : bool
        Shuffle and gzip the file.
    apart : bool
        Work in a forked process, for a disk that refuses may make HDF5 crash there.

    Returns
    -------
    str
        Why the parts were kept; empty if they were not.
    """
    parts = parts_of(path)
    total = bytes_of(path)
    if total > PACK_LIMIT:
        return f"kept in parts: {total >> 30} GiB, more than is packed into one file"
    if lack := lack_of_room(total, parts):
        return f"kept in parts: {lack}"
    try:
        replace_with(path, path, status, compress=compress, apart=apart)
    except Exception as error:  # a damaged segment may raise anything; the parts are kept
        return f"kept in parts: {reason_of(error)}"
    return ""


class Packed(NamedTuple):
    """What :func:`pack` made.

    Attributes
    ----------
    path : Path
    bytes, steps : int
    ranks : tuple of int
        That recorded it.
    left_out : list of str
        What is damaged or missing.
    kept : list of str
        What is damaged, but nothing could be read without it.
    """

    path: Path
    bytes: int
    steps: int
    ranks: tuple[int, ...]
    left_out: list[str]
    kept: list[str]


def pack(
    recording: str | Path,
    target: Path | None = None,
    *,
    compress: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Packed:
    """Make one file of a recording that has ended.

    Parameters
    ----------
    recording : str or Path
        As for :func:`open_run`.
    target : Path, optional
        Write the file there and leave the recording as it is; what is damaged is left out then.
    compress : bool
        Shuffle and gzip the file.
    progress : callable, optional
        Called with how much is done and how much there is to do: all is read twice.

    Returns
    -------
    Packed

    Raises
    ------
    RunError
        If that is not possible; everything is then as it was before.
    """
    run = open_run(recording)
    path = run.path
    parts = parts_of(path)
    in_parts = parts.exists()
    if run.live:
        raise RunError(f"{path}: still being recorded; pack it once it has ended")
    if not (in_parts or target or compress):
        raise RunError(f"{path}: is one file already; to copy it, use -o OTHER.h5 or --compress")
    if target and (target.exists() or parts_of(target).exists()):
        raise RunError(f"{target}: exists already; choose another path or delete it")
    if target and not target.parent.is_dir():
        raise RunError(f"{target.parent}: no such folder")
    if lack := lack_of_room(bytes_of(path), target.parent if target else path.parent):
        raise RunError(f"{target or path}: {lack}")
    total = max(1, 2 * run.size)
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(min(done, total), total)

    flaws = list(run.flaws(more))
    left_out = wounds(run, flaws)
    if not target and (flaws or (in_parts and left_out)):
        raise RunError(f"{path}: {in_short(left_out)}; -o OTHER.h5 saves what is whole")
    if in_parts and not target and not lock(parts):
        raise RunError(f"{path}: another process is at work there just now")
    try:
        # Somebody may have begun to record between the look and the lock.
        if in_parts and not target and Run(path).live:
            raise RunError(f"{path}: still being recorded; pack it once it has ended")
        replace_with(
            path,
            target or path,
            run.status,
            compress=compress,
            apart=True,
            damaged=target is not None,
            flaws=flaws,
            progress=more,
        )
    except OSError as error:
        raise RunError(f"{target or path}: {error.strerror or error}") from None
    finally:
        if in_parts and not target:
            (parts / LOCK).unlink(missing_ok=True)
    made = target or path
    left_out = wounds(run, [flaw for flaw in flaws if flaw.can_go])
    kept = [flaw.text for flaw in flaws if not flaw.can_go]
    steps = len(open_run(made).steps)
    return Packed(made, made.stat().st_size, steps, run.ranks, left_out, kept)


def wounds(run: Run, flaws: Sequence[Flaw] = ()) -> list[str]:
    """Return what of a recording is damaged or missing, one line each."""
    lines = [f"{damage.path.name}: {damage.reason}" for damage in run.damaged]
    return [*lines, *(flaw.text for flaw in flaws), *(hole.text for hole in run.holes)]


def in_short(lines: Sequence[str], most: int = 5) -> str:
    """Join lines into one, the first few of them if they are many."""
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "; ".join([*lines[:most], *more])


def leftovers(path: Path) -> list[str]:
    """Return what lies beside a recording that counts for nothing, one line each.

    Parameters
    ----------
    path : Path
        Of a recording that has ended: of one that is being made they are no leftovers.
    """
    parts = parts_of(path)
    found = [path.with_name(f"{path.name}.packed.tmp")]
    lines = [f"{file.name}: half of a packed file; delete it" for file in found if file.exists()]
    folders = [folder for ranks in rank_folders(parts).values() for folder in ranks.values()]
    for folder in [parts, *folders]:
        if not folder.is_dir() or folder.is_symlink():
            continue
        with suppress(RunError):  # a damaged list is told of elsewhere
            manifest = Manifest.load(folder)
            listed = {entry.file for entry in manifest.segments} if manifest else set()
            for name in sorted(file.name for file in folder.iterdir()):
                if name.endswith(".tmp"):
                    lines.append(f"{name}: half of a file, never committed; delete it")
                elif name.endswith(".h5") and name not in listed:
                    lines.append(f"{name}: not in {NAME}, so nothing of it is read")
    return lines


def replace_with(
    path: Path,
    target: Path,
    status: str,
    *,
    compress: bool = False,
    apart: bool = False,
    damaged: bool = False,
    flaws: Sequence[Flaw] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the recording at `path` as one file to `target`; in its own place, for its parts.

    Parameters
    ----------
    path, target : Path
        If they differ, the recording stays as it is.
    status : str
        The run's status.
    compress, apart : bool
        As for :func:`pack_in_place`.
    damaged : bool
        Leave out what is damaged instead of refusing.
    flaws : sequence of Flaw, optional
        What is wrong with its numbers; None: they are read to find out.
    progress : callable, optional
        Called with the bytes that were copied, again and again.

    Raises
    ------
    RunError, OSError
        If it cannot be written; nothing is left behind then.
    """
    in_place = target == path and parts_of(path).exists()
    folder = parts_of(path) if in_place else target.parent
    temporary = folder / f"{target.name}.packed.tmp"

    def write(said: Callable[[int], None] | None) -> None:
        run = Run(path)
        found = list(run.flaws()) if flaws is None else flaws
        if run.damaged and not damaged:
            raise RunError(f"{run.damaged[0].path.name} is damaged ({run.damaged[0].reason})")
        if found and not damaged:
            raise RunError(found[0].text)
        write_packed(run, temporary, status, flaws=found, compress=compress, progress=said)

    try:
        temporary.unlink(missing_ok=True)
        if apart:
            _in_a_fork(write, progress)
        else:
            write(progress)
        replace_durably(temporary, target)
        if in_place:
            # Killed right here, the same steps lie in both places; a reader takes each step once.
            Manifest(status=status).save(parts_of(path))
            remove_parts(parts_of(path))
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_packed(
    run: Run,
    temporary: Path,
    status: str,
    *,
    flaws: Sequence[Flaw] = (),
    compress: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write all records of `run` but its `flaws` into the new file `temporary`.

    Holes and damage become events.
    """
    run.leave_out(flaws)
    segments = run.segments()
    for segment in segments:
        segment.events = [event for event in segment.events if event.kind != HOLE]
    events = [Event(hole.steps[0], HOLE, hole.text) for hole in run.holes]
    for damage in run.damaged:
        first, last = damage.steps or (0, 0)
        span = f"steps {first}–{last}" if damage.steps else "a part"
        text = f"{span} left out, {damage.path.name} is damaged: {damage.reason}"
        events.append(Event(first, "damaged", text))
    for flaw in flaws:
        if flaw.path not in {damage.path for damage in run.damaged}:
            text = f"{flaw.text}; {'left out' if flaw.can_go else 'kept as it is'}"
            events.append(Event(flaw.steps[0] if flaw.steps else 0, "damaged", text))
    if events:
        segments.append(Segment(events=events))
    with h5py.File(temporary, "x", libver=LIBVER) as packed:
        write_segment(
            packed,
            to_json(run.metadata),
            run.table,
            segments,
            packed=True,
            compress=compress,
            progress=progress,
        )
        packed.attrs["status"] = np.bytes_(status.encode())
        packed.attrs["dropped"] = run.dropped
        packed.flush()


def await_ranks(path: Path, shard: Shard, seconds: float) -> str:
    """Wait until no rank records any more, in this attempt or an earlier one.

    Parameters
    ----------
    path : Path
        Of the recording.
    shard : Shard
        Of the rank that waits.
    seconds : float
        For how long.

    Returns
    -------
    str
        Empty once all ranks of the attempt have finished; else which has not.
    """
    until = time.monotonic() + seconds
    while True:
        late, failed = _ranks_that_are_late(parts_of(path), shard)
        if failed or not late:
            return failed and f"kept in parts: {failed}"
        if time.monotonic() >= until:
            return f"kept in parts: {late}"
        time.sleep(LOOK_SECONDS)


def _ranks_that_are_late(parts: Path, shard: Shard) -> tuple[str, str]:
    """Return in words what rank still records, and what rank will never finish its attempt."""
    late = failed = ""
    folders = rank_folders(parts)
    for attempt in range((shard.attempt or 0) + 1):
        current = attempt == shard.attempt
        for rank in shard.ranks if current else folders.get(attempt, {}):
            try:
                manifest = Manifest.load(parts / rank_folder(rank, attempt))
                status = manifest.status if manifest else "no files of this rank"
            except RunError as error:
                manifest, status = None, str(error)
            if manifest and manifest.writer_lives():
                late = late or f"rank {rank} has not finished"
            elif current and status == RECORDING:
                failed = failed or f"rank {rank} has not finished"
            elif current and status != FINISHED:
                failed = failed or f"rank {rank}: {status}"
    return late, failed


def bytes_of(path: Path) -> int:
    """Return how many bytes a recording takes, its file and its parts together."""
    files = [path, *parts_of(path).rglob("*.h5")]
    return sum(file.stat().st_size for file in files if file.is_file())


def lack_of_room(total: int, folder: Path) -> str:
    """Say in words that packing `total` bytes into `folder` would fill the disk; empty if not."""
    free = shutil.disk_usage(folder).free
    if total * 1.2 + ROOM <= free:
        return ""
    return f"packing needs {total >> 20} MiB, {free >> 20} MiB are free"


def _in_a_fork(
    work: Callable[[Callable[[int], None]], None], progress: Callable[[int], None] | None
) -> None:
    """Do `work` in a forked process; RunError with the reason when it fails or crashes.

    What the work says of its progress comes line by line through a pipe, its failure last.
    """
    of, to = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(of)
            work(lambda count: _say(to, f"{count}"))
            os._exit(0)
        except Exception as error:
            _say(to, f"!{reason_of(error)}")
        finally:
            os._exit(1)
    os.close(to)
    reason = ""
    with open(of, encoding="utf-8") as pipe:
        for line in pipe:
            if line.startswith("!"):
                reason = line[1:].strip()
            elif progress:
                progress(int(line))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise RunError(f"the packed file could not be written ({reason or f'exit code {code}'})")


def _say(pipe: int, text: str) -> None:
    os.write(pipe, f"{text}\n".encode())
