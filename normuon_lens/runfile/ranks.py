"""One attempt of several ranks, read as if it were one file with whole matrices.

Every rank recorded some rows of each matrix, and the spectra of matrices that it owned at some
steps. Here they are put together when they are asked for. What a rank did not record, or what
can no longer be read of it, is NaN and named as a hole; it is never taken from another step,
another attempt, or a pass through the same step before the training went back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from normuon_lens.errors import RunError
from normuon_lens.runfile.flaws import Flaw
from normuon_lens.runfile.guard import MAX_EXPANSION, SMALL
from normuon_lens.runfile.manifest import FINISHED, INTERRUPTED, RECORDING
from normuon_lens.runfile.rank_files import (
    NO_FILES,
    Handles,
    RankFiles,
    RankSegment,
    disown,
    read_rank,
)
from normuon_lens.runfile.schema import STAGES, Event, Matrices, rank_folders
from normuon_lens.runfile.segment import Segment
from normuon_lens.runfile.source import Damage, Lack

SILENT_SECONDS = 60.0
"""A living rank that committed nothing for so long after another did holds the others back no
more."""


class Lazy:
    """An array that is put together when it is sliced.

    Parameters
    ----------
    shape : tuple of int
    dtype : dtype
    read : callable
        Takes the wanted rows, an ascending array, and a slice of columns; returns their values.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        read: Callable[[np.ndarray, slice], np.ndarray],
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self._read = read

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: Any) -> np.ndarray:
        rows, *more = at if isinstance(at, tuple) else (at,)
        columns = more[0] if more else slice(None)
        if not isinstance(rows, slice):
            one: np.ndarray = self._read(np.array([rows]), columns)[0]
            return one
        return self._read(np.arange(len(self))[rows], columns)


class _Norms(NamedTuple):
    """Where one rank's columns of a stage belong: (C,) columns of the run, (C,) parts."""

    columns: np.ndarray
    parts: np.ndarray


class _Records(NamedTuple):
    """Samples of a stage, (R,) each: key, matrix, which segment, and number in that segment."""

    keys: np.ndarray
    matrices: np.ndarray
    segments: np.ndarray
    numbers: np.ndarray


class Attempt:
    """All ranks of one attempt as one source.

    Rows are all passes through all steps, by how often the training had gone back, then by step.

    Parameters
    ----------
    path : Path
        Of the recording.
    members : sequence of RankFiles
        By rank; of those that recorded, at least one with a segment.
    """

    def __init__(self, path: Path, members: Sequence[RankFiles]) -> None:
        self.path = path
        self._members = list(members)
        first = next(member for member in members if member.segments)
        self.matrices: Matrices = first.segments[0].matrices
        self.metadata: dict[str, Any] = first.segments[-1].metadata
        self.ranks = first.segments[0].shard.ranks
        self.later = np.empty(0, np.int64)
        self.dropped = sum(x.manifest.dropped for x in members if x.manifest)
        self._segments = [segment for member in members for segment in member.segments]
        self._put_in_order()
        self.events = self._all_events()
        self.index: dict[str, np.ndarray] = self._rows()
        self.scalars = self._scalars()
        self.lacks = [lack for w in range(len(members)) for lack in self._lacks(w)]
        self._lazy: dict[str, Lazy] = {}
        for stage in STAGES:
            self._add_neurons(stage)
            self._add_spectra(stage)
            self._add_updates(stage)
        self.paths = {*self.index, *self._lazy}

    # -- as a source -------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Recorded rows T."""
        return len(self._keys)

    @property
    def size(self) -> int:
        """Bytes that :meth:`flaws` reads."""
        return sum(segment.size for segment in self._segments)

    @property
    def has_digests(self) -> bool:
        """Whether all segments have checksums."""
        return all(segment.has_digests for segment in self._segments)

    def flaws(self, progress: Callable[[int], None] | None = None) -> Iterator[Flaw]:
        """Read everything once and yield what is wrong."""
        for segment in self._segments:
            yield from segment.flaws(progress)

    def read(self, path: str, at: tuple[Any, ...]) -> np.ndarray:
        """Read part of a dataset; RunError when the disk or a file refuses."""
        return self._lazy[path][at]

    def segment(self) -> Segment:
        """Return all records, to be copied piece by piece."""
        arrays: dict[str, Any] = {**self.index, **self._lazy}
        return Segment(dict(self.scalars), arrays, list(self.events))

    # -- rows --------------------------------------------------------------------------------

    def _put_in_order(self) -> None:
        """Give every pass through a step one key, and find each rank's row of it."""
        known = [
            values
            for segment in self._segments
            for name, values in segment.index.items()
            if name.endswith("step")
        ]
        self._steps = np.unique(np.concatenate(known))
        rows = [self._key_rows(member) for member in self._members]
        self._until = self._last_shown(rows)
        keys = np.unique(np.concatenate(rows))
        self._keys = keys[keys <= self._until]
        self._expect_room(len(self._keys), 8 * len(rows))
        self._expect_room(len(self._keys), 4 * self.matrices.total_rows)
        self._places = np.full((len(rows), len(self._keys)), -1, dtype=np.int64)
        for w, of_rank in enumerate(rows):
            shown = np.flatnonzero(of_rank <= self._until)
            self._places[w, np.searchsorted(self._keys, of_rank[shown])] = shown
        self._reached = [int(of_rank.max()) if len(of_rank) else -1 for of_rank in rows]
        # The pass that counts of each step, -1 where no rank has a row of it.
        self._newest = np.full(len(self._steps), -1, dtype=np.int64)
        if len(self._steps):
            era, step = np.divmod(self._keys, len(self._steps))
            np.maximum.at(self._newest, step, era)

    def _expect_room(self, rows: int, row_bytes: int) -> None:
        """Refuse what takes far more memory than the files; ranks that are not there take some."""
        stored = sum(segment.stored for segment in self._segments)
        if rows * row_bytes > SMALL + MAX_EXPANSION * stored:
            raise RunError(
                f"{self.path}: damaged, its ranks tell of more than files of {stored} bytes hold"
            )

    def _key(self, segment: RankSegment, steps: str, eras: str) -> np.ndarray:
        numbers = np.searchsorted(self._steps, segment.index[steps]).astype(np.int64)
        keys: np.ndarray = segment.index[eras].astype(np.int64) * len(self._steps) + numbers
        return keys

    def _key_rows(self, member: RankFiles) -> np.ndarray:
        keys = [self._key(x, "steps/step", "steps/era") for x in member.segments]
        return np.concatenate(keys) if keys else np.empty(0, np.int64)

    def _last_shown(self, rows: Sequence[np.ndarray]) -> int:
        """Return the last key that all living ranks have committed; beyond all if none lives."""
        updated = [x.manifest.updated if x.manifest else -np.inf for x in self._members]
        until = int(np.iinfo(np.int64).max)
        for member, keys, when in zip(self._members, rows, updated, strict=True):
            if member.writer_lives() and when >= max(updated) - SILENT_SECONDS:
                until = min(until, int(keys.max()) if len(keys) else -1)
        return until

    def _of_rows(self, w: int, name: str) -> np.ndarray:
        return np.concatenate([x.index[name] for x in self._members[w].segments])

    def _rows(self) -> dict[str, np.ndarray]:
        count = len(self._keys)
        times, voids = np.full(count, np.nan), np.ones(count, dtype=bool)
        for w in reversed(range(len(self._members))):
            here = self._places[w] >= 0
            if here.any():
                times[here] = self._of_rows(w, "steps/time")[self._places[w, here]]
                voids[here] &= self._of_rows(w, "steps/void")[self._places[w, here]].astype(bool)
        return {
            "steps/step": self._steps[self._keys % max(1, len(self._steps))],
            "steps/time": times,
            "steps/void": voids.astype(np.uint8),
        }

    def _scalars(self) -> dict[str, np.ndarray]:
        lead = self._members[0].segments
        here = self._places[0] >= 0
        scalars = {}
        for name in sorted({name for segment in lead for name in segment.scalars}):
            blocks = [x.scalars.get(name, np.full(x.rows, np.nan)) for x in lead]
            scalars[name] = np.full(len(self._keys), np.nan)
            scalars[name][here] = np.concatenate(blocks)[self._places[0, here]]
        return scalars

    def _all_events(self) -> list[Event]:
        events = []
        for member in self._members:
            prefix = "" if member is self._members[0] else f"rank {member.rank}: "
            for segment in member.segments:
                events += [x._replace(text=prefix + x.text) for x in segment.events]
        return sorted(events, key=lambda event: event.step)

    def _lacks(self, w: int) -> list[Lack]:
        """Return the rows that a rank has not, by reason."""
        member = self._members[w]
        missing = self._places[w] < 0
        if not missing.any():
            return []
        if member.problem:
            return [Lack(member.rank, missing, member.problem)]
        lacks = []
        steps = self.index["steps/step"]
        for damage in member.damaged:
            low, high = damage.steps or (1, 0)
            here = missing & (steps >= low) & (steps <= high)
            reason = f"{damage.path.name} is damaged ({damage.reason})"
            lacks.append(Lack(member.rank, here, reason))
            missing = missing & ~here
        after = missing & (self._keys > self._reached[w])
        lacks.append(Lack(member.rank, after, _why_it_ended(member)))
        lacks.append(Lack(member.rank, missing & ~after, "missing"))
        return [lack for lack in lacks if lack.rows.any()]

    # -- norms -------------------------------------------------------------------------------

    def _add_neurons(self, stage: str) -> None:
        path = f"neurons/{stage}"
        if not any(path in segment.dtypes for segment in self._segments):
            return
        norms = [self._columns_of(member, stage) for member in self._members]
        parts = np.ones(self.matrices.total_rows, dtype=np.int64)
        for of_rank in norms:
            parts[of_rank.columns] = np.maximum(parts[of_rank.columns], of_rank.parts)

        def read(rows: np.ndarray, columns: slice) -> np.ndarray:
            low, high, _ = columns.indices(self.matrices.total_rows)
            values = np.full((len(rows), max(0, high - low)), np.nan, dtype=np.float32)
            if not values.size:
                return values
            spread = np.flatnonzero(parts[low:high] > 1)
            squares = np.zeros((len(rows), len(spread)))
            count = np.zeros((len(rows), len(spread)), dtype=np.int64)
            # The first rank that has a norm is to count, so it is written last.
            for w in reversed(range(len(norms))):
                first, last = np.searchsorted(norms[w].columns, (low, high))
                wanted = norms[w].columns[first:last] - low
                if not len(wanted):
                    continue
                for at, block in self._blocks(w, path, rows, slice(first, last)):
                    whole = norms[w].parts[first:last] == 1
                    values[np.ix_(at, wanted[whole])] = block[:, whole]
                    into = np.searchsorted(spread, wanted[~whole])
                    squares[np.ix_(at, into)] += block[:, ~whole].astype(np.float64) ** 2
                    count[np.ix_(at, into)] += 1
            complete = count == parts[low:high][spread]
            values[:, spread] = np.where(complete, np.sqrt(squares), np.nan)
            return values

        shape = (len(self._keys), self.matrices.total_rows)
        self._lazy[path] = Lazy(shape, np.dtype(np.float32), read)

    def _columns_of(self, member: RankFiles, stage: str) -> _Norms:
        rows = member.segments[0].shard.rows.get(stage, ()) if member.segments else ()
        columns = [np.empty(0, np.int64)]
        parts = [np.empty(0, np.int64)]
        for i, (start, stop, of) in enumerate(rows):
            offset = self.matrices.rows(i).start
            columns.append(np.arange(offset + start, offset + stop))
            parts.append(np.full(stop - start, of))
        return _Norms(np.concatenate(columns), np.concatenate(parts))

    def _blocks(
        self, w: int, path: str, rows: np.ndarray, columns: slice
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Read rows of one rank; returns which of `rows` they are and their values, by segment."""
        places, first, blocks = self._places[w, rows], 0, []
        for segment in self._members[w].segments:
            here = np.flatnonzero((places >= first) & (places < first + segment.rows))
            if len(here) and path in segment.dtypes:
                wanted = places[here] - first
                low = int(wanted.min())
                values = segment.read(path, (slice(low, int(wanted.max()) + 1), columns))
                blocks.append((here, values[wanted - low]))
            first += segment.rows
        return blocks

    # -- samples -----------------------------------------------------------------------------

    def _counts(self, keys: np.ndarray) -> np.ndarray:
        """Tell which samples are shown: of the pass through their step that counts."""
        era, step = np.divmod(keys, max(1, len(self._steps)))
        counts: np.ndarray = (keys <= self._until) & (era >= self._newest[step])
        return counts

    def _add_spectra(self, stage: str) -> None:
        name = f"samples/{stage}"
        owners = [
            number
            for number, segment in enumerate(self._segments)
            if f"{name}/step" in segment.index
        ]
        if not owners:
            return
        records = self._records(name, owners)
        keys, rows = np.unique(records.keys, return_inverse=True)
        self._expect_room(len(keys), 8 * len(self.matrices))
        slots = np.full((len(keys), len(self.matrices)), -1, dtype=np.int64)
        # Of one rank the last record counts, of several ranks the first one's.
        order = self._by_rank(records.segments)
        slots[rows[order], records.matrices[order]] = order
        filled = slots >= 0
        self.index[f"spectra/{stage}/step"] = self._steps[keys % max(1, len(self._steps))]
        for quantity in ("floor", "weight_norm", "decay"):
            values = np.full(slots.shape, np.nan)
            values[filled] = self._gather(records, f"{name}/{quantity}")[slots[filled]]
            self.index[f"spectra/{stage}/{quantity}"] = values
        starts = self._sigma_starts(records, name)

        def read(wanted: np.ndarray, columns: slice) -> np.ndarray:
            return self._sigma(f"{name}/sigma", slots[wanted], records, starts, columns)

        shape = (len(keys), self.matrices.total_sigmas)
        self._lazy[f"spectra/{stage}/sigma"] = Lazy(shape, np.dtype(np.float64), read)

    def _records(self, name: str, owners: Sequence[int]) -> _Records:
        columns: list[list[np.ndarray]] = [[], [], [], []]
        for number in owners:
            segment = self._segments[number]
            keys = self._key(segment, f"{name}/step", f"{name}/era")
            shown = np.flatnonzero(self._counts(keys))
            columns[0].append(keys[shown])
            columns[1].append(segment.index[f"{name}/matrix"][shown])
            columns[2].append(np.full(len(shown), number))
            columns[3].append(shown)
        return _Records(*map(np.concatenate, columns))

    def _by_rank(self, segments: np.ndarray) -> np.ndarray:
        """Order records so that the last of those at one place is the one that counts."""
        ranks = np.array([segment.shard.rank for segment in self._segments])
        order: np.ndarray = np.argsort(-ranks[segments], kind="stable")
        return order

    def _gather(self, records: _Records, name: str) -> np.ndarray:
        values = np.full(len(records.keys), np.nan)
        for number in np.unique(records.segments).tolist():
            here = records.segments == number
            values[here] = self._segments[number].index[name][records.numbers[here]]
        return values

    def _sigma_starts(self, records: _Records, name: str) -> np.ndarray:
        """Return where in its segment's sigma each record begins."""
        starts = np.zeros(len(records.keys), dtype=np.int64)
        for number in np.unique(records.segments).tolist():
            here = records.segments == number
            widths = self.matrices.widths[self._segments[number].index[f"{name}/matrix"]]
            starts[here] = (np.cumsum(widths) - widths)[records.numbers[here]]
        return starts

    def _sigma(
        self,
        path: str,
        slots: np.ndarray,
        records: _Records,
        starts: np.ndarray,
        columns: slice,
    ) -> np.ndarray:
        """Read singular values: neighbours in a segment together, and nothing else."""
        low, high, _ = columns.indices(self.matrices.total_sigmas)
        values = np.full((len(slots), max(0, high - low)), np.nan)
        pieces: list[tuple[int, int, int, int, int]] = []
        for i in range(len(self.matrices)):
            of = self.matrices.sigmas(i)
            first, last = max(of.start, low), min(of.stop, high)
            if first >= last:
                continue
            for row in np.flatnonzero(slots[:, i] >= 0).tolist():
                record = int(slots[row, i])
                start = int(starts[record]) + first - of.start
                number = int(records.segments[record])
                pieces.append((number, start, last - first, row, first - low))
        pieces.sort()
        done = 0
        while done < len(pieces):
            number, start, _, _, _ = pieces[done]
            stop, until = start, done
            while until < len(pieces) and pieces[until][:2] == (number, stop):
                stop += pieces[until][2]
                until += 1
            block = self._segments[number].read(path, slice(start, stop))
            for _, begin, width, row, column in pieces[done:until]:
                values[row, column : column + width] = block[begin - start : begin - start + width]
            done = until
        return values

    # -- matrices ----------------------------------------------------------------------------

    def _add_updates(self, stage: str) -> None:
        found: dict[int, list[int]] = {}
        start = f"updates/{stage}/"
        for number, segment in enumerate(self._segments):
            for path in segment.dtypes:
                if path.startswith(start) and path.removeprefix(start).isdecimal():
                    found.setdefault(int(path.removeprefix(start)), []).append(number)
        for i, owners in sorted(found.items()):
            self._add_matrix(f"{start}{i:03d}", i, owners)

    def _add_matrix(self, path: str, i: int, owners: Sequence[int]) -> None:
        columns: list[list[np.ndarray]] = [[], [], []]
        for number in owners:
            keys = self._key(self._segments[number], f"{path}_step", f"{path}_era")
            shown = np.flatnonzero(self._counts(keys))
            for column, values in zip(
                columns, (keys[shown], np.full(len(shown), number), shown), strict=True
            ):
                column.append(values)
        all_keys, segments, numbers = map(np.concatenate, columns)
        order = self._by_rank(segments)
        keys, last = np.unique(all_keys[order][::-1], return_index=True)
        order = order[::-1][last]
        segments, numbers = segments[order], numbers[order]
        self.index[f"{path}_step"] = self._steps[keys % max(1, len(self._steps))]
        if any(f"{path}_scale" in self._segments[number].index for number in owners):
            scales = np.ones(len(keys), dtype=np.float32)
            for at, (number, row) in enumerate(zip(segments, numbers, strict=True)):
                if f"{path}_scale" in self._segments[number].index:
                    scales[at] = self._segments[number].index[f"{path}_scale"][row]
            self.index[f"{path}_scale"] = scales
        dtype = np.result_type(*(self._segments[number].dtypes[path] for number in owners))
        shape = (self.matrices[i].m, self.matrices[i].n)

        def read(rows: np.ndarray, columns: slice) -> np.ndarray:
            values = np.empty((len(rows), *shape), dtype=dtype)
            for at, row in enumerate(rows.tolist()):
                segment = self._segments[segments[row]]
                values[at] = segment.read(path, int(numbers[row]))
            return values[:, columns]

        self._lazy[path] = Lazy((len(keys), *shape), dtype, read)


class Ranks(NamedTuple):
    """What several ranks recorded.

    Attributes
    ----------
    attempts : list of Attempt
        In their order, those of which anything can be read.
    members : list of list of RankFiles
        By attempt, then by rank; those that should be there and are not included.
    damaged : list of Damage
    """

    attempts: list[Attempt]
    members: list[list[RankFiles]]
    damaged: list[Damage]

    def alive(self) -> tuple[bool, ...]:
        """Tell of each rank whether it still records."""
        return tuple(member.writer_lives() for of in self.members for member in of)

    def status(self) -> str:
        """Return the status of the whole recording, named by its last attempt's first laggard."""
        if any(self.alive()):
            return RECORDING
        for member in self.members[-1]:
            status = member.manifest.status if member.manifest else member.problem
            if status == RECORDING:
                return INTERRUPTED
            if status != FINISHED:
                return status if status == INTERRUPTED else f"rank {member.rank}: {status}"
        return FINISHED

    def dropped(self) -> int:
        """Return how many samples all ranks lost in all attempts."""
        manifests = [member.manifest for of in self.members for member in of]
        return sum(manifest.dropped for manifest in manifests if manifest)


def read_ranks(
    path: Path,
    parts: Path,
    table: Matrices | None,
    known: MutableMapping[Path, RankSegment],
    handles: Handles,
    distrusted: Mapping[Path, str],
) -> Ranks:
    """Read what several ranks recorded in `parts`.

    Parameters
    ----------
    path : Path
        Of the recording.
    parts : Path
        The folder of its ranks' folders.
    table : Matrices or None
        The run's matrices, if they are known already: those of other matrices are damaged.
    known : mapping of Path to RankSegment
        Segments that were read before; what is read is added.
    handles : Handles
        For the files.
    distrusted : mapping of Path to str
        Segments that count as damaged, and why.

    Raises
    ------
    OutOfDate
        If something was merged or packed meanwhile.
    """
    ranks = Ranks([], [], [])
    for number, folders in rank_folders(parts).items():
        found = {
            rank: read_rank(folder, rank, number, known, handles, distrusted)
            for rank, folder in folders.items()
        }
        readable = [segment for member in found.values() for segment in member.segments]
        if table is None and readable:
            table = readable[0].matrices
        expected = tuple(found)
        if like := [segment for segment in readable if segment.matrices == table]:
            expected = like[0].shard.ranks
        for member in found.values():
            if table is not None:
                disown(member, table, expected)
            ranks.damaged.extend(member.damaged)
            if member.rank not in expected and not member.damaged:
                ranks.damaged.append(Damage(member.folder, None, "of no rank of this run"))
        members = [found.get(rank) or RankFiles(rank, parts) for rank in expected]
        ranks.members.append(members)
        if any(member.segments for member in members):
            ranks.attempts.append(Attempt(path, members))
    return ranks


def _why_it_ended(member: RankFiles) -> str:
    """Say why a rank has no more rows."""
    if member.manifest is None:
        return NO_FILES
    if member.manifest.status == RECORDING:
        return "not recorded yet" if member.writer_lives() else INTERRUPTED
    return "missing" if member.manifest.status == FINISHED else member.manifest.status
