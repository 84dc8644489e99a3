"""The real Accelerate, Hugging Face `Trainer` and Lightning: recorded, and none the wiser."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

os.environ["HF_HUB_OFFLINE"] = "1"  # before Hugging Face's libraries read it

import accelerate
import lightning.pytorch
import pytorch_lightning
import transformers

from normuon_lens.errors import MissingExtra
from normuon_lens.hooks.automatic import AutomaticRecorder
from normuon_lens.hooks.lightning import LensCallback as LightningCallback
from normuon_lens.hooks.transformers import LensCallback as TransformersCallback
from normuon_lens.runfile import Run, open_run

STEPS = 3
BATCHES = 2 * STEPS
"""Every training here accumulates the gradients of two batches for a step."""

Train = Callable[..., nn.Module]

# Lightning asks torch in a way that torch deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.usefixtures("forked_helpers"),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def batches() -> DataLoader[Tensor]:
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(8, generator=generator) for _ in range(4 * BATCHES)]
    return DataLoader(data, batch_size=4)  # type: ignore[arg-type]


def error(model: nn.Module, x: Tensor) -> Tensor:
    difference: Tensor = model(x) - x
    return difference.square().mean()


def by_accelerate() -> nn.Module:
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = Net()
    model, optimizer, data = accelerator.prepare(
        net, torch.optim.AdamW(net.parameters(), 1e-2), batches()
    )
    for x in data:
        with accelerator.accumulate(model):
            accelerator.backward(error(model, x))
            optimizer.step()
            optimizer.zero_grad()
    return net


def by_trainer(*callbacks: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4 * BATCHES
    arguments = transformers.TrainingArguments(
        output_dir="unused",
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=data,
        callbacks=list(callbacks),
    )
    trainer.train()
    return model


def module_of(library: Any, rule: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW) -> Any:
    class Task(library.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss = error(self.net, batch)
            self.log("train/loss", loss)
            self.log("batch", float(index))
            if batch.isnan().any():
                raise ArithmeticError
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return rule(self.parameters(), lr=1e-2)

    torch.manual_seed(0)
    return Task()


def fit(
    module: Any,
    *callbacks: Any,
    library: Any = lightning.pytorch,
    data: DataLoader[Tensor] | None = None,
    steps: int = STEPS,
    checkpoint: Path | None = None,
) -> Any:
    trainer = library.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, data or batches(), ckpt_path=checkpoint)
    return trainer


def by_lightning(*callbacks: Any, library: Any = lightning.pytorch) -> nn.Module:
    module: nn.Module = module_of(library)
    fit(module, *callbacks, library=library)
    return module


def by_pytorch_lightning(*callbacks: Any) -> nn.Module:
    return by_lightning(*callbacks, library=pytorch_lightning)


def expect_the_training(run: Run, model: nn.Module) -> None:
    assert run.steps.tolist() == list(range(1, STEPS + 1)), "optimizer steps, not batches"
    matrices = [name for name, p in model.named_parameters() if p.ndim > 1]
    assert run.matrices == [name.removesuffix(".weight") for name in matrices]
    assert (run.optimizer, run.status) == ("AdamW", "finished")
    assert (run.all_neuron_norms()[0] > 0).any()
    if isinstance(model, transformers.GPT2LMHeadModel):
        # GPT-2's linear layers store (inputs, outputs); its neurons are outputs all the same.
        assert run.shape("transformer.h.0.attn.c_attn") == (48, 16)


def expect_equal(model: nn.Module, other: nn.Module) -> None:
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("train", [by_accelerate, by_trainer, by_lightning])
def test_without_a_change_to_the_code(train: Train, tmp_path: Path) -> None:
    plain = train()
    recorder = AutomaticRecorder(tmp_path / "x.h5", {"every": 2})
    recorder.start()
    model = train()
    recorder.finish()
    expect_equal(model, plain)
    expect_the_training(open_run(tmp_path / "x.h5"), model)
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"], "recorded once"


@pytest.mark.parametrize(
    ("train", "make"),
    [
        (by_trainer, TransformersCallback),
        (by_lightning, LightningCallback),
        (by_pytorch_lightning, LightningCallback),
    ],
)
def test_with_the_callback(train: Train, make: Any, tmp_path: Path) -> None:
    lens = make(tmp_path / "x.h5", every=2, name="mine", quiet=True)
    model = train(lens)
    assert not lens.recorder.active
    expect_equal(model, train())
    run = open_run(tmp_path / "x.h5")
    expect_the_training(run, model)
    assert run.name == "mine"
    if train is by_trainer:
        assert {"loss", "grad_norm", "learning_rate", "lr"} <= set(run.scalars)
        assert run.scalars["epoch"].tolist() == sorted(run.scalars["epoch"])
        assert (run.scalars["loss"] > 0).all()
        assert "train_runtime" not in run.scalars
    else:
        assert run.scalars["batch"].tolist() == [1, 3, 5], "of the batch that completed the step"
        assert (run.scalars["train/loss"] > 0).all()


def test_a_training_that_goes_on_is_recorded_under_its_own_steps(tmp_path: Path) -> None:
    # The state of SGD does not say how many steps it has taken; the trainer does.
    module = module_of(lightning.pytorch, torch.optim.SGD)
    lens = LightningCallback(tmp_path / "x.h5", quiet=True)
    checkpoint = tmp_path / "x.ckpt"
    fit(module, lens).save_checkpoint(checkpoint)
    other = LightningCallback(tmp_path / "other.h5", quiet=True)
    fit(module, lens, other, steps=STEPS + 2, checkpoint=checkpoint)
    assert open_run(tmp_path / "other.h5").steps.tolist() == [4, 5]
    assert open_run(tmp_path / "x.h5").steps.tolist() == [1, 2, 3, 4, 5], "appended"


def test_a_training_that_fails_is_interrupted(tmp_path: Path) -> None:
    lens = LightningCallback(tmp_path / "x.h5", quiet=True)
    data = [torch.randn(8) for _ in range(8)] + [torch.full((8,), torch.nan)] * 8
    with pytest.raises(ArithmeticError):
        fit(module_of(lightning.pytorch), lens, data=DataLoader(data, batch_size=4))  # type: ignore[arg-type]
    run = open_run(tmp_path / "x.h5")
    assert (run.steps.tolist(), run.status) == ([1], "interrupted: ArithmeticError")


def test_a_trainer_that_fails_leaves_the_next_one_free(tmp_path: Path) -> None:
    class Failing(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise ArithmeticError

    lens = TransformersCallback(tmp_path / "x.h5", quiet=True)
    with pytest.raises(ArithmeticError):
        by_trainer(lens, Failing())
    by_trainer(lens)
    run = open_run(tmp_path / "x.h5")
    assert run.steps.tolist() == [1, 2, 3]
    assert run.overlaps == 1, "its first step, taken once more"


@pytest.mark.parametrize("make", [TransformersCallback, LightningCallback])
def test_an_unknown_option_is_an_error_at_once(make: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="evry"):
        make(tmp_path / "x.h5", evry=2)


@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_a_library_that_is_missing_is_one_line(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"normuon_lens.hooks.{library}")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra, match=rf"pip install .normuon-lens\[{library}\]."):
        import_module(f"normuon_lens.hooks.{library}")
