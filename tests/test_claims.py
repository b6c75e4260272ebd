"""bench/claims.py: the rules by hand, the file of claims, and that nothing undecided is counted."""

import importlib
import tomllib
from pathlib import Path
from typing import Any

import pytest

from bitloft.options.recipe import Recipe, Row

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def bench_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


def rules() -> Any:
    return importlib.import_module("claims_grid.rules")


def outcome(kind: str, high: list[float], low: list[float], margin: float = 0.0) -> str:
    rows = {"h": high, "l": low}
    part = {"kind": kind, "model": "m", "metric": "x", "high": "h", "low": "l", "margin": margin}
    series = lambda model, row, metric: {str(i): v for i, v in enumerate(rows[row])}  # noqa: E731
    return str(rules().decide(part, series).outcome)


@pytest.mark.parametrize(
    ("kind", "high", "low", "margin", "expected"),
    [
        # differences 1, 2, 3: mean 2, standard error 1 / sqrt(3) = 0.577
        ("greater", [1, 2, 3], [0, 0, 0], 0.0, "holds"),
        ("greater", [1, 2, 3], [0, 0, 0], 2.5, "ties"),
        ("greater", [1, 2, 3], [0, 0, 0], 3.5, "fails"),
        ("greater", [0, 0, 0], [1, 2, 3], 0.0, "fails"),
        ("greater", [-1, 2, 1], [0, 0, 0], 0.0, "ties"),
        ("not_worse", [0, 0, 0], [1, 2, 3], 4.0, "holds"),
        ("not_worse", [0, 0, 0], [1, 2, 3], 2.0, "ties"),
        ("not_worse", [0, 0, 0], [1, 2, 3], 0.5, "fails"),
        ("equal", [1, 2, 3], [0, 0, 0], 3.2, "holds"),
        ("equal", [1, 2, 3], [0, 0, 0], 2.0, "ties"),
        ("equal", [1, 2, 3], [0, 0, 0], 0.5, "fails"),
        ("every", [1, 2, 3], [0, 0, 0], 0.0, "holds"),
        ("every", [1, 2, 0], [0, 0, 0], 0.0, "fails"),
        ("greater", [1], [0], 0.0, "not measured"),
    ],
)
def test_rules_by_hand(kind: str, high: list[float], low: list[float], margin: float, expected: str) -> None:
    assert outcome(kind, high, low, margin) == expected


def test_differences_of_rows_are_paired() -> None:
    values = {"a": {"0": 5.0, "1": 9.0}, "b": {"0": 1.0, "1": 2.0}, "c": {"0": 3.0}, "d": {"0": 1.0, "1": 0.0}}
    part = {"kind": "greater", "model": "m", "metric": "x", "high": ["a", "b"], "low": "d"}
    found = rules().decide(part, lambda model, row, metric: values[row])
    assert (found.value, found.pairs) == (5.0, 2)  # (5-1-1, 9-2-0)
    part = part | {"low": ["c", "d"]}
    assert rules().decide(part, lambda model, row, metric: values.get(row)).pairs == 1
    assert rules().decide(part, lambda model, row, metric: None).outcome == "not measured"


def of(*names: str) -> str:
    return str(rules().of_claim([rules().Verdict({}, name) for name in names]))


def test_a_claim_is_what_its_parts_are() -> None:
    assert of("holds", "holds") == "holds"
    assert of("holds", "ties") == "ties"
    assert of("ties", "fails", "not measured") == "fails"
    assert of("holds", "not measured") == "not measured"


def test_every_claim_names_rows_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    table = tomllib.loads((ROOT / "bench" / "claims.toml").read_text(encoding="utf-8"))
    assert [claim["number"] for claim in table["claims"]] == list(range(1, 19))
    rows = {name: {row["name"] for row in recipe["rows"]} for name, recipe in table["recipes"].items()}
    for claim in [*table["claims"], *table["shows"]]:
        for part in claim["parts"]:
            assert part["kind"] in ("greater", "not_worse", "equal", "every", "within")
            if part["model"] in rows:
                sides = [part["high"], part["low"]]
                names = {n for side in sides for n in ([side] if isinstance(side, str) else side)}
                assert names <= rows[part["model"]]


class Search:
    """A bench whose held-out loss is least at a rate of 2."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.asked = recipe, list[tuple[float, bool]]()

    def run(self, row: Row, seed: int, *, rate: float, held: bool) -> dict[str, Any]:
        self.asked.append((rate, held))
        return {"scores": [{"name": "loss", "value": abs(rate - 2), "better": "low"}], "lr": rate}


def test_a_rate_is_what_held_out_rows_choose_and_is_searched_once(tmp_path: Path) -> None:
    work = importlib.import_module("claims_grid.work")
    harness = importlib.import_module("harness")
    searched, fixed = Row("lora", name="a"), Row("lora", name="b", lr=7.0)
    recipe = Recipe("r", "model", "task", (searched, fixed), rates=(1.0, 2.0, 3.0))
    bench = Search(recipe)
    cells = harness.Cells(tmp_path / "cells.jsonl")
    opened = work.Work(tmp_path, cells, {"m": recipe}, {"m": bench})
    assert [opened.rate("m", searched), opened.rate("m", searched), opened.rate("m", fixed)] == [2.0, 2.0, None]
    assert bench.asked == [(1.0, True), (2.0, True), (3.0, True)]
    assert work.Table(cells).series("m", "a", "held out") is None  # what chose a rate judges nothing


def test_the_page_is_put_between_its_markers(tmp_path: Path) -> None:
    page = importlib.import_module("claims_grid.page")
    file = tmp_path / "x.md"
    file.write_text(f"a\n{page.BEGIN}\nformer\n{page.END}\nb\n")
    table = {"claims": [{"number": 1, "says": "s", "parts": [
        {"kind": "within", "model": "m", "metric": "x", "row": "r", "margin": [0, 2]}]}], "shows": []}  # fmt: skip
    found = page.figures(table, lambda model, row, metric: {"0": 1.0})
    assert (found["decided"], found["holds"], found["not_measured"]) == (1, 1, [])
    page.put(file, page.page(found, 1, {}))
    text = file.read_text()
    assert text.startswith("a\n")
    assert text.endswith("b\n")
    assert "1 of 1 claims decided: 1 hold" in text
    assert "former" not in text
    failing = page.figures(table, lambda model, row, metric: {"0": 3.0})
    assert "- **1** why 3" in page.page(failing, 1, {"1": "why 3"})
    assert page.explained("{m: a b|x} and {m: c|y}", lambda m, row, x: 0.5 if row == "a b" else None) == "0.5 and ?"
    none = page.figures(table, lambda model, row, metric: None)
    assert (none["decided"], none["not_measured"]) == (0, [1])
    with pytest.raises(ValueError, match="has no <!-- claims:begin"):
        page.put(ROOT / "README.md", "")
