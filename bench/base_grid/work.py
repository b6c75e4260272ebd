"""Bases and cells: each base is made once and kept below the working directory, each training run is one cell.

The learning rate of a row at some bits is the one of least held-out loss after the fewest steps with the first seed.
The loss is taken to have one minimum over the rates: they are tried from the middle one upwards while it falls, and
downwards only where it did not fall upwards. What was trained to choose a rate is kept, and judged on the test rows as
the cell that it is.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from base_grid.peers import make_peer
from base_grid.plan import RANK, Cell, Effort, Row
from base_grid.tasks import Task, judge
from bitloft.integrations.loading import load
from bitloft.integrations.peft import fresh_adapter, start_adapter
from bitloft.integrations.source import open_source
from bitloft.modules.linear import quant_linears
from bitloft.modules.select import select_modules
from bitloft.options import QuantizeOptions
from bitloft.quantize import quantize
from bitloft.tasks.precision import choose_precision

WARMUP = 10
COST = "cost.json"


@dataclass
class Work:
    """``models`` and ``texts`` give a task's 16-bit model and calibration text; ``tasks`` opens a task."""

    directory: Path
    effort: Effort
    cells: harness.Cells
    models: Mapping[str, Path]
    texts: Mapping[str, Path]
    tasks: Callable[[str], Task]

    def base(self, row: Row, bits: float, task: str) -> Path:
        """The directory of a row's base; the 16-bit model's own for a row that makes none."""
        model, text = self.models[task], self.texts[task]
        if row.maker == "none":
            return model
        name = f"{model.name}-{text.stem if row.calibrated else 'any'}-{bits}-{row.name}"
        out = self.directory / "bases" / name.replace(" ", "_").replace(":", "_")
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            began, cost = time.perf_counter(), harness.Peak()
            if row.maker != "bitloft":
                stored = make_peer(row.maker, model, out, int(row.formats[bits]), text, self.effort.samples)
            else:
                stored = self._quantize(row, bits, model, text, out)
            stored |= {"seconds": round(time.perf_counter() - began, 1), "peak_mib": cost.mib()}
            (out.parent / f"{out.name}.{COST}").write_text(json.dumps(stored), encoding="utf-8")
        return out

    def _quantize(self, row: Row, bits: float, model: Path, text: Path, out: Path) -> dict[str, Any]:
        settings = dict(row.settings)
        if row.calibrated:
            settings |= {"calibrate": str(text), "samples": self.effort.samples, **self.effort.base}
        if row.refined:
            settings["refine"] = self.effort.refine
        if "target_bits" in settings:
            settings["target_bits"] = bits
        report = quantize(model, out, format=row.formats[bits], resume=True, **settings)
        found = {"true_bits": report.true_bits, "true_bits_with_start": report.true_bits_with_start}
        return found | {"weights": report.weights, "refined": report.to_dict()["refined"]}

    def facts(self, row: Row, bits: float, task: str) -> dict[str, Any]:
        """True bits, seconds and memory of a base."""
        if row.maker == "none":
            return {"true_bits": 16.0, "true_bits_with_start": 16.0}
        base = self.base(row, bits, task)
        found: dict[str, Any] = json.loads((base.parent / f"{base.name}.{COST}").read_text(encoding="utf-8"))
        return found

    def before(self, row: Row, bits: float, task: str) -> dict[str, Any]:
        """The cell of a base before any training."""
        key = Cell(row, bits, task, 0, 0).key
        return self.cells.get(key, lambda: self._before(row, bits, task))

    def _before(self, row: Row, bits: float, task: str) -> dict[str, Any]:
        opened, model = self.tasks(task), _opened(self.base(row, bits, task), "frozen")
        opened.prepare(model)
        return _figures(judge(opened, model, "test")) | self.facts(row, bits, task) | self._made()

    def cell(self, cell: Cell) -> dict[str, Any]:
        """A trained cell, with the learning rate that held-out rows choose."""
        return self.cells.get(cell.key, lambda: self._trained(cell))

    def rate(self, cell: Cell) -> float:
        """The rate for a row at some bits and a task, by one cell for each rate that is tried."""
        rates = sorted(self.effort.rates)
        if len(rates) == 1:
            return rates[0]
        first = Cell(cell.row, cell.bits, cell.task, self.effort.seeds[0], self.effort.steps[0])

        def loss(rate: float) -> float:
            key = first.key | {"rate": rate}
            found: float = self.cells.get(key, partial(self._run, first, rate, "held"))["loss"]
            return found

        best = len(rates) // 2
        for way in (1, -1):
            moved = False
            while 0 <= best + way < len(rates) and loss(rates[best + way]) < loss(rates[best]):
                best, moved = best + way, True
            if moved:
                break
        return rates[best]

    def _trained(self, cell: Cell) -> dict[str, Any]:
        rate = self.rate(cell)
        return {"rate": rate} | self._run(cell, rate, "test") | self.facts(cell.row, cell.bits, cell.task)

    def _run(self, cell: Cell, rate: float, which: str) -> dict[str, Any]:
        """Train one adapter, or take the one that chose the rate, and judge it."""
        task, row = self.tasks(cell.task), cell.row
        model = _opened(self.base(row, cell.bits, cell.task), "trainable" if row.trains == "start" else "frozen")
        head = task.prepare(model)
        if row.trains == "start":
            adapted: nn.Module = start_adapter(model)
        else:
            adapted = fresh_adapter(model, rank=RANK, alpha=RANK, targets=_targets(model), seed=cell.seed)
        tuned = [p for p in adapted.parameters() if p.requires_grad and not any(p is h for h in head)] + head
        about = cell.key | {"rate": rate} | self._made()["settings"]
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        kept = self.directory / "trained" / f"{name[:24]}.safetensors"
        began = time.perf_counter()
        if kept.is_file():
            held = load_file(kept)
            for i, parameter in enumerate(tuned):
                parameter.data.copy_(held[str(i)])
            facts = {"last_loss": round(float(held["loss"]), 4), "train_seconds": round(float(held["seconds"]), 1)}
        else:
            loss = self._tune(task, model, tuned, cell.seed, cell.steps, rate)
            facts = {"last_loss": loss, "train_seconds": round(time.perf_counter() - began, 1)}
            if which == "held":
                kept.parent.mkdir(parents=True, exist_ok=True)
                tensors = {str(i): parameter.detach().contiguous() for i, parameter in enumerate(tuned)}
                said = {"loss": torch.tensor(loss), "seconds": torch.tensor(facts["train_seconds"])}
                save_file(tensors | said, kept)
        found = _figures(judge(task, model.eval(), which))
        return found | facts | self._made()

    def _tune(
        self, task: Task, model: nn.Module, tuned: list[nn.Parameter], seed: int, steps: int, rate: float
    ) -> float:
        """AdamW without decay, ten steps of warm-up, cosine to zero, gradients clipped at norm 1; the last loss."""
        optimizer, loss = torch.optim.AdamW(tuned, weight_decay=0.0), torch.zeros(())
        precision = choose_precision("auto", torch.device("cpu"))
        for parameter in tuned:
            parameter.requires_grad_(True)
        model.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
            with precision.autocast(torch.device("cpu")):
                sums, counts = task.losses(model, task.batch(seed, step))
            loss = sums.sum() / counts.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(tuned, 1.0)
            optimizer.step()
        return round(float(loss.detach()), 4)

    def _made(self) -> dict[str, Any]:
        effort = self.effort
        shape = {"batch": effort.batch, "length": effort.length, "judged": effort.judged, "held": effort.held}
        shape |= {"refine": effort.refine, "samples": effort.samples, **effort.base}
        return {"commit": harness.commit(), "settings": shape}


def _figures(judged: Mapping[str, float | None]) -> dict[str, Any]:
    loss = float(judged["loss"] or 0.0)
    return {"loss": loss, "stderr": judged["stderr"], "perplexity": math.exp(min(loss, 80.0))}


def _opened(base: Path, start: str) -> PreTrainedModel:
    """A packed base, or a dense model in float32."""
    settings = json.loads((base / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    if settings.get("quant_method") == "bitloft":
        return load(base, start=start)
    return open_source(str(base)).load().float().eval()


def _targets(model: PreTrainedModel) -> tuple[str, ...]:
    """The linears that a base packs, so that a dense model is adapted in the same places."""
    packed = tuple(quant_linears(model))
    return packed or tuple(select_modules(model, QuantizeOptions()).chosen)
