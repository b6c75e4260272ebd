"""What a base is trained and judged on: batches by seed and step, a loss, held-out rows and test rows.

wikitext2: `valid` to train and calibrate, but for its last tenth, which chooses the learning rate; `test` judges.
gsm8k: the loss of answers, trained on the train file but for its last tenth, judged on the test file. Bases are the
same: calibrated on WikiText-2. sst2, mrpc: MiniLM, mean of the last states and a linear head that is trained with the
adapter; calibrated on the training sentences. ``words`` and ``pairs`` are the toys of --smoke.
"""

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitloft.evaluate import mean_and_stderr
from bitloft.tasks.lm import Collator, Example, encode_rows, target_losses
from bitloft.tasks.precision import choose_precision
from bitloft.tasks.rows import read_rows

JUDGED_LENGTH = 512


class Task(Protocol):
    """``losses`` gives the summed loss and the count of every cluster (sequence or row) of a batch."""

    def prepare(self, model: nn.Module) -> list[nn.Parameter]: ...
    def batch(self, seed: int, step: int) -> Any: ...
    def losses(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]: ...
    def judging(self, which: str) -> Iterator[Any]: ...


@torch.inference_mode()
def judge(task: Task, model: nn.Module, which: str) -> dict[str, float | None]:
    """Mean loss over ``held`` or ``test``, in nats, with its standard error between sequences; computed as trained."""
    device = torch.device("cpu")
    with choose_precision("auto", device).autocast(device):
        found = [task.losses(model, batch) for batch in task.judging(which)]
    sums, counts = (torch.cat(parts).double() for parts in zip(*found, strict=True))
    loss, stderr = mean_and_stderr(sums, counts)
    return {"loss": loss, "stderr": stderr}


@dataclass
class Text:
    """A decoder's task: ``train`` is a file of text, cut at random places, or of rows; so are ``held`` and ``test``."""

    tokenizer: Any
    files: dict[str, Path]
    size: int
    length: int
    judged: int
    held: int

    def __post_init__(self) -> None:
        self.collate = Collator.for_tokenizer(self.tokenizer)
        self._examples: dict[str, list[Example]] = {}

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        return []

    def examples(self, which: str) -> list[Example]:
        if which not in self._examples:
            plain = self.files[which].suffix == ".txt"
            length = JUDGED_LENGTH if which != "train" else 1 << 30 if plain else 2 * self.length
            self._examples[which] = encode_rows(read_rows(self.files[which]), self.tokenizer, length)[0]
        return self._examples[which]

    def batch(self, seed: int, step: int) -> dict[str, Tensor]:
        rows, draw = self.examples("train"), random.Random(f"{seed} {step}")
        if len(rows) > 1:
            return self.collate(draw.sample(rows, self.size))
        starts = [draw.randrange(len(rows[0].ids) - self.length) for _ in range(self.size)]
        ids = torch.stack([rows[0].ids[i : i + self.length] for i in starts])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        found, owners = target_losses(model, batch)
        size = len(batch["labels"])
        sums = torch.zeros(size).index_add(0, owners, found.float())
        return sums, torch.bincount(owners, minlength=size)

    def judging(self, which: str) -> Iterator[dict[str, Tensor]]:
        chosen = self.examples(which)[: self.held if which == "held" else self.judged]
        return (self.collate(chosen[i : i + 4]) for i in range(0, len(chosen), 4))


@dataclass
class Pairs:
    """An encoder's task: rows of (text, second text or None, label); the head is the mean state's linear function."""

    tokenizer: Any
    rows: dict[str, list[tuple[str, str | None, int]]]
    size: int

    def prepare(self, model: Any) -> list[nn.Parameter]:
        model.head = nn.Linear(model.config.hidden_size, 2)
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        return list(model.head.parameters())

    def batch(self, seed: int, step: int) -> list[tuple[str, str | None, int]]:
        return random.Random(f"{seed} {step}").sample(self.rows["train"], self.size)

    def losses(self, model: Any, batch: Sequence[tuple[str, str | None, int]]) -> tuple[Tensor, Tensor]:
        texts = [[row[column] for row in batch] for column in (0, 1) if batch[0][column] is not None]
        encoded = self.tokenizer(*texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        mask = encoded["attention_mask"].unsqueeze(-1)
        mean = (model(**encoded)[0] * mask).sum(1) / mask.sum(1)
        labels = torch.tensor([row[2] for row in batch])
        found = nn.functional.cross_entropy(model.head(mean.float()), labels, reduction="none")
        return found, torch.ones_like(found)

    def judging(self, which: str) -> Iterator[list[tuple[str, str | None, int]]]:
        return (self.rows[which][i : i + 32] for i in range(0, len(self.rows[which]), 32))


def text_files(directory: Path, shared: Path) -> dict[str, dict[str, Path]]:
    """The files of the decoder's tasks, made once below ``directory``."""
    data, out = shared / "data", directory / "data"
    valid = (data / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
    test = (data / "wikitext2" / "test.txt").read_text(encoding="utf-8")
    cut = len(valid) * 9 // 10
    files = {"wikitext2": split_files(out, "wikitext2", ".txt", valid[:cut], valid[cut:], test)}
    rows = {
        name: (data / "gsm8k" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") for name in ("train", "test")
    }
    asked = {name: [_asked(line) for line in lines if line] for name, lines in rows.items()}
    cut = len(asked["train"]) * 9 // 10
    parts = ("".join(lines) for lines in (asked["train"][:cut], asked["train"][cut:], asked["test"]))
    return files | {"gsm8k": split_files(out, "gsm8k", ".jsonl", *parts)}


def split_files(out: Path, name: str, suffix: str, *texts: str) -> dict[str, Path]:
    """One file each for train, held and test."""
    out.mkdir(parents=True, exist_ok=True)
    files = {which: out / f"{name}.{which}{suffix}" for which in ("train", "held", "test")}
    for file, text in zip(files.values(), texts, strict=True):
        file.write_text(text, encoding="utf-8")
    return files


def _asked(line: str) -> str:
    row = json.loads(line)
    return json.dumps({"prompt": row["question"] + "\n", "completion": row["answer"]}) + "\n"


def pairs_of(shared: Path, task: str) -> dict[str, list[tuple[str, str | None, int]]]:
    """Rows of SST-2 or MRPC: the first 4,000 to train on, 400 after them held out; validation judges."""
    first, second, label = {"sst2": ("sentence", None, "label"), "mrpc": ("#1 String", "#2 String", "Quality")}[task]
    found = {}
    for which in ("train", "validation"):
        with (shared / "data" / f"glue_{task}" / f"{which}.tsv").open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
            found[which] = [(row[first], row[second] if second else None, int(row[label])) for row in rows]
    trained = min(4000, len(found["train"]) * 9 // 10)
    held = found["train"][trained : trained + 400]
    return {"train": found["train"][:trained], "held": held, "test": found["validation"]}
