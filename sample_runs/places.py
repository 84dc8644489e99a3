"""Where new recordings go: refused before any training, not after."""

from __future__ import annotations

import tempfile
from pathlib import Path

from normuon_lens.errors import LensError
from normuon_lens.hooks.automatic import is_taken, numbered


def free_place(wanted: Path) -> Path:
    """Return `wanted`, or the first of wanted-2, wanted-3, … where nothing is yet."""
    number = 1
    while is_taken(numbered(wanted, number)):
        number += 1
    return numbered(wanted, number)


def prepare(*paths: Path) -> None:
    """Make the folders of new recordings.

    Raises
    ------
    LensError
        If there is a recording at one of `paths`, or its folder cannot be written.
    """
    for path in paths:
        if is_taken(path):
            raise LensError(f"{path}: exists already; choose another place by -o, or delete it")
    for folder in {path.parent for path in paths}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise LensError(f"{folder}: cannot record there ({error.strerror})") from None
