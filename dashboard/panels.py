"""The six panels: what each takes from the runs, and what it says when there is nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from normuon_lens.analysis.settled import SKIP

from .figures import condition, imbalance, loss, neurons, spectrum, timeline
from .figures.frame import Band, Curve, Figure, Grid, empty_figure
from .store import Entry, Store
from .thin import blocks, extremes

LEAST_TOP = 0.4
"""The imbalance colours reach at least so far, lest harmless differences glow."""

SMOOTHING = 0.9
"""Weight of the past in the smoothed loss: an average over about ten logged values."""

NO_RUN = "No run is ticked."
NO_STEP = "Waiting for the first step."


class View(NamedTuple):
    """What the page looks at: runs, one matrix, one step, one stage; and its theme."""

    runs: Sequence[Entry]
    matrix: str
    step: int
    stage: str
    dark: bool


@dataclass(frozen=True)
class Panel:
    """One picture of the page.

    Attributes
    ----------
    id : str
        Of its graph.
    title, reading : str
        What it is, and one sentence on how to read it.
    draw : callable
        View to figure.
    one_matrix, one_step : bool
        Whether it shows the chosen matrix only, the chosen step only. What runs over steps has no
        cursor drawn in: the page moves one over it.
    """

    id: str
    title: str
    reading: str
    draw: Callable[[Store, View], Figure]
    one_matrix: bool = False
    one_step: bool = False


def _draw_spectrum(store: Store, view: View) -> Figure:
    curves = []
    for entry in view.runs:
        found = entry.spectrum_at(view.matrix, view.stage, view.step)
        if found is not None:
            curves.append(_curve(store, entry, found.step, view, found.values / found.values[0]))
    if not curves:
        return _nothing(view, "spectra")
    return spectrum.spectrum_figure(curves, dark=view.dark)


def _draw_neurons(store: Store, view: View) -> Figure:
    curves = []
    for entry in view.runs:
        found = entry.norms_at(view.matrix, view.stage, view.step)
        if found is not None:
            ratio = -np.sort(-_over_mean(found.values))
            curves.append(_curve(store, entry, found.step, view, ratio))
    if not curves:
        return _nothing(view, "neuron norms")
    return neurons.neurons_figure(curves, dark=view.dark)


def _draw_condition(store: Store, view: View) -> Figure:
    bands = []
    for entry in view.runs:
        steps, values = entry.series("condition_number", view.stage)
        known = np.isfinite(values).any(axis=1)
        if known.any():
            low, middle, high = np.nanpercentile(values[known], [10, 50, 90], axis=1)
            at = extremes(middle)
            name = store.label(entry)
            bands.append(Band(name, entry.style, steps[known][at], low[at], middle[at], high[at]))
    if not bands:
        return _nothing(view, "spectra")
    return condition.condition_figure(bands, until=SKIP, dark=view.dark)


def _draw_imbalance(store: Store, view: View) -> Figure:
    measured = [(entry, entry.series("neuron_cv", view.stage)) for entry in view.runs]
    measured = [(entry, series) for entry, series in measured if len(series.steps)]
    if not measured:
        return _nothing(view, "neuron norms")
    names = list(dict.fromkeys(name for entry, _ in measured for name in _matrices(entry)))
    place = {name: row for row, name in enumerate(names)}
    grids = []
    for entry, (steps, values) in measured:
        # The same rows in every grid, NaN where a run has no such matrix.
        everywhere = np.full((len(names), len(steps)), np.nan)
        everywhere[[place[name] for name in _matrices(entry)]] = values.T
        cells, _, at = blocks(everywhere, rows=len(names))
        grids.append(Grid(store.label(entry), entry.style, steps[at], names, cells))
    late = [grid.values[:, grid.steps > SKIP] for grid in grids]
    settled = np.concatenate([cells[np.isfinite(cells)] for cells in late])
    top = max(LEAST_TOP, float(np.percentile(settled, 98)) if settled.size else 0.0)
    return imbalance.imbalance_figure(
        grids, top=top, chosen=view.matrix, until=SKIP, dark=view.dark
    )


def _draw_timeline(store: Store, view: View) -> Figure:
    grids = []
    for entry in view.runs:
        steps, norms = entry.norms(view.matrix, view.stage)
        if len(steps):
            cells, rows, at = blocks(_over_mean(norms).T)
            grids.append(Grid(store.label(entry), entry.style, steps[at], rows.tolist(), cells))
    if not grids:
        return _nothing(view, "neuron norms")
    return timeline.timeline_figure(grids, until=SKIP, dark=view.dark)


def _draw_loss(store: Store, view: View) -> Figure:
    losses = []
    for entry in view.runs:
        assert entry.run is not None
        values = entry.run.scalars.get("loss", np.empty(0))
        known = np.isfinite(values)
        if known.any():
            raw, steps = values[known], entry.run.steps[known]
            at = extremes(raw)
            smooth = Curve(store.label(entry), entry.style, steps[at], smoothed(raw)[at])
            losses.append(loss.Loss(smooth, raw[at]))
    if not losses:
        text = "No loss was logged.\nLog it with lens.log(loss=loss)"
        return empty_figure(_why(view) or text, dark=view.dark)
    # The list of runs right above it is its legend.
    return loss.loss_figure(losses, until=SKIP, legend=False, dark=view.dark)


PANELS = (
    Panel("condition", condition.TITLE, condition.READING, _draw_condition),
    Panel("imbalance", imbalance.TITLE, imbalance.READING, _draw_imbalance),
    Panel(
        "spectrum", spectrum.TITLE, spectrum.READING, _draw_spectrum, one_matrix=True, one_step=True
    ),
    Panel("neurons", neurons.TITLE, neurons.READING, _draw_neurons, one_matrix=True, one_step=True),
    Panel("timeline", timeline.TITLE, timeline.READING, _draw_timeline, one_matrix=True),
    Panel("loss", loss.TITLE, loss.READING, _draw_loss),
)
"""In the order of the page: all matrices first, then one of them."""


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return the running exponential mean of values (T,), free of a bias towards the first."""
    total = weight = 0.0
    means = np.empty(len(values))
    for i, value in enumerate(values.tolist()):
        total = SMOOTHING * total + value
        weight = SMOOTHING * weight + 1.0
        means[i] = total / weight
    return means


def _over_mean(norms: np.ndarray) -> np.ndarray:
    """Return norms (..., m) over the mean of their step; NaN where nothing moved at all."""
    with np.errstate(all="ignore"):
        ratio: np.ndarray = norms / np.nanmean(norms, axis=-1, keepdims=True)
    return ratio


def _curve(store: Store, entry: Entry, step: int, view: View, values: np.ndarray) -> Curve:
    """Return a sorted line; its name says the step where that is not the chosen one."""
    name = store.label(entry)
    at = extremes(values)
    return Curve(name if step == view.step else f"{name} @ {step}", entry.style, at + 1, values[at])


def _matrices(entry: Entry) -> list[str]:
    return entry.run.matrices if entry.run else []


def _nothing(view: View, what: str) -> Figure:
    """Return a picture that says why it is empty and what to do about it."""
    text = f"No {what} of stage “{view.stage}” in these runs."
    if view.stage != "update":
        text += "\nRecord them with attach(…, stages=True)"
    return empty_figure(_why(view) or text, dark=view.dark)


def _why(view: View) -> str:
    if not view.runs:
        return NO_RUN
    if not any(len(entry.run.steps) for entry in view.runs if entry.run):
        return NO_STEP
    return ""
