"""An observation of the paper, the rule by which it is looked for, and the code that does.

Every observation states its rule before it looks: `test` holds the thresholds in words, made from
the same constants that the code compares with. They are round numbers (a factor of two, an order of
magnitude, three quarters) or the paper's own. What cannot be decided by the rule is not decided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from normuon_lens.analysis.claims.evidence import Evidence
from normuon_lens.analysis.claims.verdict import Answer

PAPER = "arXiv 2510.05491"


@dataclass(frozen=True)
class Observation:
    """An observation of the paper, and the code that looks for it.

    Attributes
    ----------
    id : str
    statement : str
        The observation in our words, one sentence.
    source : str
        Where the paper has it.
    test : str
        The rule, with its thresholds.
    check : callable
        Evidence to Answer; raises `Undecided` or LensError where it cannot be told.
    """

    id: str
    statement: str
    source: str
    test: str
    check: Callable[[Evidence], Answer]
