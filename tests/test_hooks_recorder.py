"""The recorder says what happened, and changes nothing about it."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from normuon_lens.errors import AttachError
from normuon_lens.hooks import Recorder, attach
from normuon_lens.optim import Muon, NorMuon, split_parameters
from normuon_lens.runfile import Run, open_run
from normuon_lens.runfile.schema import parts_of

pytestmark = pytest.mark.usefixtures("forked_helpers")

Build = Callable[[nn.Module], list[torch.optim.Optimizer]]


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 8), nn.GELU(), nn.Linear(8, 12)]
    return nn.Sequential(*layers).to(dtype)


def train(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    steps: int,
    after_step: Callable[[int, Tensor], None] = lambda step, loss: None,
) -> None:
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    for step in range(1, steps + 1):
        x = torch.randn(16, 12, generator=generator).to(dtype)
        loss = (model(x) - x.roll(1, 1)).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        after_step(step, loss)


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]


def vectors(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim == 1]


OPTIMIZERS: dict[str, Build] = {
    "AdamW foreach": lambda m: [torch.optim.AdamW(m.parameters(), 1e-2, foreach=True)],
    "AdamW fused": lambda m: [torch.optim.AdamW(m.parameters(), 1e-2, fused=True)],
    "AdamW single": lambda m: [torch.optim.AdamW(m.parameters(), 1e-2, foreach=False)],
    "Adam with L2": lambda m: [torch.optim.Adam(m.parameters(), 1e-2, weight_decay=0.1)],
    "SGD": lambda m: [torch.optim.SGD(m.parameters(), 1e-2, momentum=0.9, nesterov=True)],
    "RMSprop": lambda m: [torch.optim.RMSprop(m.parameters(), 1e-3)],
    "torch Muon": lambda m: [
        torch.optim.Muon(matrices(m), 1e-2),
        torch.optim.AdamW(vectors(m), 1e-2),
    ],
    "our Muon": lambda m: [Muon(matrices(m), 1e-2), torch.optim.AdamW(vectors(m), 1e-2)],
    "our NorMuon": lambda m: [NorMuon(matrices(m), 1e-2), torch.optim.AdamW(vectors(m), 1e-2)],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_bitwise_equal_with_and_without(name: str, tmp_path: Path) -> None:
    plain, recorded = make_model(), make_model()
    train(plain, OPTIMIZERS[name](plain), 25)
    optimizers = OPTIMIZERS[name](recorded)
    with attach(recorded, optimizers, tmp_path / "x.h5", every=4) as lens:
        train(recorded, optimizers, 25, lambda step, loss: lens.log(loss=loss))
    for expected, got in zip(weights(plain), weights(recorded), strict=True):
        assert torch.equal(expected, got)
    run = open_run(tmp_path / "x.h5")
    assert run.steps.tolist() == list(range(1, 26))
    assert run.optimizer == type(optimizers[0]).__name__
    assert run.spectrum_steps().tolist() == [1, 4, 8, 12, 16, 20, 24]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bitwise_equal_in_every_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    plain, recorded = make_model(dtype=dtype), make_model(dtype=dtype)
    train(plain, [torch.optim.AdamW(plain.parameters(), 1e-2)], 8)
    optimizer = torch.optim.AdamW(recorded.parameters(), 1e-2)
    with attach(recorded, optimizer, tmp_path / "x.h5", every=2):
        train(recorded, [optimizer], 8)
    for expected, got in zip(weights(plain), weights(recorded), strict=True):
        assert torch.equal(expected, got)
    assert open_run(tmp_path / "x.h5").table[0].dtype == str(dtype).removeprefix("torch.")


REST_OF_TORCH = sorted(
    {
        cls
        for cls in vars(torch.optim).values()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    }
    - {torch.optim.Optimizer, torch.optim.SparseAdam, torch.optim.Muon},
    key=lambda cls: cls.__name__,
)
"""Every optimizer of torch that takes dense parameters of any shape."""


@pytest.mark.parametrize("cls", REST_OF_TORCH, ids=lambda cls: cls.__name__)
def test_bitwise_equal_under_every_optimizer_of_torch(
    cls: type[torch.optim.Optimizer], tmp_path: Path
) -> None:
    def run(record: bool) -> list[Tensor]:
        model = make_model()
        optimizer = cls(model.parameters(), lr=1e-3)  # type: ignore[call-arg]
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (model(x) - x.roll(1, 1)).square().mean()
            loss.backward()
            return loss

        recorder = attach(model, optimizer, tmp_path / "x.h5", every=2) if record else None
        for _ in range(5):
            optimizer.step(closure)  # type: ignore[arg-type]
        if recorder:
            recorder.close()
        return weights(model)

    for expected, got in zip(run(False), run(True), strict=True):
        assert torch.equal(expected, got)
    recorded = open_run(tmp_path / "x.h5")
    assert recorded.steps.tolist() == [1, 2, 3, 4, 5]
    assert recorded.optimizer == cls.__name__
    assert np.isfinite(recorded.all_neuron_norms()).all()
    assert recorded.neuron_norms("0").any()


def test_random_numbers_are_not_consumed(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    before = torch.get_rng_state()
    with attach(model, optimizer, tmp_path / "x.h5", every=1):
        train(model, [optimizer], 3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture
def adamw_run(tmp_path: Path) -> tuple[Run, dict[int, list[Tensor]], nn.Module]:
    """Return a recorded AdamW training and, per step, weights kept by hand."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    kept = {0: weights(model)}
    with attach(model, optimizer, tmp_path / "x.h5", every=5, name="mine", notes="a test") as lens:

        def after_step(step: int, loss: Tensor) -> None:
            kept[step] = weights(model)
            lens.log(loss=loss)

        train(model, [optimizer], 12, after_step)
    return open_run(tmp_path / "x.h5"), kept, model


def test_numbers_equal_those_taken_by_hand(
    adamw_run: tuple[Run, dict[int, list[Tensor]], nn.Module],
) -> None:
    run, kept, _ = adamw_run
    for i, name in zip((0, 2, 4), run.matrices, strict=True):
        norms = run.neuron_norms(name)
        for step in range(1, 13):
            before, after = kept[step - 1][i].double(), kept[step][i].double()
            # AdamW takes lr·wd·W off before it adds its update: that part is not the update.
            update = after - before + 1e-2 * 0.1 * before
            # W carries 24 bits and is ~10x as large as the update.
            np.testing.assert_allclose(norms[step - 1], update.norm(dim=1), rtol=2e-5)
            if step in (1, 5, 10):
                # The weights kept by hand were rounded twice, by the decay and by the update: half
                # a unit of W (3e-8) each. The recorded update was not.
                np.testing.assert_allclose(run.update(name, step), update, atol=3.1e-8)
                sigma = torch.linalg.svdvals(update)
                np.testing.assert_allclose(
                    run.spectrum(name, step), sigma, atol=1e-5 * float(sigma[0])
                )
                spectra = run.spectra(name)
                weight_norm = spectra.weight_norm[spectra.steps == step]
                np.testing.assert_allclose(weight_norm, before.norm(), rtol=1e-6)


def test_metadata_describes_the_training(
    adamw_run: tuple[Run, dict[int, list[Tensor]], nn.Module],
) -> None:
    run, _, model = adamw_run
    assert (run.name, run.optimizer, run.metadata["notes"]) == ("mine", "AdamW", "a test")
    assert run.metadata["groups"][0]["betas"] == [0.9, 0.999]
    assert run.metadata["groups"][0]["lr"] == 1e-2
    assert run.metadata["parameters"] == sum(p.numel() for p in model.parameters())
    assert run.metadata["versions"]["torch"] == torch.__version__
    np.testing.assert_array_equal(run.scalars["lr"], 1e-2)


def test_norms_rarely_and_matrices_never(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with attach(
        model, optimizer, tmp_path / "x.h5", norms_every=3, every=4, matrices_every=0
    ) as lens:
        train(model, [optimizer], 9, lambda step, loss: lens.log(loss=float(step)))
    run = open_run(tmp_path / "x.h5")
    taken = ~np.isnan(run.neuron_norms("0")[:, 0])
    assert run.steps[taken].tolist() == [1, 3, 4, 6, 8, 9]
    np.testing.assert_array_equal(run.scalars["loss"], np.arange(1, 10))
    assert run.spectrum_steps().tolist() == [1, 4, 8]
    assert len(run.update_steps("0")) == 0


def test_scalars_belong_to_their_step(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    running = torch.zeros(())

    def after_step(step: int, loss: Tensor) -> None:
        running.fill_(step)
        lens.log(step=running)  # changed in place before it is read
        if step == 2:
            lens.log(rare=7)
        if step == 3:
            lens.flush()
            assert open_run(tmp_path / "x.h5").steps.tolist() == [1, 2, 3]

    with attach(model, optimizer, tmp_path / "x.h5") as lens:
        lens.log(before=5.0)
        train(model, [optimizer], 4, after_step)
    run = open_run(tmp_path / "x.h5")
    np.testing.assert_array_equal(run.scalars["step"], [1, 2, 3, 4])
    np.testing.assert_array_equal(run.scalars["rare"], [np.nan, 7, np.nan, np.nan])
    np.testing.assert_array_equal(run.scalars["before"], [5, np.nan, np.nan, np.nan])


ADAMW_STATE = 4 * (2 * (24 * 12 + 8 * 24 + 12 * 8) + 3)
"""Bytes of two averages and a counter for each of three matrices; biases are not recorded."""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AdamW", ADAMW_STATE),
        ("SGD", 0),
        # Momentum in float32, and one number a neuron.
        ("NorMuon", 4 * (24 * (12 + 1) + 8 * (24 + 1) + 12 * (8 + 1))),
    ],
)
def test_state_and_overhead_are_told_on_sampled_steps(
    name: str, expected: int, tmp_path: Path
) -> None:
    model = make_model()
    rule = NorMuon if name == "NorMuon" else getattr(torch.optim, name)
    matrices = [p for p in model.parameters() if p.ndim == 2 or name != "NorMuon"]
    optimizer = rule(matrices, 1e-2)
    with attach(model, optimizer, tmp_path / "x.h5", every=4, matrices_every=0) as lens:
        train(model, [optimizer], 9)
    run = open_run(tmp_path / "x.h5")
    sampled = np.isin(run.steps, [1, 4, 8])
    held, overhead = run.scalars["optimizer_state_bytes"], run.scalars["recording_overhead"]
    np.testing.assert_array_equal(held[sampled], expected)
    assert np.isnan(held[~sampled]).all()
    assert np.isnan(overhead[~sampled]).all()
    assert (overhead[sampled][1:] > 0).all()
    assert np.isfinite(lens.overhead)


def test_what_a_user_logs_by_the_same_name_counts(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    own = {"lr": 3.0, "optimizer_state_bytes": 5.0, "recording_overhead": 7.0}
    with attach(model, optimizer, tmp_path / "x.h5", every=2) as lens:
        train(model, [optimizer], 4, lambda step, loss: lens.log(**own))
    run = open_run(tmp_path / "x.h5")
    for name, value in own.items():
        np.testing.assert_array_equal(run.scalars[name], value)


def test_a_state_of_another_kind_is_no_figure(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        """Keeps a list where others keep a mapping."""

        def step(self, closure: Any = None) -> None:
            super().step(closure)
            self.state = []  # type: ignore[assignment]

    model = make_model()
    optimizer = Odd(model.parameters(), 1e-2)
    with attach(model, optimizer, tmp_path / "x.h5", every=1, on_error="raise"):
        train(model, [optimizer], 3)
    run = open_run(tmp_path / "x.h5")
    assert run.steps.tolist() == [1, 2, 3]
    assert np.isnan(run.scalars["optimizer_state_bytes"]).all()


def test_void_and_non_finite_steps_are_marked(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    model = nn.ParameterDict({"w": weight})
    optimizer = torch.optim.SGD([weight], 1.0)
    with attach(model, optimizer, tmp_path / "x.h5", every=1):
        for gradient in (1.0, 0.0, float("nan")):
            weight.grad = torch.full((4, 3), gradient)
            optimizer.step()
    run = open_run(tmp_path / "x.h5")
    assert run.void.tolist() == [False, True, False]
    assert np.isnan(run.spectrum("w", 3)).all()
    np.testing.assert_array_equal(run.spectrum("w", 2), 0)
    assert np.isposinf(run.neuron_norms("w")[2]).all()


def test_convolution_counts_as_a_matrix(tmp_path: Path) -> None:
    conv = nn.Conv2d(3, 5, 2)
    optimizer = torch.optim.SGD(conv.parameters(), 0.1)
    with attach(conv, optimizer, tmp_path / "x.h5", every=1):
        conv(torch.randn(1, 3, 4, 4)).square().sum().backward()
        gradient = conv.weight.grad
        optimizer.step()
    assert gradient is not None
    run = open_run(tmp_path / "x.h5")
    assert run.shape("weight") == (5, 12)
    np.testing.assert_allclose(run.update("weight", 1), -0.1 * gradient.reshape(5, 12), atol=1e-6)


def test_neurons_of_a_transposed_convolution_are_its_outputs(tmp_path: Path) -> None:
    conv = nn.ConvTranspose2d(3, 5, 2)
    for build in (lambda p: torch.optim.SGD(p, 0.1), lambda p: NorMuon(p, 0.1)):
        optimizer = build([conv.weight])
        before = conv.weight.detach().clone()
        path = tmp_path / f"{type(optimizer).__name__}.h5"
        with attach(conv, optimizer, path, every=1, stages=True, shadow="normuon"):
            conv(torch.randn(1, 3, 4, 4)).square().sum().backward()
            optimizer.step()
        run = open_run(path)
        assert run.shape("weight") == (5, 12)
        expected = conv.weight.detach() - before
        if isinstance(optimizer, NorMuon):
            expected += 0.1 * 0.1 * before
        by_outputs = torch.stack([expected[:, out].flatten() for out in range(5)])
        np.testing.assert_allclose(run.update("weight", 1), by_outputs, atol=1e-6)
        np.testing.assert_allclose(run.neuron_norms("weight")[0], by_outputs.norm(dim=1), rtol=1e-4)
        shadow = open_run(path.with_stem(f"{path.stem}.shadow-normuon"))
        if isinstance(optimizer, NorMuon):
            np.testing.assert_allclose(shadow.update("weight", 1), by_outputs, atol=1e-6)


def test_resume_appends_and_counts_on(tmp_path: Path) -> None:
    for steps in (5, 7):
        model = make_model()
        optimizer = NorMuon(matrices(model), 1e-2)
        with attach(model, optimizer, tmp_path / "x.h5", every=2, resume=True):
            train(model, [optimizer], steps)
    run = open_run(tmp_path / "x.h5")
    assert run.steps.tolist() == list(range(1, 13))


def test_step_count_follows_a_loaded_optimizer(tmp_path: Path) -> None:
    model = make_model()
    first = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, [first], 30)
    second = torch.optim.AdamW(model.parameters(), 1e-2)
    second.load_state_dict(first.state_dict())
    with attach(model, second, tmp_path / "x.h5", every=10):
        train(model, [second], 3)
    run = open_run(tmp_path / "x.h5")
    assert run.steps.tolist() == [31, 32, 33]
    assert run.spectrum_steps().tolist() == [31], "the first step seen is always sampled"


def test_after_close_nothing_is_left_behind(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    lens = attach(model, optimizer, tmp_path / "my run.h5")
    pid = helper_pid(lens)
    train(model, [optimizer], 5)
    lens.close()
    lens.close()
    assert not is_running(pid)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    said = capfd.readouterr().err
    assert "recording 3 matrices (0, 2, 4) to" in said
    assert re.search(r"my run.h5: \d\.\d MB, 5 steps, overhead \d+", said)
    assert f"normuon-lens dashboard '{tmp_path}/my run.h5'" in said
    assert lens.overhead > 0
    assert not parts_of(tmp_path / "my run.h5").exists()
    train(model, [optimizer], 2)


def test_a_training_that_is_dropped_is_let_go_and_finished(tmp_path: Path) -> None:
    """Nobody closes it, as in a notebook that makes one model after the other."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    lens = attach(model, optimizer, tmp_path / "x.h5", stages=True, shadow="normuon")
    pid = helper_pid(lens)
    train(model, [optimizer], 4)
    gone = [weakref.ref(thing) for thing in (model[0].weight, optimizer, lens)]
    del model, optimizer, lens
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    wait_for(lambda: not is_running(pid))
    # The row of the last step was still waiting for what might be logged.
    run = open_run(tmp_path / "x.h5")
    assert (run.status, run.steps.tolist()) == ("finished", [1, 2, 3])


def test_exception_in_the_training_passes_and_is_noted(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)

    def fail_at_three(step: int, loss: Tensor) -> None:
        if step == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), attach(model, optimizer, tmp_path / "x.h5"):
        train(model, [optimizer], 5, fail_at_three)
    run = open_run(tmp_path / "x.h5")
    assert run.status == "interrupted: ZeroDivisionError"
    assert len(run.steps) == 3


def test_training_without_a_step_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with pytest.raises(ZeroDivisionError), attach(model, optimizer, tmp_path / "x.h5"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with attach(model, optimizer, tmp_path / "x.h5", shadow="muon") as lens:
        pass
    assert "no step was taken" in lens.summary
    assert list(tmp_path.iterdir()) == []
    with attach(model, optimizer, tmp_path / "x.h5"):
        train(model, [optimizer], 2)
    before = (tmp_path / "x.h5").read_bytes()
    with attach(model, optimizer, tmp_path / "x.h5", resume=True):
        pass
    assert (tmp_path / "x.h5").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"]


def test_exception_that_ends_the_script_is_noted(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from normuon_lens.hooks import attach\n"
        "model = torch.nn.Linear(4, 3)\n"
        "optimizer = torch.optim.SGD(model.parameters(), 0.1)\n"
        f"attach(model, optimizer, {str(tmp_path / 'x.h5')!r})\n"
        "model(torch.ones(1, 4)).sum().backward()\n"
        "optimizer.step()\n"
        "1 / 0\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError: division by zero" in done.stderr
    run = open_run(tmp_path / "x.h5")
    assert (run.status, run.steps.tolist()) == ("interrupted: ZeroDivisionError", [1])


def test_recording_ends_with_the_interpreter(tmp_path: Path) -> None:
    """No ``with``, no close(), no __main__ guard: the script just ends."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from normuon_lens.hooks import attach\n"
        "model = torch.nn.Linear(4, 3)\n"
        "optimizer = torch.optim.SGD(model.parameters(), 0.1)\n"
        f"attach(model, optimizer, {str(tmp_path / 'x.h5')!r})\n"
        "for _ in range(3):\n"
        "    model(torch.ones(1, 4)).sum().backward()\n"
        "    optimizer.step()\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert "3 steps" in done.stderr
    assert done.stdout == ""
    assert open_run(tmp_path / "x.h5").steps.tolist() == [1, 2, 3]


# -- failures ------------------------------------------------------------------------------------


def test_killed_helper_is_one_warning_and_training_goes_on(tmp_path: Path) -> None:
    plain, model = make_model(), make_model()
    train(plain, [torch.optim.AdamW(plain.parameters(), 1e-2)], 30)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    lens = attach(model, optimizer, tmp_path / "x.h5", every=1)

    def after_step(step: int, loss: Tensor) -> None:
        if step == 10:
            lens.flush()
            os.kill(helper_pid(lens), signal.SIGKILL)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, [optimizer], 30, after_step)
        lens.close()
    assert len(caught) == 1
    assert "training goes on" in str(caught[0].message)
    for expected, got in zip(weights(plain), weights(model), strict=True):
        assert torch.equal(expected, got)
    run = open_run(tmp_path / "x.h5")
    assert run.steps.tolist() == list(range(1, 11))
    assert run.status == "interrupted"


def test_error_in_a_hook_is_a_warning_or_raised(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    lens = attach(model, optimizer, tmp_path / "x.h5")
    lens.log(loss="high")  # type: ignore[arg-type]
    with pytest.warns(RuntimeWarning, match=r"stopped at step 1.*could not convert"):
        train(model, [optimizer], 3)
    strict = attach(model, optimizer, tmp_path / "y.h5", on_error="raise")
    strict.log(loss="high")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="could not convert"):
        train(model, [optimizer], 3)


def test_full_ring_drops_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normuon_lens.hooks.opening.RING_BYTES", (1 << 18, 1 << 18))
    model = nn.Linear(256, 256, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    lens = attach(model, optimizer, tmp_path / "x.h5", every=1)
    os.kill(helper_pid(lens), signal.SIGSTOP)
    began = time.monotonic()
    for _ in range(40):
        model(torch.ones(1, 256)).sum().backward()
        optimizer.step()
    assert time.monotonic() - began < 20, "a helper that stands still must not hold the training"
    assert lens.dropped > 0
    os.kill(helper_pid(lens), signal.SIGCONT)
    lens.close()
    run = open_run(tmp_path / "x.h5")
    assert run.dropped == lens.dropped
    assert 0 < len(run.spectrum_steps()) < 40
    assert "samples dropped" in lens.summary


def test_waiting_records_every_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normuon_lens.hooks.opening.RING_BYTES", (1 << 18, 1 << 18))
    model = nn.Linear(128, 128, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with attach(model, optimizer, tmp_path / "x.h5", every=1, on_full="wait") as lens:
        for _ in range(40):
            model(torch.ones(1, 128)).sum().backward()
            optimizer.step()
    assert lens.dropped == 0
    assert len(open_run(tmp_path / "x.h5").spectrum_steps()) == 40


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"include": "block.*"}, r"include='block\.\*' matches none of 3 matrices; the closest: 0"),
        ({"every": 0}, "every=0: expected a whole number from 1"),
        ({"matrices_every": -1}, "matrices_every=-1"),
        ({"on_full": "maybe"}, "expected one of drop, wait"),
        ({"path": "/proc/nowhere/x.h5"}, "cannot record there"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    tmp_path: Path, change: dict[str, object], says: str
) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    arguments = {"path": tmp_path / "x.h5", **change}
    with pytest.raises(AttachError, match=says) as caught:
        attach(model, optimizer, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not optimizer._optimizer_step_pre_hooks
    assert list(tmp_path.iterdir()) == []


def test_optimizer_without_matrices_is_refused(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(AttachError, match="SGD: trains 3 parameters, but no weight matrix"):
        attach(model, torch.optim.SGD(vectors(model), 1e-2), tmp_path / "x.h5")
    other = torch.optim.SGD(make_model().parameters(), 1e-2)
    with pytest.raises(AttachError, match="that belong together"):
        attach(model, other, tmp_path / "x.h5")


@pytest.mark.parametrize("given", [None, 0.1, [], ["AdamW"]])
def test_what_is_no_optimizer_is_refused(given: object, tmp_path: Path) -> None:
    with pytest.raises(AttachError, match=r"needs a torch\.optim\.Optimizer or a list"):
        attach(make_model(), given, tmp_path / "x.h5")  # type: ignore[arg-type]


def test_existing_recording_is_refused(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with attach(model, optimizer, tmp_path / "x.h5"):
        train(model, [optimizer], 2)
    with pytest.raises(AttachError, match="exists already"):
        attach(model, optimizer, tmp_path / "x.h5")
    assert len(open_run(tmp_path / "x.h5").steps) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    model = make_model()
    with pytest.raises(AttachError, match="Permission denied"):
        attach(model, torch.optim.SGD(model.parameters(), 1e-2), tmp_path / "x.h5")


def test_forked_child_leaves_the_recording_alone(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    lens = attach(model, optimizer, tmp_path / "x.h5")
    train(model, [optimizer], 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads
        child = os.fork()
    if child == 0:
        lens.log(loss=1.0)
        lens.close()
        os._exit(0 if not lens.active else 1)
    assert os.waitpid(child, 0)[1] == 0
    train(model, [optimizer], 2)
    lens.close()
    assert open_run(tmp_path / "x.h5").steps.tolist() == [1, 2, 3, 4]


def test_split_parameters_and_a_list_of_optimizers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(10, 12), make_model())
    main, others = split_parameters(model)
    optimizers = [NorMuon(main, 1e-2), torch.optim.AdamW(others, 1e-2)]
    with attach(model, optimizers, tmp_path / "x.h5"):
        for _ in range(3):
            model(torch.arange(4)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
    run = open_run(tmp_path / "x.h5")
    assert run.matrices == ["0", "1.0", "1.2", "1.4"]
    assert run.steps.tolist() == [1, 2, 3], "a step is one round of all optimizers"
    assert [matrix.group for matrix in run.table] == [1, 0, 0, 0]
    assert np.isfinite(run.all_neuron_norms()).all()


def helper_pid(lens: Recorder) -> int:
    assert lens._feed is not None
    return lens._feed.pid


def wait_for(what: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
