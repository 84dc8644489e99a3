"""What the page looks at, as the query of its address: a view can be sent to a colleague."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qs


class Link(NamedTuple):
    """What an address asks for; None where it asks for nothing.

    Attributes
    ----------
    runs : list of str or None
        Ids.
    matrix : str or None
    step : int or None
        None too for ``step=latest``: follow the newest.
    stage : str or None
    """

    runs: list[str] | None = None
    matrix: str | None = None
    step: int | None = None
    stage: str | None = None


def read_link(query: str | None) -> Link:
    """Read the query of an address, such as ``?runs=muon,normuon&step=120``."""
    given = {key: values[0] for key, values in parse_qs((query or "").lstrip("?")).items()}
    step = given.get("step", "")
    return Link(
        runs=given["runs"].split(",") if "runs" in given else None,
        matrix=given.get("matrix"),
        step=int(step) if step.isascii() and step.isdigit() and len(step) < 16 else None,
        stage=given.get("stage"),
    )
