"""integrations/trainer.py: no pickle is written or read, only whole checkpoints count, the loss is per target."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from bitloft.checkpoint import PICKLES, read_tensors, write_tensors
from bitloft.errors import BitloftError, CheckpointError
from bitloft.integrations import trainer as module
from bitloft.integrations.trainer import Progress, SafeTrainer, last_checkpoint, step_of


class Line(nn.Module):
    """y = a * x + b, of which b is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.5]))
        self.b = nn.Parameter(torch.tensor([1.0]), requires_grad=False)
        self.dropout = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a * self.dropout(x) + self.b
        return y


DATA = [{"x": float(i % 5), "labels": [0, i % 3, -100 if i % 2 else 1]} for i in range(12)]


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {"x": torch.tensor([r["x"] for r in rows]), "labels": torch.tensor([r["labels"] for r in rows])}


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """One loss for each label but the first of a row, as a causal model has it."""
    wanted = batch["labels"][:, 1:]
    found: Tensor = (model(batch["x"]).unsqueeze(1) - wanted).square()[wanted != -100]
    return found


def trainer(work: Path, model: nn.Module, *, told: Progress | None = None, **settings: Any) -> SafeTrainer:
    arguments = TrainingArguments(
        output_dir=str(work),
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        **{"per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 0.1, "logging_steps": 2} | settings,
    )
    callbacks = [] if told is None else [told]
    return SafeTrainer(
        losses=losses, model=model, args=arguments, train_dataset=DATA, data_collator=collate, callbacks=callbacks
    )


def test_checkpoint_holds_no_pickle_and_only_trainable_weights(tmp_path: Path) -> None:
    trainer(tmp_path, Line(), save_steps=3).train()
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint is not None
    assert step_of(checkpoint) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]  # the older one is gone
    assert not [path for path in tmp_path.rglob("*") if path.suffix in PICKLES]
    assert set(read_tensors(checkpoint / "adapter.safetensors")) == {"a"}
    assert {path.name for path in checkpoint.iterdir()} == {
        "adapter.safetensors", "optimizer.safetensors", "optimizer.json", "scheduler.json", "random-0.safetensors",
        "random-0.json", "trainer_state.json", "complete.json",
    }  # fmt: skip


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, moments, schedule, data order and dropout all go on where they were; torch.load is never called."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    monkeypatch.setattr(torch, "save", lambda *_, **__: pytest.fail("torch.save was called"))
    whole, told = Line(), Progress(None)
    trainer(tmp_path / "whole", whole, told=told, save_strategy="no").train()
    trainer(tmp_path / "parts", Line(), save_steps=4).train()
    (tmp_path / "parts" / "checkpoint-6").rename(tmp_path / "ignored")

    class StopAtFour(Progress):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            control.should_training_stop = state.global_step == 4

    trainer(tmp_path / "parts", Line(), told=StopAtFour(None), save_steps=4).train()
    checkpoint = last_checkpoint(tmp_path / "parts")
    assert checkpoint is not None
    assert step_of(checkpoint) == 4
    resumed, again = Line(), Progress(None)
    trainer(tmp_path / "parts", resumed, told=again, save_strategy="no").train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(resumed.a, whole.a)
    assert again.history == told.history
    assert (again.steps_here, told.steps_here) == (2, 6)


def test_random_states_come_back(tmp_path: Path) -> None:
    import random

    one = trainer(tmp_path, Line())
    one._save_rng_state(str(tmp_path))
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    one._load_rng_state(str(tmp_path))
    assert [random.random(), float(np.random.rand()), float(torch.rand(()))] == drawn


def test_half_written_checkpoint_is_passed_by(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, whole in ((9, True), (10, True), (11, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
        if whole:
            (folder / module.COMPLETE).write_text("{}", encoding="utf-8")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_checkpoint_of_another_adapter_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "adapter.safetensors", {"a": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="holds an adapter of another shape"):
        trainer(tmp_path, Line())._load_from_checkpoint(str(tmp_path))


def test_loss_of_a_step_does_not_depend_on_its_split(tmp_path: Path) -> None:
    """Rows have one or two targets: a mean of the batches' means would weigh them by their batch."""
    found = []
    for batch, accumulate in ((12, 1), (4, 3), (1, 12)):
        model, told = Line(), Progress(None)
        model.dropout.p = 0.0
        run = trainer(
            tmp_path, model, told=told, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
            max_steps=1, logging_steps=1, save_strategy="no",
        )  # fmt: skip
        run.train()
        found.append(told.history[0][1])
        with torch.no_grad():
            fresh = Line().eval()
            expected = float(losses(fresh, collate(DATA)).mean())
    assert found == pytest.approx([expected] * 3, rel=1e-5)


def test_nan_stops_the_run_with_a_sentence(tmp_path: Path) -> None:
    model = Line()
    model.b.data.fill_(float("nan"))
    with pytest.raises(BitloftError, match=r"the loss became nan at step 1; lower the learning rate \(now 0\.1\)"):
        trainer(tmp_path, model).train()


def test_progress_is_told_of_every_step(tmp_path: Path) -> None:
    said: list[tuple[int, int, str]] = []
    told = Progress(lambda *words: said.append(words))
    trainer(tmp_path, Line(), told=told, max_steps=5, save_strategy="no").train()
    assert [words[:2] for words in said] == [(n, 5) for n in range(1, 6)]
    assert said[0][2] == "loss -"
    assert said[-1][2] == f"loss {told.history[1][1]:.3f}"
    assert [entry[0] for entry in told.history] == [2, 4, 5]  # the last steps are logged too
    assert json.dumps(told.history)
