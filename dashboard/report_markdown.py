"""A report as Markdown: its text and its tables, for a pull request, a wiki or a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from .report_parts import (
    Block,
    Cards,
    Caution,
    Cell,
    Chart,
    Charts,
    Facts,
    Part,
    Prose,
    Report,
    Sentences,
    Table,
    Verdict,
    Verdicts,
)
from .words import inert

SPECIAL = re.compile(r"([\\`*_\[\]<>|~&$])")
"""What Markdown could read as anything but itself, wherever it stands."""

STARTS = re.compile(r"^(?:([-+=#:])|(\d+)([.)])(?=\s|$))")
"""What makes a list, a heading or a rule of a line that begins with it."""


def markdown_of(report: Report) -> str:
    """Return the report as Markdown, figures in words and numbers."""
    lines = [f"# {_text(report.title)}", "", _text(" · ".join(report.about))]
    for section in report.sections:
        lines += ["", f"## {_text(section.title)}"]
        for block in section.blocks:
            lines += ["", *_block(block)]
    lines += ["", "---", "", f"Made by {_text(report.made)}, with {_code(report.command)}", ""]
    return "\n".join(lines)


def _block(block: Block) -> Iterator[str]:
    match block:
        case Prose():
            yield _text(block.text)
        case Caution():
            yield f"> **Note:** {_text(block.text)}"
        case Sentences():
            yield from [f"### {_text(block.heading)}", ""] if block.heading else []
            yield from (f"- {_words(line)}" for line in block.lines)
        case Table():
            yield from _table(block)
        case Cards():
            yield from _cards(block)
        case Verdicts():
            for verdict in block.verdicts:
                yield from _verdict(verdict)
        case Charts():
            yield f"### {_words(block.title) if block.title else 'All matrices'}"
            for chart in block.charts:
                yield from _chart(chart)
        case Facts():
            yield f"### {_text(block.key.name)}"
            yield ""
            yield from (f"> **Note:** {_text(text)}.\n" for text in block.warnings)
            yield from (f"- {_text(label)}: {_text(value)}" for label, value in block.rows)


def _table(table: Table, title: str = "**{}**") -> Iterator[str]:
    yield title.format(_text(table.caption))
    yield ""
    yield _row([_text(column) for column in table.columns])
    yield _row([":--" if i < table.texts else "--:" for i in range(len(table.columns))])
    for row in table.rows:
        yield _row([_cell(cell) for cell in row])
    if table.note:
        yield ""
        yield f"{_text(table.note)}."


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    text = f"**{_text(cell.text)}**" if cell.tone == "bad" else _text(cell.text)
    return f"{text} ({_inline(', '.join(cell.notes))})" if cell.notes else text


def _cards(cards: Cards) -> Iterator[str]:
    for card in cards.cards:
        yield f"### {_text(card.key.name)}"
        yield ""
        for figure in card.figures:
            verdict = f" ({_text(figure.verdict)})" if figure.verdict else ""
            yield f"- {_text(figure.label)}: **{_text(figure.value)}**{verdict}"
        yield from (f"- {_words(line)}" for line in card.told)
        yield ""


def _verdict(verdict: Verdict) -> Iterator[str]:
    yield f"### {_text(verdict.statement)}"
    yield ""
    yield f"**{_text(verdict.verdict)}** on these runs: {_text(verdict.reason)}."
    yield ""
    yield from (f"- {_text(label)}: **{_text(value)}**" for label, value in verdict.findings)
    yield f"- rule: {_text(verdict.test)}"
    yield f"- source: {_text(verdict.source)}"
    yield ""


def _chart(chart: Chart) -> Iterator[str]:
    yield ""
    yield f"#### {_text(chart.title)}"
    yield ""
    yield f"{_text(chart.reading)} {_text(chart.summary)}"
    for note in chart.notes:
        yield ""
        yield _text(note)
    if chart.numbers.rows:
        yield ""
        yield from _table(chart.numbers)


def _words(parts: Sequence[Part]) -> str:
    marks = {"run": "**{}**", "figure": "**{}**", "text": "{}"}
    told = [
        _code(text) if style == "matrix" else marks[style].format(_inline(text))
        for style, text in parts
        if text
    ]
    return "".join(told)


def _text(text: str) -> str:
    """Return a text that Markdown shows as it is, from the beginning of a line on."""
    return STARTS.sub(lambda it: f"\\{it[1]}" if it[1] else f"{it[2]}\\{it[3]}", _inline(text))


def _inline(text: str) -> str:
    """Return a text that Markdown shows as it is, within a line."""
    return SPECIAL.sub(r"\\\1", inert(text))


def _code(text: str) -> str:
    """Return a text as code; one that would end it as text."""
    plain = inert(text)
    return _inline(plain) if re.search(r"[`|<]", plain) or plain != plain.strip() else f"`{plain}`"
