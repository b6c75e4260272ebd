"""The Hugging Face Trainer without pickles: resume state as safetensors and JSON, complete checkpoints only.

The Trainer writes optimizer, scheduler and random states with ``torch.save``, its arguments as ``training_args.bin``; a
pickle can run code when it is opened, also where ``weights_only`` is meant to prevent that (CVE-2025-32434,
CVE-2026-1839). Its hooks are replaced here, one for one; the loop itself stays the Trainer's. A checkpoint counts only
once ``complete.json`` lies in it, written last: a process killed in the middle leaves a folder that resuming passes by.
"""

import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from bitloft.checkpoint import read_json, read_tensors, write_json, write_tensors
from bitloft.errors import BitloftError, CheckpointError
from bitloft.integrations.distributed import like, processes, wait, whole
from bitloft.options import TrainOptions

COMPLETE = "complete.json"
SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
OPTIMIZER, SCHEDULER, RANDOM, ADAPTER = "optimizer", "scheduler.json", "random", "adapter.safetensors"
Loss = Callable[[Any, dict[str, Tensor]], Tensor]


class SafeTrainer(Trainer):
    """A Trainer that trains the parameters that require a gradient and saves only those.

    ``losses(model, batch)`` gives the loss of each target token, [targets]; their sum over an optimizer step is divided
    by its number of targets, however the step is split into batches.
    """

    def __init__(self, *, losses: Loss, shifted: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._losses = losses
        # a model that is shared out already (FSDP2) must not be wrapped; the Trainer has a word for such models
        self.is_distributed_loading_by_transformers = isinstance(self.model, FSDPModule)
        self.model._is_fsdp_managed_module = self.is_distributed_loading_by_transformers
        # count the targets of an optimizer step for us; ``shifted``: without each row's first label, which a causal
        # model does not predict
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = shifted

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Raises BitloftError where the loss is NaN or infinite: later steps would only spoil the weights."""
        losses = self._losses(model, inputs)
        loss = losses.sum() / (losses.numel() if num_items_in_batch is None else num_items_in_batch)
        if not math.isfinite(float(loss.detach())):
            raise BitloftError(
                f"the loss became {float(loss.detach())} at step {self.state.global_step + 1}; lower the learning rate "
                f"(now {self.args.learning_rate:g}) or train in float32. The last checkpoint stays in "
                f"{self.args.output_dir}."
            )
        return loss * self.accelerator.num_processes  # the count is of all processes, and their gradients are averaged

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Keep gradients of all but an optimizer step's last batch where they are (the Trainer asks for this)."""
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, but every process takes part: shared tensors are put together by all."""
        self._save(output_dir)

    def _trainable(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The trainable weights; no training_args.bin."""
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: whole(p) for name, p in self._trainable().items()}
        if self.args.should_save:
            write_tensors(directory / ADAPTER, tensors)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        stored, trainable = read_tensors(Path(resume_from_checkpoint) / ADAPTER), self._trainable()
        if {n: t.shape for n, t in stored.items()} != {n: p.shape for n, p in trainable.items()}:
            raise CheckpointError(f"{resume_from_checkpoint} holds an adapter of another shape; it cannot be resumed.")
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(like(stored[name], parameter))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        directory, state = Path(output_dir), self.optimizer.state_dict()
        # in one order everywhere: processes put shared tensors together side by side, and files are read in any order
        named = sorted((i, key) for i, held in state["state"].items() for key in held)
        tensors = {f"{i}.{key}": whole(state["state"][i][key]) for i, key in named}
        if not self.args.should_save:
            return
        write_tensors(directory / f"{OPTIMIZER}.safetensors", tensors)
        write_json(directory / f"{OPTIMIZER}.json", state["param_groups"])
        write_json(directory / SCHEDULER, self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        directory, state = Path(checkpoint), dict[int, dict[str, Tensor]]()
        for name, tensor in read_tensors(directory / f"{OPTIMIZER}.safetensors").items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        groups = read_json(directory / f"{OPTIMIZER}.json")
        for group, own in zip(groups, self.optimizer.param_groups, strict=True):
            for index, parameter in zip(group["params"], own["params"], strict=True):
                state[index] = {key: like(tensor, parameter) for key, tensor in state.get(index, {}).items()}
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.lr_scheduler.load_state_dict(read_json(directory / SCHEDULER))

    def _save_rng_state(self, output_dir: str) -> None:
        name, keys, *rest = np.random.get_state()
        tensors = {"cpu": torch.random.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
        tensors |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all() if _cuda() else [])}
        write_tensors(Path(output_dir) / f"{self._random}.safetensors", tensors)
        write_json(Path(output_dir) / f"{self._random}.json", {"python": random.getstate(), "numpy": [name, *rest]})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        tensors = read_tensors(Path(checkpoint) / f"{self._random}.safetensors")
        plain = read_json(Path(checkpoint) / f"{self._random}.json")
        version, internal, gauss = plain["python"]
        random.setstate((version, tuple(internal), gauss))
        name, *rest = plain["numpy"]
        np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *rest))
        torch.random.set_rng_state(tensors["cpu"])
        if _cuda():
            torch.cuda.set_rng_state_all([tensors[f"cuda{i}"] for i in range(torch.cuda.device_count())])

    def _save_scaler(self, output_dir: str) -> None:
        """Nothing: a gradient scaler exists for fp16 only, which bitloft does not train in."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing, as for ``_save_scaler``."""

    @property
    def _random(self) -> str:
        return f"{RANDOM}-{self.args.process_index}"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        wait()  # for the random states of the others
        if self.args.should_save:
            done = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            for file in done.iterdir():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
            write_json(done / COMPLETE, {"step": self.state.global_step})
            for older in set(done.parent.glob("checkpoint-*")) - {done}:  # only now: the newest is whole
                shutil.rmtree(older)
        wait()


def make_trainer(
    model: nn.Module,
    examples: Sequence[Any],
    collate: Callable[[Any], dict[str, Tensor]],
    losses: Loss,
    options: TrainOptions,
    *,
    bf16: bool,
    work: Path,
    shown: "Progress",
    shifted: bool = True,
    by_length: bool = False,
) -> SafeTrainer:
    """The Trainer for these options: AdamW, gradients clipped at norm 1; checkpoints go to ``work``.

    ``by_length`` batches examples (mappings with input_ids) of about one length: a third of the padding of short rows.
    """
    together = options.batch * processes()
    per_epoch = math.ceil(math.ceil(len(examples) / together) / options.accumulate)
    steps = options.steps or math.ceil(options.epochs * per_epoch)
    settings = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        max_steps=steps,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        lr_scheduler_type=SCHEDULERS[options.schedule],
        warmup_steps=int(options.warmup * steps),
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=options.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if options.save_every else "no",
        save_steps=options.save_every or 1,
        seed=options.seed,
        data_seed=options.seed,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        train_sampling_strategy="group_by_length" if by_length else "random",
        disable_tqdm=True,
        ddp_broadcast_buffers=False,
        ddp_find_unused_parameters=False,
        report_to="none",
    )
    trainer = SafeTrainer(
        losses=losses,
        shifted=shifted,
        model=model,
        args=settings,
        train_dataset=examples,
        data_collator=collate,
        callbacks=[shown],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _cuda() -> bool:
    return torch.cuda.is_available()


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint below ``directory``, or None."""
    found = [path.parent for path in directory.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


class Progress(TrainerCallback):
    """Calls ``tell(step, steps, text)`` after every step: the verb's caller draws, the Trainer's own bars stay off.

    ``history`` collects (step, loss, learning rate) of the logged steps, those before a resume included;
    ``steps_here`` counts the steps of this process.
    """

    def __init__(self, tell: Callable[[int, int, str], None] | None) -> None:
        self.tell = tell
        self.history: list[tuple[int, float, float]] = []
        self.steps_here = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.steps_here += 1
        if self.tell is not None:
            text = f"loss {self.history[-1][1]:.3f}" if self.history else "loss -"
            self.tell(state.global_step, state.max_steps, text)
        control.should_log |= state.global_step == state.max_steps  # the last few steps too

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logged = [entry for entry in state.log_history if "loss" in entry]
        self.history = [(e["step"], e["loss"], e["learning_rate"]) for e in logged]
