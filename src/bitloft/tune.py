"""`train --task`: an adapter for a packed base, trained on a task's own rows; and the model of a task, opened again.

A decoder's task becomes rows of prompt and completion (or a text) and goes through ``train``: checkpoints, resuming and
its report are the same. Encoders and encoder-decoders are trained here, by the same Trainer; their adapter directory
holds one file more, ``head.safetensors``, the trained task head, where the task has one. Such a run is short and is not
resumed.
"""

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from bitloft.adapters import is_packed, read_adapter, read_packed
from bitloft.checkpoint import read_tensors, write_json, write_tensors, writing
from bitloft.compress import expand
from bitloft.errors import AdapterError, CheckpointError, OptionError
from bitloft.integrations.loading import load, quiet_loading
from bitloft.integrations.mismatch import admitted
from bitloft.integrations.opening import open_model, quantized_by
from bitloft.integrations.peft import save_adapter
from bitloft.integrations.record import base_record, load_tokenizer
from bitloft.modules.linear import quant_linears
from bitloft.options import TrainOptions
from bitloft.regimes import fit, in_head, reset_head
from bitloft.tasks.catalog import Task, find_task, form_of, head_of
from bitloft.tasks.documents import DocumentTask
from bitloft.tasks.lm import check_length
from bitloft.tasks.texts import TextTask
from bitloft.train import TrainReport, adapted_by, train

HEAD, REPORT = "head.safetensors", "train_report.json"


@dataclass(frozen=True)
class TuneReport:
    """What ``tune`` did on an encoder or encoder-decoder; ``history`` as in TrainReport."""

    out: str
    base: str
    task: str
    start: str
    rank: int
    parameters: int
    head_parameters: int
    rows: int
    steps: int
    first_loss: float
    last_loss: float
    history: tuple[tuple[int, float, float], ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def tune(
    base: str | Path,
    task: str,
    out: str | Path,
    data: str | Path | None = None,
    options: TrainOptions | None = None,
    *,
    limit: int | None = None,
    overwrite: bool = False,
    progress: Any = None,
    **settings: Any,
) -> TrainReport | TuneReport:
    """Train an adapter for the packed base on the first ``limit`` training rows of ``task``, into ``out``.

    ``data`` is a folder or file of the task's columns, None the hub. Settings are the fields of TrainOptions. Raises
    OptionError for a task that the model cannot do, DataError in one sentence where data is missing, and what ``train``
    raises.
    """
    options, out = options or TrainOptions(**settings), Path(out)
    record = base_record(base)
    config = transformers.AutoConfig.from_pretrained(base)
    wanted = find_task(task, config.to_dict())
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists already; remove it or choose another place.")
    rows = wanted.rows(data, "train", limit)
    if isinstance(wanted, DocumentTask) or (isinstance(wanted, TextTask) and not config.is_encoder_decoder):
        with tempfile.TemporaryDirectory() as place:
            file = _as_rows(wanted, rows, Path(place) / task)
            return train(base, file, out, options, overwrite=overwrite, progress=progress)
    if options.resume:
        raise OptionError(f"a run on {task} is not resumed; leave resume out to begin anew.")
    began = time.perf_counter()
    model = open_for(base, wanted, start=options.start, seed=options.seed)
    check_length(options.length, model.config)
    form = form_of(wanted, model.config, load_tokenizer(base), length=options.length, generates=False)
    adapted: Any = adapted_by(model, options, tuple(quant_linears(model)))
    for name, parameter in adapted.named_parameters():
        if in_head(name):
            parameter.requires_grad_(True)
    history = fit(adapted, form, form.examples(rows), options, progress)
    made = {"base": record.fingerprint, "source": record.source, "start": options.start}
    facts = {"base": str(base), "task": task, "start": options.start, "rows": len(rows), "history": history}
    with writing(out, overwrite=overwrite) as directory:
        return _saved(adapted, directory, made, facts | {"out": str(out), "seconds": time.perf_counter() - began})


def _saved(adapted: Any, directory: Path, made: dict[str, Any], facts: dict[str, Any]) -> TuneReport:
    """Write adapter, head and report into ``directory``."""
    saved = save_adapter(adapted, directory, base=facts["base"], record=made)
    head = {_plain(name): p.detach().contiguous() for name, p in adapted.named_parameters() if in_head(name)}
    if head:
        write_tensors(directory / HEAD, head)
    history = facts["history"]
    report = TuneReport(
        rank=saved.r,
        parameters=sum(p.numel() for n, p in adapted.named_parameters() if p.requires_grad and not in_head(n)),
        head_parameters=sum(p.numel() for p in head.values()),
        steps=history[-1][0],
        first_loss=history[0][1],
        last_loss=history[-1][1],
        **facts,
    )
    write_json(directory / REPORT, report.to_dict())
    return report


def _as_rows(task: TextTask | DocumentTask, rows: list[dict[str, Any]], stem: Path) -> Path:
    """The rows as a file that ``train`` reads; its bytes depend on the rows alone, so a run can be resumed."""
    if isinstance(task, DocumentTask):
        file = stem.with_suffix(".txt")
        file.write_text("\n".join(row["text"] for row in rows), encoding="utf-8")
        return file
    file = stem.with_suffix(".jsonl")
    pairs = ({"prompt": task.prompt(row) + task.suffix, "completion": task.completion(row)} for row in rows)
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return file


def open_for(base: str | Path, task: Task, *, start: str = "frozen", seed: int = 0) -> PreTrainedModel:
    """The model in eval mode, with the head that the task wants; one that the files do not hold is drawn from ``seed``.

    Raises OptionError where the model has the head of another task (its number of outputs differs).
    """
    wanted = head_of(task)
    packed = quantized_by(Path(base)) == "bitloft"
    model = load(base, start=start, arrange=False) if packed else open_model(base).model
    if wanted is None:
        return model
    outputs = getattr(task, "outputs", 2)
    if wanted.removeprefix("AutoModelFor") in type(model).__name__:
        found = int(model.config.num_labels)
        if found != outputs:
            raise OptionError(
                f"{base} has a head of {found} outputs and {task.name} wants {outputs}; use another model."
            )
        return model
    return _headed(model, wanted, outputs, seed)


def _headed(model: PreTrainedModel, wanted: str, outputs: int, seed: int) -> PreTrainedModel:
    """The task's class around the model that is there: the body is moved over, only the head is new."""
    config = type(model.config).from_dict(model.config.to_dict() | {"num_labels": outputs})
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        del config.quantization_config  # the body is packed already
    with quiet_loading(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: PreTrainedModel = getattr(transformers, wanted).from_config(config)
    setattr(made, made.base_model_prefix, model.base_model)
    if quantization is not None:
        made.config.quantization_config = quantization
    made.name_or_path = model.name_or_path
    reset_head(made, seed)
    return made.eval()


def with_adapter(model: PreTrainedModel, adapter: Path, base: str | Path, asked: str | None) -> tuple[Any, str | None]:
    """The model with an adapter (plain or packed) and its head; what is to be told where it does not name this base.

    PEFT carries it, so that whatever calls the model (generation, lm-eval) needs to know nothing.
    """
    from peft import PeftModel

    found = read_packed(adapter) if is_packed(adapter) else read_adapter(adapter)
    note = admitted(found, base_record(base), asked) if quantized_by(Path(base)) == "bitloft" else None
    with tempfile.TemporaryDirectory() as place:
        plain = expand(adapter, Path(place) / "plain") if is_packed(adapter) else adapter
        adapted: Any = PeftModel.from_pretrained(model, str(plain))
    head = adapter / HEAD
    if head.exists():
        _put_head(model, read_tensors(head), adapter)
    return adapted.eval(), note


def _put_head(model: nn.Module, tensors: dict[str, Any], adapter: Path) -> None:
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in own or own[name].shape != tensor.shape:
                raise AdapterError(f"{adapter} holds a head ({name}) that this model does not have; use its own task.")
            own[name].copy_(tensor)


def _plain(name: str) -> str:
    """A parameter's name without what PEFT puts before it."""
    return name.removeprefix("base_model.model.")
