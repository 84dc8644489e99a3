"""``normuon-lens run``: the script notices nothing, and every matrix optimizer is recorded."""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normuon_lens.cli.main import main
from normuon_lens.hooks import attach
from normuon_lens.hooks.automatic import AutomaticRecorder
from normuon_lens.hooks.command import SHADOWS
from normuon_lens.hooks.discovery import discover
from normuon_lens.hooks.script import run_as_main
from normuon_lens.hooks.shadow import RULES, shadow_path
from normuon_lens.optim import NorMuon, split_parameters
from normuon_lens.runfile import made_up_run, open_run
from normuon_lens.runfile.schema import parts_of

pytestmark = pytest.mark.usefixtures("forked_helpers")

RUN = [sys.executable, "-m", "normuon_lens.cli.main", "run"]
OURS = ("normuon-lens: ", "  look at it:")


# -- what is discovered, in this process -----------------------------------------------------


class Net(nn.Module):
    def __init__(self, inner: int = 12) -> None:
        super().__init__()
        self.up = nn.Linear(8, inner)
        self.down = nn.Linear(inner, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


@contextmanager
def automatic(path: Path, **options: Any) -> Iterator[AutomaticRecorder]:
    recorder = AutomaticRecorder(path, options)
    recorder.start()
    try:
        yield recorder
    finally:
        recorder.finish()


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    model(torch.ones(4, 8)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), 1e-2)


def test_optimizers_of_one_model_are_one_recording_from_the_first_step(tmp_path: Path) -> None:
    def train() -> Net:
        torch.manual_seed(0)
        model = Net()
        matrices, others = split_parameters(model)
        optimizers = NorMuon(matrices, lr=1e-2), torch.optim.AdamW(others, 1e-2)
        for _ in range(3):
            step(model, *optimizers)
        return model

    plain = train()
    with automatic(tmp_path / "x.h5", every=2, name="mine"):
        recorded = train()
    assert all(map(torch.equal, plain.parameters(), recorded.parameters()))
    run = open_run(tmp_path / "x.h5")
    assert run.steps.tolist() == [1, 2, 3]
    assert run.matrices == ["up", "down"]
    assert (run.optimizer, run.name, run.status) == ("NorMuon", "mine", "finished")
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"]


def test_a_second_model_is_a_further_recording(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up_run(tmp_path / "x-2.h5")
    generator, critic = Net(10), Net(14)
    theirs, its = adamw(generator), adamw(critic)
    with automatic(tmp_path / "x.h5"):
        for _ in range(2):
            step(critic, its)
            step(critic, its)
            step(generator, theirs)
    first, second = open_run(tmp_path / "x.h5"), open_run(tmp_path / "x-3.h5")
    assert [first.table[0].m, second.table[0].m] == [14, 10]
    assert [first.steps.tolist(), second.steps.tolist()] == [[1, 2, 3, 4], [1, 2]]
    assert sum("recording 2 matrices" in s for s in capsys.readouterr().err.splitlines()) == 2


def test_resumed_recordings_go_on_model_by_model(tmp_path: Path) -> None:
    for _ in range(2):
        models = Net(10), Net(14)
        with automatic(tmp_path / "x.h5", resume=True):
            for model in models:
                step(model, torch.optim.SGD(model.parameters(), 1e-2))
    assert {path.name for path in tmp_path.iterdir()} == {"x.h5", "x-2.h5"}
    assert open_run(tmp_path / "x.h5").steps.tolist() == [1, 2]
    assert open_run(tmp_path / "x-2.h5").steps.tolist() == [1, 2]


def test_a_replaced_optimizer_ends_one_recording_and_begins_another(tmp_path: Path) -> None:
    model = Net()
    old = adamw(model)
    with automatic(tmp_path / "x.h5"):
        step(model, old)
        new = torch.optim.SGD(model.parameters(), 1e-2)
        step(model, new)
        first = open_run(tmp_path / "x.h5")
        assert (first.steps.tolist(), first.status) == ([1], "finished")
        step(model, new)
    run = open_run(tmp_path / "x-2.h5")
    assert (run.optimizer, run.steps.tolist()) == ("SGD", [1, 2])


def test_models_that_are_trained_one_after_another_are_let_go(tmp_path: Path) -> None:
    gone: list[Callable[[], object]] = []
    with automatic(tmp_path / "x.h5", quiet=True):
        for _ in range(3):
            model = Net()
            optimizer = adamw(model)
            step(model, optimizer)
            gone += [weakref.ref(model), weakref.ref(optimizer), weakref.ref(model.up.weight)]
            del model, optimizer
        gc.collect()
        assert [each() is None for each in gone[:6]] == [True] * 6, "all but the last, just trained"
    assert {path.name for path in tmp_path.iterdir()} == {"x.h5", "x-2.h5", "x-3.h5"}


class Container(torch.optim.Optimizer):
    """Steps two others, and is an optimizer with hooks itself."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([p for o in optimizers for g in o.param_groups for p in g["params"]], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()


def test_what_a_container_holds_is_recorded_once(tmp_path: Path) -> None:
    model = Net()
    container = Container(adamw(model.up), torch.optim.SGD(model.down.parameters(), 1e-2))
    with automatic(tmp_path / "x.h5"):
        step(model, container)
        step(model, container)
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"]
    run = open_run(tmp_path / "x.h5")
    assert (run.steps.tolist(), run.matrices) == ([1, 2], ["up", "down"])
    assert {group["optimizer"] for group in run.metadata["groups"]} == {"AdamW", "SGD"}


class Task(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.teacher = Net()


class Outer(torch.optim.Optimizer):
    """Has a rule of its own around another optimizer's step."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {"lr": 0.5})
        self.inner = inner

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(group["lr"])


def test_a_step_inside_a_step_is_part_of_it(tmp_path: Path) -> None:
    model = Net()
    optimizer = Outer(torch.optim.SGD(model.parameters(), 1e-2))
    with automatic(tmp_path / "x.h5", every=1):
        before = model.up.weight.detach().clone()
        step(model, optimizer)
        after = model.up.weight.detach().clone()
        step(model, optimizer)
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"]
    run = open_run(tmp_path / "x.h5")
    assert (run.optimizer, run.steps.tolist()) == ("Outer", [1, 2])
    assert torch.allclose(torch.as_tensor(run.update("up", 1)), after - before)


def test_names_are_those_of_the_outermost_model_without_its_wrappers() -> None:
    task = Task()
    optimizer = adamw(task.net)
    found = discover(optimizer)
    assert found is not None
    assert found.model is task
    compiled: Any = torch.compile(task, backend="eager")
    wrapped = nn.DataParallel(compiled)
    found = discover(optimizer)
    assert found is not None
    assert found.model is task
    assert wrapped.module is not task


def test_of_several_outermost_modules_it_is_the_one_that_fits_best() -> None:
    task = Task()
    part, more = nn.Sequential(task.net.up), nn.ModuleList([task, Net()])
    more_of_it = nn.ModuleList([task.net, Net(), Net(), Net()])
    found = discover(adamw(task.net))
    assert found is not None
    assert found.model is more
    assert part[0] is more_of_it[0].up


def test_lingering_optimizers_of_the_same_parameters_are_left_out() -> None:
    model = Net()
    old, new = adamw(model.up), adamw(model.up)
    others = adamw(model.down), adamw(model.down)
    found = discover(new)
    assert found is not None
    first, second = found.optimizers
    assert first is new
    assert second in others
    assert old.param_groups[0]["params"] == new.param_groups[0]["params"]


def test_objects_that_load_when_asked_what_they_are_stay_asleep() -> None:
    class Lazy:
        asked = False

        def __getattribute__(self, name: str) -> Any:
            Lazy.asked = True
            return nn.Module if name == "__class__" else object.__getattribute__(self, name)

    proxy = Lazy()
    assert isinstance(proxy, nn.Module)
    assert Lazy.asked
    Lazy.asked = False
    model = Net()
    assert discover(adamw(model)) is not None
    assert not Lazy.asked


def no_step() -> None:
    adamw(Net())


def no_matrix() -> None:
    norm = nn.LayerNorm(8)
    step(norm, adamw(norm))


def no_module() -> None:
    loose = torch.ones(8, 8, requires_grad=True)
    loose.grad = torch.ones(8, 8)
    torch.optim.SGD([loose], 1e-2).step()


@pytest.mark.parametrize(
    ("train", "why"),
    [
        (no_step, "no optimizer took a step in this process"),
        (no_matrix, "AdamW trains no weight matrix of LayerNorm"),
        (no_module, "what SGD trains belongs to no torch.nn.Module"),
    ],
)
def test_why_nothing_was_recorded_is_said_at_the_end(
    train: Callable[[], None], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with automatic(tmp_path / "x.h5"):
        train()
        assert capsys.readouterr().err == ""
    said = capsys.readouterr().err
    assert said.startswith(f"normuon-lens: nothing was recorded: {why}")
    assert said.count("\n") == 1


def test_an_optimizer_without_matrices_beside_one_with_is_no_matter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    norm, model = nn.LayerNorm(8), Net()
    with automatic(tmp_path / "x.h5"):
        step(norm, adamw(norm))
        step(model, adamw(model))
    assert open_run(tmp_path / "x.h5").matrices == ["up", "down"]
    assert "nothing" not in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["pattern", "bug"])
def test_what_goes_wrong_is_one_line_and_training_goes_on(
    broken: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if broken == "bug":
        monkeypatch.setattr("normuon_lens.hooks.discovery.discover", lambda *_: 1 / 0)
    model = Net()
    optimizer = adamw(model)
    before = model.up.weight.detach().clone()
    with automatic(tmp_path / "x.h5", include="blocks.*"):
        step(model, optimizer)
        step(model, optimizer)
        said = capsys.readouterr().err
    assert said.startswith("normuon-lens: not recorded, training goes on: AdamW: ")
    assert ("ZeroDivisionError" if broken == "bug" else "include='blocks.*'") in said
    assert said.count("\n") == 1
    assert not torch.equal(before, model.up.weight)


def test_training_goes_on_when_nobody_can_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    model = Net()
    with open(writer, "w") as closed, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", closed)
        with automatic(tmp_path / "x.h5", include="blocks.*"):
            step(model, adamw(model))
        with suppress(BrokenPipeError):
            closed.close()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_compiled_step_is_one_graph_and_is_recorded(tmp_path: Path) -> None:
    from torch._dynamo.testing import CompileCounter

    model = Net()
    optimizer = adamw(model)
    counter = CompileCounter()
    compiled = torch.compile(optimizer.step, backend=counter)
    with automatic(tmp_path / "x.h5"):
        for _ in range(3):
            model(torch.ones(4, 8)).square().mean().backward()
            compiled()
    assert open_run(tmp_path / "x.h5").steps.tolist() == [1, 2, 3]
    assert counter.frame_count == 1


def test_threads_that_step_at_once_are_met_one_by_one(tmp_path: Path) -> None:
    models = [Net(), Net()]
    with automatic(tmp_path / "x.h5"):
        threads = [threading.Thread(target=step, args=(m, adamw(m))) for m in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {path.name for path in tmp_path.iterdir()} == {"x.h5", "x-2.h5"}


# -- what the verb refuses -------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    argv, path = list(sys.argv), list(sys.path)
    assert main(["run", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("normuon-lens: ")
    assert said.err.count("\n") == 1
    assert (sys.argv, sys.path) == (argv, path), "nothing ran"
    return said.err


def test_mistakes_are_refused_before_the_script_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("raise SystemError('it ran')")
    Path("train.sh").write_text("for i in 1 2; do echo $i; done")
    Path("data.bin").write_bytes(b"x = 1\0")
    Path("folder").mkdir()
    assert "no script absent.py" in refusal(capsys, "absent.py")
    assert "folder is a folder" in refusal(capsys, "folder")
    assert "train.sh is not a Python script" in refusal(capsys, "train.sh")
    assert "data.bin is not a Python script" in refusal(capsys, "data.bin")
    assert "no module named 'no_such.thing'" in refusal(capsys, "-m", "no_such.thing")
    assert "--evry" in refusal(capsys, "--evry", 5, "train.py")
    assert "--every" in refusal(capsys, "--every", 0, "train.py")
    assert "--budget" in refusal(capsys, "--budget", 0, "train.py")
    assert "'lion': expected adamw" in refusal(capsys, "--shadow", "muon,lion", "train.py")
    assert "cannot be written" in refusal(capsys, "-o", "train.py/x.h5", "train.py")
    assert not Path("runs").exists()


def test_a_recording_that_is_there_is_refused_before_the_script_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("raise SystemError('it ran')")
    made_up_run(Path("whole.h5"))
    parts_of(Path("interrupted.h5")).mkdir()
    made_up_run(shadow_path(Path("x.h5"), "muon"))
    assert "whole.h5: there is" in refusal(capsys, "-o", "whole.h5", "train.py")
    assert "--resume" in refusal(capsys, "-o", "interrupted.h5", "train.py")
    assert "x.shadow-muon.h5" in refusal(capsys, "-o", "x.h5", "--shadow", "muon", "train.py")
    assert tuple(RULES) == SHADOWS


# -- how the script fares, in a process of its own -------------------------------------------


def process(command: list[str], folder: Path, **environment: str) -> tuple[int, str, list[str]]:
    """Return the exit code, standard output, and standard error without our own lines."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment}
    )
    lines = done.stderr.splitlines(keepends=True)
    return done.returncode, done.stdout, [line for line in lines if not line.startswith(OURS)]


TRAIN = """
import atexit, hashlib, json, sys
from multiprocessing import get_context
from pathlib import Path

def square(x):
    return x * x

def train():
    import torch
    from sibling import Net
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(3):
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(weights).hexdigest()

if __name__ == "__main__":
    early = sorted({"numpy", "torch", "h5py"} & set(sys.modules))
    with get_context("spawn").Pool(1) as pool:
        squares = pool.map(square, [2, 3])
    main = sys.modules["__main__"]
    atexit.register(lambda: print(main is sys.modules["__main__"], main.square(4)))
    data = Path("data.txt").read_text()
    print(json.dumps([sys.argv, __file__, sys.path[0], __spec__, early, squares, data]))
    print(train())
    1 / 0
"""

SIBLING = """
from torch import nn
from torch.nn.functional import relu

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return self.down(relu(self.up(x)))
"""


def test_a_training_is_the_same_as_under_python(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/train.py").write_text(TRAIN)
    (tmp_path / "code/sibling.py").write_text(SIBLING)
    (tmp_path / "data.txt").write_text("42")
    script = ["code/train.py", "--every", "7", "-o", "mine.h5", "--help", "--", ""]
    plain = process([sys.executable, *script], tmp_path)
    recorded = process([*RUN, "--every", "2", *script], tmp_path)
    assert recorded == plain
    code, out, err = plain
    assert code == 1
    assert err[-1] == "ZeroDivisionError: division by zero\n"
    facts = json.loads(out.splitlines()[0])
    assert facts[0] == script, "all arguments reach the script"
    assert facts[4:] == [[], [4, 9], "42"]
    assert out.splitlines()[-1] == "True 16"
    run = open_run(tmp_path / "runs/train.h5")
    assert run.steps.tolist() == [1, 2, 3]
    assert run.matrices == ["up", "down"]
    assert run.status == "interrupted: ZeroDivisionError"
    assert run.metadata["schedule"]["every"] == 2


ENDINGS = {
    "end": "print('done')",
    "exit code": "import sys; sys.exit(3)",
    "exit text": "import sys; sys.exit('told')",
    "exit nothing": "import sys; sys.exit()",
    "ours": "from normuon_lens.errors import LensError\nraise LensError('the script has its own')",
    "nested": "try:\n    1 / 0\nexcept Exception as e:\n    raise KeyError('x') from e",
    "syntax": "print('x'\nx = ",
    "interrupt": "import atexit; atexit.register(print, 'exit'); raise KeyboardInterrupt",
    "terminate": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "hook": "import sys; sys.excepthook = lambda *e: print('hook', e[0]); raise ValueError",
    "bad hook": "import sys; sys.excepthook = None; import os; os._exit(4)",
    "thread": "import threading; threading.Timer(0.3, print, ['thread']).start()",
    "deep": "def f():\n    raise OSError(32, 'Broken pipe')\nf()",
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_a_script_ends_as_under_python(ending: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(ending)
    plain = process([sys.executable, "script.py"], tmp_path)
    assert process([*RUN, "script.py"], tmp_path) == plain


@pytest.mark.parametrize(
    ("ending", "told"),
    [
        ("", []),
        ("import sys; sys.exit(0)", []),
        ("import sys; sys.exit(3)", [SystemExit]),
        ("import sys\ntry: 1 / 0\nexcept ArithmeticError: sys.exit(1)", [ZeroDivisionError]),
        ("raise KeyError", [KeyError]),
    ],
)
def test_what_ended_a_script_is_told(
    ending: str, told: list[type], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "script.py").write_text(ending)
    for name in ("argv", "path", "excepthook", "last_type", "last_value", "last_traceback"):
        value = getattr(sys, name, None)
        monkeypatch.setattr(sys, name, value[:] if isinstance(value, list) else value, False)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    at_exit: list[tuple[Any, ...]] = []
    monkeypatch.setattr(atexit, "register", lambda *given: at_exit.append(given))
    errors: list[BaseException | None] = []

    def run() -> None:
        with suppress(SystemExit):
            run_as_main(str(tmp_path / "script.py"), [], errors.append)

    # A thread handles no exception at its start, as a process does not; this one may: tests that
    # raise at every opcode leave one behind.
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert [type(error) for error in errors] == told
    assert at_exit[1] == (errors.append, None)


def test_a_module_runs_as_under_python(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").touch()
    (tmp_path / "package/train.py").write_text(
        "import sys; print(sys.argv, __name__, __spec__.name, sys.path[0]); 1 / 0"
    )
    script = ["-m", "package.train", "--lr", "1"]
    plain = process([sys.executable, *script], tmp_path)
    recorded = process([*RUN, *script], tmp_path)
    assert recorded[:2] == plain[:2]
    ours = [line for line in plain[2] if "runpy" not in line]
    assert recorded[2] == ours, "the frames that ran it are not shown"


def test_other_ranks_only_run_the_script(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import os; print(os.environ['RANK'])")
    made_up_run(tmp_path / "x.h5")
    command = [*RUN, "-o", "x.h5", "script.py"]
    ranks = {"WORLD_SIZE": "2", "RANK": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **ranks}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


ENDLESS = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
{TRAIN.split("if __name__", maxsplit=1)[0].replace("range(3)", "iter(int, 1)")}
train()
"""


def wait_for(what: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def test_a_signal_ends_it_as_under_python_and_the_recording_is_whole(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(ENDLESS)
    (tmp_path / "sibling.py").write_text(SIBLING)
    signals = signal.SIGINT, signal.SIGTERM
    running = [
        subprocess.Popen(
            [*RUN, "-o", f"{number.name}.h5", "train.py"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in signals
    ]
    said = {}
    try:
        for number, each in zip(signals, running, strict=True):
            assert each.stderr is not None
            assert "recording 2 matrices" in each.stderr.readline()
            wait_for(lambda: len(open_run(tmp_path / f"{number.name}.h5").steps) > 0)  # noqa: B023
            each.send_signal(number)
            said[number] = each.communicate(timeout=60)[1]
            assert each.returncode == -number
    finally:
        for each in running:
            each.kill()
            each.communicate()
    assert "\nKeyboardInterrupt\n" in said[signal.SIGINT]
    assert "script.py" not in said[signal.SIGINT]
    assert said[signal.SIGTERM] == ""
    assert open_run(tmp_path / "SIGINT.h5").status == "interrupted: KeyboardInterrupt"
    wait_for(lambda: not parts_of(tmp_path / "SIGTERM.h5").exists())
    assert open_run(tmp_path / "SIGTERM.h5").status == "interrupted"


def test_attach_is_where_it_was() -> None:
    import normuon_lens.hooks as hooks

    assert hooks.attach is attach
    assert dir(hooks) == hooks.__all__ == ["Recorder", "attach"]
    with pytest.raises(AttributeError, match="has no attribute 'detach'"):
        _ = hooks.detach
