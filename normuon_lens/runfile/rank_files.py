"""What one rank wrote in one attempt: its segments, and what is wrong with them.

A big training has more segments than a process may hold open files, so only some stay open.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from normuon_lens.errors import RunError
from normuon_lens.runfile.digests import GROUP
from normuon_lens.runfile.flaws import Flaw, flaws_of, size_of
from normuon_lens.runfile.guard import damage, open_guarded
from normuon_lens.runfile.manifest import NAME, Manifest
from normuon_lens.runfile.schema import Matrices, Shard
from normuon_lens.runfile.segment import (
    check_layout,
    check_steps,
    read_matrices,
    read_metadata,
    read_segment,
    read_shard,
)
from normuon_lens.runfile.source import Damage

OPEN_FILES = 128
"""Files that stay open; the longest unread is closed first."""
NO_FILES = "no files of this rank"


class OutOfDate(Exception):
    """A list of segments changed while it was read: they were merged or packed meanwhile."""


class Handles:
    """Opens files as they are read, and keeps the last few open.

    What is merged away stays readable as long as it is open.
    """

    def __init__(self) -> None:
        self._files: OrderedDict[Path, h5py.File] = OrderedDict()
        self._one_at_a_time = threading.Lock()

    def add(self, path: Path, file: h5py.File) -> None:
        """Take over an open file."""
        with self._one_at_a_time:
            self._files[path] = file
            while len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1].close()

    def read(self, path: Path, stamp: tuple[int, int], name: str, at: Any) -> np.ndarray:
        """Read part of a dataset of a file that had this stamp when it was walked.

        Raises
        ------
        RunError
            If the file is damaged, gone or another.
        """
        with damage(path, name):
            if path not in self._files:
                if _stamp(path) != stamp:
                    raise ValueError("it was replaced")
                self.add(path, h5py.File(path, "r", locking=False))
            with self._one_at_a_time:
                self._files.move_to_end(path)
                values: np.ndarray = self._files[path][name][at]
        return values

    def keep(self, paths: Iterable[Path]) -> None:
        """Close all files but these."""
        with self._one_at_a_time:
            for path in self._files.keys() - set(paths):
                self._files.pop(path).close()


class RankSegment:
    """One immutable segment of a rank: its small index in memory, its data read on demand.

    Parameters
    ----------
    path : Path
    handles : Handles
        Which keep it open.

    Raises
    ------
    RunError
        If it cannot be read, or is no rank's.
    """

    def __init__(self, path: Path, handles: Handles) -> None:
        if path.is_symlink():
            raise RunError(f"{path}: a link, which is not followed")
        self.path = path
        self._handles = handles
        self._stamp = _stamp(path)
        file = open_guarded(path)
        handles.add(path, file)
        with damage(path):
            self.metadata = read_metadata(file)
            self.matrices = read_matrices(file)
            shard = read_shard(file, self.matrices)
            if shard is None:
                raise ValueError("it is not of one of several ranks")
            self.shard: Shard = shard
            segment = read_segment(file)
            check_layout(segment, self.matrices, shard)
            self.index = {
                name: array[()]
                for name, array in segment.arrays.items()
                if array.ndim == 1 and not name.endswith("/sigma")
            }
            check_steps(self.index)
            self.stored = file.id.get_filesize()
            self.size = size_of(file, segment.arrays)
            self.has_digests = GROUP in file
        self.dtypes = {name: array.dtype for name, array in segment.arrays.items()}
        self.events = segment.events
        self.scalars = segment.scalars

    @property
    def rows(self) -> int:
        """Recorded steps."""
        return len(self.index["steps/step"])

    def flaws(self, progress: Callable[[int], None] | None = None) -> Iterator[Flaw]:
        """Read everything once and yield what is wrong; RunError when the file is gone."""
        with open_guarded(self.path) as file:
            yield from flaws_of(file, self.path, self.dtypes, self.matrices, progress)

    def read(self, name: str, at: Any) -> np.ndarray:
        """Read part of a dataset; RunError when the disk or the file refuses."""
        return self._handles.read(self.path, self._stamp, name, at)


@dataclass
class RankFiles:
    """What can be read of one rank in one attempt.

    Attributes
    ----------
    rank : int
    folder : Path
    manifest : Manifest or None
        None if it cannot be read.
    segments : list of RankSegment
        In the order in which they were recorded.
    damaged : list of Damage
        Segments that cannot be read, or the whole folder.
    """

    rank: int
    folder: Path
    manifest: Manifest | None = None
    segments: list[RankSegment] = field(default_factory=list)
    damaged: list[Damage] = field(default_factory=list)

    @property
    def problem(self) -> str:
        """Why nothing at all can be read of this rank; empty if something can."""
        if self.segments:
            return ""
        if self.manifest is None:
            return self.damaged[0].reason if self.damaged else NO_FILES
        return ""

    def writer_lives(self) -> bool:
        """Tell whether this rank still records, as far as this machine can see."""
        return self.manifest is not None and self.manifest.writer_lives()


def read_rank(
    folder: Path,
    rank: int,
    attempt: int,
    known: MutableMapping[Path, RankSegment],
    handles: Handles,
    distrusted: Mapping[Path, str],
) -> RankFiles:
    """Read the list of a rank's segments and those that are not `known` yet, which is added to.

    Those that are `distrusted`, for the reason given, count as damaged.

    Raises
    ------
    OutOfDate
        If the list changed meanwhile.
    """
    found = RankFiles(rank, folder)
    try:
        if folder.is_symlink() or (folder / NAME).is_symlink():
            raise RunError("a link, which is not followed")
        found.manifest = Manifest.load(folder)
    except RunError as error:
        found.damaged.append(Damage(folder, None, _without(error, folder / NAME)))
    for entry in found.manifest.segments if found.manifest else []:
        path = folder / entry.file
        try:
            if path in distrusted:
                raise RunError(distrusted[path])
            segment = known.get(path) or RankSegment(path, handles)
            of = segment.shard
            if (of.rank, of.attempt) != (rank, attempt):
                raise RunError(f"recorded by rank {of.rank} in attempt {of.attempt}")
            if found.segments and of != found.segments[0].shard:
                raise RunError("its rows are not those of the segments before")
        except RunError as error:
            if not path.exists() and not _lists(folder, path):
                raise OutOfDate from None
            steps = (entry.first, entry.last) if entry.rows else None
            found.damaged.append(Damage(path, steps, _without(error, path)))
            continue
        found.segments.append(segment)
        known[path] = segment
    return found


def disown(found: RankFiles, table: Matrices, ranks: tuple[int, ...]) -> None:
    """Count as damaged what is of other matrices or of other ranks than the rest of a run."""
    for segment in found.segments:
        reason = "its matrices are not this run's" if segment.matrices != table else ""
        if segment.shard.ranks != ranks:
            reason = reason or "its ranks are not this run's"
        if reason:
            steps = segment.index["steps/step"]
            span = (int(steps.min()), int(steps.max())) if len(steps) else None
            found.damaged.append(Damage(segment.path, span, reason))
    found.segments = [x for x in found.segments if x.matrices == table and x.shard.ranks == ranks]


def _lists(folder: Path, path: Path) -> bool:
    try:
        manifest = Manifest.load(folder)
    except RunError:
        return True
    return any(entry.file == path.name for entry in manifest.segments) if manifest else False


def _without(error: RunError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    except OSError:
        return (0, 0)
