"""Bases, adapters and cells: each made once and kept below the working directory."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter_grid.cells import Cell, Cells
from adapter_grid.tasks import rows_of
from bitloft.adapters import read_adapter
from bitloft.compress import compress
from bitloft.errors import OptionError
from bitloft.evaluate import evaluate
from bitloft.factors import Pair, write_lora
from bitloft.quantize import quantize
from bitloft.solvers.adapter import Components, Loose, Trained, components, factors, product_error
from bitloft.solvers.baselines import billm, pb_llm
from bitloft.solvers.loraquant import loraquant_across
from bitloft.train import train

# What needs a mask or another axis than the file has: judged from float factors, bytes counted as the solver does.
LOOSE = ("pb-llm", "billm", "loraquant-across")


@dataclass(frozen=True)
class Setting:
    """One adapter of the grid."""

    base: str
    task: str
    rank: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.base.replace(':', '_')}-r{self.rank}-s{self.seed}"

    def cell(self, method: str, asked: object) -> Cell:
        return {**self.__dict__, "method": method, "asked": asked}


@dataclass
class Work:
    """Where things are kept, and how long training and judging take."""

    directory: Path
    model: Path
    shared: Path
    cells: Cells
    start_rank: int
    train: dict[str, Any]
    judge: dict[str, Any]

    def base(self, fmt: str) -> Path:
        out = self.directory / "bases" / fmt.replace(":", "_")
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            quantize(self.model, out, format=fmt, rank=self.start_rank)
        return out

    def data(self, task: str, which: str) -> Path:
        file = self.directory / "data" / f"{task}.{which}.jsonl"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            for name, rows in zip(("train", "judge"), rows_of(task, self.shared), strict=True):
                text = "".join(json.dumps(row) + "\n" for row in rows)
                (file.parent / f"{task}.{name}.jsonl").write_text(text, encoding="utf-8")
        return file

    def adapter(self, setting: Setting) -> Path:
        out = self.directory / "adapters" / setting.name
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            data = self.data(setting.task, "train")
            train(self.base(setting.base), data, out, rank=setting.rank, alpha=2.0 * setting.rank, seed=setting.seed,
                  resume=False, **self.train)  # fmt: skip
        return out

    def loss(self, setting: Setting, adapter: Path | None) -> Cell:
        report = evaluate(self.base(setting.base), self.data(setting.task, "judge"), adapter, **self.judge)
        return {"loss": report.loss, "stderr": report.stderr, "tokens": report.tokens}

    def reference(self, setting: Setting) -> tuple[Cell, Cell]:
        """The cells of the base alone and of the whole adapter."""
        # the base knows neither rank nor seed: one cell serves all adapters of a task
        alone = Setting(setting.base, setting.task, 0, 0).cell("base", "")
        if alone not in self.cells:
            self.cells.add(alone | {"true_bits": 0.0, "error": 1.0, **self.loss(setting, None)})
        full = setting.cell("full", "")
        if full not in self.cells:
            source = self.adapter(setting)
            bits = 8 * sum(f.stat().st_size for f in source.glob("adapter_*")) / read_adapter(source).values
            self.cells.add(full | {"true_bits": bits, "error": 0.0, **self.loss(setting, source)})
        return self.cells.get(alone), self.cells.get(full)

    def packed(self, setting: Setting, method: str, asked: object, settings: dict[str, Any]) -> Cell:
        """The cell of one method at one size; a size below the floor of the files is a cell that says so."""
        cell = setting.cell(method, asked)
        if cell in self.cells:
            return self.cells.get(cell)
        out = self.directory / "packed" / setting.name
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            if method in LOOSE:
                found = _loose(self.adapter(setting), out, method)
            else:
                report = compress(self.adapter(setting), out, **settings)
                found = {"true_bits": report.true_bits, "payload_bits": report.payload_bits, "error": report.error}
        except OptionError as error:
            return self.cells.add(cell | {"skipped": str(error)})
        cell = self.cells.add(cell | found | self.loss(setting, out))
        shutil.rmtree(out)
        return cell


def _loose(source: Path, out: Path, method: str) -> Cell:
    adapter = read_adapter(source)
    pairs, size, lost, energy = {}, 0, 0.0, 0.0
    for pair in adapter.pairs:
        exact = components(pair.a, pair.b, pair.scaling)
        made = _made(method, exact, Trained(pair.a, (pair.scaling * pair.b).T.contiguous()))
        a, bt = factors(made)
        pairs[pair.name] = Pair(a, bt.T.contiguous())
        size, lost, energy = size + made.nbytes, lost + product_error(exact, [made]), energy + exact.energy
    record = {"base": adapter.base, "source": adapter.source, "start": adapter.start}
    write_lora(out, pairs, base_name=str(adapter.config.get("base_model_name_or_path")), record=record)
    return {"true_bits": 8 * size / adapter.values, "error": lost / energy, "note": "factors only, no file"}


def _made(method: str, exact: Components, trained: Trained) -> Loose:
    if method == "loraquant-across":
        return loraquant_across(exact, high=2, ratio=0.8)
    return pb_llm(trained) if method == "pb-llm" else billm(trained)
