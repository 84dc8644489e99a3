"""The list of committed segments: what is named here is recorded, whatever else lies about.

``manifest.json`` is replaced atomically, so a reader sees the list before or after a commit and
never in between.
"""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

from normuon_lens.errors import RunError
from normuon_lens.runfile.schema import FORMAT, SCHEMA

NAME = "manifest.json"
MAX_BYTES = 16 << 20
"""Of a list of segments: a hundred thousand of them."""

FILE_NAME = re.compile(r"\w[\w.-]{0,199}", re.ASCII)
"""What a segment may be called: a file in the folder of its list."""

RECORDING, FINISHED, INTERRUPTED = "recording", "finished", "interrupted"


@dataclass(frozen=True)
class Entry:
    """One committed segment: its file name, rows, step range, bytes and merge level."""

    file: str
    rows: int
    first: int
    last: int
    bytes: int
    level: int = 0


@dataclass
class Manifest:
    """State of a recording in parts.

    Attributes
    ----------
    status : str
        ``"recording"``, ``"finished"``, or why it stopped.
    segments : list of Entry
        In the order in which they were recorded.
    dropped : int
        Samples that were not recorded because the helper process could not keep up.
    updated : float
        Unix time in seconds of the last commit.
    host, pid : str, int
        The writing process, to tell a recording from the remains of a crash.
    """

    status: str = RECORDING
    segments: list[Entry] = field(default_factory=list)
    dropped: int = 0
    updated: float = 0.0
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)

    def save(self, folder: Path) -> None:
        """Replace ``manifest.json`` in `folder` atomically; OSError when the disk refuses."""
        self.updated = time.time()
        content = {"format": FORMAT, "schema": SCHEMA, **asdict(self)}
        write_durably(folder / NAME, json.dumps(content, indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> Manifest | None:
        """Read ``manifest.json``, None if there is none.

        Raises
        ------
        RunError
            When it is damaged or newer than this code.
        """
        path = folder / NAME
        try:
            found = path.lstat()
            # Opening a named pipe would wait for ever, and a link may lead anywhere.
            if not stat.S_ISREG(found.st_mode):
                raise RunError(f"{path}: not a file; a link is not followed")
            if found.st_size > MAX_BYTES:
                raise RunError(f"{path}: refused, it has more than any list of segments")
            content = json.loads(path.read_bytes())
            return cls._from_json(content, path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise RunError(f"{path}: {error.strerror or error}") from None
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
            raise RunError(f"{path}: damaged, it is no list of segments") from None

    @classmethod
    def _from_json(cls, content: Mapping[str, Any], path: Path) -> Manifest:
        if content["format"] != FORMAT or int(content["schema"]) > SCHEMA:
            raise RunError(f"{path}: not a recording that this version can read")
        segments = [Entry(**entry) for entry in content["segments"]]
        if any(type(value) is not int for entry in segments for value in astuple(entry)[1:]):
            raise ValueError
        if not all(FILE_NAME.fullmatch(entry.file) for entry in segments):
            raise RunError(f"{path}: refused, it names a segment outside its folder")
        # Its order is the order of recording, so a name that comes twice would be no order.
        if len({entry.file for entry in segments}) < len(segments):
            raise ValueError
        return cls(
            status=str(content["status"]),
            segments=segments,
            dropped=int(content["dropped"]),
            updated=float(content["updated"]),
            host=str(content["host"]),
            pid=int(content["pid"]),
        )

    def writer_lives(self) -> bool:
        """Tell whether the writing process still runs, as far as this machine can see."""
        if self.status != RECORDING:
            return False
        return self.host != socket.gethostname() or process_lives(self.pid)


def process_lives(pid: int) -> bool:
    """Tell whether a process with this id runs on this machine."""
    if pid <= 0:
        return False  # to kill(2) a group of processes
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    # Containers often lack an init that buries the dead.
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1] != b"Z"
    return True


def write_durably(path: Path, content: bytes) -> None:
    """Write `content` to a temporary file, fsync, and rename it to `path`.

    Plain file writes, not HDF5's: on a full disk they raise OSError, where HDF5 kills the process.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
        replace_durably(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def replace_durably(temporary: Path, path: Path) -> None:
    """Fsync a finished file, rename it to `path`, and fsync the folder that names it."""
    _fsync(temporary)
    os.replace(temporary, path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
