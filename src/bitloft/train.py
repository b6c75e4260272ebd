"""The train verb: an adapter for a packed base, trained by the Hugging Face Trainer, complete on disk or not there.

By default the base keeps its start frozen and a fresh adapter is trained on top; ``start="trainable"`` is LoftQ as
published: the start itself is trained, and its difference to the frozen start is what is saved. Either way the
adapter directory is PEFT's, relative to the base with its start.

Under torchrun or accelerate launch every process calls ``train``: each takes batches of its own, the first one writes,
and N processes with batch b compute what one does with N*b sequences a step (``integrations/distributed.py``).

Checkpoints live in ``OUT.work`` beside ``OUT`` until the run is complete, together with what the run was asked for: a
run is resumed with the same settings, base and data, or not at all.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from bitloft.checkpoint import read_json, sha256, write_json, writing
from bitloft.errors import CheckpointError
from bitloft.integrations import distributed
from bitloft.integrations.loading import load
from bitloft.integrations.peft import fresh_adapter, save_adapter, start_adapter
from bitloft.integrations.record import BaseRecord, base_record, load_tokenizer
from bitloft.integrations.trainer import Progress, SafeTrainer, last_checkpoint, make_trainer, step_of
from bitloft.options import TrainOptions
from bitloft.tasks.lm import Collator, DataReport, Example, check_length, encode_rows, target_losses
from bitloft.tasks.precision import Precision, choose_precision
from bitloft.tasks.rows import read_rows

REPORT = "train_report.json"
SETTINGS = "settings.json"
_RANK = 16
# settings that may change between a run and its continuation: they do not change what is computed
FREE = ("resume", "save_every", "log_every")


@dataclass(frozen=True)
class TrainReport:
    """What ``train`` did. ``history`` holds (step, loss, learning rate), each loss the mean since the entry before."""

    out: str
    base: str
    start: str
    rank: int
    scaling: float
    parameters: int
    data: DataReport
    steps: int
    epochs: float
    first_loss: float
    last_loss: float
    history: tuple[tuple[int, float, float], ...]
    dtype: str
    dtype_why: str
    resumed_from: int | None
    seconds: float
    seconds_per_step: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(
    base: str | Path,
    data: str | Path,
    out: str | Path,
    options: TrainOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    **settings: Any,
) -> TrainReport:
    """Train an adapter for the packed base directory ``base`` on ``data`` (.jsonl rows or .txt) into ``out``.

    Settings are the fields of TrainOptions. ``progress`` is called with (steps done, steps in all, text). Raises
    OptionError, DataError (file and line) and CheckpointError before anything is trained; BitloftError where the loss
    is not finite. In a launcher's process all of them return the report, and the first one writes.
    """
    options, out = options or TrainOptions(**settings), Path(out)
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists already; remove it or choose another place.")
    distributed.join()
    record, rows, tokenizer = base_record(base), read_rows(data), load_tokenizer(base)
    examples, cut = encode_rows(rows, tokenizer, options.length)
    # on the CPU, codes in the stored order: the Trainer moves it to the device of its process, and may shard it
    model = load(base, start=options.start, arrange=False)
    check_length(options.length, model.config)
    precision = choose_precision(options.dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    adapted, work = adapted_by(model, options), out.with_name(out.name + ".work")
    wanted = _identity(options, record, Path(data), precision)
    with distributed.first_alone() as first:
        resumed = _settle(work, wanted, resume=options.resume, overwrite=overwrite) if first else None
    resumed = resumed if first else last_checkpoint(work)
    _distribute(adapted, options)
    shown = Progress(progress if first else None)
    trainer = _trainer(adapted, examples, Collator.for_tokenizer(tokenizer), options, precision, work, shown)
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    seconds = time.perf_counter() - began
    distributed.gather(adapted)
    with distributed.first_alone(), _output(out, overwrite=overwrite) as directory:
        made = {"base": record.fingerprint, "source": record.source, "start": options.start}
        config = save_adapter(adapted, directory, base=str(base), record=made)
        shape = (config.r, config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r))
        count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        ran = _ran(trainer, shown, resumed, seconds)
        report = TrainReport(
            str(out), str(base), options.start, *shape, count, cut, dtype=precision.name, dtype_why=precision.why, **ran
        )
        write_json(directory / REPORT, report.to_dict())
    if first:
        shutil.rmtree(work)
    return report


def _ran(trainer: SafeTrainer, shown: Progress, resumed: Path | None, seconds: float) -> dict[str, Any]:
    """What the report says of the run itself."""
    return {
        "steps": trainer.state.global_step,
        "epochs": float(trainer.state.epoch or 0.0),
        "first_loss": shown.history[0][1],
        "last_loss": shown.history[-1][1],
        "history": tuple(shown.history),
        "resumed_from": None if resumed is None else step_of(resumed),
        "seconds": seconds,
        "seconds_per_step": seconds / max(shown.steps_here, 1),
    }


@contextmanager
def _output(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Where the adapter is written; in the other processes of a launcher a place that is thrown away."""
    if distributed.is_first():
        with writing(out, overwrite=overwrite) as directory:
            yield directory
    else:
        with TemporaryDirectory() as place:
            yield Path(place)


def _distribute(adapted: PeftModel, options: TrainOptions) -> None:
    """Prepare a model for the processes that train it."""
    if options.shard:
        distributed.shard(adapted)
    elif distributed.processes() > 1:
        distributed.leave_out_packed(adapted)


def adapted_by(model: PreTrainedModel, options: TrainOptions, targets: Sequence[str] = ()) -> PeftModel:
    """The model with the adapter to train: its own start, or a fresh one over ``options.target`` (else ``targets``)."""
    if options.start == "trainable":
        return start_adapter(model, dropout=options.dropout)
    rank = options.rank or _RANK
    return fresh_adapter(
        model,
        rank=rank,
        alpha=options.alpha or rank,
        rslora=options.rslora,
        dropout=options.dropout,
        targets=options.target or tuple(targets),
        seed=options.seed,
    )


def _identity(options: TrainOptions, record: BaseRecord, data: Path, precision: Precision) -> dict[str, Any]:
    """Everything that decides what is computed: a continued run must agree in it."""
    asked = {key: value for key, value in asdict(options).items() if key not in FREE}
    return asked | {
        "target": list(options.target),
        "dtype": precision.name,
        "base": record.fingerprint,
        "data": sha256(data),
        "processes": distributed.processes(),
    }


def _settle(work: Path, wanted: dict[str, Any], *, resume: bool, overwrite: bool) -> Path | None:
    """Make the work directory, or take over an interrupted one; the checkpoint to go on from, if there is one.

    A run that stopped before its first checkpoint leaves nothing worth keeping and is begun anew. Raises
    CheckpointError where a run can be resumed and nothing says so, and where it had other settings, base or data.
    """
    checkpoint = last_checkpoint(work)
    if checkpoint and not resume and not overwrite:
        raise CheckpointError(f"{work} holds an interrupted run; resume it, or remove the directory to begin anew.")
    if checkpoint and resume:
        found = read_json(work / SETTINGS)
        for key, value in wanted.items():
            if found.get(key) != value:
                raise CheckpointError(
                    f"the interrupted run in {work} had {key} {found.get(key)!r}, now it is {value!r}; resume with the "
                    "same settings, or remove the directory to begin anew."
                )
        return checkpoint
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_json(work / SETTINGS, wanted)
    return None


def _trainer(
    model: PeftModel,
    examples: list[Example],
    collate: Collator,
    options: TrainOptions,
    precision: Precision,
    work: Path,
    shown: Progress,
) -> SafeTrainer:
    bf16 = precision.dtype == torch.bfloat16
    return make_trainer(model, examples, collate, _losses, options, bf16=bf16, work=work, shown=shown)


def _losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return target_losses(model, batch)[0]
