"""What a panel shows, as lines for a notebook that give the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

from .panels import BY_ID, View

OPEN = "import normuon_lens as nl\nruns = [nl.open_run(path) for path in {paths}]\n"


def python_of(panel: str, view: View) -> str:
    """Return the Python that gives the numbers behind a panel, run by run.

    Parameters
    ----------
    panel : str
        Its id.
    """
    paths = [str(entry.path.resolve()) for entry in view.runs]
    matrix, stage = repr(view.matrix), repr(view.stage)
    each = f"for run, step in zip(runs, {_steps(panel, view)})"
    norms = f"run.neuron_norms({matrix}, {stage})"
    last = {
        "spectrum": f"[(s := run.spectrum({matrix}, step, {stage})) / s[0] {each}]",
        "neurons": f"[sorted((r := {norms}[run.steps == step][0]) / r.mean())[::-1] {each}]",
        "matrix": f"[abs(u := run.update({matrix}, step, {stage})) / (u**2).mean() ** 0.5 {each}]",
        "timeline": f"[(run.steps[~run.void], (r := {norms}[~run.void]).T / r.mean(axis=1))"
        " for run in runs]",
        "condition": f"nl.table(runs, ['condition_number'], stages=[{stage}])",
        "imbalance": f"nl.table(runs, ['neuron_cv'], stages=[{stage}])",
        "stages": "[nl.table([run], ['condition_number', 'neuron_cv'], stages=run.stages)"
        f".query('matrix == @name') for name in [{matrix}] for run in runs]",
        "loss": "[(run.steps, run.scalars.get('loss')) for run in runs]",
    }
    return OPEN.format(paths=paths) + last[panel] + "\n"


def _steps(name: str, view: View) -> Sequence[int]:
    """Return the step that the panel shows of every run: the nearest that was recorded."""
    moments = BY_ID[name].moments
    found = [moments(entry, view) if moments else [] for entry in view.runs]
    return [steps[0] if steps else view.step for steps in found]
