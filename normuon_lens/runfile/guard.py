"""A run file may come from a stranger: walk it before reading it.

External links, external storage and virtual datasets make HDF5 read *other* files on behalf of
whoever opens this one, and a lying shape or chunk can take all memory. None of them occurs in a
run file, so each is refused before a single value is read.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from normuon_lens.errors import RunError
from normuon_lens.runfile.schema import FORMAT, SCHEMA

MAX_LINKS = 30_000
"""Objects of a file: to look at so many takes a second or two."""
MAX_ATTRIBUTES = 64
MAX_ATTRIBUTE_BYTES = 1 << 20
MAX_CHUNK_BYTES = 256 << 20
MAX_EXPANSION = 1100
"""Declared bytes per stored byte, of a dataset and of the whole file: gzip makes 1032 zeros one.
What is smaller than SMALL may be sparser."""
SMALL = 16 << 20
MAX_LIST_EXPANSION = 32
"""The same of lists, which are read as soon as a file is opened: times hardly compress."""
TABLES_IN_MEMORY = {"scalars", "floor", "weight_norm", "decay"}
"""Datasets that are no lists and are read as soon as a file is opened all the same."""
SIGNATURE = b"\x89HDF\r\n\x1a\n"
KNOWN_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
SCALE_ATTRIBUTES = {"DIMENSION_LIST", "REFERENCE_LIST", "CLASS", "NAME"}
"""HDF5's own dimension-scale attributes: they hold references, which are never followed."""


def open_guarded(path: Path) -> h5py.File:
    """Open `path` for reading after walking it.

    Returns
    -------
    h5py.File
        The caller closes it.

    Raises
    ------
    RunError
        If the file is missing, no HDF5, truncated, not a run file, of a newer schema, or holds
        anything that a run file never holds.
    """
    try:
        # Opening a named pipe would wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise RunError(f"{path}: not a file")
        _check_signature(path)
        # Segments are immutable, so a lock protects nothing and fails on some network disks.
        file = h5py.File(path, "r", locking=False)
    except FileNotFoundError:
        raise RunError(f"{path}: no such file") from None
    except PermissionError:
        raise RunError(f"{path}: no permission to read it") from None
    except OSError as error:
        reason = "truncated" if "truncated" in str(error) else "not a readable HDF5 file"
        raise RunError(f"{path}: {reason}, so it is no run that can be opened") from None
    try:
        with damage(path):
            _check_header(file, path)
            for name, what in _suspicions(file, path.stat().st_size):
                raise RunError(f"{path}: refused, {name!r} {what}, which no run file has")
    except RunError:
        file.close()
        raise
    return file


@contextmanager
def damage(path: Path, what: str = "") -> Iterator[None]:
    """Turn whatever goes wrong while `what` is read from `path` into one RunError.

    A damaged file may make h5py, and what works with its numbers, raise anything.
    """
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        reason = reason_of(error)
        if what:  # of a file that could be opened
            hint = "normuon-lens check tells what is still good"
            raise RunError(f"{path}: damaged ({what}: {reason}); {hint}") from None
        raise RunError(f"{path}: damaged ({reason})") from None


def reason_of(error: Exception) -> str:
    """Return an error's text in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_signature(path: Path) -> None:
    """Refuse what HDF5 should not even open: its old format has no checksums, and can hang it."""
    with path.open("rb") as file:
        start = file.read(len(SIGNATURE) + 1)
    if not start.startswith(SIGNATURE) or start == SIGNATURE:
        raise RunError(f"{path}: not a readable HDF5 file, so it is no run that can be opened")
    if start[-1] not in (2, 3):
        raise RunError(f"{path}: an HDF5 file of the old format, not one that normuon-lens wrote")


def _check_header(file: h5py.File, path: Path) -> None:
    if bytes(file.attrs.get("format", b"")) != FORMAT.encode():
        raise RunError(f"{path}: an HDF5 file, but not one that normuon-lens wrote")
    if int(file.attrs["schema"]) > SCHEMA:
        raise RunError(
            f"{path}: written by a newer normuon-lens (schema {int(file.attrs['schema'])}, "
            f"this one reads {SCHEMA}): pip install -U normuon-lens"
        )


def _suspicions(file: h5py.File, size: int) -> Iterator[tuple[str, str]]:
    """Yield (name, what is wrong with it) for what a run file never holds; the first one counts.

    By HDF5's own handles: h5py's objects would take ten times as long.
    """
    links = declared = lists = 0
    seen: set[int] = set()
    waiting: list[h5py.h5g.GroupID] = [h5py.h5g.open(file.id, b"/")]
    yield from _attribute_suspicions("/", waiting[0])
    while waiting:
        group = waiting.pop()
        links += group.get_num_objs()
        if links > MAX_LINKS:
            yield "/", f"has more than {MAX_LINKS} objects"
            return
        for spelled, kind, address in _links_of(group):
            name = spelled.decode(errors="replace")
            if kind != h5py.h5l.TYPE_HARD:
                yield name, "is not a hard link"
            if address in seen:
                continue
            seen.add(address)
            child = h5py.h5o.open(group, spelled)
            yield from _attribute_suspicions(name, child)
            if isinstance(child, h5py.h5g.GroupID):
                waiting.append(child)
            elif isinstance(child, h5py.h5d.DatasetID):
                yield from _dataset_suspicions(name, child)
                count = _bytes_of(child.get_space(), child.get_type())
                declared += count
                if child.rank <= 1 or name in TABLES_IN_MEMORY:
                    lists += count
            else:
                yield name, "is neither a group nor a dataset"
    # Each dataset alone may pass, and yet all of them together point at the same few bytes.
    if declared > SMALL + MAX_EXPANSION * size:
        yield "/", f"declares {declared} bytes in a file of {size}"
    if lists > SMALL + MAX_LIST_EXPANSION * size:
        yield "/", f"has lists of {lists} bytes in a file of {size}"


def _links_of(group: h5py.h5g.GroupID) -> list[tuple[bytes, int, int]]:
    """Return name, kind and, of hard links, the address of all links of a group."""
    found: list[tuple[bytes, int, int]] = []

    def add(name: bytes, info: h5py.h5l.LinkInfo) -> None:
        found.append((name, info.type, info.u))

    group.links.iterate(add, info=True)
    return found


def _attribute_suspicions(name: str, item: h5py.h5g.ObjectID) -> Iterator[tuple[str, str]]:
    count = h5py.h5a.get_num_attrs(item)
    if count > MAX_ATTRIBUTES:
        yield name, f"has more than {MAX_ATTRIBUTES} attributes"
    for number in range(count):
        attribute = h5py.h5a.open(item, index=number)
        key = attribute.name.decode(errors="replace")
        if key in SCALE_ATTRIBUTES:
            continue
        if not _is_plain(attribute.get_type()):
            yield name, f"has an attribute {key!r} of an unknown type"
        if attribute.get_storage_size() > MAX_ATTRIBUTE_BYTES:
            yield name, f"has an attribute {key!r} of more than 1 MiB"


def _dataset_suspicions(name: str, dataset: h5py.h5d.DatasetID) -> Iterator[tuple[str, str]]:
    creation, space, kind = dataset.get_create_plist(), dataset.get_space(), dataset.get_type()
    if creation.get_external_count():
        yield name, "is stored in another file"
    if creation.get_layout() == h5py.h5d.VIRTUAL:
        yield name, "is a virtual dataset"
    if not _is_plain(kind):
        yield name, "is of a type that is neither numbers nor texts of fixed length"
    if space.get_simple_extent_type() == h5py.h5s.NULL:
        yield name, "has no shape"
    filters = {creation.get_filter(i)[0] for i in range(creation.get_nfilters())}
    if filters - KNOWN_FILTERS:
        yield name, f"needs the unknown filters {sorted(filters - KNOWN_FILTERS)}"
    if creation.get_layout() == h5py.h5d.CHUNKED:
        chunk = kind.get_size() * math.prod(creation.get_chunk())
        if chunk > MAX_CHUNK_BYTES:
            yield name, f"has chunks of {chunk >> 20} MiB"
    declared, stored = _bytes_of(space, kind), dataset.get_storage_size()
    if declared > SMALL and declared > MAX_EXPANSION * max(stored, 1):
        yield name, f"declares {declared} bytes and stores {stored}"


def _is_plain(kind: h5py.h5t.TypeID) -> bool:
    """Tell whether a type is numbers or texts of fixed length."""
    if kind.get_class() == h5py.h5t.STRING:
        return not kind.is_variable_str()
    # A number longer than a double could not be sent on to a page.
    return kind.get_class() in (h5py.h5t.INTEGER, h5py.h5t.FLOAT) and kind.get_size() <= 8


def _bytes_of(space: h5py.h5s.SpaceID, kind: h5py.h5t.TypeID) -> int:
    return math.prod(space.get_simple_extent_dims() or ()) * int(kind.get_size())
