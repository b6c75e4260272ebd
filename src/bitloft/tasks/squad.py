"""SQuAD v1.1: the span of a passage that answers a question; exact match and F1 (Rajpurkar et al. 2016).

The official script's normalization (lower case, no punctuation, no articles, one space) and its word-bag F1 are a dozen
lines, rewritten here from the script: the maintained library that has them (torchmetrics) would bring a second training
framework for it. A test checks both against hand-computed cases. Standard errors are over questions.

A passage longer than ``length`` is cut into windows that overlap by ``STRIDE`` tokens; a window without the answer
points at its first token. Of all spans of at most ``ANSWER`` tokens the one with the largest sum of logits is given.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitloft.tasks.scores import Score, mean
from bitloft.tasks.sources import Row, Source, read_source

STRIDE, ANSWER = 32, 30
SOURCE = Source(
    ("context", "question", "answers"),
    "rajpurkar/squad",
    None,
    {"train": "train", "test": "validation"},
    {"train": ("train",), "test": ("validation", "dev", "dev_slice")},
    lists=("answers",),
)


@dataclass(frozen=True)
class SpanTask:
    """``rows`` have context, question and answers {"text": [...], "answer_start": [...]}."""

    name: str = "squad"
    source: Source = SOURCE
    metrics: tuple[str, ...] = ("f1", "exact")

    def rows(self, where: str | Path | None, split: str, limit: int | None = None) -> list[Row]:
        return read_source(self.source, where, split, limit=limit, name=self.name)


TASKS = {"squad": SpanTask()}


def normalized(text: str) -> str:
    """Lower case without punctuation, articles and extra space: the official script's normalize_answer."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact(given: str, wanted: Sequence[str]) -> float:
    """1 where the normalized answer is one of the normalized references."""
    return float(normalized(given) in {normalized(answer) for answer in wanted})


def f1(given: str, wanted: Sequence[str]) -> float:
    """The best word-bag F1 against any reference."""
    return max(_f1(normalized(given).split(), normalized(answer).split()) for answer in wanted)


def _f1(given: list[str], wanted: list[str]) -> float:
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted)) if shared else 0.0


@dataclass(frozen=True)
class Spans:
    """SQuAD on an encoder with a span head (start and end logits)."""

    task: SpanTask
    tokenizer: Any
    length: int
    shifted = False

    def examples(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """One for each window; ``labels`` are the first and last token of the answer in it, or 0 and 0."""
        found = self._windows(rows)
        made = []
        for i, owner in enumerate(found["overflow_to_sample_mapping"]):
            answers = rows[owner]["answers"]
            start = answers["answer_start"][0] if answers["text"] else -1
            end = start + len(answers["text"][0]) if answers["text"] else -1
            made.append(_inputs(found, i) | {"labels": _tokens(found.encodings[i], start, end), "row": owner})
        return made

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        inputs = [{key: value for key, value in e.items() if key not in ("labels", "row")} for e in examples]
        labels = torch.tensor([example["labels"] for example in examples])
        return dict(self.tokenizer.pad(inputs, return_tensors="pt")) | {"labels": labels}

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of first and last token, [2 * windows]."""
        ends = self._logits(model, batch)
        return torch.cat([nn.functional.cross_entropy(e, batch["labels"][:, i], reduction="none") for i, e in ends])

    @torch.inference_mode()
    def judge(self, model: nn.Module, rows: Sequence[Row], batch: int) -> list[Score]:
        """F1 and exact match over questions."""
        given = self.answers(model, rows, batch)
        wanted = [row["answers"]["text"] for row in rows]
        pairs = list(zip(given, wanted, strict=True))
        return [mean("f1", [f1(a, w) for a, w in pairs]), mean("exact", [exact(a, w) for a, w in pairs])]

    @torch.inference_mode()
    def answers(self, model: nn.Module, rows: Sequence[Row], batch: int) -> list[str]:
        """The answer to each question, as a piece of its passage."""
        found, best = self._windows(rows), [(float("-inf"), "")] * len(rows)
        count = len(found["input_ids"])
        for at in range(0, count, batch):
            chosen = range(at, min(at + batch, count))
            inputs = self.tokenizer.pad([_inputs(found, i) for i in chosen], return_tensors="pt")
            (_, starts), (_, ends) = self._logits(model, dict(inputs))
            for i, start, end in zip(chosen, starts, ends, strict=True):
                owner = found["overflow_to_sample_mapping"][i]
                score, first, last = _span(found.encodings[i], start, end)
                best[owner] = max(best[owner], (score, rows[owner]["context"][first:last]))
        return [text for _, text in best]

    def _windows(self, rows: Sequence[Row]) -> Any:
        return self.tokenizer(
            [row["question"].strip() for row in rows],
            [row["context"] for row in rows],
            truncation="only_second",
            max_length=self.length,
            stride=min(STRIDE, self.length // 4),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )

    def _logits(self, model: nn.Module, batch: dict[str, Tensor]) -> list[tuple[int, Tensor]]:
        out = model(**{key: value for key, value in batch.items() if key != "labels"})
        return [(0, out.start_logits.float()), (1, out.end_logits.float())]


def _inputs(found: Any, i: int) -> dict[str, Any]:
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: found[name][i] for name in names if name in found}


def _tokens(window: Any, start: int, end: int) -> list[int]:
    """First and last token of characters [start, end) of the passage in a window, [0, 0] where it is not all inside."""
    inside = [t for t, (owner, (a, b)) in enumerate(_passage(window)) if owner == 1 and a < end and b > start]
    if not inside or start < 0:
        return [0, 0]
    whole = window.offsets[inside[0]][0] <= start and window.offsets[inside[-1]][1] >= end
    return [inside[0], inside[-1]] if whole else [0, 0]


def _span(window: Any, start: Tensor, end: Tensor) -> tuple[float, int, int]:
    """The best span of a window: its score and its characters in the passage."""
    inside = torch.tensor([owner == 1 for owner, _ in _passage(window)])
    size = len(inside)  # the batch may be padded beyond the window
    scores = start[:size, None] + end[None, :size]
    allowed = inside[:, None] & inside[None, :]
    allowed &= torch.ones(size, size, dtype=torch.bool).triu().tril(ANSWER - 1)
    scores = scores.masked_fill(~allowed, float("-inf"))
    at = int(scores.argmax())
    first, last = at // size, at % size
    return float(scores[first, last]), window.offsets[first][0], window.offsets[last][1]


def _passage(window: Any) -> list[tuple[int | None, tuple[int, int]]]:
    return list(zip(window.sequence_ids, window.offsets, strict=True))
