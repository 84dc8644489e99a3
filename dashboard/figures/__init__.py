"""Pictures as data: pure functions from arrays to Plotly figures, one panel a file.

::

    import plotly.graph_objects as go
    from normuon_lens.dashboard.figures import Curve, spectrum_figure, style_of

    go.Figure(spectrum_figure([Curve("Muon", style_of("Muon"), index, sigma)]))

They compute nothing but layout and import neither Dash nor Plotly: a figure is a plain dict of
JSON values, and carries exactly the numbers it was given.
"""

from .condition import condition_figure
from .frame import Band, Curve, Grid, Marks, empty_figure
from .imbalance import imbalance_figure
from .loss import Loss, loss_figure
from .matrix import Update, matrix_figure
from .neurons import neurons_figure
from .numbers import csv_of, summary_of, table_of
from .palette import Style, faded, style_of, variant
from .spectrum import spectrum_figure
from .stages import Stages, stages_figure
from .timeline import timeline_figure

__all__ = [
    "Band",
    "Curve",
    "Grid",
    "Loss",
    "Marks",
    "Stages",
    "Style",
    "Update",
    "condition_figure",
    "csv_of",
    "empty_figure",
    "faded",
    "imbalance_figure",
    "loss_figure",
    "matrix_figure",
    "neurons_figure",
    "spectrum_figure",
    "stages_figure",
    "style_of",
    "summary_of",
    "table_of",
    "timeline_figure",
    "variant",
]
