"""What a report is made of, as plain data: who writes it down need know nothing of runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .figures.palette import Style

Part = tuple[str, str]
"""Style, which is ``text``, ``matrix``, ``run`` or ``figure``, and text, never markup."""


class Key(NamedTuple):
    """A run as it is told apart: its name and how its lines are drawn."""

    name: str
    style: Style


class Cell(NamedTuple):
    """One cell of a table.

    Attributes
    ----------
    text : str
    notes : tuple of str
        Said beside it, more quietly: a factor, quantiles.
    tone : str
        ``"bad"`` or ``"good"`` where it is one, else empty. Never the only sign of it.
    """

    text: str
    notes: tuple[str, ...] = ()
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under a caption; the first cell of each names it.

    Attributes
    ----------
    texts : int
        So many first columns are text, the others figures.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    texts: int = 1
    note: str = ""


@dataclass(frozen=True)
class Prose:
    """One paragraph."""

    text: str


@dataclass(frozen=True)
class Caution:
    """One sentence that must not be overlooked."""

    text: str


@dataclass(frozen=True)
class Sentences:
    """Findings, a line each, under a heading if they have one."""

    lines: tuple[tuple[Part, ...], ...]
    heading: str = ""


class Figure(NamedTuple):
    """One headline figure, and in words whether it is healthy."""

    label: str
    value: str
    verdict: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Card:
    """One run in a few figures, and what was found in it."""

    key: Key
    figures: tuple[Figure, ...]
    told: tuple[tuple[Part, ...], ...]


@dataclass(frozen=True)
class Cards:
    """The runs, a card each."""

    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Verdict:
    """One observation of the paper: what it says, what these runs say, and where it stands."""

    statement: str
    source: str
    test: str
    verdict: str
    reason: str
    findings: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Verdicts:
    """Observations, one below the other."""

    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes
    ----------
    id : str
    title, reading : str
        What it is, and one sentence on how to read it.
    data : list of dict
        Plotly's traces; none where there is nothing to show, which `summary` then explains.
    light, dark : dict
        Plotly's layout in either theme.
    summary : str
        The picture in words.
    notes : tuple of str
    keys : tuple of Key
        Its legend, where the picture has no room for one.
    numbers : Table
        The picture in numbers.
    wide : bool
        Whether it takes the whole width.
    """

    id: str
    title: str
    reading: str
    data: list[dict[str, Any]]
    light: dict[str, Any]
    dark: dict[str, Any]
    summary: str
    notes: tuple[str, ...]
    keys: tuple[Key, ...]
    numbers: Table
    wide: bool


@dataclass(frozen=True)
class Charts:
    """Pictures that stand together under a title, which may be none."""

    title: tuple[Part, ...]
    charts: tuple[Chart, ...]


@dataclass(frozen=True)
class Facts:
    """Names and values under the name of what they belong to."""

    key: Key
    rows: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...] = ()


Block = Prose | Caution | Sentences | Table | Cards | Verdicts | Charts | Facts


@dataclass(frozen=True)
class Section:
    """A chapter: id, title, and what is in it."""

    id: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Report:
    """All of it.

    Attributes
    ----------
    title : str
    about : tuple of str
        Model, steps and date, as short texts.
    runs : tuple of Key
        The runs that it is about.
    sections : tuple of Section
    made : str
        By what, and when.
    command : str
        What to type to make it again.
    """

    title: str
    about: tuple[str, ...]
    runs: tuple[Key, ...]
    sections: tuple[Section, ...]
    made: str
    command: str
