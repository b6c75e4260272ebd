"""GLUE's nine tasks and ANLI: a sentence or two in, a class (STS-B: a number) out, each with its published metrics.

    cola matthews   sst2 accuracy   mrpc accuracy, F1   qqp accuracy, F1   stsb Pearson, Spearman
    mnli, qnli, rte, wnli, anli accuracy

Sources: Wang et al. 2018 (arXiv 1804.07461), Nie et al. 2019 (arXiv 1910.14599). An encoder gets a linear head; its
logits are read off the row, so nothing is generated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitloft.errors import DataError
from bitloft.tasks.scores import METRICS, Score
from bitloft.tasks.sources import Row, Source, read_source

NLI = ("entailment", "neutral", "contradiction")
INFERENCE = ("entailment", "not_entailment")
_VALIDATION = {"train": "train", "test": "validation"}
_FILES = {"train": ("train",), "test": ("validation", "dev")}


@dataclass(frozen=True)
class PairTask:
    """``texts`` are the columns that are read, ``labels`` the classes in the hub's order (none: a number)."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    source: Source
    spelled: Mapping[str, str] = field(default_factory=dict)

    @property
    def outputs(self) -> int:
        return max(len(self.labels), 1)

    def rows(self, where: str | Path | None, split: str, limit: int | None = None) -> list[Row]:
        """Rows with ``label`` as a class index or a float. Raises DataError for a label that the task does not have."""
        rows = read_source(self.source, where, split, limit=limit, name=self.name)
        return [row | {"label": self.label(row["label"])} for row in rows]

    def label(self, value: Any) -> float | int:
        """A label as files spell it: an index, its digits, a name, or a known letter."""
        if not self.labels:
            return float(value)
        text = self.spelled.get(str(value), str(value))
        if text in self.labels:
            return self.labels.index(text)
        if text.isdecimal() and int(text) < len(self.labels):
            return int(text)
        raise DataError(
            f"{self.name} has no label {value!r}; use {', '.join(self.labels)} or 0 to {len(self.labels) - 1}."
        )

    def scores(self, wanted: Sequence[float | int], given: Sequence[float | int]) -> list[Score]:
        """The task's own metrics of predictions against labels."""
        return [METRICS[name](wanted, given) for name in self.metrics]


def _glue(
    name: str,
    texts: tuple[str, ...],
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
    aliases: Mapping[str, str] | None = None,
    splits: Mapping[str, str] | None = None,
    files: Mapping[str, tuple[str, ...]] | None = None,
) -> PairTask:
    source = Source(
        (*texts, "label"), "nyu-mll/glue", name, splits or _VALIDATION, files or _FILES, aliases=aliases or {}
    )
    return PairTask(name, texts, labels, metrics, source)


_BOTH, _NO_YES = ("sentence1", "sentence2"), ("0", "1")
_MRPC = {"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"}
_MNLI = {"train": ("train",), "test": ("dev_matched", "validation_matched", "validation")}
TASKS: dict[str, PairTask] = {
    task.name: task
    for task in (
        _glue("cola", ("sentence",), _NO_YES, ("matthews",)),
        _glue("sst2", ("sentence",), _NO_YES, ("accuracy",)),
        _glue("mrpc", _BOTH, _NO_YES, ("accuracy", "f1"), _MRPC),
        _glue("qqp", ("question1", "question2"), _NO_YES, ("accuracy", "f1"), {"is_duplicate": "label"}),
        _glue("stsb", _BOTH, (), ("pearson", "spearman"), {"score": "label"}),
        _glue(
            "mnli",
            ("premise", "hypothesis"),
            NLI,
            ("accuracy",),
            {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
            {"train": "train", "test": "validation_matched"},
            _MNLI,
        ),
        _glue("qnli", ("question", "sentence"), INFERENCE, ("accuracy",)),
        _glue("rte", _BOTH, INFERENCE, ("accuracy",)),
        _glue("wnli", _BOTH, _NO_YES, ("accuracy",)),
        PairTask(
            "anli",
            ("premise", "hypothesis"),
            NLI,
            ("accuracy",),
            Source(
                ("premise", "hypothesis", "label"),
                "facebook/anli",
                None,
                {"train": "train_r1", "test": "dev_r1"},
                {"train": ("train_r1", "train"), "test": ("dev_r1", "dev", "validation")},
                aliases={"context": "premise"},
            ),
            {"e": "entailment", "n": "neutral", "c": "contradiction"},
        ),
    )
}


@dataclass(frozen=True)
class Classes:
    """A ``PairTask`` on an encoder with a sequence head: what the training loop and the judge need of it."""

    task: PairTask
    tokenizer: Any
    length: int
    shifted = False  # labels are not the next token's

    def examples(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        texts = [[str(row[column]) for row in rows] for column in self.task.texts]
        found = self.tokenizer(*texts, truncation=True, max_length=self.length)
        return [{key: found[key][i] for key in found} | {"labels": row["label"]} for i, row in enumerate(rows)]

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Padded ids and masks [batch, longest]; ``labels`` [batch] int64, float32 for a number."""
        inputs = [{key: value for key, value in example.items() if key != "labels"} for example in examples]
        kind = torch.long if self.task.labels else torch.float32
        labels = torch.tensor([example["labels"] for example in examples], dtype=kind)
        return dict(self.tokenizer.pad(inputs, return_tensors="pt")) | {"labels": labels}

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of each row in nats; squared error of a number."""
        logits, labels = self._logits(model, batch), batch["labels"]
        if not self.task.labels:
            return (logits.squeeze(1) - labels).square()
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    @torch.inference_mode()
    def judge(self, model: nn.Module, rows: Sequence[Row], batch: int) -> list[Score]:
        """The task's metrics on ``rows``."""
        given: list[float] = [0.0] * len(rows)
        examples = self.examples(rows)
        order = sorted(range(len(rows)), key=lambda i: len(examples[i]["input_ids"]))
        for at in range(0, len(order), batch):
            chosen = order[at : at + batch]
            logits = self._logits(model, self.collate([examples[i] for i in chosen]))
            found = logits.argmax(1) if self.task.labels else logits.squeeze(1)
            for i, value in zip(chosen, found.tolist(), strict=True):
                given[i] = value
        return self.task.scores([row["label"] for row in rows], given)

    def _logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        return logits.float()
