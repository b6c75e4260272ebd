"""Every task by name, what it looks like on each kind of model (its form), and the model class that it wants."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from bitloft.errors import OptionError
from bitloft.tasks import code, documents, glue, math, squad, summarization
from bitloft.tasks.documents import Documents, DocumentTask
from bitloft.tasks.glue import Classes, PairTask
from bitloft.tasks.scores import Score
from bitloft.tasks.sources import Row
from bitloft.tasks.squad import Spans, SpanTask
from bitloft.tasks.texts import Answers, Sequences, TextTask
from bitloft.tasks.words import word_task

Task = PairTask | SpanTask | TextTask | DocumentTask
TASKS: dict[str, Task] = {
    **documents.TASKS,
    **glue.TASKS,
    **squad.TASKS,
    **math.TASKS,
    **code.TASKS,
    **summarization.TASKS,
}


@runtime_checkable
class Form(Protocol):
    """A task on a kind of model: rows to examples to batches, losses [targets] of a batch, and figures of the rows.

    ``shifted``: a row's first label is not predicted (decoders)."""

    shifted: bool

    def examples(self, rows: Any) -> list[Any]: ...
    def collate(self, examples: Any) -> dict[str, Tensor]: ...
    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor: ...
    def judge(self, model: Any, rows: list[Row], batch: int) -> list[Score]: ...


def find_task(name: str, config: dict[str, Any] | None = None) -> Task:
    """The task of that name; ``g2p`` takes its symbols from the model's ``config``. Raises OptionError for another."""
    if name == "g2p":
        return word_task(config or {})
    if name not in TASKS:
        raise OptionError(f"unknown task {name!r}; use one of {', '.join(sorted([*TASKS, 'g2p']))}.")
    return TASKS[name]


def head_of(task: Task) -> str | None:
    """The transformers Auto class whose head the task needs; None for the model's own."""
    if isinstance(task, PairTask):
        return "AutoModelForSequenceClassification"
    return "AutoModelForQuestionAnswering" if isinstance(task, SpanTask) else None


def form_of(
    task: Task,
    config: Any,
    tokenizer: Any,
    *,
    length: int,
    generates: bool = True,
    beams: int = 1,
    limit: int | None = None,
    samples: int | None = None,
    allow_code: bool = False,
) -> Form:
    """The task on a model with this transformers ``config``. Raises OptionError where they do not go together."""
    if tokenizer is None:
        raise OptionError(f"task {task.name} needs a tokenizer, and this model comes without one.")
    if isinstance(task, PairTask):
        return Classes(task, tokenizer, length)
    if isinstance(task, SpanTask):
        return Spans(task, tokenizer, length)
    if isinstance(task, DocumentTask):
        return Documents(tokenizer, length, limit)
    if task.runs_code and generates and not allow_code:
        raise OptionError(
            f"scoring {task.name} runs programs that the model wrote; allow it with --allow-code-execution, on a "
            "machine where that is fine, or leave it at the loss with --no-generates."
        )
    if samples is not None:
        task = replace(task, samples=samples)
    if config.is_encoder_decoder:
        return Sequences(task, tokenizer, length, beams, generates)
    if any("CausalLM" in name or "LMHead" in name for name in config.architectures or ()):
        return Answers(task, tokenizer, length, generates)
    raise OptionError(
        f"task {task.name} is answered in text, and {(config.architectures or ['this model'])[0]} writes none; use an "
        "encoder-decoder or a decoder."
    )


def calibration_text(task: Task, rows: list[Row], out: Path) -> Path:
    """The rows' own text as a file that `quantize --calibrate` reads, beside ``out`` (its ending is chosen here)."""
    import json

    out.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(task, TextTask):
        file = out.with_suffix(".jsonl")
        pairs = ({"prompt": task.prompt(row), "completion": task.completion(row)} for row in rows)
        text = "".join(json.dumps(pair) + "\n" for pair in pairs)
    else:
        file = out.with_suffix(".txt")
        columns = {"PairTask": getattr(task, "texts", ()), "SpanTask": ("question", "context")}
        names = columns.get(type(task).__name__, ("text",))
        text = "\n".join(str(row[name]) for row in rows for name in names)
    file.write_text(text, encoding="utf-8")
    return file
