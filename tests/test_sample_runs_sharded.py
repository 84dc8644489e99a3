"""The demo and the sample script on several ranks: they train what one process would."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch.distributed.tensor import DTensor

from normuon_lens.cli.main import main
from normuon_lens.runfile import open_run
from normuon_lens.sample_runs.data import Batches, Text
from normuon_lens.sample_runs.model import Shape
from normuon_lens.sample_runs.training import BATCH, RECIPES, Training

STEPS = 20
WORLDS = (1, 2, 3, 4)  # three divide neither the batch nor the rows
SHAPE = Shape(context=32, width=20, heads=2, layers=1)
NAMES = ("adamw", "muon", "normuon")

# Gradients are added up in another order on other numbers of ranks, so they differ by float32's
# rounding, 6e-8 of them; over these steps it stays below 1e-6 of a loss. Shares of uneven size
# taken for even are off by 3e-4 in the first loss, by 1e-3 in later ones.
TOLERANCE = {"rtol": 1e-5, "atol": 0}


def train(text: Text) -> dict[str, Any]:
    """Train every recipe on what ranks there are; return what this rank sees of it."""
    seen: dict[str, Any] = {}
    for recipe in RECIPES:
        training = Training(recipe, STEPS, 0, SHAPE)
        for group in training.optimizers[0].param_groups:
            if "ns_dtype" in group:
                group["ns_dtype"] = torch.float32  # where bfloat16 is fast, it would be taken
        parameters = list(training.model.parameters())
        local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
        batches = Batches(text.train, BATCH, SHAPE.context, seed=0)
        validation = Batches(text.validation, 2 * BATCH, SHAPE.context, seed=0)
        seen[recipe.name] = {
            "rows": [len(p) for p in local],
            "weights": torch.cat([p.detach().flatten() for p in whole]),
            "losses": [training.step(*batches.next(), batches.weight) for _ in range(STEPS)],
            "validation": training.validate(*validation.next(), validation.weight),
            "next": batches.next()[0],
        }
    return seen


def call(arguments: list[str], rank: int, port: int) -> tuple[int, str, str]:
    """Call the command line as one of two that torchrun started; return code and what it said."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as left:
            code = int(left.code or 0)
    return code, out.getvalue(), err.getvalue()


def work(folder: str, refused: list[list[str]]) -> dict[Any, Any]:
    """Be one of up to four ranks, in smaller worlds one after another."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    text = Text(*torch.randint(64, (2, 5000), generator=generator).to(torch.uint8))
    found: dict[Any, Any] = {}
    for world in WORLDS:
        if rank < world:
            if world > 1:
                store = dist.FileStore(f"{folder}/store{world}", world)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
            found[world] = train(text)
            if world > 1:
                dist.destroy_process_group()
    if rank > 1:
        return found
    # Of two ranks alone: the second to let go of it removes the file.
    ports = dist.FileStore(f"{folder}/ports", 2)
    if rank == 0:
        servers = [
            dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) for _ in refused
        ]
        for i, server in enumerate(servers):
            ports.set(str(i), str(server.port))
    found["refused"] = [call(a, rank, int(ports.get(str(i)))) for i, a in enumerate(refused)]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "muon.h5").write_bytes(b"precious")
    (folder / "file").write_text("")
    refused = [
        ["demo", "--no-dashboard", "-o", str(folder)],
        ["demo", "--no-dashboard", "-o", str(folder / "file" / "x")],
        ["demo", "--steps", "0"],
    ]
    results = on_ranks(max(WORLDS), work, str(folder), refused)
    assert (folder / "muon.h5").read_bytes() == b"precious"
    assert not (folder / "adamw.h5.parts").exists()
    return results


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("world", WORLDS[1:])
def test_ranks_train_as_one_process_does(
    found: list[dict[Any, Any]], world: int, recipe: Any
) -> None:
    alone = found[0][1][recipe.name]
    shares = [found[rank][world][recipe.name] for rank in range(world)]
    for share in shares:
        assert torch.equal(share["weights"], alone["weights"]), "same seed, same weights"
        assert share["losses"] == shares[0]["losses"], "the loss is that of the whole batch"
        assert share["validation"] == shares[0]["validation"]
    assert torch.equal(torch.cat([share["next"] for share in shares]), alone["next"])
    rows = [sum(each) for each in zip(*(share["rows"] for share in shares), strict=True)]
    assert rows == alone["rows"]
    assert all(sum(share["rows"]) < sum(rows) for share in shares), "each holds a part"
    for key in ("losses", "validation"):
        torch.testing.assert_close(
            torch.tensor(shares[0][key]), torch.tensor(alone[key]), **TOLERANCE
        )


@pytest.mark.parametrize(
    ("i", "reason"), [(0, "muon.h5: exists already"), (1, "cannot record there"), (2, "--steps")]
)
def test_what_is_refused_is_told_once(found: list[dict[Any, Any]], i: int, reason: str) -> None:
    code, out, err = found[0]["refused"][i]
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert reason in err
    # With another code torchrun might kill the first before it has spoken.
    assert found[1]["refused"][i] == (0, "", "")


def torchrun(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*command, "--nproc-per-node=2", "-m", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "error"},
        **options,
    )


def test_demo_on_two_ranks_is_the_demo(tmp_path: Path) -> None:
    demo = torchrun("normuon_lens", "demo", "--steps", "12", "--no-dashboard", "-o", tmp_path)
    said, _ = demo.communicate(timeout=120)
    assert demo.returncode == 0, said
    assert said.count("Training one small GPT") == said.count("step 12/12") == 1, said
    assert said.count("Updates, steps 1–12") == said.count("blocks.*.mlp.up") == 1, said
    assert said.count("recording took") == 3
    for name in NAMES:
        run = open_run(tmp_path / f"{name}.h5")
        assert run.status == "finished"
        assert run.steps.tolist() == list(range(1, 13))
        assert run.spectrum_steps().tolist() == [1, 10]
        for matrix in run.matrices:
            norms = run.neuron_norms(matrix)
            assert np.isfinite(norms).all()
            whole = np.linalg.norm(run.update(matrix, 1), axis=1)
            np.testing.assert_allclose(norms[0], whole, rtol=1e-5)


def test_script_on_two_ranks_ends_with_ctrl_c(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    training = torchrun("normuon_lens.sample_runs.train", "--steps", "480", "-o", path)
    assert training.stdout
    assert any(line.startswith("step 40/480") for line in training.stdout)
    training.send_signal(signal.SIGINT)
    rest, _ = training.communicate(timeout=25)
    assert rest.count("interrupted") == 1, rest
    assert "[rank" not in rest, rest
    run = open_run(path)
    assert "interrupted: KeyboardInterrupt" in run.status
    assert len(run.steps) >= 40
