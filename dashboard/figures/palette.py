"""One colour and one dash per optimizer, the same in every picture.

Colours are Okabe and Ito's, told apart with every kind of colour vision; the dash says the same
once more for print and for thin lines.
"""

from typing import NamedTuple


class Style(NamedTuple):
    """How the lines of a run are drawn: a ``#rrggbb`` colour and a Plotly dash."""

    colour: str
    dash: str


KNOWN = {
    "AdamW": Style("#0072B2", "solid"),
    "Muon": Style("#D55E00", "dash"),
    "NorMuon": Style("#009E73", "dot"),
}

OTHERS = (
    Style("#CC79A7", "longdash"),
    Style("#E69F00", "dashdot"),
    Style("#56B4E9", "longdashdot"),
    Style("#8A7CC8", "solid"),
    Style("#9A8B4F", "dash"),
)

LIGHTER = (0.0, 0.45, 0.25, 0.6)
"""How far towards grey the first, second, ... run of one optimizer is drawn."""

GREY = 0x9A


def style_of(optimizer: str, others: int = 0) -> Style:
    """Return the style of an optimizer; one that is not `KNOWN` takes the next of `OTHERS`.

    Parameters
    ----------
    optimizer : str
        Class name.
    others : int
        How many other optimizers were met before this one.
    """
    return KNOWN.get(optimizer, OTHERS[others % len(OTHERS)])


def variant(style: Style, earlier: int) -> Style:
    """Return the style of a further run of an optimizer: the same dash, a greyer colour.

    Parameters
    ----------
    earlier : int
        Runs of the same optimizer before this one; 0 returns `style` itself.
    """
    share = LIGHTER[earlier % len(LIGHTER)]
    channels = (round(value + (GREY - value) * share) for value in _channels(style.colour))
    return Style("#" + "".join(f"{value:02X}" for value in channels), style.dash)


def faded(colour: str, opacity: float) -> str:
    """Return a ``#rrggbb`` colour with an opacity, as ``rgba(...)``."""
    red, green, blue = _channels(colour)
    return f"rgba({red},{green},{blue},{opacity:g})"


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
