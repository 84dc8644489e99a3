"""A recording of several ranks is that of a single process, and training does not notice it.

Ranks are real. A launch of them costs seconds, so all trainings on as many ranks share one; every
training runs twice, recorded and not, and must be the same bit by bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from sharded import EVERY, Case, Places, Trained, expect_equal, expect_true, train, train_all
from torch import nn

from normuon_lens.errors import AttachError
from normuon_lens.hooks import attach
from normuon_lens.hooks.exchange import deal
from normuon_lens.optim.owners import row_range
from normuon_lens.runfile import Run, open_run

STAGES = {"stages": True}


pytestmark = pytest.mark.usefixtures("forked_helpers")

ON_TWO = {
    "adamw": Case(options=STAGES),
    "normuon": Case(rule="NorMuon", options=STAGES),
    "muon": Case(rule="Muon", model="even", dtype="float64", twist="clip", options=STAGES),
    "both": Case(rule="NorMuon", model="tokens", twist="accumulate"),
    "sgd": Case(rule="SGD with momentum", twist="closure"),
    "torch muon": Case(rule="torch Muon"),
    "original scale": Case(rule="NorMuon, original scale", layout="root only", model="even"),
    "mixed precision": Case(layout="mixed precision", model="tokens"),
    "replicated": Case(layout="replicated", rule="NorMuon", model="tokens"),
    "ddp": Case(layout="ddp", model="even"),
    "ddp normuon": Case(layout="ddp", rule="NorMuon", model="tokens"),
    "alone each": Case(layout="alone each", rule="NorMuon", model="tokens"),
    "plain beside": Case(layout="plain beside"),
    "backwards": Case(layout="backwards", model="even"),
    "convolutions": Case(model="convolutions", dtype="float64"),
    "convolutions normuon": Case(model="convolutions", rule="NorMuon", options=STAGES),
    "bfloat16": Case(rule="SGD", dtype="bfloat16", lr=0.3),
    "bfloat16 normuon": Case(rule="NorMuon", dtype="bfloat16", lr=0.3),
    "idle": Case(model="idle"),
    "idle normuon": Case(model="idle", rule="NorMuon", options=STAGES),
    "scaler": Case(twist="scaler, overflow", options={"include": ["0", "2"], "exclude": "2"}),
    "fused scaler": Case(twist="scaler, overflow", rule="fused AdamW"),
    "zero gradient": Case(twist="zero gradient", rule="SGD"),
    "checkpoint": Case(twist="checkpoint"),
    "one steps seldom": Case(twist="seldom", rule="NorMuon", model="tokens", steps=7),
    "budget": Case(twist="slow", steps=30, options={"budget": 0.05}),
    # What four ranks recorded goes on with two, and goes on once more.
    "resumed": Case(options={"resume": True}, onto="first of three", taken=6, seed=1),
    "resumed again": Case(
        options={"resume": True}, rule="SGD", onto="first of three", taken=12, seed=2
    ),
}

ON_FOUR = {
    "adamw": Case(options=STAGES),
    "normuon": Case(rule="NorMuon", options=STAGES),
    "even": Case(model="even", options=STAGES),
    "even normuon": Case(model="even", rule="NorMuon"),
    "hsdp": Case(layout="hsdp", rule="NorMuon", model="tokens", options=STAGES),
    "hsdp convolutions": Case(layout="hsdp", model="convolutions"),
    "convolutions": Case(model="convolutions"),
    "ranks 1 and 2": Case(layout="middle", rule="NorMuon", model="tokens"),
    "state asked for first": Case(twist="state asked for first"),
    "first rate 0": Case(twist="first rate 0", model="tokens"),
    "first of three": Case(),
}

IN_ONE_PROCESS_TOO = {
    "2 ranks": (
        "adamw",
        "normuon",
        "muon",
        "both",
        "idle normuon",
        "fused scaler",
        "one steps seldom",
        "convolutions normuon",
    ),
    "4 ranks": ("adamw", "normuon", "even", "hsdp"),
}

VOID = {"fused scaler": (1, 4), "zero gradient": (1, 3), "first rate 0": (1,)}
SAMPLED = {"fused scaler": (2, 6)}
RESUMED = ("first of three", "resumed", "resumed again")


class Launch:
    """What came back from a launch of ranks, and where they recorded."""

    def __init__(self, ranks: int, folder: Path, cases: dict[str, Case]) -> None:
        self.ranks, self.folder, self.cases = ranks, folder, cases
        folder.mkdir(exist_ok=True)
        results = on_ranks(ranks, train_and_refuse, folder, cases, timeout=240)
        self.told = [told for told, _ in results]
        self.refused = [refused for _, refused in results]

    def of(self, name: str) -> list[Trained]:
        """Return what the ranks of a case did."""
        told = [told[name] for told in self.told if name in told]
        for did in told:
            assert not isinstance(did, str), did
        return told


def train_and_refuse(folder: Path, cases: dict[str, Case]) -> Any:
    return train_all(folder, cases), refused(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def four(folder: Path) -> Launch:
    return Launch(4, folder / "4", ON_FOUR)


@pytest.fixture(scope="module")
def two(four: Launch, folder: Path) -> Launch:
    (folder / "2").mkdir()
    (four.folder / "first of three.h5").rename(folder / "2" / "first of three.h5")
    return Launch(2, folder / "2", ON_TWO)


def launch_of(request: pytest.FixtureRequest, ranks: str) -> Launch:
    launch: Launch = request.getfixturevalue("two" if ranks == "2 ranks" else "four")
    return launch


# These are held against something else.
SEPARATE = {"budget", "one steps seldom", "backwards", *RESUMED}
ALL = [("4 ranks", name) for name in ON_FOUR if name not in SEPARATE] + [
    ("2 ranks", name) for name in ON_TWO if name not in SEPARATE
]


@pytest.mark.parametrize(("ranks", "name"), ALL)
def test_a_recording_is_what_the_training_did_and_training_is_the_same(
    ranks: str, name: str, request: pytest.FixtureRequest
) -> None:
    launch = launch_of(request, ranks)
    did, case = launch.of(name), launch.cases[name]
    expected = VOID.get(name, ()), SAMPLED.get(name)
    run = expect_true(
        launch.folder / f"{name}.h5", case, did[0], void=expected[0], sampled=expected[1]
    )
    names = list(did[0].moves[1][0])
    assert run.matrices == (["0"] if "include" in case.options else names)
    assert not run.events
    assert run.overlaps == (2 if name == "checkpoint" else 0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_state_that_is_told_is_what_the_first_rank_holds(
    ranks: int, request: pytest.FixtureRequest
) -> None:
    launch = launch_of(request, f"{ranks} ranks")
    for name, numbers in (("adamw", lambda n: 2 * n), ("normuon", lambda n: n + 1)):
        run = open_run(launch.folder / f"{name}.h5")
        rows = [len(range(*row_range(x.m, ranks, 0))) for x in run.table]
        held = sum(4 * r * numbers(x.n) for r, x in zip(rows, run.table, strict=True))
        held += 4 * len(run.table) * (name == "adamw")  # counters of steps
        told = run.scalars["optimizer_state_bytes"]
        assert set(told[np.isfinite(told)]) == {held}


ONES = [(ranks, name) for ranks, names in IN_ONE_PROCESS_TOO.items() for name in names]


@pytest.mark.parametrize(("ranks", "name"), ONES)
def test_a_recording_of_ranks_is_that_of_a_single_process(
    ranks: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    launch = launch_of(request, ranks)
    launch.of(name)
    train(launch.cases[name], tmp_path / "single.h5")
    run, single = open_run(launch.folder / f"{name}.h5"), open_run(tmp_path / "single.h5")
    expect_equal(run, single)


def test_recordings_are_resumed_by_other_numbers_of_ranks(two: Launch, four: Launch) -> None:
    launches = (four, two, two)
    did = [launch.of(name)[0] for launch, name in zip(launches, RESUMED, strict=True)]
    moves = {step: move for part in did for step, move in part.moves.items()}
    assert list(moves) == list(range(1, 19))
    sampled = (1, 2, 4, 6, 7, 8, 10, 12, 13, 14, 16, 18)
    path = two.folder / "first of three.h5"
    # The rule of the last part, SGD, has no decay; the first two are held against theirs.
    for part, first in zip(did, (1, 7, 13), strict=True):
        run = open_run(path)
        assert run.steps.tolist() == list(moves)
        for name in run.matrices:
            assert run.update_steps(name).tolist() == list(sampled)
            for step in range(first, first + 6):
                before, after = (weights[name] for weights in moves[step])
                update = after - (1 - part.decays.get(name, 0.0)) * before
                norms = run.neuron_norms(name)[step - 1]
                np.testing.assert_allclose(norms, np.linalg.norm(update, axis=1), 1e-4, 1e-6)
                if step in sampled:
                    np.testing.assert_allclose(run.update(name, step), update, 0, 1e-6)
    assert run.status == "finished"
    assert run.overlaps == 0
    assert [event.kind for event in run.events] == ["resumed", "resumed"]


def test_all_ranks_keep_to_the_budget_of_the_one_with_the_highest_cost(two: Launch) -> None:
    first, last = two.of("budget")
    assert first.every == last.every > EVERY
    run = open_run(two.folder / "budget.h5")
    told = [event for event in run.events if event.kind == "schedule"]
    assert told
    assert f"spectra every {first.every}, " in told[-1].text
    assert len({event.text for event in told}) == len(told)  # the first rank says it, once
    assert run.status == "finished"
    assert run.holes == []
    assert run.steps.tolist() == list(range(1, 31))
    recorded = np.isfinite(run.all_neuron_norms())
    assert (recorded.all(1) | ~recorded.any(1)).all()
    assert recorded[:2].all()
    for name in run.matrices:
        for norms, step in zip(run.neuron_norms(name), run.steps.tolist(), strict=True):
            if not recorded[step - 1].any():
                continue
            before, after = (weights[name] for weights in first.moves[step])
            update = after - (1 - first.decays[name]) * before
            np.testing.assert_allclose(norms, np.linalg.norm(update, axis=1), 1e-4, 1e-6)


def test_a_mesh_on_which_torch_deals_rows_otherwise_is_refused(two: Launch) -> None:
    # Its ranks do not ascend: FSDP2 deals rows by their order in the group, not in the mesh.
    for told in two.told:
        assert "AttachError: 0 is placed as" in str(told["backwards"])


# --- what is sent --------------------------------------------------------------------------------


def sent_a_step(launch: Launch, name: str) -> dict[int, int]:
    """Return the bytes that all ranks sent at each step."""
    sent = np.diff(np.array([did.sent for did in launch.of(name)]), axis=1, prepend=0)
    return dict(enumerate(sent.sum(0).tolist(), 1))


def expected_to_be_sent(run: Run, ranks: int, exchanged: int, turn: int) -> int:
    """Bytes of one exchange, by arithmetic: `exchanged` stages of every matrix go to its owner."""
    costs = {i: float(x.m * x.n * min(x.m, x.n)) for i, x in enumerate(run.table)}
    owners = deal(costs, [0.0] * ranks, turn)
    total = 48 * ranks * (ranks - 1)
    for i, matrix in enumerate(run.table):
        rows = [
            stop - start for start, stop in (row_range(matrix.m, ranks, r) for r in range(ranks))
        ]
        elsewhere = matrix.m - rows[owners[i]]
        total += exchanged * 4 * matrix.n * elsewhere + 8 * (ranks - 1)
    return total


def test_only_rows_that_the_owner_lacks_are_sent_and_only_at_sampled_steps(four: Launch) -> None:
    # Of a NorMuon, each owner has its matrices whole: nothing but the norms of weights is sent,
    # and with stages the gradient.
    exchanged = {"adamw": 2, "normuon": 1, "even": 2, "even normuon": 0}
    for name, stages in exchanged.items():
        run = open_run(four.folder / f"{name}.h5")
        sampled = run.spectrum_steps().tolist()
        for step, count in sent_a_step(four, name).items():
            if step not in sampled:
                assert count == 0, (name, step)
            elif name != "normuon":  # whose owners the optimizer chooses
                turn = sampled.index(step)
                assert count == expected_to_be_sent(run, 4, stages, turn), (name, step)
            else:
                most = sum(4 * x.n * x.m + 8 * 3 for x in run.table) + 48 * 12
                assert 48 * 12 < count < most


def test_of_replicas_each_records_a_share_and_only_a_word_is_sent(two: Launch) -> None:
    sampled = open_run(two.folder / "ddp.h5").spectrum_steps().tolist()
    sent = sent_a_step(two, "ddp")
    assert [step for step, count in sent.items() if count] == sampled
    assert {sent[step] for step in sampled} == {48 * 2}


# --- what is refused -----------------------------------------------------------------------------


def refused(folder: Path) -> dict[str, str]:
    """Try what cannot be recorded; return what it is told."""
    from torch.distributed.tensor import Shard, distribute_tensor

    places = Places()
    tried = {"columns": ("fsdp", [Shard(1)]), "shadow": ("fsdp", [Shard(0)])}
    if dist.get_world_size() == 4:
        tried["squares"] = ("hsdp", [Shard(0), Shard(1)])
        tried["rows twice"] = ("hsdp", [Shard(0), Shard(0)])
    told = {}
    for name, (layout, placements) in tried.items():
        mesh = places.meshes[layout]
        weight = nn.Parameter(distribute_tensor(torch.ones(8, 6), mesh, placements))
        optimizer = torch.optim.SGD([weight], 0.1)
        options = {"shadow": "adamw"} if name == "shadow" else {}
        try:
            attach(nn.ParameterDict({"w": weight}), optimizer, folder / f"{name}.h5", **options)
        except AttachError as error:
            told[name] = str(error)
        assert not list(folder.glob(f"{name}*"))
    return told


def test_other_ways_of_sharding_and_shadows_are_refused_in_one_line(
    two: Launch, four: Launch
) -> None:
    for launch, names in (
        (two, ["columns", "shadow"]),
        (four, ["columns", "squares", "rows twice"]),
    ):
        for told in launch.refused:
            for name in names:
                assert "\n" not in told[name]
                named = "shadow=" if name == "shadow" else "exclude='w'"
                assert named in told[name]
