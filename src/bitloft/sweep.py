"""The sweep verb: every row of a recipe with every seed; a table, a plot of quality against true bits, one HTML page.

    OUT/cells.jsonl    one line a cell: row, seed, scores, bits, seconds, or why it failed
    OUT/table.md       means over seeds with their standard errors
    OUT/report.html    the same with the plot and the settings, one file that needs no other

A cell that fails is a line with its reason, and the sweep goes on. Finished cells are written down one by one in
OUT.work (``journal``): an interrupted sweep goes on with ``resume`` and the same recipe, failed cells are tried again.
Where a recipe names several learning ``rates``, each row is trained with each of them from the first seed, judged on
held-out training rows, and keeps the best: the same search for every method.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitloft import report as paper
from bitloft.checkpoint import write_json
from bitloft.errors import BitloftError
from bitloft.journal import Journal, working
from bitloft.options.recipe import Recipe, Row, read_recipe
from bitloft.regimes import Bench, main_score

CELLS, TABLE, PAGE, RECIPE = "cells.jsonl", "table.md", "report.html", "recipe.json"
Progress = Callable[[int, int, str], None]
Cell = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A row of the table: mean of the main metric over seeds, ``stderr`` between seeds (within one where one ran).

    ``failed`` says why, where no seed of the row has a figure."""

    label: str
    regime: str
    true_bits: float | None
    with_start: float | None
    value: float | None
    stderr: float | None
    seeds: int
    lr: float | None
    seconds: float
    failed: str = ""


@dataclass(frozen=True)
class SweepReport:
    """What ``sweep`` did; ``resumed`` counts the cells that an earlier run had finished."""

    out: str
    recipe: str
    metric: str
    better: str
    lines: tuple[Line, ...]
    cells: int
    failures: int
    resumed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> paper.Table:
        """One line a row, best figures as digits that the terminal, the file and the page share."""
        columns = ("row", "true bits", "with start", self.metric, "seeds", "lr", "seconds", "failed")
        return paper.Table(columns, tuple(_cells(line) for line in self.lines))


def sweep(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    work: str | Path | None = None,
    progress: Progress | None = None,
) -> SweepReport:
    """Run a recipe (or the TOML file that holds one) into the directory ``out``.

    ``work`` keeps bases for other sweeps; without it they go when the sweep is complete. Raises OptionError for a bad
    recipe, DataError for data that is missing, CheckpointError where ``out`` or an interrupted run is in the way; what
    happens inside a cell is a row of the report.
    """
    began = time.perf_counter()
    plan = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    identity = json.loads(json.dumps(asdict(plan), default=dict))
    with working(out, identity, overwrite=overwrite, resume=resume) as journal:
        bench = Bench.open(plan, Path(work) if work is not None else journal.directory.parent / "bases")
        resumed = sum("failed" not in cell for cell in journal.done.values())
        _measure(bench, journal, progress)
        cells = [journal.done[_name(row, seed)] for row, seed in plan.cells()]
        report = _report(str(out), plan, cells, resumed, time.perf_counter() - began)
        write_json(journal.directory / RECIPE, identity)
        lines = "".join(json.dumps(cell, sort_keys=True) + "\n" for cell in cells)
        (journal.directory / CELLS).write_text(lines, encoding="utf-8")
        (journal.directory / TABLE).write_text(report.table().markdown() + "\n", encoding="utf-8")
        paper.write(journal.directory / PAGE, _page(report, plan))
    return report


def _measure(bench: Bench, journal: Journal, progress: Progress | None) -> None:
    """Every cell that is not in the journal, in the recipe's order."""
    planned = list(bench.recipe.cells())
    for done, (row, seed) in enumerate(planned):
        if progress is not None:
            progress(done, len(planned), f"{row.label}, seed {seed}")
        name = _name(row, seed)
        if name in journal.done and "failed" not in journal.done[name]:
            continue
        journal.add(name, {"row": row.label, "regime": row.regime, "seed": seed} | _cell(bench, journal, row, seed))
    if progress is not None:
        progress(len(planned), len(planned), "")


def _cell(bench: Bench, journal: Journal, row: Row, seed: int) -> Cell:
    try:
        return bench.run(row, seed, rate=_rate(bench, journal, row))
    except BitloftError as error:
        return {"failed": str(error)}
    except Exception as error:  # a cell that runs out of memory or meets a bug must not take the others with it
        return {"failed": f"{type(error).__name__}: {error}"}


def _rate(bench: Bench, journal: Journal, row: Row) -> float | None:
    """The learning rate of a row that held-out rows choose; None where there is no search."""
    if not bench.recipe.rates or row.untrained or row.lr is not None:
        return None
    found: dict[float, float] = {}
    for rate in bench.recipe.rates:
        name = f"rate {rate:g} of {row.label}"
        if name not in journal.done:
            journal.add(name, bench.run(row, bench.recipe.seeds[0], rate=rate, held=True))
        score = main_score(journal.done[name]["scores"], bench.recipe.metric)
        found[rate] = score["value"] if score["better"] == "high" else -score["value"]
    return max(found, key=lambda rate: found[rate])


def _name(row: Row, seed: int) -> str:
    return f"{row.label}, seed {seed}"


def _report(out: str, plan: Recipe, cells: Sequence[Cell], resumed: int, seconds: float) -> SweepReport:
    known = [cell for cell in cells if "failed" not in cell]
    main = main_score(known[0]["scores"], plan.metric) if known else {"name": plan.metric or "score", "better": "high"}
    lines = tuple(_line(row, [c for c in cells if c["row"] == row.label], plan.metric) for row in plan.rows)
    failures = len(cells) - len(known)
    return SweepReport(
        out, plan.name, main["name"], main["better"], lines, len(cells), failures, resumed, round(seconds, 2)
    )


def _line(row: Row, cells: Sequence[Cell], metric: str | None) -> Line:
    known = [cell for cell in cells if "failed" not in cell]
    failed = "; ".join(dict.fromkeys(cell["failed"] for cell in cells if "failed" in cell))
    if not known:
        return Line(row.label, row.regime, None, None, None, None, 0, None, 0.0, failed)
    scores = [main_score(cell["scores"], metric) for cell in known]
    values = [score["value"] for score in scores]
    value = sum(values) / len(values)
    spread = scores[0]["stderr"]
    if len(values) > 1:
        spread = math.sqrt(sum((v - value) ** 2 for v in values) / (len(values) - 1) / len(values))
    seconds = sum(cell["seconds"] for cell in known) / len(known)
    first = known[0]
    bits = (first["true_bits"], first["with_start"])
    return Line(row.label, row.regime, *bits, value, spread, len(values), first["lr"], round(seconds, 1), failed)


def _cells(line: Line) -> tuple[str, ...]:
    if line.value is None:
        return (line.label, "", "", "", "0", "", "", line.failed)
    bits = (f"{line.true_bits:.3f}", f"{line.with_start:.3f}")
    value = f"{line.value:.4f}" + (f" ± {line.stderr:.4f}" if line.stderr is not None else "")
    return (line.label, *bits, value, str(line.seeds), f"{line.lr:g}", f"{line.seconds:.1f}", line.failed)


def _page(report: SweepReport, plan: Recipe) -> str:
    """The HTML page: what was asked, the table, the plot, what failed."""
    asked = (
        f"{plan.model} on {plan.task}; {plan.train.steps or f'{plan.train.epochs:g} epochs'}"
        f"{' steps' if plan.train.steps else ''}, batch {plan.train.batch}, seeds {', '.join(map(str, plan.seeds))}. "
        f"{report.cells} cells, {report.failures} failed. Bits are true bits per packed weight."
    )
    parts: list[str | paper.Table | paper.Figure] = [asked, report.table()]
    points = _points(report)
    if points:
        which = "higher" if report.better == "high" else "lower"
        caption = f"{report.metric} against true bits (start included); bars are one standard error; {which} is better."
        parts.append(paper.points(points, x="true bits per weight, start included", y=report.metric, caption=caption))
    sections = [paper.Section("Results", tuple(parts))]
    failed = tuple((line.label, line.failed) for line in report.lines if line.failed)
    if failed:
        sections.append(paper.Section("What failed", (paper.Table(("row", "why"), failed),)))
    return paper.page(f"Sweep {plan.name}", sections)


def _points(report: SweepReport) -> dict[str, list[tuple[float, float, float]]]:
    """Regime -> (bits, value, standard error), packed rows only."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for line in report.lines:
        if line.value is not None and line.with_start is not None:
            found.setdefault(line.regime, []).append((line.with_start, line.value, line.stderr or 0.0))
    return {name: sorted(points) for name, points in found.items()}
