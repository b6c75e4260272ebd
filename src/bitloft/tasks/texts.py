"""Tasks with a text for an answer, on an encoder-decoder (``Sequences``) or a decoder (``Answers``).

A ``TextTask`` says how a row is asked (``prompt``), what is taught (``completion``) and how answers are scored. Beside
the task's own metrics both report ``loss``, the mean over target tokens in nats with the ratio estimator's error over
rows (Cochran 1977): it is known far better than an exact match on a few rows. Answers are greedy unless a task samples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitloft.errors import OptionError
from bitloft.tasks.lm import IGNORED, Collator, Example, encode_rows, target_losses
from bitloft.tasks.rows import Row as TextRow
from bitloft.tasks.scores import Score
from bitloft.tasks.sources import Row, Source, read_source

Scorer = Callable[[Sequence[Row], Sequence[Sequence[str]]], list[Score]]


@dataclass(frozen=True)
class TextTask:
    """``scores`` gets rows and the answers to each (one, or ``samples`` of them). ``tokens`` bounds an answer;
    ``stop`` are texts that end it."""

    name: str
    source: Source
    prompt: Callable[[Row], str]
    completion: Callable[[Row], str]
    scores: Scorer
    metrics: tuple[str, ...]
    tokens: int
    stop: tuple[str, ...] = ()
    suffix: str = ""  # what a decoder is asked after the prompt; an encoder-decoder needs no words for it
    samples: int = 1
    runs_code: bool = False

    def rows(self, where: str | Path | None, split: str, limit: int | None = None) -> list[Row]:
        return read_source(self.source, where, split, limit=limit, name=self.name)

    def cut(self, text: str) -> str:
        """An answer up to the first of ``stop``."""
        return text[: min((at for mark in self.stop if (at := text.find(mark)) >= 0), default=len(text))]


def loss_score(sums: Tensor, counts: Tensor) -> Score:
    """Summed losses and numbers of tokens of each row -> mean loss a token, its error over rows."""
    total, m = counts.sum(), len(sums)
    value = sums.sum() / total
    spread = (sums - value * counts).square().sum() * m / max(m - 1, 1)
    stderr = float(spread.sqrt() / total) if m > 1 else None
    return Score("loss", float(value), stderr, m, "low")


def perplexity_score(loss: Score) -> Score:
    """exp(loss), its error by the delta method."""
    value = math.exp(min(loss.value, 80.0))
    return Score("perplexity", value, None if loss.stderr is None else value * loss.stderr, loss.count, "low")


@dataclass(frozen=True)
class Sequences:
    """A text task on an encoder-decoder: the encoder reads the prompt, the decoder writes the answer.

    ``beams`` of the search (BART's summaries are published with several).
    """

    task: TextTask
    tokenizer: Any
    length: int
    beams: int = 1
    generates: bool = True
    shifted = False

    def examples(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        asked = self.tokenizer([self.task.prompt(row) for row in rows], truncation=True, max_length=self.length)
        taught = self.tokenizer(
            text_target=[self.task.completion(row) for row in rows], truncation=True, max_length=self.task.tokens
        )
        return [{"input_ids": a, "labels": t} for a, t in zip(asked["input_ids"], taught["input_ids"], strict=True)]

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        inputs = self.tokenizer.pad([{"input_ids": e["input_ids"]} for e in examples], return_tensors="pt")
        longest = max(len(e["labels"]) for e in examples)
        labels = torch.full((len(examples), longest), IGNORED)
        for i, example in enumerate(examples):
            labels[i, : len(example["labels"])] = torch.tensor(example["labels"])
        kept = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        return kept | {"labels": labels}

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of every target token in nats."""
        labels = batch["labels"]
        logits = model(**batch).logits.float()
        wanted = labels != IGNORED
        return nn.functional.cross_entropy(logits[wanted], labels[wanted], reduction="none")

    @torch.inference_mode()
    def judge(self, model: Any, rows: Sequence[Row], batch: int) -> list[Score]:
        """The task's metrics on generated answers, and the loss."""
        examples, answers = self.examples(rows), [""] * len(rows)
        sums, counts = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.float64)
        for chosen in _by_length(examples, batch):
            inputs = self.collate([examples[i] for i in chosen])
            found, owners = self.losses(model, inputs), (inputs["labels"] != IGNORED).nonzero()[:, 0]
            index = torch.tensor(chosen)[owners]
            sums.index_add_(0, index, found.double())
            counts.index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
            for i, text in zip(chosen, self._write(model, inputs) if self.generates else (), strict=False):
                answers[i] = self.task.cut(text)
        own = self.task.scores(rows, [[answer] for answer in answers]) if self.generates else []
        return [*own, loss_score(sums, counts)]

    def _write(self, model: Any, inputs: dict[str, Tensor]) -> list[str]:
        asked = {key: value for key, value in inputs.items() if key != "labels"}
        ids = model.generate(**asked, max_new_tokens=self.task.tokens, num_beams=self.beams, do_sample=False)
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts


@dataclass(frozen=True)
class Answers:
    """A text task on a decoder: prompt and completion in one sequence, the loss on the completion.

    The prompt goes through the tokenizer's chat template where it has one, as in `bitloft train`. ``generates`` off
    leaves the loss alone. ``temperature`` is that of tasks which sample several answers.
    """

    task: TextTask
    tokenizer: Any
    length: int
    generates: bool = True
    temperature: float = 0.8
    seed: int = 0
    shifted = True

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        return encode_rows(self._asked(rows), self.tokenizer, self.length)[0]

    def _asked(self, rows: Sequence[Row]) -> list[TextRow]:
        task = self.task
        return [
            TextRow(task.name, i + 1, "prompt", prompt=task.prompt(row) + task.suffix, completion=task.completion(row))
            for i, row in enumerate(rows)
        ]

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return Collator.for_tokenizer(self.tokenizer)(examples)

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return target_losses(model, batch)[0]

    @torch.inference_mode()
    def judge(self, model: Any, rows: Sequence[Row], batch: int) -> list[Score]:
        """The task's metrics on generated answers, and the loss of the references."""
        own = self.task.scores(rows, self.answers(model, rows, batch)) if self.generates else []
        return [*own, token_loss(self, model, self.examples(rows), batch)]

    @torch.inference_mode()
    def answers(self, model: Any, rows: Sequence[Row], batch: int) -> list[list[str]]:
        """``task.samples`` answers to each row."""
        prompts = [self._prompt_ids(row) for row in rows]
        found: list[list[str]] = [[] for _ in rows]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for chosen in _by_length([{"input_ids": ids} for ids in prompts], batch):
                inputs = self._left_padded([prompts[i] for i in chosen])
                count, size = self.task.samples, inputs["input_ids"].shape[1]
                how: dict[str, Any] = {"do_sample": False}
                if count > 1:
                    how = {"do_sample": True, "temperature": self.temperature, "num_return_sequences": count}
                ids = model.generate(**inputs, max_new_tokens=self.task.tokens, pad_token_id=self._pad(), **how)
                texts = self.tokenizer.batch_decode(ids[:, size:], skip_special_tokens=True)
                for at, i in enumerate(chosen):
                    found[i] = [self.task.cut(text) for text in texts[at * count : (at + 1) * count]]
        return found

    def _prompt_ids(self, row: Row) -> list[int]:
        """The ids before the completion's first label: exactly what training put before it."""
        (example,) = encode_rows(self._asked([row]), self.tokenizer, 1 << 30)[0]
        first = int((example.labels != IGNORED).float().argmax())
        return example.ids[:first].tolist()[-self.length :]

    def _pad(self) -> int:
        return Collator.for_tokenizer(self.tokenizer).pad

    def _left_padded(self, prompts: Sequence[list[int]]) -> dict[str, Tensor]:
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self._pad())
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        return {"input_ids": ids, "attention_mask": mask}


def token_loss(form: Any, model: Any, examples: Sequence[Example], batch: int) -> Score:
    """Mean loss of a decoder's targets, its error over sequences."""
    sums, counts = torch.zeros(len(examples), dtype=torch.float64), torch.zeros(len(examples), dtype=torch.float64)
    for at in range(0, len(examples), batch):
        found, owners = target_losses(model, form.collate(examples[at : at + batch]))
        sums.index_add_(0, owners + at, found.double())
        counts.index_add_(0, owners + at, torch.ones(len(owners), dtype=torch.float64))
    return loss_score(sums, counts)


def _by_length(examples: Sequence[dict[str, Any]], batch: int) -> list[list[int]]:
    """Indices in batches of about one length."""
    if batch < 1:
        raise OptionError(f"batch is {batch}; use 1 or more.")
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    return [order[at : at + batch] for at in range(0, len(order), batch)]
