"""Wherever a training runs: notebooks, launchers, threads, scripts of all kinds, a GPU."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normuon_lens.hooks
from normuon_lens.hooks import attach
from normuon_lens.optim import NorMuon
from normuon_lens.runfile import Run, open_run, wire
from normuon_lens.runfile.schema import parts_of

LR, DECAY = 1e-2, 0.1
SECONDS = 120.0
"""A bound that only a hang reaches, also on a busy machine."""

SETUP = """
import os, sys
import torch
from torch import nn
from normuon_lens.hooks import attach

torch.set_num_threads(1)

def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))

def adamw(model):
    return torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)

def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]

def step(model, optimizer, x):
    optimizer.zero_grad()
    (model(x) - x.roll(1, 1)).square().mean().backward()
    optimizer.step()

def check_equal(plain, recorded):
    if not all(map(torch.equal, plain, recorded)):
        sys.exit("recorded training differs")
"""


def check(run: Run, kept: list[list[Tensor]], names: dict[str, int]) -> None:
    """Hold all recorded steps against the weights kept by hand; `names` says which is which."""
    assert run.steps.tolist() == list(range(1, len(kept)))
    assert run.matrices == list(names)
    assert run.dropped == 0
    assert run.damaged == []
    for name, place in names.items():
        norms = run.neuron_norms(name)
        for i, (before, after) in enumerate(itertools.pairwise(kept)):
            update = after[place].double() - (1 - LR * DECAY) * before[place].double()
            np.testing.assert_allclose(norms[i], update.norm(dim=1), rtol=3e-5, atol=1e-7)


def run_script(command: list[str], folder: Path, **options: Any) -> str:
    """Run a command in `folder` to its end and return what it printed; no child survives."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=SECONDS, **options)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{command} hangs:\n{out}\n{err}")
    assert process.returncode == 0, err
    return out


# -- interruptions -------------------------------------------------------------------------------


class Interruption:
    """Sends Ctrl-C at the n-th line that is run inside a hook."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.where = ""
        self.files = (str(Path(normuon_lens.hooks.__file__).parent), wire.__file__)

    def __enter__(self) -> Interruption:
        self.others = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.others)

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        inside: FrameType | None = frame
        while inside is not None and not inside.f_code.co_filename.startswith(self.files):
            inside = inside.f_back
        if inside is None:
            return self.trace if event == "call" else None
        self.left -= event == "line"
        if event == "line" and self.left == 0:
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            signal.raise_signal(signal.SIGINT)
        return self.trace


@pytest.fixture
def handlers() -> Iterator[list[Any]]:
    """Return the handlers of Ctrl-C and SIGTERM, the latter one of the user's own."""
    default = signal.signal(signal.SIGTERM, lambda *_: None)
    yield [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGTERM, default)


def test_interruption_at_every_line_of_the_hooks(handlers: list[Any], tmp_path: Path) -> None:
    """Each step is interrupted at another line: all are counted, none has wrong numbers."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 4))
    optimizer = torch.optim.AdamW([weight], LR, weight_decay=DECAY)
    model = nn.ParameterDict({"w": weight})
    lens = attach(model, optimizer, tmp_path / "x.h5", every=1, on_full="wait", quiet=True)
    generator = torch.Generator().manual_seed(1)
    kept = [weight.detach().clone()]
    interrupted = 0
    for line in itertools.count(1):
        weight.grad = torch.randn(weight.shape, generator=generator)
        with Interruption(line) as interruption:
            try:
                optimizer.step()
            except KeyboardInterrupt:
                interrupted += 1
        if int(optimizer.state[weight].get("step", 0)) == len(kept):
            kept.append(weight.detach().clone())
        assert lens.active, interruption.where
        now = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        assert now == handlers, interruption.where
        if interruption.left > 0:
            break
    lens.close()
    assert interrupted == line - 1 > 50
    assert lens.steps == len(kept) - 1
    run = open_run(tmp_path / "x.h5")
    assert run.steps.tolist() == list(range(1, len(kept)))
    norms, sampled = run.neuron_norms("w"), run.spectrum_steps().tolist()
    whole = 0
    for step, (before, after) in enumerate(itertools.pairwise(kept), start=1):
        update = after.double() - (1 - LR * DECAY) * before.double()
        # A step may lack its numbers if its hook was interrupted before it could begin.
        if np.isfinite(norms[step - 1]).any() or step in sampled:
            whole += 1
            # The reference is a difference of float32 weights around 2.
            np.testing.assert_allclose(norms[step - 1], update.norm(dim=1), atol=1e-6)
            sigma = torch.linalg.svdvals(update)
            np.testing.assert_allclose(run.spectrum("w", step), sigma, atol=1e-6)
    assert whole > 0.7 * len(run.steps)


def test_notebook_that_is_interrupted(tmp_path: Path) -> None:
    """Cells of a real kernel; one is interrupted in the midst of its training, the next goes on."""
    pytest.importorskip("ipykernel")
    manager = pytest.importorskip("jupyter_client.manager")
    cells = [
        SETUP,
        """
        model, generator, paused = make_model(), torch.Generator().manual_seed(1), False
        optimizer = adamw(model)
        kept = [weights(model)]
        lens = attach(model, optimizer, "x.h5", every=5)

        def train(steps, pause_at=None):
            import time
            for i in range(steps):
                x = torch.randn(8, 6, generator=generator)
                if i == pause_at:
                    print("pausing", flush=True)
                    time.sleep(600)
                step(model, optimizer, x)
                kept.append(weights(model))
                lens.log(number=len(kept) - 1)
        """,
        "train(7)",
        "train(20, pause_at=6)",
        "lens",
        "train(6)",
        """
        lens.close()
        torch.save(kept, "kept.pt")
        """,
    ]
    kernel, client = manager.start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    replies = []

    def hear(message: dict[str, Any]) -> None:
        if "pausing" in message["content"].get("text", ""):
            kernel.interrupt_kernel()

    try:
        for cell in cells:
            reply = client.execute_interactive(
                textwrap.dedent(cell), timeout=SECONDS, output_hook=hear
            )
            replies.append(reply["content"].get("ename", reply["content"]["status"]))
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
        kernel.context.destroy()
    assert replies == ["ok", "ok", "ok", "KeyboardInterrupt", "ok", "ok", "ok"]
    kept = torch.load(tmp_path / "kept.pt")
    assert len(kept) - 1 == 7 + 6 + 6
    run = open_run(tmp_path / "x.h5")
    assert run.status == "finished"
    check(run, kept, {"0": 0, "2": 2})
    np.testing.assert_array_equal(run.scalars["number"], run.steps)


# -- launchers and scripts -----------------------------------------------------------------------

DISTRIBUTED = """
import datetime
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=100))
rank = dist.get_rank()

def trained(path, ranks):
    model = make_model()
    parallel = DistributedDataParallel(model)
    optimizer = adamw(model)
    generator = torch.Generator().manual_seed(rank)
    lens = attach(parallel, optimizer, path, every=2, stages=True) if rank in ranks else None
    kept = [weights(model)]
    for i in range(6):
        step(parallel, optimizer, torch.randn(8, 6, generator=generator))
        if lens:
            lens.log(loss=float(i))
        kept.append(weights(model))
    if lens:
        lens.flush()
        lens.close()
    return kept

plain = trained(None, ())
for path, ranks in (("both.h5", (0, 1)), ("first.h5", (0,))):
    for left, right in zip(plain, trained(path, ranks), strict=True):
        check_equal(left, right)
if rank == 0:
    torch.save(plain, "kept.pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_two_ranks_of_data_parallel_training(tmp_path: Path) -> None:
    """Attached on both ranks or on the first alone: one recording, equal weights, no deadlock."""
    (tmp_path / "train.py").write_text(SETUP + DISTRIBUTED)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    run_script(launcher, tmp_path)
    kept = torch.load(tmp_path / "kept.pt")
    recordings = [open_run(tmp_path / name) for name in ("both.h5", "first.h5")]
    for run in recordings:
        check(run, kept, {"0": 0, "2": 2})
        assert run.status == "finished"
        assert run.stages == ["gradient", "update"]
        np.testing.assert_array_equal(run.scalars["loss"], np.arange(6))
        assert run.metadata["world_size"] == 2
        assert not parts_of(run.path).exists()


WORKERS = """
from torch.utils.data import DataLoader, TensorDataset

def trained(path):
    model = make_model()
    optimizer = adamw(model)
    lens = attach(model, optimizer, path, every=2) if path else None
    data = TensorDataset(torch.randn(48, 6, generator=torch.Generator().manual_seed(1)))
    workers = {"num_workers": 1, "multiprocessing_context": CONTEXT} if path else {}
    loader = DataLoader(data, 8, **workers)
    kept = [weights(model)]
    for (x,) in loader:
        step(model, optimizer, x)
        kept.append(weights(model))
    if lens:
        print(lens._feed.pid)
        lens.close()
    return kept

plain, recorded = trained(None), trained("x.h5")
for left, right in zip(plain, recorded, strict=True):
    check_equal(left, right)
torch.save(plain, "kept.pt")
"""


@pytest.mark.parametrize(
    ("way", "context"),
    [("isolated and optimized", "fork"), ("standard input", "fork"), ("-c", "spawn")],
)
def test_script_without_a_main_guard(way: str, context: str, tmp_path: Path) -> None:
    script = SETUP + f"CONTEXT = {context!r}\n" + WORKERS
    if way == "standard input":
        said = run_script(["-"], tmp_path, input=script)
    elif way == "-c":  # from a file, Python itself asks for a guard before it spawns
        said = run_script(["-c", script], tmp_path)
    else:
        (tmp_path / "train.py").write_text(script)
        said = run_script(["-I", "-O", "train.py"], tmp_path)
    run = open_run(tmp_path / "x.h5")
    assert run.status == "finished"
    check(run, torch.load(tmp_path / "kept.pt"), {"0": 0, "2": 2})
    with pytest.raises(ProcessLookupError):
        os.kill(json.loads(said), 0)


@pytest.mark.parametrize("attach_in_thread", [False, True])
def test_training_in_a_thread(attach_in_thread: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 4))
    model = nn.ParameterDict({"w": weight})
    optimizer = torch.optim.AdamW([weight], LR, weight_decay=DECAY)
    kept = [[weight.detach().clone()]]
    made, failures = [], []

    def begin() -> None:
        made.append(attach(model, optimizer, tmp_path / "x.h5", every=2, quiet=True))

    def train() -> None:
        try:
            if attach_in_thread:
                begin()
            for step in range(5):
                weight.grad = torch.full_like(weight, float(step + 1)).cumsum(0)
                optimizer.step()
                kept.append([weight.detach().clone()])
                made[0].log(step=step + 1)
            if attach_in_thread:
                made[0].close()
        except BaseException as error:
            failures.append(error)

    if not attach_in_thread:
        begin()
    thread = threading.Thread(target=train)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert failures == []
    made[0].close()
    run = open_run(tmp_path / "x.h5")
    check(run, kept, {"w": 0})
    np.testing.assert_array_equal(run.scalars["step"], run.steps)


# -- a GPU ---------------------------------------------------------------------------------------


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    yield torch.device("cuda")
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["foreach", "fused", "capturable", "SGD", "NorMuon"])
def test_on_a_gpu(rule: str, dtype: torch.dtype, cuda: torch.device, tmp_path: Path) -> None:
    """CUDA is initialised before the helper process starts, and stays out of it."""

    def trained(path: Path | None) -> list[list[Tensor]]:
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(64, 32, generator=generator).to(cuda, dtype))
        optimizer: torch.optim.Optimizer
        if rule == "NorMuon":
            optimizer = NorMuon([weight], LR, weight_decay=DECAY)
        elif rule == "SGD":
            optimizer = torch.optim.SGD([weight], LR)
        else:
            flags: dict[str, Any] = {rule: True}
            optimizer = torch.optim.AdamW([weight], LR, weight_decay=DECAY, **flags)
        lens = None
        if path:
            model = nn.ParameterDict({"w": weight})
            lens = attach(model, optimizer, path, every=1, on_full="wait", stages=True, quiet=True)
        kept = [[weight.detach().cpu()]]
        for _ in range(6):
            weight.grad = torch.randn(weight.shape, generator=generator).to(cuda, dtype)
            optimizer.step()
            if lens:
                lens.log(loss=weight.detach().float().square().mean())
            kept.append([weight.detach().cpu()])
        if lens:
            lens.close()
        return kept

    plain, recorded = trained(None), trained(tmp_path / "x.h5")
    for left, right in zip(plain, recorded, strict=True):
        assert torch.equal(left[0], right[0])
    run = open_run(tmp_path / "x.h5")
    assert run.steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert np.isfinite(run.scalars["loss"]).all()
    if dtype == torch.float32:
        decay = 0.0 if rule == "SGD" else LR * DECAY
        for i, (before, after) in enumerate(itertools.pairwise(recorded)):
            update = after[0].double() - (1 - decay) * before[0].double()
            np.testing.assert_allclose(run.neuron_norms("w")[i], update.norm(dim=1), rtol=1e-4)
            np.testing.assert_allclose(run.update("w", i + 1), update, rtol=1e-3, atol=1e-6)
