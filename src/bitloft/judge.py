"""`eval --task`: the metrics of a task, each with its standard error, for a base or any model that ``eval`` opens."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bitloft.checkpoint import read_json
from bitloft.errors import CheckpointError, OptionError
from bitloft.integrations.opening import quantized_by
from bitloft.integrations.record import load_tokenizer
from bitloft.integrations.source import open_source
from bitloft.options import EvalOptions
from bitloft.tasks.catalog import find_task, form_of
from bitloft.tasks.lm import check_length
from bitloft.tasks.precision import choose_precision
from bitloft.tasks.sandbox import network_off
from bitloft.tasks.scores import Score
from bitloft.tasks.texts import TextTask
from bitloft.tune import open_for, with_adapter


@dataclass(frozen=True)
class JudgeReport:
    """What ``judge`` found. ``sandbox`` says how programs ran, for tasks that run them."""

    base: str
    adapter: str | None
    task: str
    scores: tuple[Score, ...]
    rows: int
    dtype: str
    seconds: float
    mismatch: str | None = None
    sandbox: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def value(self, name: str) -> float:
        """The value of a score. Raises OptionError where the task has no such metric."""
        found = {score.name: score.value for score in self.scores}
        if name not in found:
            raise OptionError(f"{self.task} has no metric {name!r}; it has {', '.join(found)}.")
        return found[name]


def judge(
    base: str | Path,
    task: str,
    data: str | Path | None = None,
    adapter: str | Path | None = None,
    options: EvalOptions | None = None,
    *,
    samples: int | None = None,
    beams: int = 1,
    generates: bool = True,
    allow_code_execution: bool = False,
    **settings: Any,
) -> JudgeReport:
    """Judge a model on the first ``limit`` test rows of ``task``. Settings are the fields of EvalOptions.

    ``data`` is a folder or file of the task's columns, None the hub; ``samples`` are answers to a row, for pass@k;
    ``generates`` off leaves a text task at its loss. Raises OptionError for a task that the model cannot do
    and for code without leave to run it, DataError where data is missing, AdapterError for an adapter of another base.
    """
    options = options or EvalOptions(**settings)
    began = time.perf_counter()
    wanted = find_task(task, _config(base))
    rows = wanted.rows(data, "test", options.limit)
    model: Any = open_for(base, wanted)
    check_length(options.length, model.config)
    tokenizer = _tokenizer(base)
    note = None
    form = form_of(
        wanted,
        model.config,
        tokenizer,
        length=options.length,
        generates=generates,
        beams=beams,
        limit=options.limit,
        samples=samples,
        allow_code=allow_code_execution,
    )
    if adapter is not None:
        model, note = with_adapter(model, Path(adapter), base, options.base_mismatch)
    precision = choose_precision(options.dtype, torch.device("cpu"))
    with precision.autocast(torch.device("cpu")):
        scores = tuple(form.judge(model, rows, options.batch))
    runs = isinstance(wanted, TextTask) and wanted.runs_code and generates
    return JudgeReport(
        base=str(base),
        adapter=None if adapter is None else str(adapter),
        task=task,
        scores=scores,
        rows=scores[-1].count,
        dtype=precision.name,
        seconds=time.perf_counter() - began,
        mismatch=note,
        sandbox=None if not runs else "network off" if network_off() else "network on: this kernel allows no namespace",
    )


def _config(base: str | Path) -> dict[str, Any]:
    file = Path(base) / "config.json"
    return dict(read_json(file)) if file.is_file() else {}


def _tokenizer(base: str | Path) -> Any:
    if quantized_by(Path(base)) == "bitloft":
        return load_tokenizer(base)
    found = open_source(str(base)).tokenizer
    if found is None:
        raise CheckpointError(f"{base} holds no tokenizer; text cannot be encoded.")
    return found
