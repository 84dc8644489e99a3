"""How the numbers are shown: one page over run files, live while they are recorded.

`figures` turns data into Plotly figures and is usable without Dash, in a notebook or a report;
`draw` gives any picture of the page there. The modules beside them are the page. Importing this
package loads neither Dash nor Plotly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .notebook import draw

__all__ = ["draw"]


def __getattr__(name: str) -> Any:
    if name == "draw":
        from .notebook import draw

        return draw
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
