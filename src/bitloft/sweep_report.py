"""What a sweep came to: means over seeds with their standard errors, as a table and as one HTML page with the plot."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bitloft import report as paper
from bitloft.options.recipe import Recipe, Row
from bitloft.regimes import main_score

Cell = dict[str, Any]  # one row with one seed: its scores, bits, seconds, or why it failed


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


def report_of(out: str, plan: Recipe, cells: Sequence[Cell], resumed: int, seconds: float) -> SweepReport:
    """The lines of the recipe's rows, from its cells."""
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


def page_of(report: SweepReport, plan: Recipe) -> str:
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
