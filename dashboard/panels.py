"""The eight panels: what each takes from the runs, and what it says when there is nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from normuon_lens.analysis.settled import SKIP

from .figures import condition, imbalance, loss, matrix, neurons, spectrum, stages, timeline
from .figures.frame import Band, Curve, Figure, Grid, empty_figure
from .store import Entry, Moment, Store
from .thin import blocks, blocks_note, evenly, extremes

LEAST_TOP = 0.4
"""The imbalance colours reach at least so far, lest harmless differences glow."""

SMOOTHING = 0.9
"""Weight of the past in the smoothed loss: an average over about ten logged values."""

LEGEND_RUNS, LEGEND_LETTERS = 4, 48
"""More runs or longer names leave a legend no room: the list of runs is one already."""

SIDE = 128
"""Rows and columns of a picture of an update, at most: what fits when three stand side by side."""

AT = " @ "
"""Between the name of a run and the step shown of it, where that is not the chosen one."""

NO_RUN = "No run is ticked."
NO_STEP = "Waiting for the first step."


class Window(NamedTuple):
    """What of a picture is zoomed in to, in the unit of its axes."""

    left: float
    right: float
    low: float
    high: float


class View(NamedTuple):
    """What the page looks at: runs, one matrix, one step, one stage; its theme and its zooms."""

    runs: Sequence[Entry]
    matrix: str
    step: int
    stage: str
    dark: bool
    windows: Mapping[str, Window] = {}


class Picture(NamedTuple):
    """A figure, and what must be said of it: what was thinned, what is not finite or missing."""

    figure: Figure
    notes: Sequence[str] = ()


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
        View to picture.
    one_matrix, marks_matrix : bool
        Whether it shows the chosen matrix only; whether it marks it among all.
    moments : callable or None
        Of a panel that shows one step: the steps of a run that are nearest to the chosen one.
        What runs over steps has no cursor drawn in: the page moves one over it.
    zooms : bool
        Whether it holds more than the screen shows, so that zooming in needs a finer picture.
    """

    id: str
    title: str
    reading: str
    draw: Callable[[Store, View], Picture]
    one_matrix: bool = False
    marks_matrix: bool = False
    moments: Callable[[Entry, View], Sequence[int]] | None = None
    zooms: bool = False

    def subject(self, view: View) -> list[object]:
        """Return what the picture is of: another subject has other axes, and no zoom yet."""
        runs = [entry.id for entry in view.runs]
        return [self.id, view.stage, runs, view.matrix if self.one_matrix else ""]

    def content(self, store: Store, view: View) -> list[object]:
        """Return what the picture is drawn from: if that is the same, so is the picture."""
        runs = [[entry.version, store.label(entry)] for entry in view.runs]
        content = [*self.subject(view), runs, view.dark]
        if self.marks_matrix:
            content.append(view.matrix)
        if self.moments:
            found = [self.moments(entry, view) for entry in view.runs]
            content.append([[[step, step == view.step] for step in steps] for steps in found])
        if self.zooms:
            content.append(view.windows.get(self.id))
        return content


# -- one step --------------------------------------------------------------------------------------


def _draw_spectrum(store: Store, view: View) -> Picture:
    curves, notes = [], []
    for entry in view.runs:
        found = entry.spectrum_at(view.matrix, view.stage, view.step)
        if found is not None:
            curves.append(_curve(store, entry, found.step, view, found.values / found.values[0]))
            if hidden := int(np.isnan(found.values).sum()):
                notes.append(f"{store.label(entry)}: {hidden} of {len(found.values)} lost in noise")
    if not curves:
        return _nothing(view, "spectra")
    return _with_legend(spectrum.spectrum_figure(curves, dark=view.dark), curves, notes)


def _draw_neurons(store: Store, view: View) -> Picture:
    curves, notes = [], []
    for entry in view.runs:
        found = entry.norms_at(view.matrix, view.stage, view.step)
        if found is not None:
            finite = np.isfinite(found.values)
            ratio = -np.sort(-_over_mean(found.values[finite]))
            curves.append(_curve(store, entry, found.step, view, ratio))
            if not finite.all():
                count = f"{int((~finite).sum())} of {len(finite)}"
                notes.append(f"{store.label(entry)}: {count} neurons not finite (NaN or ∞)")
    if not curves:
        return _nothing(view, "neuron norms")
    return _with_legend(neurons.neurons_figure(curves, dark=view.dark), curves, notes)


def _draw_matrix(store: Store, view: View) -> Picture:
    updates, notes = [], []
    for entry in view.runs:
        found = entry.update_at(view.matrix, view.stage, view.step)
        if found is None:
            continue
        values = np.abs(found.values.astype(np.float64))
        values[~np.isfinite(values)] = np.nan
        rows, columns = _inside(view, "matrix", *values.shape)
        with np.errstate(all="ignore"):
            norms = _over_mean(np.sqrt(np.nansum(values**2, axis=1)))
            values = values / np.sqrt(np.nanmean(values**2))
        part = values[rows, columns]
        cells, row, column = blocks(part, SIDE, SIDE)
        updates.append(
            matrix.Update(
                _named(store, entry, found.step, view),
                entry.style,
                rows.start + row,
                columns.start + column,
                cells,
                blocks(norms[rows, None], SIDE, 1)[0][:, 0],
            )
        )
        notes.append(blocks_note(part.shape, cells.shape, ("neurons", "inputs")))
        if np.isnan(values).any():
            count = f"{int(np.isnan(values).sum())} of {values.size}"
            notes.append(f"{store.label(entry)}: {count} entries are not finite, and left blank")
    if not updates:
        text = "No full matrix of stage “{stage}” was kept.\nKeep some with attach(…, {how})"
        how = "matrices_every=100" if view.stage == "update" else "stages=True"
        text = text.format(stage=view.stage, how=how)
        return Picture(empty_figure(_why(view) or text, dark=view.dark))
    return Picture(matrix.matrix_figure(updates, dark=view.dark), _each_once(notes))


def _draw_stages(store: Store, view: View) -> Picture:
    runs = []
    for entry in view.runs:
        condition, bound, cv = (
            [entry.metric_at(metric, view.matrix, stage, view.step) for stage in _stages(entry)]
            for metric in ("condition_number", "condition_is_lower_bound", "neuron_cv")
        )
        found = [pair for pair in zip(condition, cv, strict=True) if pair != (None, None)]
        if found:
            runs.append(
                stages.Stages(
                    store.label(entry),
                    entry.style,
                    _stages(entry),
                    _values(condition),
                    _values(bound) == 1,
                    _values(cv),
                )
            )
    if not runs:
        return _nothing(view, "numbers")
    notes = []
    if all(list(run.stages) == ["update"] for run in runs):
        notes.append("Only the update was recorded; attach(…, stages=True) records every stage")
    figure = stages.stages_figure(runs, chosen=view.stage, dark=view.dark)
    return _with_legend(figure, runs, notes)


def _stages(entry: Entry) -> list[str]:
    return entry.run.stages if entry.run else []


def _values(moments: Sequence[Moment | None]) -> np.ndarray:
    return np.array([np.nan if moment is None else float(moment.values) for moment in moments])


# -- all steps -------------------------------------------------------------------------------------


def _draw_condition(store: Store, view: View) -> Picture:
    bands, marks, notes = [], [], []
    for entry in view.runs:
        steps, values = entry.series("condition_number", view.stage)
        known = np.isfinite(values).any(axis=1)
        if known.any():
            low, middle, high = _deciles(values[known])
            at = extremes(middle)
            name = store.label(entry)
            bands.append(Band(name, entry.style, steps[known][at], low[at], middle[at], high[at]))
            marks.append(entry.marks(view.stage))
            notes.append(_points_note(len(middle), len(at)))
    if not bands:
        return _nothing(view, "spectra")
    figure = condition.condition_figure(bands, until=SKIP, marks=marks, dark=view.dark)
    return _with_legend(figure, bands, [*_each_once(notes), *_told(store, view)])


def _deciles(values: np.ndarray) -> np.ndarray:
    """Return the 10th, 50th and 90th percentile of every row, without its NaN."""
    found = np.empty((3, len(values)))
    whole = np.isfinite(values).all(axis=1)
    found[:, whole] = np.percentile(values[whole], [10, 50, 90], axis=1)
    if not whole.all():  # one by one, and a hundred times slower
        found[:, ~whole] = np.nanpercentile(values[~whole], [10, 50, 90], axis=1)
    return found


def _draw_imbalance(store: Store, view: View) -> Picture:
    measured = [(entry, entry.series("neuron_cv", view.stage)) for entry in view.runs]
    measured = [(entry, series) for entry, series in measured if len(series.steps)]
    if not measured:
        return _nothing(view, "neuron norms")
    names = list(dict.fromkeys(name for entry, _ in measured for name in _matrices(entry)))
    place = {name: row for row, name in enumerate(names)}
    grids, notes = [], []
    for entry, (steps, values) in measured:
        # The same rows in every grid, NaN where a run has no such matrix.
        everywhere = np.full((len(names), len(steps)), np.nan)
        everywhere[[place[name] for name in _matrices(entry)]] = values.T
        shown = _within(view, "imbalance", steps)
        steps, everywhere = evenly(steps[shown], everywhere[:, shown])
        cells, _, at = blocks(everywhere, rows=len(names))
        grids.append(Grid(store.label(entry), entry.style, steps[at], names, cells))
        notes.append(blocks_note(everywhere.shape, cells.shape))
    late = [grid.values[:, grid.steps > SKIP] for grid in grids]
    settled = np.concatenate([cells[np.isfinite(cells)] for cells in late])
    top = max(LEAST_TOP, float(np.percentile(settled, 98)) if settled.size else 0.0)
    marks = [entry.marks(view.stage) for entry, _ in measured]
    figure = imbalance.imbalance_figure(
        grids, top=top, chosen=view.matrix, until=SKIP, marks=marks, dark=view.dark
    )
    return Picture(figure, [*_each_once(notes), *_told(store, view)])


def _draw_timeline(store: Store, view: View) -> Picture:
    grids, marks, notes = [], [], []
    for entry in view.runs:
        steps, norms = entry.norms(view.matrix, view.stage)
        if len(steps):
            shown = _within(view, "timeline", steps)
            rows, _ = _inside(view, "timeline", norms.shape[1], 1)
            steps, part = evenly(steps[shown], _over_mean(norms[shown])[:, rows].T)
            cells, row, at = blocks(part)
            number = (rows.start + row).tolist()
            grids.append(Grid(store.label(entry), entry.style, steps[at], number, cells))
            marks.append(entry.marks(view.stage))
            notes.append(blocks_note(part.shape, cells.shape))
    if not grids:
        return _nothing(view, "neuron norms")
    figure = timeline.timeline_figure(grids, until=SKIP, marks=marks, dark=view.dark)
    return Picture(figure, [*_each_once(notes), *_told(store, view)])


def _draw_loss(store: Store, view: View) -> Picture:
    losses, marks, notes = [], [], []
    for entry in view.runs:
        assert entry.run is not None
        values = entry.run.scalars.get("loss", np.empty(0))
        known = np.isfinite(values)
        if known.any():
            raw, steps = values[known], entry.run.steps[known]
            at = extremes(raw)
            smooth = Curve(store.label(entry), entry.style, steps[at], smoothed(raw)[at])
            losses.append(loss.Loss(smooth, raw[at]))
            marks.append(entry.marks(view.stage))
            notes.append(_points_note(len(raw), len(at)))
        if infinite := int(np.isinf(values).sum()):
            notes.append(f"{store.label(entry)}: the loss was infinite at {infinite} steps")
    if not losses:
        text = "No loss was logged.\nLog it with lens.log(loss=loss)"
        return Picture(empty_figure(_why(view) or text, dark=view.dark))
    # The list of runs right above it is its legend.
    figure = loss.loss_figure(losses, until=SKIP, marks=marks, legend=False, dark=view.dark)
    return Picture(figure, _each_once(notes))


def _nearest(what: str) -> Callable[[Entry, View], Sequence[int]]:
    return lambda entry, view: entry.moments(what, view.matrix, view.stage, view.step)


PANELS = (
    Panel("condition", condition.TITLE, condition.READING, _draw_condition),
    Panel(
        "imbalance",
        imbalance.TITLE,
        imbalance.READING,
        _draw_imbalance,
        marks_matrix=True,
        zooms=True,
    ),
    Panel(
        "spectrum",
        spectrum.TITLE,
        spectrum.READING,
        _draw_spectrum,
        one_matrix=True,
        moments=_nearest("spectrum"),
    ),
    Panel(
        "neurons",
        neurons.TITLE,
        neurons.READING,
        _draw_neurons,
        one_matrix=True,
        moments=_nearest("norms"),
    ),
    Panel(
        "timeline", timeline.TITLE, timeline.READING, _draw_timeline, one_matrix=True, zooms=True
    ),
    Panel(
        "matrix",
        matrix.TITLE,
        matrix.READING,
        _draw_matrix,
        one_matrix=True,
        moments=_nearest("update"),
        zooms=True,
    ),
    Panel(
        "stages",
        stages.TITLE,
        stages.READING,
        _draw_stages,
        one_matrix=True,
        moments=lambda entry, view: [
            found.step
            for stage in _stages(entry)
            for metric in ("condition_number", "neuron_cv")
            if (found := entry.metric_at(metric, view.matrix, stage, view.step))
        ],
    ),
    Panel("loss", loss.TITLE, loss.READING, _draw_loss),
)
"""In the order of the page: all matrices first, then one of them."""

BY_ID = {panel.id: panel for panel in PANELS}


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
        finite = np.where(np.isfinite(norms), norms, np.nan)
        count = np.isfinite(norms).sum(axis=-1, keepdims=True)
        ratio: np.ndarray = finite / (np.nansum(finite, axis=-1, keepdims=True) / count)
    return ratio


def _curve(store: Store, entry: Entry, step: int, view: View, values: np.ndarray) -> Curve:
    """Return a sorted line; its name says the step where that is not the chosen one."""
    at = extremes(values)
    return Curve(_named(store, entry, step, view), entry.style, at + 1, values[at])


def _named(store: Store, entry: Entry, step: int, view: View) -> str:
    name = store.label(entry)
    return name if step == view.step else f"{name}{AT}{step}"


def _matrices(entry: Entry) -> list[str]:
    return entry.run.matrices if entry.run else []


def _within(view: View, panel: str, steps: np.ndarray) -> np.ndarray:
    """Return which steps (T,) the panel is zoomed in to, and one more on either side."""
    window = view.windows.get(panel)
    if window is None:
        return np.ones(len(steps), dtype=bool)
    first = int(np.searchsorted(steps, window.left)) - 1
    last = int(np.searchsorted(steps, window.right)) + 1
    index = np.arange(len(steps))
    return (index >= first) & (index <= last)


def _inside(view: View, panel: str, rows: int, columns: int) -> tuple[slice, slice]:
    """Return the rows and the columns of a matrix that the panel is zoomed in to."""
    window = view.windows.get(panel)
    if window is None:
        return slice(0, rows), slice(0, columns)
    return _cut(window.low, window.high, rows), _cut(window.left, window.right, columns)


def _cut(low: float, high: float, length: int) -> slice:
    first = min(max(int(low), 0), length - 1)
    return slice(first, min(max(int(high) + 1, first + 1), length))


def _points_note(given: int, shown: int) -> str:
    return f"{shown} of {given} points drawn, the lowest and highest of each stretch" * (
        shown < given
    )


def _told(store: Store, view: View) -> list[str]:
    """Return in words what the marks on the time axis mean, and of which runs."""
    told: dict[str, list[str]] = {}
    for entry in view.runs:
        void, dropped, broken = (len(steps) for steps in entry.marks(view.stage))
        said = [
            f"{_count(void, 'void step')}, which moved nothing (below)" * (void > 0),
            f"samples lost at {_count(dropped, 'step')} (above)" * (dropped > 0),
            f"not finite at {_count(broken, 'step')} (dashed)" * (broken > 0),
        ]
        told.setdefault(", ".join(filter(None, said)), []).append(store.label(entry))
    return [
        f"{'every run' if 1 < len(view.runs) == len(runs) else ', '.join(runs)}: {text}"
        for text, runs in told.items()
        if text
    ]


def _with_legend(
    figure: Figure, runs: Sequence[Curve | Band | stages.Stages], notes: Sequence[str]
) -> Picture:
    """Return a picture with its legend if there is room, else with what only that would say."""
    names = [run.name for run in runs]
    if len(names) <= LEGEND_RUNS and sum(map(len, names)) <= LEGEND_LETTERS:
        return Picture(figure, notes)
    figure["layout"]["showlegend"] = False
    elsewhere = [name for name in names if AT in name]
    return Picture(figure, [*notes, *([f"Nearest: {', '.join(elsewhere)}"] if elsewhere else [])])


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _each_once(notes: Sequence[str]) -> list[str]:
    return [note for note in dict.fromkeys(notes) if note]


def _nothing(view: View, what: str) -> Picture:
    """Return a picture that says why it is empty and what to do about it."""
    text = f"No {what} of stage “{view.stage}” in these runs."
    if view.stage != "update":
        text += "\nRecord them with attach(…, stages=True)"
    return Picture(empty_figure(_why(view) or text, dark=view.dark))


def _why(view: View) -> str:
    if not view.runs:
        return NO_RUN
    if not any(entry.begun for entry in view.runs):
        return NO_STEP
    return ""
