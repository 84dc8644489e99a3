"""Whole analyses: what is missing and nothing else, whatever comes between."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from normuon_lens.analysis.offline.coordinator import Progress, analyze
from normuon_lens.analysis.offline.stored import Answer, Batch, measure_batch
from normuon_lens.analysis.results import results_of, results_path
from normuon_lens.analysis.table import table
from normuon_lens.errors import LensError
from normuon_lens.runfile import Matrices, Matrix, Run, Writer, made_up_run, open_run

MODULE = sys.modules["normuon_lens.analysis.offline.coordinator"]
SHAPES = {"blocks.0.up": (12, 6), "blocks.0.q": (6, 6), "blocks.1.q": (6, 6)}


class Engine:
    """Stands in for the processes: measures here, and notes what it was asked for.

    Attributes
    ----------
    asked : list of Batch
    stop_after : int or None
        Batches after which somebody presses Ctrl-C.
    fails : str
        Matrices of this name cannot be analysed.
    """

    def __init__(self) -> None:
        self.asked: list[Batch] = []
        self.stop_after: int | None = None
        self.fails = ""

    def spread(
        self, batches: Sequence[Batch], workers: int
    ) -> Generator[tuple[Batch, Answer] | None]:
        for number, batch in enumerate(batches):
            if number == self.stop_after:
                raise KeyboardInterrupt
            yield None
            self.asked.append(batch)
            if batch.matrix == self.fails:
                yield batch, [f"{batch.path}: damaged (a chunk)"] * len(batch.steps)
            else:
                yield batch, measure_batch(batch)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    stand_in = Engine()
    monkeypatch.setattr(MODULE, "spread", stand_in.spread)
    monkeypatch.setattr(MODULE, "BATCH_STEPS", 2)
    return stand_in


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "x.h5"
    return made_up_run(path, steps=4, every=1, shapes=SHAPES, void=(3,)).path


@pytest.fixture
def run(recorded: Path, tmp_path: Path) -> Run:
    (tmp_path / "x.h5").write_bytes(recorded.read_bytes())
    return open_run(tmp_path / "x.h5")


class Seen(NamedTuple):
    batches: int
    matrices: int


def seen(engine: Engine) -> Seen:
    asked, engine.asked = engine.asked, []
    return Seen(len(asked), sum(len(batch.steps) for batch in asked))


def test_numbers_are_those_of_the_recording_which_stays_untouched(run: Run, engine: Engine) -> None:
    before = run.path.read_bytes(), os.stat(run.path).st_mtime_ns
    names = ["condition_number", "spread_p95_p5", "neuron_cv", "cosine_previous"]
    expected = table(run, names)
    told: list[Progress] = []
    found = analyze(run.path, progress=told.append)
    assert (run.path.read_bytes(), os.stat(run.path).st_mtime_ns) == before
    assert sorted(os.listdir(run.path.parent)) == ["x.h5", "x.h5.analysis.jsonl"]
    both = expected.merge(found, on=["run", "step", "matrix", "stage", "metric"])
    assert len(both) == len(expected)
    np.testing.assert_allclose(both["value_x"], both["value_y"], rtol=1e-5, atol=1e-7)
    void = found[found["step"] == 3]
    assert "condition_number" not in set(void["metric"]), "a void step has none"
    assert told[0] == Progress(0, 12, 0, 0.0)
    assert told[-1] == Progress(12, 12, 0, pytest.approx(1.0))
    assert engine.asked[0].matrix == "blocks.0.up", "the dearest is begun first"
    assert seen(engine) == Seen(6, 12)


def test_an_interrupted_analysis_goes_on_where_it_was(run: Run, engine: Engine) -> None:
    engine.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        analyze(run)
    assert seen(engine) == Seen(2, 4)
    half = results_of(run)
    assert half is not None
    assert len(half[["matrix", "step"]].drop_duplicates()) == 4
    engine.stop_after = None
    told: list[Progress] = []
    whole = analyze(run, progress=told.append)
    assert seen(engine) == Seen(4, 8)
    assert told[0] == Progress(4, 12, 4, 0.0)
    assert analyze(run).equals(whole)
    assert seen(engine) == Seen(0, 0)
    again = results_of(run)
    assert again is not None
    assert (
        again[["run", "step", "matrix", "metric", "value"]]
        .astype(object)
        .equals(whole[["run", "step", "matrix", "metric", "value"]].astype(object))
    )


def test_only_metrics_that_are_missing_are_computed(run: Run, engine: Engine) -> None:
    first = analyze(run, "neuron_cv", matrices="*.q")
    assert set(first["metric"]) == {"neuron_cv"}
    assert set(first["matrix"]) == {"blocks.0.q", "blocks.1.q"}
    assert seen(engine).matrices == 8
    both = analyze(run, ["neuron_cv", "sigma_max"], steps=[2, 4])
    wanted = {batch.matrix: batch.metrics for batch in engine.asked}
    assert wanted["blocks.0.q"] == ("sigma_max",)
    assert set(wanted["blocks.0.up"]) == {"neuron_cv", "sigma_max"}
    assert seen(engine).matrices == 6
    assert set(both["step"]) == {2, 4}
    assert len(both) == 12


def test_a_live_recording_is_analysed_as_far_as_it_is(tmp_path: Path, engine: Engine) -> None:
    writer = Writer(tmp_path / "x.h5", {"optimizer": "SGD"}, Matrices([Matrix("w", 2, 2)]))
    for step in range(1, 6):
        writer.step(step, float(step), scalars={}, norms={"update": np.ones(2)})
        writer.matrix("update", 0, step, step * np.eye(2))
        if step == 3:
            writer.commit()
            found = analyze(tmp_path / "x.h5.parts", "sigma_max")
            assert found["value"].tolist() == [1.0, 2.0, 3.0]
    writer.close()
    seen(engine)
    assert analyze(tmp_path / "x.h5", "sigma_max")["value"].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert seen(engine).matrices == 2, "packing changes nothing"


def test_what_fails_is_named_once_the_rest_is_done(run: Run, engine: Engine) -> None:
    engine.fails = "blocks.0.q"
    text = r"^x\.h5: blocks\.0\.q, update of step 1: damaged \(a chunk\); and 3 more; the rest is"
    with pytest.raises(LensError, match=text):
        analyze(run)
    rest = results_of(run)
    assert rest is not None
    assert set(rest["matrix"]) == {"blocks.0.up", "blocks.1.q"}
    engine.fails = ""
    seen(engine)
    analyze(run)
    assert seen(engine).matrices == 4, "what failed is tried again"


def test_several_runs_and_a_folder_for_their_results(
    run: Run, tmp_path: Path, engine: Engine
) -> None:
    made_up_run(tmp_path / "y.h5", steps=2, every=1, shapes={"w": (3, 2)})
    Writer(tmp_path / "z.h5", {"optimizer": "SGD"}, Matrices([Matrix("w", 2, 2)])).close()
    found = analyze(tmp_path, "sigma_max", folder=tmp_path / "made" / "here")
    assert found.groupby("run", observed=True).size().to_dict() == {"x": 12, "y": 2}
    assert sorted(os.listdir(tmp_path / "made" / "here")) == [
        "x.h5.analysis.jsonl",
        "y.h5.analysis.jsonl",
    ]
    assert results_of(run) is None
    assert results_of(run, tmp_path / "made" / "here") is not None
    twin = made_up_run(tmp_path / "twin" / "x.h5", steps=1)
    with pytest.raises(LensError, match="two recordings would have their results there"):
        analyze([run, twin], folder=tmp_path)


@pytest.mark.usefixtures("engine")
def test_what_cannot_be_had_is_refused_before_anything_is_written(run: Run, tmp_path: Path) -> None:
    empty = Writer(tmp_path / "z.h5", {"optimizer": "SGD"}, Matrices([Matrix("w", 2, 2)]))
    empty.close()
    for options, says in [
        ({"metrics": "update_to_weight_spectral"}, "is of the weight too, which is in no record"),
        ({"metrics": "alignment"}, r"x\.h5 keeps update: record with stages=True"),
        ({"metrics": ["sigma_max", "alignement"]}, "the closest are alignment"),
        ({"stages": "momenta"}, "no stage is called 'momenta'"),
        ({"stages": "momentum"}, r"no kept matrix is among .*: x\.h5 keeps update at steps 1, 2"),
        ({"steps": [7]}, r"x\.h5 keeps update at steps 1, 2, 3, … 4"),
        ({"matrices": "*.k"}, r"no matrix matches '\*\.k': the closest are"),
    ]:
        with pytest.raises(LensError, match=says):
            analyze(run, **options)  # type: ignore[arg-type]
    assert not results_path(run).exists()
    with pytest.raises(LensError, match="workers is 0"):
        analyze(run, workers=0)
    with pytest.raises(LensError, match=r"z\.h5: no full matrix was kept"):
        analyze(tmp_path / "z.h5")
    with pytest.raises(LensError, match="no such file or folder"):
        analyze(tmp_path / "none.h5")
