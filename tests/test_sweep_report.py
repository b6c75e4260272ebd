"""sweep_report.py: means and standard errors over seeds, rows that failed, and the page that shows both."""

import math
from typing import Any

import pytest

from bitloft.options.recipe import Recipe, Row
from bitloft.sweep_report import page_of, report_of


def cell(row: str, seed: int, value: float, better: str = "high") -> dict[str, Any]:
    score = {"name": "accuracy", "value": value, "stderr": 0.02, "better": better}
    return {"row": row, "regime": "loftq", "seed": seed, "scores": [score], "true_bits": 2.25, "with_start": 2.5,
            "lr": 1e-3, "seconds": 2.0}  # fmt: skip


def recipe(*labels: str) -> Recipe:
    rows = tuple(Row(name=label, regime="loftq", format="lm2:64") for label in labels)
    return Recipe(name="tried", model="m", task="sst2", rows=rows, seeds=(0, 1))


def test_lines_are_means_over_seeds() -> None:
    plan = recipe("good", "bad")
    cells = [cell("good", 0, 0.8), cell("good", 1, 0.9), {"row": "bad", "regime": "loftq", "seed": 0, "failed": "why"},
             {"row": "bad", "regime": "loftq", "seed": 1, "failed": "why"}]  # fmt: skip
    found = report_of("out", plan, cells, 1, 3.0)
    good, bad = found.lines
    assert (found.metric, found.better, found.cells, found.failures, found.resumed) == ("accuracy", "high", 4, 2, 1)
    assert good.value == pytest.approx(0.85)
    assert good.stderr == pytest.approx(math.sqrt(2 * 0.05**2 / 1 / 2))
    assert (bad.value, bad.failed) == (None, "why")
    table = found.table().markdown()
    assert "0.8500 ± 0.0500" in table
    page = page_of(found, plan)
    assert "What failed" in page
    assert "4 cells, 2 failed" in page


def test_one_seed_keeps_the_error_of_its_rows() -> None:
    (line,) = report_of("out", recipe("one"), [cell("one", 0, 0.8)], 0, 1.0).lines
    assert (line.value, line.stderr, line.seeds) == (0.8, 0.02, 1)
