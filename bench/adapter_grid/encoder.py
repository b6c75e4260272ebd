"""MiniLM in the grid: SST-2 and MRPC, judged by the cross-entropy of a row and by the share of right answers.

The task's head is fitted first, on what the float model's pooler says of the training rows, and stays as it is from
then on: adapters carry the rest of the task, and the base alone is that head on the quantized encoder.
"""

import csv
import math
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from adapter_grid.plan import Setting
from bitloft.adapters import is_packed, read_adapter, read_packed
from bitloft.integrations.loading import load, quiet_loading
from bitloft.integrations.peft import register, save_adapter
from bitloft.integrations.record import base_record
from bitloft.modules.linear import quant_linears
from bitloft.modules.multi import AdapterBank
from bitloft.sensitivity import Moments, collected

COLUMNS = {"sst2": ("sentence", None, "label"), "mrpc": ("#1 String", "#2 String", "Quality")}
HEAD_ROWS, HEAD_STEPS, TRAINED_ROWS = 1000, 200, 4000
BATCH, STEPS = 32, 3  # rows of a batch; times the steps of a decoder, whose steps cost that much more
SAMPLE = 256  # rows that the input moments are collected on

Row = tuple[str, str | None, int]


class Encoder:
    """Training, judging and input moments of MiniLM's bases."""

    def __init__(self, directory: Path, shared: Path, model: Path) -> None:
        self.directory, self.shared, self.model = directory, shared, model
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def source(self, task: str) -> Path:
        """The float model with its fitted head."""
        out = self.directory / "models" / f"minilm-{task}"
        if not out.exists():
            with quiet_loading():
                model = AutoModelForSequenceClassification.from_pretrained(self.model, num_labels=2).eval()
            self._fit_head(model, self.rows(task, "train")[:HEAD_ROWS])
            beside = out.with_suffix(".work")
            shutil.rmtree(beside, ignore_errors=True)
            model.save_pretrained(beside)
            self.tokenizer.save_pretrained(beside)
            beside.rename(out)
        return out

    def train(self, base: Path, setting: Setting, out: Path) -> None:
        adapted = self._adapted(base, setting)
        rows, draw = self.rows(setting.task, "train")[:TRAINED_ROWS], random.Random(setting.seed)
        count = STEPS * setting.effort.steps
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], weight_decay=0.0)
        adapted.train()
        for step in range(count):
            for group in optimizer.param_groups:
                group["lr"] = setting.effort.learning_rate * (1 + math.cos(math.pi * step / count)) / 2
            chosen = draw.sample(rows, min(BATCH, len(rows)))
            optimizer.zero_grad()
            self._losses(adapted, chosen).mean().backward()
            optimizer.step()
        record = base_record(base)
        out.mkdir()
        save_adapter(
            adapted,
            out,
            base=str(base),
            record={"base": record.fingerprint, "source": record.source, "start": "frozen"},
        )

    @torch.inference_mode()
    def loss(self, base: Path, setting: Setting, adapter: Path | None) -> dict[str, Any]:
        model, rows = load(base), self.rows(setting.task, "judge")
        bank, name = AdapterBank(model), None
        if adapter is not None:
            bank.attach(name := "adapter", read_packed(adapter) if is_packed(adapter) else read_adapter(adapter))
        losses, right = [], 0.0
        for chosen in _batches(rows):
            with bank.rows([name] * len(chosen)):
                losses.append(self._losses(model, chosen))
            right += float((losses[-1] < math.log(2)).sum())  # two labels: right is more than half
        found = torch.cat(losses).double()
        stderr = float(found.std() / math.sqrt(len(rows)))
        return {"loss": float(found.mean()), "stderr": stderr, "tokens": len(rows), "right": right / len(rows)}

    def moments(self, base: Path, setting: Setting) -> Moments:
        """The metric of the base on the first training rows; padding has no gradient, hence no weight."""
        model = load(base)
        with collected(model) as found:
            for chosen in _batches(self.rows(setting.task, "train")[:SAMPLE]):
                self._losses(model, chosen).sum().backward()
        return found

    def base_settings(self, base: str, rank: int) -> dict[str, Any]:
        """What quantize is asked for: the plan has no refined base of an encoder, which writes no next tokens."""
        return {"format": base, "rank": rank}

    def data(self, task: str, which: str) -> Path:
        return self.shared / "data" / f"glue_{task}" / f"{'train' if which == 'train' else 'validation'}.tsv"

    def rows(self, task: str, which: str) -> list[Row]:
        first, second, label = COLUMNS[task]
        with self.data(task, which).open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
        return [(row[first], row[second] if second else None, int(row[label])) for row in rows]

    def _adapted(self, base: Path, setting: Setting) -> PeftModel:
        """A fresh adapter of the packed linears: pooler and head stay what they are."""
        register()
        model = load(base)
        config = LoraConfig(r=setting.rank, lora_alpha=2 * setting.rank, target_modules=list(quant_linears(model)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed)
            return get_peft_model(model, config)

    def _fit_head(self, model: PreTrainedModel, rows: Sequence[Row]) -> None:
        """The classifier by full-batch Adam on the pooled states of ``rows``; the encoder does not move."""
        head: nn.Linear = model.classifier
        with torch.inference_mode():
            pooled = torch.cat([model.base_model(**self._encoded(chosen)).pooler_output for chosen in _batches(rows)])
        states, labels = pooled.clone(), torch.tensor([label for _, _, label in rows])
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        optimizer = torch.optim.Adam(head.parameters(), lr=0.02, weight_decay=1e-4)
        for _ in range(HEAD_STEPS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(states), labels).backward()
            optimizer.step()

    def _losses(self, model: nn.Module, rows: Sequence[Row]) -> Tensor:
        labels = torch.tensor([label for _, _, label in rows])
        return nn.functional.cross_entropy(model(**self._encoded(rows)).logits, labels, reduction="none")

    def _encoded(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        texts = [[row[column] for row in rows] for column in (0, 1) if rows[0][column] is not None]
        return dict(self.tokenizer(*texts, padding=True, truncation=True, max_length=128, return_tensors="pt"))


def _batches(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    ordered = sorted(rows, key=lambda row: len(row[0]) + len(row[1] or ""))  # of about one length: little padding
    yield from (ordered[at : at + BATCH] for at in range(0, len(ordered), BATCH))
