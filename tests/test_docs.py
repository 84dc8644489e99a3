"""Every example of the documentation runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normuon_lens.hooks import Recorder, attach
from normuon_lens.runfile import open_run

DOCS = Path(__file__).parents[1] / "docs"
FENCE = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)

OF_RANKS = "init_process_group"
"""What is in an example that is a script for `torchrun`."""

OF_SAMPLES = "sample_runs"
"""What is in an example that reads the recorded runs."""


def examples(language: str) -> list[Any]:
    """Return the fenced code of every page, named by the heading it stands under."""
    every = []
    for path in sorted(DOCS.glob("*.md")):
        heading = ""
        for part in re.split(r"^(#+ .*)$", path.read_text(), flags=re.MULTILINE):
            if part.startswith("#"):
                heading = part.lstrip("# ")
                continue
            for number, (found, code) in enumerate(FENCE.findall(part)):
                if found == language:
                    every.append(pytest.param(code, id=f"{path.stem}: {heading} {number}"))
    return every


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def beside_samples(code: str, in_tmp_path: Path) -> None:
    """Put a copy of the recorded runs where an example looks for them: it may write beside them."""
    if OF_SAMPLES in code:
        shutil.copytree(
            DOCS.parent / OF_SAMPLES,
            OF_SAMPLES,
            ignore=lambda _, names: [name for name in names if not name.endswith(".h5")],
        )


def block() -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("q", "k", "v")})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # a checkpoint of one process
@pytest.mark.parametrize(
    "code", [example for example in examples("python") if OF_RANKS not in example.values[0]]
)
@pytest.mark.usefixtures("beside_samples")
def test_python_examples_run(code: str) -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(block() for _ in range(2))
    model = nn.ModuleDict({"blocks": blocks, "norm": nn.LayerNorm(8)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train_step(batch: Tensor) -> Tensor:
        for layers in blocks:
            for layer in layers.values():  # type: ignore[operator]
                batch = batch + layer(batch).tanh()
        optimizer.zero_grad()
        loss = batch.square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    names: dict[str, Any] = {
        "attach": attach,
        "data": list(torch.randn(4, 16, 8)),
        "model": model,
        "optimizer": optimizer,
        "torch": torch,
        "train_step": train_step,
    }
    exec(code, names)
    if isinstance(lens := names.get("lens"), Recorder):
        lens.close()
    if "train_step" in code:
        run = open_run("runs/x.h5")
        assert len(run.steps) == 4
        assert run.status == "finished"


@pytest.mark.parametrize(
    "code", [example for example in examples("python") if OF_RANKS in example.values[0]]
)
def test_examples_for_many_ranks_run_on_two(code: str, in_tmp_path: Path) -> None:
    # without the interpreter's own end, during which a thread of gloo may abort (pytorch #179291)
    end = "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"
    (in_tmp_path / "train.py").write_text(code + end)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = os.environ | {"PYTHONWARNINGS": "error"}
    subprocess.run([*torchrun, "--nproc-per-node=2", "train.py"], check=True, env=environment)


@pytest.mark.parametrize("code", examples("sh"))
@pytest.mark.usefixtures("beside_samples")
def test_shell_examples_run(code: str, in_tmp_path: Path) -> None:
    (in_tmp_path / "train.py").write_text(
        "import sys, torch\n"
        "assert sys.argv[1:] == ['--lr', '0.02']\n"
        "model = torch.nn.Linear(4, 3)\n"
        "optimizer = torch.optim.SGD(model.parameters(), 0.02)\n"
        "for _ in range(3):\n"
        "    model(torch.ones(1, 4)).sum().backward()\n"
        "    optimizer.step()\n"
    )
    folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["sh", "-e", "-c", code], check=True, env=environment)
    if OF_SAMPLES not in code:
        assert open_run("runs/x.h5").steps.tolist() == [1, 2, 3]
