"""Who may record where: no recording is overwritten by accident, and none by two at once.

A lock file names the process that holds a folder. One of a process that is gone counts for
nothing: what it left behind can be resumed, and is resumed unasked by a restart of its own job.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from normuon_lens.errors import RunError
from normuon_lens.runfile.guard import damage, open_guarded
from normuon_lens.runfile.manifest import Manifest, process_lives
from normuon_lens.runfile.schema import Matrices, parts_of, rank_folders
from normuon_lens.runfile.segment import read_matrices, read_metadata

LOCK = "lock"
RESTART_SECONDS = 30.0
"""How long a restarted job waits for the writer of its earlier attempt, which may be finishing."""
LOOK_SECONDS = 0.1


class Found(NamedTuple):
    """What a recording that begins found in its place.

    Attributes
    ----------
    manifest : Manifest or None
        What one process recorded in parts.
    last_step, dropped : int
        How far the recording came that is resumed, and how many samples it lost; 0 if none is.
    attempts : int
        How often several ranks began it, so the number of their next attempt.
    resumed, restarted : bool
        Whether it may be appended to, and whether only because the same job was restarted.
    """

    manifest: Manifest | None
    last_step: int
    dropped: int
    attempts: int
    resumed: bool
    restarted: bool


def survey(
    path: Path, matrices: Matrices, job: Mapping[str, Any] | None, *, resume: bool, sharded: bool
) -> Found:
    """Look at what is in the place of a recording that is to begin, and tidy up after the dead.

    Parameters
    ----------
    path : Path
        Where the finished recording shall lie.
    matrices : Matrices
        Its matrices: another's are not resumed.
    job : mapping or None
        ``id`` and ``restart`` of the job that records.
    resume : bool
        Whether the user wants to append to what is there.
    sharded : bool
        Whether several ranks are to record.

    Returns
    -------
    Found

    Raises
    ------
    RunError
        If it may not begin there. Nothing is changed then.
    """
    parts = parts_of(path)
    restarted = _is_restart(path, job)
    until = time.monotonic() + RESTART_SECONDS
    while restarted and owner_of(parts) and time.monotonic() < until:
        time.sleep(LOOK_SECONDS)
    allowed = resume or restarted
    if path.exists() and not allowed:
        raise RunError(
            f"{path}: exists already; choose another path, delete it, or append with resume=True"
        )
    manifest, attempts = None, {}
    if parts.exists():
        # The ranks of an earlier attempt, each in a folder of its own, are in nobody's way.
        folders = [] if sharded and restarted else _folders(parts)
        for owner in filter(None, map(owner_of, [parts, *folders])):
            raise RunError(
                f"{path}: being recorded by process {owner[1]} on {owner[0]}; choose another path"
            )
        if not allowed:
            raise RunError(
                f"{parts}: remains of an interrupted recording; choose another path, "
                "delete it, or append with resume=True"
            )
        manifest, attempts = Manifest.load(parts), rank_folders(parts)
        if manifest and not manifest.segments and path.exists():  # all of it is packed
            remove_parts(parts)
            manifest, attempts = None, {}
        if manifest if sharded else attempts:
            raise RunError(
                f"{path}: was recorded by {'one process' if sharded else 'several ranks'}: "
                f"make it one file first: normuon-lens pack {path}"
            )
    last_step, dropped = _progress(path, manifest, attempts, matrices)
    if not sharded and parts.exists():
        (parts / LOCK).unlink(missing_ok=True)
        for leftover in parts.glob("*.tmp"):
            leftover.unlink()
    return Found(manifest, last_step, dropped, max(attempts, default=-1) + 1, allowed, restarted)


def owner_of(folder: Path) -> tuple[str, int] | None:
    """Return host and process id of who holds the lock of `folder`; None if nobody alive does."""
    try:
        host, pid = (folder / LOCK).read_text().split()
        alive = host != os.uname().nodename or process_lives(int(pid))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return (host, int(pid)) if alive else None


def lock(folder: Path) -> bool:
    """Take the lock of `folder`; False if somebody has it."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            with (folder / LOCK).open("x") as file:
                file.write(f"{os.uname().nodename} {os.getpid()}")
            return True
        except FileExistsError:
            return False
        except FileNotFoundError:
            pass  # who packed the recording before has just removed the folder
        except OSError:  # a full disk holds the empty file, but not what is to be in it
            (folder / LOCK).unlink(missing_ok=True)
            raise


def remove_parts(parts: Path) -> None:
    """Remove a folder of parts that is packed, as far as that is possible.

    Ranks first, for without a manifest beside them they would count again. The lock last: whoever
    waits for it may then write here at once.
    """
    with suppress(OSError):
        for folder in [path for path in parts.iterdir() if path.is_dir()]:
            shutil.rmtree(folder, ignore_errors=True)
        for file in [path for path in parts.iterdir() if path.name != LOCK]:
            file.unlink(missing_ok=True)
        (parts / LOCK).unlink(missing_ok=True)
        parts.rmdir()


def _folders(parts: Path) -> list[Path]:
    return [folder for ranks in rank_folders(parts).values() for folder in ranks.values()]


def _is_restart(path: Path, job: Mapping[str, Any] | None) -> bool:
    """Tell whether an earlier start of this very job recorded what is there."""
    for metadata in _metadata(path) if job else ():
        before = metadata.get("job")
        if isinstance(before, dict) and job and before.get("id") == job["id"]:
            restart = before.get("restart")
            if isinstance(restart, int) and restart < job["restart"]:
                return True
    return False


def _metadata(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the metadata of all that can be read of a recording, the newest first."""
    for file in [*_segments(parts_of(path)), path]:
        with suppress(RunError), open_guarded(file) as opened, damage(file):
            yield read_metadata(opened)


def _segments(parts: Path) -> Iterator[Path]:
    attempts = rank_folders(parts)
    for folder in [parts, *(f for n in reversed(attempts) for f in attempts[n].values())]:
        with suppress(RunError):
            manifest = None if folder.is_symlink() else Manifest.load(folder)
            yield from (folder / x.file for x in reversed(manifest.segments if manifest else []))


def _progress(
    path: Path,
    manifest: Manifest | None,
    attempts: dict[int, dict[int, Path]],
    matrices: Matrices,
) -> tuple[int, int]:
    """Return the last step and the lost samples of what is resumed; RunError for another's."""
    last_step = dropped = 0
    if path.exists():
        with open_guarded(path) as file, damage(path):
            _check_matrices(path, read_matrices(file), matrices)
            steps = file["steps/step"]
            last_step = int(steps[-1]) if len(steps) else 0
            dropped = int(file.attrs.get("dropped", 0))
    if manifest:
        recorded = [entry.last for entry in manifest.segments if entry.rows]
        last_step, dropped = recorded[-1] if recorded else last_step, manifest.dropped
        for segment in [parts_of(path) / entry.file for entry in manifest.segments[-1:]]:
            with open_guarded(segment) as file, damage(segment):
                _check_matrices(path, read_matrices(file), matrices)
    if attempts:
        for segment in _segments(parts_of(path)):
            with suppress(RunError):
                with open_guarded(segment) as file, damage(segment):
                    found = read_matrices(file)
                break
        else:
            found = matrices
        _check_matrices(path, found, matrices)
    for _, folders in sorted(attempts.items(), reverse=True):
        lasts = [[entry.last for entry in x.segments if entry.rows] for x in _manifests(folders)]
        if reached := [last[-1] for last in lasts if last]:
            return max(reached), dropped
    return last_step, dropped


def _manifests(folders: dict[int, Path]) -> Iterator[Manifest]:
    for folder in folders.values():
        with suppress(RunError):
            if not folder.is_symlink() and (manifest := Manifest.load(folder)):
                yield manifest


def _check_matrices(path: Path, found: Matrices, matrices: Matrices) -> None:
    if found != matrices:
        raise RunError(f"{path}: a recording of other matrices; choose another path")
