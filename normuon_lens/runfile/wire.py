"""How the trainer talks to the helper process that writes its recording.

Arrays travel through bounded shared memory, so that a trainer never waits for a disk: a message
that does not fit is the sender's to drop or to hold. The pipes carry only where a message lies
(trainer → helper) and what was taken or went wrong (helper → trainer). What the trainer has sent
survives the trainer: both the memory and the pipe outlive a ``kill -9``.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

PLACE = struct.Struct("<QQQ")
"""Offset, length, and the sender's position after it (bytes; position grows for ever).

A place of length 0 holds no message: it only asks how far the sender's messages were taken."""

_LENGTH = struct.Struct("<Q")
_ALIGN = 64


class Message(NamedTuple):
    """A kind, a small JSON-able header, and arrays by name."""

    kind: str
    header: dict[str, Any]
    arrays: dict[str, np.ndarray]


def create_memory(size: int) -> tuple[int, mmap.mmap]:
    """Reserve `size` bytes of shared memory; returns the file descriptor and its mapping.

    Raises
    ------
    OSError
        If so much is not to be had. Reserving now avoids a SIGBUS later.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("normuon-lens")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
        return descriptor, mmap.mmap(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise


def message_size(header: bytes, arrays: Mapping[str, np.ndarray]) -> int:
    """Bytes that a message takes in shared memory."""
    return _LENGTH.size + len(header) + sum(_ALIGN + array.nbytes for array in arrays.values())


def encode_header(kind: str, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """Serialise everything of a message but the arrays' values."""
    shapes = {name: [array.dtype.str, array.shape] for name, array in arrays.items()}
    return json.dumps([kind, header, shapes], separators=(",", ":")).encode()


def write_message(
    memory: mmap.mmap, offset: int, header: bytes, arrays: Mapping[str, np.ndarray]
) -> int:
    """Put a message into shared memory at `offset`; returns its length in bytes."""
    memory[offset : offset + _LENGTH.size] = _LENGTH.pack(len(header))
    at = offset + _LENGTH.size
    memory[at : at + len(header)] = header
    at += len(header)
    for array in arrays.values():
        at = -(-at // _ALIGN) * _ALIGN
        target = np.frombuffer(memory, array.dtype, array.size, at)
        target.reshape(array.shape)[...] = array
        at += array.nbytes
    return at - offset


def read_message(memory: mmap.mmap, offset: int) -> Message:
    """Copy a message out of shared memory."""
    (length,) = _LENGTH.unpack(memory[offset : offset + _LENGTH.size])
    at = offset + _LENGTH.size
    kind, header, shapes = json.loads(memory[at : at + length])
    at += length
    arrays = {}
    for name, (dtype, shape) in shapes.items():
        at = -(-at // _ALIGN) * _ALIGN
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(memory, np.dtype(dtype), count, at).reshape(shape).copy()
        at += arrays[name].nbytes
    return Message(kind, header, arrays)
