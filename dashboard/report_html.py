"""A report as one page: nothing on it is asked of a network, and names stay text."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from .layout import swatch
from .report_parts import Chart, Charts, Report
from .words import inert

TEMPLATES = Path(__file__).parent / "templates"

POLICY = (
    "default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
"""Plotly writes styles while it draws; scripts are those that are in the page, word by word."""


def html_of(report: Report) -> str:
    """Return the page.

    Parameters
    ----------
    report : Report

    Returns
    -------
    str
        HTML with everything in it: styles, scripts and numbers.
    """
    pictures = [
        chart
        for section in report.sections
        for block in section.blocks
        if isinstance(block, Charts)
        for chart in block.charts
        if chart.data
    ]
    scripts = [get_plotlyjs(), _text("report.js")] if pictures else []
    return _template().render(
        report=report,
        policy=POLICY.format(scripts=" ".join(map(_hash, scripts)) or "'none'"),
        style=Markup(_text("report.css")),
        scripts=[Markup(script) for script in scripts],
        pictures=Markup(_json({chart.id: _picture(chart) for chart in pictures})),
    )


def _picture(chart: Chart) -> dict[str, Any]:
    return {"data": chart.data, "light": chart.light, "dark": chart.dark}


def _json(content: Any) -> str:
    """Return JSON that is inert between script tags: no name in it can end them."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _text(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _seen(value: Any) -> Any:
    """Return what a template prints, without characters that cannot be seen."""
    return inert(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _template() -> jinja2.Template:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_seen,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["swatch"] = swatch
    made.filters["kind"] = lambda block: type(block).__name__
    return made.get_template("report.html")
