"""The figures that the bench is judged by, from the cells that exist; a figure without its cells is None.

    gap_closed_at_2bit = 1 - (loss_ours - loss_lora16) / (loss_loftq_nf - loss_lora16)      nats, after training
    nats_above_lora16  = loss_ours - loss_lora16

A difference is the mean over the seeds that all its rows have been run with. Rows without refining are taken at the
steps of ours plus those of refining.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import harness

from base_grid.plan import AUTOROUND, LORA16, ONE_WIDTH, PUBLISHED, ROWS, Cell, Effort, Row

ROW = {row.name: row for row in ROWS}


class Losses:
    """Cells by what they are about, at equal total steps."""

    def __init__(self, cells: harness.Cells, effort: Effort, task: str) -> None:
        self.cells, self.effort, self.task = cells, effort, task

    def runs(self, row: Row, bits: float, steps: int, *, granted: bool) -> list[dict[str, Any]]:
        """The cells of all seeds; ``granted`` adds the steps of refining to a row that has none."""
        more = self.effort.refine if granted and not row.refined else 0
        at = 16.0 if row.maker == "none" else bits
        keys = [Cell(row, at, self.task, seed, steps + more).key for seed in self.effort.seeds]
        return [cell for key in keys if (cell := self.cells.find(key)) is not None]

    def by_seed(self, name: str, bits: float, steps: int) -> dict[int, float]:
        """A row's losses, with the steps that it is granted."""
        return {cell["key"]["seed"]: cell["loss"] for cell in self.runs(ROW[name], bits, steps, granted=True)}


def figures(cells: harness.Cells, effort: Effort) -> dict[str, Any]:
    """The claim's keys, on the effort's first task after its fewest steps."""
    losses, steps, two = Losses(cells, effort, effort.tasks[0]), effort.steps[0], effort.bits[0]
    compared = (effort.ours, PUBLISHED, LORA16, AUTOROUND)
    ours, theirs, whole, peer = (losses.by_seed(name, two, steps) for name in compared)
    three = losses.by_seed(PUBLISHED, 3.25, steps)
    return {
        "ours": effort.ours,
        "gap_closed_at_2bit": _rounded(_closed(ours, theirs, whole)),
        "nats_above_lora16": _rounded(_minus(ours, whole)),
        "loss_vs_autoround_2bit": _rounded(_minus(ours, peer)),
        "loss_225_vs_loftq_325": _rounded(_minus(ours, three)),
        "perplexity_at_steps": {str(s): _perplexity(losses, effort, two, s) for s in (0, *effort.steps)},
        "seeds": len(ours.keys() & whole.keys()),
        "true_bits": {name: _bits(losses, name, two, steps) for name in (effort.ours, PUBLISHED, AUTOROUND)},
    }


def _closed(ours: Mapping[int, float], theirs: Mapping[int, float], whole: Mapping[int, float]) -> float | None:
    here = {seed: loss for seed, loss in whole.items() if seed in ours and seed in theirs}
    left, gap = _minus(ours, here), _minus(theirs, here)
    return None if left is None or gap is None else 1 - left / gap


def _minus(one: Mapping[int, float], other: Mapping[int, float]) -> float | None:
    """The mean difference over the seeds of both; None where they share none."""
    shared = sorted(one.keys() & other.keys())
    return sum(one[seed] - other[seed] for seed in shared) / len(shared) if shared else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _perplexity(losses: Losses, effort: Effort, bits: float, steps: int) -> dict[str, float]:
    """Of every row that has been run at these steps: the exponential of its mean loss."""
    found = {}
    for name in dict.fromkeys((LORA16, PUBLISHED, ONE_WIDTH, effort.ours, AUTOROUND)):
        if steps:
            found_losses = losses.by_seed(name, bits, steps).values()
            loss = sum(found_losses) / len(found_losses) if found_losses else None
        else:
            row = ROW[name]
            cell = losses.cells.find(Cell(row, 16.0 if row.maker == "none" else bits, losses.task, 0, 0).key)
            loss = None if cell is None else cell["loss"]
        if loss is not None:
            found[name] = round(math.exp(min(loss, 80.0)), 3)
    return found


def _bits(losses: Losses, name: str, bits: float, steps: int) -> float | None:
    runs = losses.runs(ROW[name], bits, steps, granted=True)
    return round(runs[0]["true_bits"], 4) if runs else None


def show(cells: harness.Cells, effort: Effort) -> None:
    """One table per task and number of bits; then what each base cost."""
    for task in effort.tasks:
        for bits in effort.bits:
            rows = [line for row in effort.rows if (line := _line(Losses(cells, effort, task), row, bits))]
            if rows:
                print(f"\n{task}, {bits} bits: loss in nats (mean of seeds, standard error between them)")
                columns = ("row", "true bits", "with start", "before", *(f"{s} steps" for s in effort.steps))
                harness.table((*columns, *(f"{s}+{effort.refine}" for s in effort.steps)), rows)
    costs = [line for row in effort.rows for bits in effort.bits if (line := _cost(cells, effort, row, bits))]
    if costs:
        print("\nwhat a base costs, per million weights")
        harness.table(("row", "bits", "seconds", "seconds/M", "peak MiB", "MiB/M"), costs)


def _line(losses: Losses, row: Row, bits: float) -> list[object] | None:
    before = losses.cells.find(Cell(row, 16.0 if row.maker == "none" else bits, losses.task, 0, 0).key)
    if before is None:
        return None
    spread = [_spread(losses.runs(row, bits, steps, granted=False)) for steps in losses.effort.steps]
    spread += [_spread(losses.runs(row, bits, steps, granted=True)) for steps in losses.effort.steps]
    return [row.name, before["true_bits"], before["true_bits_with_start"], before["loss"], *spread]


def _spread(runs: Sequence[dict[str, Any]]) -> str:
    losses = [run["loss"] for run in runs]
    if not losses:
        return "-"
    mean = sum(losses) / len(losses)
    if len(losses) == 1:
        return f"{mean:.4f}"
    return f"{mean:.4f} +- {math.sqrt(sum((x - mean) ** 2 for x in losses) / (len(losses) - 1) / len(losses)):.4f}"


def _cost(cells: harness.Cells, effort: Effort, row: Row, bits: float) -> list[object] | None:
    cell = cells.find(Cell(row, bits, effort.tasks[0], 0, 0).key)
    if cell is None or not cell.get("weights"):
        return None
    millions, memory = cell["weights"] / 1e6, cell["peak_mib"]
    per = "-" if memory is None else memory / millions
    return [row.name, bits, cell["seconds"], cell["seconds"] / millions, memory or "-", per]
