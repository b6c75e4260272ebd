"""Cells of the claims: each is measured once and kept as one JSON line {"key": {model, row, seed}, "metrics": ...}.

A metric of a cell is a number, paired with other rows by the seed, or a mapping (matrix or sequence -> number), paired
by its names. Trained rows are ``regimes.Bench`` cells; the other models are probes (``probes.PROBES``).
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import torch
from torch import Tensor

import bitloft.solvers
from bitloft.kernels.ops import decode, encode, residual
from bitloft.options.recipe import Recipe, Row
from bitloft.regimes import Bench, main_score, opened, rates_of
from bitloft.solvers.base import Solution, norm, pack_start, ratio
from bitloft.solvers.lowrank import balanced_factors, truncated_svd

HELD = "held out"
KEPT = ("qlora nf2", "lora")  # whose adapters the probes use
SVD_FIRST = "svd first nf2"


@dataclass
class Work:
    """``recipes`` by model name; a bench is opened when its first cell is measured."""

    directory: Path
    cells: harness.Cells
    recipes: Mapping[str, Recipe]
    _benches: dict[str, Bench] = field(default_factory=dict)

    def bench(self, model: str) -> Bench:
        if model not in self._benches:
            self._benches[model] = Bench.open(self.recipes[model], self.directory / model)
        return self._benches[model]

    def row(self, model: str, name: str) -> Row:
        return next(row for row in self.recipes[model].rows if row.label == name)

    def trained(self, model: str) -> Iterator[tuple[dict[str, Any], Row, int]]:
        """Keys of a recipe's cells, in order."""
        for row, seed in self.recipes[model].cells():
            yield {"model": model, "row": row.label, "seed": seed}, row, seed

    def kept(self, model: str, name: str, seed: int) -> Path:
        """The trained parameters of a row."""
        return self.directory / model / "kept" / f"{name.replace(' ', '-')}-{seed}.safetensors"

    def measure(self, model: str, row: Row, seed: int) -> dict[str, Any]:
        """One trained (or untrained) cell."""
        bench = self.bench(model)
        if row.untrained:
            losses = row_losses(bench, opened(bench.base(row), row, seed))
            return {"metrics": {"rows": losses}} | about()
        keep = self.kept(model, row.label, seed) if row.label in KEPT and model == "g2p" else None
        rate = self.rate(model, row)
        found: dict[str, Any]
        with svd_first() if row.label == SVD_FIRST else nullcontext():
            found = bench.run(row, seed, rate=rate, keep=keep)
        metrics = {score["name"]: round(score["value"], 6) for score in found.pop("scores")}
        return {"metrics": metrics, **found} | about()

    def rate(self, model: str, row: Row) -> float | None:
        """The rate of a row that held-out training rows choose with the first seed; None where there is no search."""
        bench, seed, found = self.bench(model), self.recipes[model].seeds[0], dict[float, float]()
        for rate in rates_of(self.recipes[model], row):
            key = {"model": f"{model} {HELD}", "row": row.label, "seed": seed, "rate": rate}
            cell = self.cells.get(key, partial(self._held, bench, row, seed, rate))
            found[rate] = cell["metrics"][HELD]
        return max(found, key=lambda rate: found[rate]) if found else None

    def _held(self, bench: Bench, row: Row, seed: int, rate: float) -> dict[str, Any]:
        """What a rate comes to on held-out rows, larger being better."""
        found = bench.run(row, seed, rate=rate, held=True)
        score = main_score(found.pop("scores"), bench.recipe.metric)
        sign = 1 if score["better"] == "high" else -1
        return {"metrics": {HELD: round(sign * score["value"], 6)}, **found} | about()


def about() -> dict[str, Any]:
    return {"commit": harness.commit()}


@torch.inference_mode()
def row_losses(bench: Bench, model: Any, limit: int | None = None) -> dict[str, float]:
    """Mean loss of every test row (of a decoder's text: of every block), by its number."""
    form = bench.form(model)
    examples = form.examples(bench.test)[: limit or bench.recipe.test_rows]
    found = {}
    for i, example in enumerate(examples):
        found[str(i)] = round(float(form.losses(model.eval(), form.collate([example])).double().mean()), 5)
    return found


def svd_first() -> AbstractContextManager[Any]:
    """LoftQ's other order (its Table 6): s B A = SVD_r(W - Q) with Q_0 = 0 first, then Q = q(W - s B A); T rounds."""

    def solve(
        weight: Tensor, fmt: Any, *, rank: int, scaling: float, start_format: Any, steps: int, generator: Any
    ) -> Solution:
        best: Solution | None = None
        rest = weight
        before = ratio(residual(weight, encode(weight, fmt)), norm(weight))
        for _ in range(steps):
            u, s, vt = truncated_svd(rest, rank, generator)
            start = pack_start(*balanced_factors(u, s, vt, scaling), scaling, start_format)
            target = weight - scaling * decode(start.bt).T @ decode(start.a)
            packed = encode(target, fmt)
            rest = weight - decode(packed)
            found = Solution(packed, start, before, ratio(residual(target, packed), norm(weight)))
            best = found if best is None or found.error_after < best.error_after else best
        assert best is not None
        return best

    return mock.patch.object(bitloft.solvers, "loftq", solve)


class Table:
    """The cells that exist, as series for the rules."""

    def __init__(self, cells: harness.Cells) -> None:
        self._found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for cell in cells:
            self._found.setdefault((cell["key"]["model"], cell["key"]["row"]), []).append(cell)

    def series(self, model: str, row: str, metric: str) -> dict[str, float] | None:
        values: dict[str, float] = {}
        for cell in self._found.get((model, row), ()):
            value = cell["metrics"].get(metric)
            if isinstance(value, dict):
                values |= value
            elif value is not None:
                values[str(cell["key"]["seed"])] = value
        return values or None

    def figure(self, model: str, row: str, name: str) -> float | None:
        """The mean over a row's cells of a metric or of another figure; None where none has it."""
        cells = self._found.get((model, row), ())
        values = [v for cell in cells if (v := cell["metrics"].get(name, cell.get(name))) is not None]
        return sum(values) / len(values) if values else None
