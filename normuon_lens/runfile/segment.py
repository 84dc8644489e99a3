"""One HDF5 file of a recording: what it holds, how several become one.

A segment, a merged segment and a packed run have the same layout, so one function writes all
three: it concatenates the records of the segments that it is given. Sources may be arrays in
memory or datasets of an open file, which are copied piece by piece.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np

from normuon_lens.runfile.digests import Digests
from normuon_lens.runfile.guard import MAX_EXPANSION, SMALL
from normuon_lens.runfile.schema import (
    FORMAT,
    HOLE,
    SCHEMA,
    STAGES,
    Event,
    Matrices,
    Matrix,
    Shard,
    fixed_strings,
    plain_strings,
)

PIECE_BYTES = 32 << 20
"""Bytes copied at a time when segments are merged."""

GZIP: dict[str, Any] = {"compression": "gzip", "compression_opts": 9, "shuffle": True}
"""Filters that every HDF5 reads."""

LIST_CHUNK = 1 << 14
"""Numbers of a chunk of a list, such as that of the steps, where it is compressed."""

MAX_SIDE = 2**31
"""Rows or columns of a matrix: far beyond any, and no sum of them overflows."""

MATRIX_CHUNK_BYTES = 64 << 20
"""A stored matrix is one chunk a step, unless it is larger than this."""

MAX_RANKS = 1 << 16
"""Ranks of a recording: far beyond any training."""

MAX_ERA = 1 << 31
"""How often a training may have gone back."""

MAX_STEP = 1 << 53
"""Beyond it a page could not tell one step from the next."""

MAX_SCALARS = 10_000
"""Names under which a training logs."""

MAX_HOLES = 1 << 29
"""Holes times steps of a file: a byte for each says which steps a hole covers."""

KINDS: dict[str, type | tuple[type, ...]] = {
    "created": (int, float),
    "job": (dict, type(None)),
    "model": str,
    "notes": (str, type(None)),
    "parameters": int,
    "schedule": dict,
    "shadow_of": (str, type(None)),
    "versions": dict,
    "world_size": int,
}
"""Of which kind a part of the metadata must be to be read at all."""

UPDATE_FIELD = re.compile(r"\d{3,6}(_step|_scale|_era)?", re.ASCII)
"""Datasets of one ``/updates/<stage>``: (Tm, m, n), then (Tm,) each; the number is the matrix."""

SAMPLE_FIELDS = ("step", "sigma", "floor", "weight_norm", "decay")
"""Datasets of one ``/spectra/<stage>``: (Ts,), (Ts, Σk), then (Ts, M) each."""

RECORD_FIELDS = ("step", "matrix", "era", "sigma", "floor", "weight_norm", "decay")
"""Datasets of one ``/samples/<stage>`` of a rank: one record a matrix and step, for at each step
a rank owns other matrices. (R,) each, but sigma, which has min(m, n) values a record."""

SCALAR_FIELDS = ("steps/scalar_names", "steps/scalars")
SMALL_GROUPS = ("matrices", "shard", "events")

MISSING = -2
"""In place of a record's number; no two of these follow each other as records do."""


@dataclass
class Segment:
    """Records of consecutive steps.

    Attributes
    ----------
    scalars : dict of str to ndarray of shape (T,)
        What the training logged, NaN where it did not.
    arrays : dict of str to array-like
        Every other quantity by its path in the file (``neurons/update``,
        ``spectra/update/sigma``, ``updates/update/003``, …), records along axis 0.
    events : list of Event
    """

    scalars: dict[str, np.ndarray] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Recorded steps T."""
        return len(self.arrays["steps/step"]) if "steps/step" in self.arrays else 0


def write_segment(
    file: h5py.File,
    run: bytes,
    matrices: Matrices,
    segments: Sequence[Segment],
    *,
    shard: Shard | None = None,
    packed: bool = False,
    compress: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the records of `segments`, in their order, into the empty `file`.

    Parameters
    ----------
    file : h5py.File
        Open for writing and empty.
    run : bytes
        The run's metadata as JSON.
    matrices : Matrices
        The table of matrices, equal for all segments.
    segments : sequence of Segment
        At least one.
    shard : Shard, optional
        Which rank's they are, and what it records; its attempt is chosen.
    packed : bool
        Chunk for reading over time, (256, 256), instead of one row a chunk, and annotate for
        general HDF5 viewers.
    compress : bool
        Shuffle and gzip, which every HDF5 reads.
    progress : callable, optional
        Called with the bytes that were copied, piece by piece.
    """
    digests = Digests()
    file.attrs["format"] = np.bytes_(FORMAT)
    file.attrs["schema"] = SCHEMA
    file.attrs["run"] = np.bytes_(run)
    _write_matrices(file.create_group("matrices"), matrices)
    if shard:
        _write_shard(file, shard)
    filters = GZIP if compress else {}
    for path in dict.fromkeys(path for segment in segments for path in segment.arrays):
        _concatenate(file, path, segments, packed, filters, digests, progress)
    _write_scalars(file.require_group("steps"), segments, filters)
    events = [event for segment in segments for event in segment.events]
    if events:
        group = file.create_group("events")
        group["step"] = np.array([event.step for event in events], dtype=np.int64)
        group["kind"] = fixed_strings([event.kind for event in events])
        group["text"] = fixed_strings([event.text for event in events])
    for path in (*SCALAR_FIELDS, *small_datasets(file)):
        digests.add(path, file[path][()])
    digests.write(file, filters)
    if packed:
        _annotate(file, filters)


def small_datasets(file: h5py.File) -> list[str]:
    """Return the paths of what an open file tells of itself: matrices, ranks and events."""
    return [f"{group}/{name}" for group in SMALL_GROUPS if group in file for name in file[group]]


def read_segment(file: h5py.File) -> Segment:
    """Return the records of an open segment; arrays are its datasets, read when sliced.

    Raises
    ------
    ValueError
        If a dataset is missing. Their shapes and types are as the file says: see
        :func:`check_layout`.
    """
    paths = [f"steps/{name}" for name in ("step", "time", "void")]
    if "shard" in file:
        paths.append("steps/era")
    for stage in STAGES:
        if f"neurons/{stage}" in file:
            paths.append(f"neurons/{stage}")
        if f"spectra/{stage}" in file:
            paths += [f"spectra/{stage}/{name}" for name in SAMPLE_FIELDS]
        if f"samples/{stage}" in file:
            paths += [f"samples/{stage}/{name}" for name in RECORD_FIELDS]
        if f"updates/{stage}" in file:
            known = [name for name in file[f"updates/{stage}"] if UPDATE_FIELD.fullmatch(name)]
            paths += [f"updates/{stage}/{name}" for name in known]
    segment = Segment(arrays={path: _dataset(file, path) for path in paths})
    if len(_dataset(file, "steps/scalar_names")) > MAX_SCALARS:
        raise ValueError(f"it has more than {MAX_SCALARS} scalars")
    names = _strings(file, "steps/scalar_names")
    table = _dataset(file, "steps/scalars")
    if table.shape != (segment.rows, len(names)) or table.dtype.kind != "f":
        raise ValueError("steps/scalars does not fit the steps")
    segment.scalars = dict(zip(names, table[()].T, strict=True))
    if "events" in file:
        steps = _whole_numbers(file, "events/step")
        kinds, texts = _strings(file, "events/kind"), _strings(file, "events/text")
        if kinds.count(HOLE) * segment.rows > MAX_HOLES:
            raise ValueError("it has more holes than it could have ranks")
        segment.events = [Event(*event) for event in zip(steps, kinds, texts, strict=True)]
    return segment


class Selected:
    """Some records of an array-like, for copying it piece by piece.

    Parameters
    ----------
    array : array-like
    records : ndarray of int64
        Which, ascending; :data:`MISSING` for one that is NaN instead, and is not read.
    """

    def __init__(self, array: Any, records: np.ndarray) -> None:
        self._array = array
        self._records = records
        self.shape = (len(records), *array.shape[1:])
        self.dtype = array.dtype

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, at: slice) -> np.ndarray:
        wanted = self._records[at]
        values = np.empty((len(wanted), *self.shape[1:]), dtype=self.dtype)
        edges = [0, *(np.flatnonzero(np.diff(wanted) != 1) + 1).tolist(), len(wanted)]
        for start, stop in itertools.pairwise(edges):
            if start < stop:
                first = int(wanted[start])
                last = first + stop - start
                values[start:stop] = np.nan if first == MISSING else self._array[first:last]
        return values


def without_samples(segment: Segment, steps: np.ndarray) -> Segment:
    """Return a segment without its spectra and matrices of these steps."""
    arrays = dict(segment.arrays)
    for path, array in segment.arrays.items():
        if not path.startswith(("spectra/", "updates/")):
            continue
        kept = ~np.isin(segment.arrays[steps_index(path)][()], steps)
        if not kept.all():
            arrays[path] = Selected(array, np.flatnonzero(kept))
    return Segment(segment.scalars, arrays, segment.events)


def without_rows(segment: Segment, lost: Mapping[str, np.ndarray]) -> Segment:
    """Return a segment without some rows of its datasets.

    Parameters
    ----------
    segment : Segment
    lost : mapping of str to ndarray of int64
        Rows by dataset. With a number of a step its whole row goes, with one of a spectrum or a
        matrix the whole sample; norms and scalars become NaN, and texts stay as they are, but
        those of events go.
    """
    gone: dict[str, np.ndarray] = {}
    for path, rows in lost.items():
        if path not in SCALAR_FIELDS and path in segment.arrays and "neurons" not in path:
            table = _table_of(path)
            gone[table] = np.union1d(gone.get(table, rows), rows)
    arrays = dict(segment.arrays)
    for path, array in segment.arrays.items():
        kept = np.setdiff1d(np.arange(len(array)), gone.get(_table_of(path), []))
        if path.startswith("neurons/") and path in lost:
            kept[np.isin(kept, lost[path])] = MISSING
            arrays[path] = Selected(array, kept)
        elif len(kept) < len(array):
            arrays[path] = Selected(array, kept)
    steps = np.setdiff1d(np.arange(segment.rows), gone.get("steps", []))
    scalars = {name: values[steps] for name, values in segment.scalars.items()}
    for values in scalars.values():
        values[np.isin(steps, lost.get("steps/scalars", []))] = np.nan
    wrong = {row for path, rows in lost.items() if path.startswith("events/") for row in rows}
    events = [event for i, event in enumerate(segment.events) if i not in wrong]
    return Segment(scalars, arrays, events)


def steps_index(path: str) -> str:
    """Return the dataset that says of which step each row of another one is."""
    kind = path.partition("/")[0]
    if kind in ("steps", "neurons"):
        return "steps/step"
    table = _table_of(path)
    return f"{table}_step" if kind == "updates" else f"{table}/step"


def _table_of(path: str) -> str:
    """Name what shares its records with a dataset: the steps, a stage's samples, a matrix."""
    kind, _, rest = path.partition("/")
    if kind in ("steps", "neurons"):
        return "steps"
    if kind == "updates":
        return re.sub(r"_(step|scale|era)$", "", path)
    return f"{kind}/{rest.partition('/')[0]}"


def check_layout(segment: Segment, matrices: Matrices, shard: Shard | None = None) -> None:
    """Hold the shapes and types of a segment against its steps and its table of matrices.

    Raises
    ------
    ValueError
        If something does not fit; the message names it.
    """
    for path, array in segment.arrays.items():
        kind, *rest = path.split("/")
        shape: tuple[int, ...]
        if kind == "steps":
            shape = (segment.rows,)
        elif kind == "neurons":
            if shard and rest[0] not in shard.rows:
                raise ValueError(f"{path} is of no stage that this rank records")
            width = shard.total(rest[0]) if shard else matrices.total_rows
            shape = (segment.rows, width)
        elif kind == "spectra":
            records = len(segment.arrays[f"spectra/{rest[0]}/step"])
            widths = {"step": (), "sigma": (matrices.total_sigmas,)}
            shape = (records, *widths.get(rest[1], (len(matrices),)))
        elif kind == "samples":
            shape = (_sample_length(segment, rest[0], rest[1], matrices),)
        else:
            number, _, field_name = rest[1].partition("_")
            of_matrix = f"updates/{rest[0]}/{number}"
            needed = {of_matrix, f"{of_matrix}_step", *([f"{of_matrix}_era"] if shard else [])}
            if needed - set(segment.arrays):
                raise ValueError(f"{of_matrix} or its steps are missing")
            if int(number) >= len(matrices):
                raise ValueError(f"{path} is of no matrix of the table")
            records, matrix = len(segment.arrays[f"{of_matrix}_step"]), matrices[int(number)]
            shape = (records,) if field_name else (records, matrix.m, matrix.n)
        whole = path.endswith(("step", "void", "era", "/matrix"))
        if array.shape != shape or array.dtype.kind not in ("iu" if whole else "f"):
            raise ValueError(
                f"{path} is {array.dtype} of shape {array.shape}, "
                f"expected {'whole' if whole else 'float'} numbers of shape {shape}"
            )
        if path.endswith("era") and not _within(array[()], 0, MAX_ERA):
            raise ValueError(f"{path} has impossible numbers")


def _sample_length(segment: Segment, stage: str, name: str, matrices: Matrices) -> int:
    """Return how many values a dataset of a rank's samples must have."""
    of = segment.arrays[f"samples/{stage}/matrix"]
    if name != "sigma":
        return len(of)
    if of.dtype.kind not in "iu" or not _within(of[()], 0, len(matrices)):
        raise ValueError(f"samples/{stage}/matrix names matrices that are not in the table")
    return int(matrices.widths[of[()]].sum())


def check_steps(index: Mapping[str, np.ndarray]) -> None:
    """Refuse impossible steps: ValueError names where they are."""
    for path, values in index.items():
        if path.endswith("step") and not _within(values, 1, MAX_STEP):
            raise ValueError(f"{path} has impossible steps")


def _within(numbers: np.ndarray, low: int, high: int) -> bool:
    return not len(numbers) or bool(low <= numbers.min() and numbers.max() < high)


def read_shard(file: h5py.File, matrices: Matrices) -> Shard | None:
    """Return which rank an open segment is of and what it records; None of an ordinary file.

    Raises
    ------
    ValueError
        If it contradicts itself or the table of matrices.
    """
    if "shard" not in file:
        return None
    ranks = _whole_numbers(file, "shard/ranks")
    rank, attempt = int(file.attrs["rank"]), int(file.attrs["attempt"])
    # A rank may have recorded no row itself, so that no norms say how many rows there are.
    if 4 * matrices.total_rows > SMALL + MAX_EXPANSION * file.id.get_filesize():
        raise ValueError("its matrices have more rows than a file of its size could tell of")
    ascending = all(a < b for a, b in itertools.pairwise(ranks))
    if not ascending or len(ranks) > MAX_RANKS or ranks[:1] < [0] or rank not in ranks:
        raise ValueError("its ranks are no ranks")
    if not 0 <= attempt < MAX_ERA:
        raise ValueError("its attempt is none")
    rows = {}
    for stage in STAGES:
        if f"shard/{stage}" in file:
            table = _dataset(file, f"shard/{stage}")
            if table.dtype.kind not in "iu" or table.shape != (len(matrices), 3):
                raise ValueError(f"shard/{stage} does not fit the matrices")
            rows[stage] = tuple((int(a), int(b), int(c)) for a, b, c in table[()].tolist())
            for (start, stop, parts), matrix in zip(rows[stage], matrices, strict=True):
                if not (0 <= start <= stop <= matrix.m and 1 <= parts <= len(ranks)):
                    raise ValueError(f"shard/{stage} has rows that {matrix.name!r} has not")
    return Shard(rank, tuple(ranks), attempt, rows)


def read_matrices(file: h5py.File) -> Matrices:
    """Return the table of matrices of an open segment; ValueError when it contradicts itself."""
    m, n = _whole_numbers(file, "matrices/m"), _whole_numbers(file, "matrices/n")
    groups, offsets = (_whole_numbers(file, f"matrices/{name}") for name in ("group", "row_offset"))
    if not all(0 < side < MAX_SIDE for side in m + n):
        raise ValueError("a matrix has an impossible shape")
    names, dtypes = _strings(file, "matrices/name"), _strings(file, "matrices/dtype")
    table = Matrices([Matrix(*row) for row in zip(names, m, n, dtypes, groups, strict=True)])
    if offsets != [table.rows(i).start for i in range(len(table))]:
        raise ValueError("the rows of its matrices do not follow each other")
    return table


def read_metadata(file: h5py.File) -> dict[str, Any]:
    """Return the run's metadata of an open segment, but for what is not of its kind."""
    given = json.loads(bytes(file.attrs["run"]))
    # JSON can spell half of a character, which no terminal and no page can be sent: a "?" then.
    metadata = json.loads(json.dumps(given, ensure_ascii=False).encode(errors="replace"))
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is no table of names and values")
    return {key: value for key, value in metadata.items() if _is_of_its_kind(key, value)}


def _is_of_its_kind(key: str, value: Any) -> bool:
    """Tell whether whoever reads this part of the metadata may rely on what it is."""
    if key == "groups":
        return isinstance(value, list) and all(isinstance(group, dict) for group in value)
    return key not in KINDS or isinstance(value, KINDS[key])


def _dataset(file: h5py.File, path: str) -> h5py.Dataset:
    found = file.get(path)
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"it has no dataset {path}")
    return found


def _whole_numbers(file: h5py.File, path: str) -> list[int]:
    stored = _dataset(file, path)
    if stored.dtype.kind not in "iu" or stored.ndim != 1:
        raise ValueError(f"{path} is no list of whole numbers")
    numbers: list[int] = stored[()].tolist()
    return numbers


def _strings(file: h5py.File, path: str) -> list[str]:
    stored = _dataset(file, path)
    if stored.dtype.kind != "S" or stored.ndim != 1:
        raise ValueError(f"{path} is no list of texts")
    return plain_strings(stored[()])


def _write_matrices(group: h5py.Group, matrices: Matrices) -> None:
    group["name"] = fixed_strings(matrices.names)
    group["m"] = np.array([matrix.m for matrix in matrices], dtype=np.int64)
    group["n"] = np.array([matrix.n for matrix in matrices], dtype=np.int64)
    offsets = [matrices.rows(i).start for i in range(len(matrices))]
    group["row_offset"] = np.array(offsets, dtype=np.int64)
    group["dtype"] = fixed_strings([matrix.dtype for matrix in matrices])
    group["group"] = np.array([matrix.group for matrix in matrices], dtype=np.int64)


def _write_shard(file: h5py.File, shard: Shard) -> None:
    file.attrs["rank"] = shard.rank
    file.attrs["attempt"] = shard.attempt
    file["shard/ranks"] = np.array(shard.ranks, dtype=np.int64)
    for stage, rows in shard.rows.items():
        file[f"shard/{stage}"] = np.array(rows, dtype=np.int64).reshape(-1, 3)


def _write_scalars(group: h5py.Group, segments: Sequence[Segment], filters: dict[str, Any]) -> None:
    names = sorted({name for segment in segments for name in segment.scalars})
    rows = sum(segment.rows for segment in segments)
    table = np.full((rows, len(names)), np.nan)
    start = 0
    for segment in segments:
        for name, values in segment.scalars.items():
            table[start : start + segment.rows, names.index(name)] = values
        start += segment.rows
    group["scalar_names"] = fixed_strings(names)
    group.create_dataset("scalars", data=table, **(filters if table.size else {}))


def _concatenate(
    file: h5py.File,
    path: str,
    segments: Sequence[Segment],
    packed: bool,
    filters: dict[str, Any],
    digests: Digests,
    progress: Callable[[int], None] | None,
) -> None:
    blocks = [_block(segment, path, segments) for segment in segments]
    blocks = [block for block in blocks if block is not None]
    rows = sum(len(block) for block in blocks)
    shape = (rows, *blocks[0].shape[1:])
    # A training resumed with another `store` has float16 and float32: nothing may be lost.
    dtype = np.result_type(*{block.dtype for block in blocks})
    chunks = _chunks(path, shape, dtype.itemsize, packed, compress=bool(filters))
    dataset = file.create_dataset(
        path, shape, dtype=dtype, chunks=chunks, **(filters if chunks else {})
    )
    start = 0
    for block in blocks:
        for piece in _pieces(block, 256 if chunks and chunks[0] == 256 else 1):
            piece = piece.astype(dtype, copy=False)
            dataset[start : start + len(piece)] = piece
            digests.add(path, piece)
            start += len(piece)
            if progress:
                progress(piece.nbytes)


def _block(segment: Segment, path: str, segments: Sequence[Segment]) -> Any:
    """Return a segment's records at `path`: NaN rows where one had a stage the other had not."""
    if path in segment.arrays:
        return segment.arrays[path]
    matrix, scale, _ = path.rpartition("_scale")
    if scale and matrix in segment.arrays:
        return np.ones(len(segment.arrays[matrix]), dtype=np.float32)
    if not path.startswith("neurons/"):
        return None
    like = next(other.arrays[path] for other in segments if path in other.arrays)
    return np.full((segment.rows, like.shape[1]), np.nan, dtype=like.dtype)


def _chunks(
    path: str, shape: tuple[int, ...], itemsize: int, packed: bool, *, compress: bool
) -> tuple[int, ...] | None:
    if 0 in shape:
        return None
    if path.startswith("updates/") and len(shape) == 3:
        _, m, n = shape
        return (1, min(m, max(1, MATRIX_CHUNK_BYTES // (n * itemsize))), n)
    if len(shape) == 2:
        return (min(256, shape[0]), min(256, shape[1])) if packed else (1, shape[1])
    if compress and len(shape) == 1:  # only what is chunked can be compressed
        return (min(LIST_CHUNK, shape[0]),)
    return None


def _pieces(block: Any, multiple: int) -> Iterable[np.ndarray]:
    """Cut a block into pieces of about PIECE_BYTES, whole chunks wherever one fits."""
    row_bytes = max(1, int(np.prod(block.shape[1:])) * block.dtype.itemsize)
    rows = max(1, PIECE_BYTES // row_bytes)
    rows = max(multiple, rows - rows % multiple)
    for start in range(0, len(block), rows):
        yield np.asarray(block[start : start + rows])


OF_A_SAMPLE = {
    "floor": ("below it a singular value is noise", "weight"),
    "weight_norm": ("Frobenius norm of the weight before the step", "weight"),
    "decay": ("learning rate times decoupled weight decay", ""),
}
"""What stands beside a spectrum, one number a matrix: what it is, and its unit."""


def _annotate(file: h5py.File, filters: Mapping[str, Any]) -> None:
    """Add dimension scales and NeXus NXdata attributes: general viewers then plot the run.

    Scales name the axes for xarray, and stand beside what they measure, where NXdata looks for
    them; a hard link to one costs nothing.
    """
    file.attrs["NX_class"] = np.bytes_("NXroot")
    steps = file["steps"]
    _scale(steps, "step", "optimizer step")
    _describe(steps["time"], "end of the step", "seconds since 1970-01-01", steps["step"])
    _describe(steps["void"], "1 where a step moved nothing", "", steps["step"])
    _scale(steps, "scalar_names", "name in the training")
    _describe(steps["scalars"], "what was logged", "", steps["step"], steps["scalar_names"])
    _nxdata(steps, "scalars", "step", ".")
    matrices = file["matrices"]
    _scale(matrices, "name", "matrix")
    for name in ("m", "n", "row_offset", "dtype", "group"):
        matrices[name].dims[0].attach_scale(matrices["name"])
    if "neurons" in file:
        group = file["neurons"]
        stages = list(group)
        group["step"] = steps["step"]
        numbers = np.arange(group[stages[0]].shape[1], dtype=np.int32)
        group.create_dataset("neuron", data=numbers, **filters)
        _scale(group, "neuron", "neurons of all matrices, one matrix after the other")
        for stage in stages:
            _describe(
                group[stage], f"row L2 norms, {stage}", "weight", group["step"], group["neuron"]
            )
        _nxdata(group, "update" if "update" in stages else min(stages), "step", "neuron")
        file.attrs["default"] = np.bytes_("neurons")
    value = None
    for stage in file.get("spectra", ()):
        group = file["spectra"][stage]
        group["name"] = matrices["name"]
        _scale(group, "step", "optimizer step")
        if value is None:
            numbers = np.arange(group["sigma"].shape[1], dtype=np.int32)
            value = group.create_dataset("value", data=numbers, **filters)
            _scale(group, "value", "singular values of all matrices, one matrix after the other")
        else:
            group["value"] = value
        _describe(
            group["sigma"], f"singular values, {stage}", "weight", group["step"], group["value"]
        )
        for name, (text, units) in OF_A_SAMPLE.items():
            _describe(group[name], text, units, group["step"], group["name"])
        _nxdata(group, "sigma", "step", "value")
        group.attrs["SILX_style"] = np.bytes_('{"signal_scale_type": "log"}')
    if "spectra" in file:
        spectra = file["spectra"]
        spectra.attrs["default"] = np.bytes_("update" if "update" in spectra else min(spectra))
        file.attrs.setdefault("default", np.bytes_("spectra"))


def _scale(group: h5py.Group, name: str, text: str) -> None:
    group[name].make_scale(name)
    group[name].attrs["long_name"] = np.bytes_(text)


def _describe(dataset: h5py.Dataset, text: str, units: str, *scales: h5py.Dataset) -> None:
    dataset.attrs["long_name"] = np.bytes_(text)
    if units:
        dataset.attrs["units"] = np.bytes_(units)
    for axis, scale in zip(dataset.dims, scales, strict=True):
        axis.attach_scale(scale)


def _nxdata(group: h5py.Group, signal: str, *axes: str) -> None:
    group.attrs["NX_class"] = np.bytes_("NXdata")
    group.attrs["signal"] = np.bytes_(signal)
    group.attrs["axes"] = fixed_strings(axes)
