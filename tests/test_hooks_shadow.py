"""A shadow is what its optimizer would have done on the same gradients, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from normuon_lens.analysis import compare
from normuon_lens.errors import AttachError
from normuon_lens.hooks import attach
from normuon_lens.optim import Muon, NorMuon
from normuon_lens.runfile import open_run
from normuon_lens.runfile.schema import parts_of

pytestmark = pytest.mark.usefixtures("forked_helpers")

LR = 1e-2
RULES = ("adamw", "muon", "normuon")
REAL: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "Muon": Muon,
    "NorMuon": NorMuon,
}


def new_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 12) -> list[Tensor]:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    gradients = []
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - x.roll(1, 1)).square().mean().backward()
        gradients.append(matrices(model)[0].grad.clone())  # type: ignore[union-attr]
        optimizer.step()
    return gradients


@pytest.mark.parametrize("name", REAL)
def test_the_shadow_of_the_same_rule_is_the_run_itself(name: str, tmp_path: Path) -> None:
    plain, model = new_model(), new_model()
    train(plain, REAL[name](matrices(plain), lr=LR))
    optimizer = REAL[name](matrices(model), lr=LR)
    with attach(model, optimizer, tmp_path / "x.h5", every=3, stages=True, shadow=RULES):
        train(model, optimizer)
    for expected, got in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(expected, got)
    real, shadow = open_run(tmp_path / "x.h5"), open_run(tmp_path / f"x.shadow-{name.lower()}.h5")
    assert shadow.name == f"{name} (shadow)"
    assert shadow.optimizer == name
    assert shadow.steps.tolist() == real.steps.tolist()
    assert shadow.spectrum_steps().tolist() == [1, 3, 6, 9, 12]
    for matrix in real.matrices:
        for stage in shadow.stages:
            norms = real.neuron_norms(matrix, stage)
            np.testing.assert_allclose(shadow.neuron_norms(matrix, stage), norms, rtol=2e-6)
        for step in (1, 6, 12):
            update = real.update(matrix, step)
            np.testing.assert_allclose(shadow.update(matrix, step), update, rtol=1e-5, atol=1e-9)
    expected_stages = {"AdamW": [], "Muon": ["momentum", "orthogonalized"]}
    between = expected_stages.get(name, ["momentum", "orthogonalized", "normalized"])
    assert shadow.stages == [*between, "update"]


def test_shadow_of_another_rule_follows_its_formula(tmp_path: Path) -> None:
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    hyper: dict[str, dict[str, Any]] = {"adamw": {"lr": 3e-3, "betas": (0.8, 0.9)}, "normuon": {}}
    with attach(model, optimizer, tmp_path / "x.h5", every=1, shadow=hyper):
        gradients = train(model, optimizer)
    adamw, normuon = (open_run(tmp_path / f"x.shadow-{rule}.h5") for rule in hyper)
    m = v = np.zeros((16, 8))
    for step, gradient in enumerate(gradients, start=1):
        g = gradient.double().numpy()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        expected = -3e-3 * (m / (1 - 0.8**step)) / (np.sqrt(v / (1 - 0.9**step)) + 1e-8)
        np.testing.assert_allclose(adamw.update("0", step), expected, rtol=1e-4, atol=1e-8)
        # Unless it was given a rate of its own, that of the training: RMS 0.2 times it.
        rms = np.sqrt((normuon.update("0", step).astype(float) ** 2).mean())
        assert rms == pytest.approx(0.2 * 0.5, rel=1e-5)
    np.testing.assert_array_equal(normuon.scalars["lr"], 0.5)
    # Of each its own: SGD keeps nothing.
    real = open_run(tmp_path / "x.h5")
    np.testing.assert_array_equal(real.scalars["optimizer_state_bytes"], 0)
    held = normuon.scalars["optimizer_state_bytes"]
    np.testing.assert_array_equal(held, 4 * sum(m * (n + 1) for m, n in ((16, 8), (8, 16))))
    assert adamw.metadata["groups"][0]["betas"] == [0.8, 0.9]
    assert adamw.metadata["shadow_of"] == "SGD"


def test_learning_rates_are_followed_group_by_group(tmp_path: Path) -> None:
    model = new_model()
    first, second = matrices(model)
    optimizer = torch.optim.SGD([{"params": [second], "lr": 0.1}, {"params": [first], "lr": 0.3}])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    x = torch.randn(4, 8)
    with attach(model, optimizer, tmp_path / "x.h5", every=1, shadow="normuon"):
        for _ in range(3):
            model(x).square().mean().backward()
            optimizer.step()
            schedule.step()
    run = open_run(tmp_path / "x.shadow-normuon.h5")
    for name, rate in {"0": 0.3, "2": 0.1}.items():
        for step in (1, 2, 3):
            rms = np.sqrt((run.update(name, step).astype(float) ** 2).mean())
            assert rms == pytest.approx(0.2 * rate * 0.5 ** (step - 1), rel=1e-5)


def test_momentum_lives_on_steps_that_are_not_recorded(tmp_path: Path) -> None:
    runs = {}
    for norms_every in (1, 6):
        model = new_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        path = tmp_path / f"{norms_every}.h5"
        with attach(model, optimizer, path, every=6, norms_every=norms_every, shadow="normuon"):
            train(model, optimizer)
        runs[norms_every] = open_run(tmp_path / f"{norms_every}.shadow-normuon.h5")
    for step in (6, 12):
        np.testing.assert_array_equal(runs[1].update("0", step), runs[6].update("0", step))


def test_closures_and_missing_gradients(tmp_path: Path) -> None:
    model = new_model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    x = torch.randn(8, 8)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with attach(model, optimizer, tmp_path / "x.h5", every=1, shadow="muon"):
        for _ in range(3):
            optimizer.step(closure)  # type: ignore[arg-type]
    run = open_run(tmp_path / "x.shadow-muon.h5")
    assert (run.neuron_norms("0") > 0).all()

    model = new_model()
    frozen = torch.optim.SGD(model.parameters(), 0.1)
    with attach(model, frozen, tmp_path / "y.h5", every=1, shadow="normuon"):
        model[0](x).square().mean().backward()
        frozen.step()
    run = open_run(tmp_path / "y.shadow-normuon.h5")
    assert (run.neuron_norms("0") > 0).all()
    np.testing.assert_array_equal(run.neuron_norms("2"), 0)


def test_shadows_can_be_compared_and_leave_global_hooks_alone(tmp_path: Path) -> None:
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    stepped: list[torch.optim.Optimizer] = []
    handle = register_optimizer_step_post_hook(
        lambda optimizer, args, kwargs: stepped.append(optimizer)
    )
    with attach(model, optimizer, tmp_path / "x.h5", every=2, shadow=RULES) as lens:
        train(model, optimizer)
    handle.remove()
    assert stepped == [optimizer] * 12
    assert "with 3 shadows" in lens.summary
    assert "x.shadow-muon.h5" in lens.summary
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == ["x.h5", *(f"x.shadow-{rule}.h5" for rule in RULES)]
    comparison = compare([open_run(path) for path in paths])
    assert [run.name for run in comparison.runs][1:] == [f"{name} (shadow)" for name in REAL]


def test_a_shadow_that_cannot_be_recorded_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.shadow-muon.h5").write_text("mine")
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    with pytest.raises(AttachError, match=r"x\.shadow-muon\.h5: exists already"):
        attach(model, optimizer, tmp_path / "x.h5", shadow=("adamw", "muon"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.shadow-muon.h5"]
    assert not parts_of(tmp_path / "x.h5").exists()


@pytest.mark.parametrize(
    ("shadow", "says"),
    [
        ("normoun", r"shadow='normoun': expected adamw, muon, normuon; did you mean 'normuon'\?"),
        ({"normuon": {"beta": 0.9}}, "shadow normuon: .*unexpected keyword argument 'beta'"),
        ({"normuon": {"betas": (2, 0)}}, "shadow normuon: betas must be"),
        ({"adamw": {"weight_decay": 0.1}}, "weight_decay is no part of an update"),
    ],
)
def test_bad_shadows_are_refused_in_one_line(shadow: Any, says: str, tmp_path: Path) -> None:
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    with pytest.raises(AttachError, match=says) as caught:
        attach(model, optimizer, tmp_path / "x.h5", shadow=shadow)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
