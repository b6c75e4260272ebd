"""sweep.py: failures are rows, an interrupted sweep goes on, table, plot and page say the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitloft.errors import CheckpointError, OptionError
from bitloft.integrations.ray import Cluster
from bitloft.options.recipe import Recipe, recipe_of
from bitloft.regimes import Bench
from bitloft.sweep import _lost, _prepare, sweep
from tests.task_models import sentiment, tiny_bert


def plan(tmp_path: Path, **change: Any) -> Recipe:
    table: dict[str, Any] = {
        "name": "demo",
        "model": str(tiny_bert(tmp_path / "m")),
        "task": "sst2",
        "data": str(sentiment(tmp_path / "data")),
        "length": 16,
        "batch": 4,
        "seeds": [0, 1],
        "train": {"steps": 1, "batch": 4},
        "rows": [{"regime": "lora", "rank": 2}, {"regime": ["qlora", "loftq"], "format": "nf2:32", "rank": 2}],
    }
    return recipe_of(table | change)


def test_a_sweep_writes_cells_table_and_page(tmp_path: Path) -> None:
    report = sweep(plan(tmp_path), tmp_path / "out")
    assert (report.cells, report.failures, report.resumed, report.metric) == (6, 0, 0, "accuracy")
    cells = [json.loads(line) for line in (tmp_path / "out" / "cells.jsonl").read_text().splitlines()]
    assert [(cell["row"], cell["seed"]) for cell in cells[:2]] == [("lora 16 bit r2", 0), ("qlora nf2:32 r2", 0)]
    line = report.lines[2]
    values = [c["scores"][0]["value"] for c in cells if c["row"] == line.label]
    assert line.value == pytest.approx(sum(values) / 2)
    assert line.stderr == pytest.approx(abs(values[0] - values[1]) / 2)
    assert f"{line.value:.4f}" in (tmp_path / "out" / "table.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/svg+xml" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://www.w3.org", "")
    assert not (tmp_path / "out.work").exists()


def test_failures_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"regime": "lora", "rank": 2}, {"regime": "loftq", "format": "nf2:32", "rank": 64}]
    run = Bench.run

    def broken(self: Bench, row: Any, seed: int, **how: Any) -> dict[str, Any]:
        if row.regime == "lora" and seed == 1:
            raise MemoryError("no more")
        return run(self, row, seed, **how)

    monkeypatch.setattr(Bench, "run", broken)
    report = sweep(plan(tmp_path, rows=rows), tmp_path / "out")
    assert report.failures == 3
    lora, loftq = report.lines
    assert (lora.seeds, lora.failed) == (1, "MemoryError: no more")
    assert loftq.value is None
    assert "rank 64 exceeds" in loftq.failed
    assert "What failed" in (tmp_path / "out" / "report.html").read_text()


def test_an_interrupted_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, run, told = plan(tmp_path), Bench.run, list[str]()

    def stops(self: Bench, row: Any, seed: int, **how: Any) -> dict[str, Any]:
        if len(told) == 4:
            raise KeyboardInterrupt
        told.append(f"{row.label} {seed}")
        return run(self, row, seed, **how)

    monkeypatch.setattr(Bench, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        sweep(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.work" / "journal.jsonl").exists()
    monkeypatch.setattr(Bench, "run", run)
    with pytest.raises(CheckpointError, match="holds an interrupted run; resume it"):
        sweep(recipe, tmp_path / "out")
    with pytest.raises(CheckpointError, match="resume with the same settings"):
        sweep(plan(tmp_path, seeds=[0, 1, 2]), tmp_path / "out", resume=True)

    def counts(self: Bench, row: Any, seed: int, **how: Any) -> dict[str, Any]:
        told.append("again")
        return run(self, row, seed, **how)

    monkeypatch.setattr(Bench, "run", counts)
    report = sweep(recipe, tmp_path / "out", resume=True)
    assert (report.resumed, report.cells) == (4, 6)
    assert told.count("again") == 2
    whole = sweep(recipe, tmp_path / "whole")
    assert [line.value for line in whole.lines] == [line.value for line in report.lines]


def test_rates_are_searched_equally(tmp_path: Path) -> None:
    rates = [1e-5, 1e-3]
    report = sweep(plan(tmp_path, rates=rates, seeds=[0]), tmp_path / "out")
    assert {line.lr for line in report.lines} <= set(rates)


def test_a_recipe_file_and_its_errors(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="there is no recipe"):
        sweep(tmp_path / "none.toml", tmp_path / "out")
    with pytest.raises(OptionError, match="has no metric 'f1'"):
        sweep(plan(tmp_path, metric="f1", seeds=[0], rows=[{"regime": "lora", "rank": 2}]), tmp_path / "out")


def scores(out: Path) -> list[tuple[Any, ...]]:
    """What decides a table: everything of the cells but how long they took."""
    cells = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    return [tuple((k, json.dumps(v)) for k, v in sorted(cell.items()) if not k.endswith("seconds")) for cell in cells]


def test_cells_on_a_cluster_are_those_of_here(ray_cluster: None, tmp_path: Path) -> None:
    """Rates searched, a calibrated row and a failing one (rank too large) among them; what failed is tried again."""
    rows = [
        {"regime": "lora", "rank": 2},
        {"regime": ["qlora", "loftq"], "format": "nf2:32", "rank": 2},
        {"regime": "calibrated", "format": "nf2:32", "rank": 2, "quantize": {"samples": 2, "calibrate_length": 16}},
        {"regime": "loftq", "format": "nf2:32", "rank": 64, "name": "large"},
    ]
    recipe, told = plan(tmp_path, rows=rows, rates=[1e-4, 1e-3]), list[tuple[int, int, str]]()
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = sweep(recipe, tmp_path / "here")
    finally:
        torch.set_num_threads(usual)
    there = sweep(recipe, tmp_path / "there", cluster=Cluster(workers=2), progress=lambda *a: told.append(a))
    assert scores(tmp_path / "there") == scores(tmp_path / "here")
    assert there.failures == here.failures == 2
    assert "rank 64 exceeds" in there.lines[-1].failed
    assert [done for done, _, _ in told] == list(range(1, 11))
    assert not (tmp_path / "there.work").exists()


def test_a_sweep_that_stopped_on_a_cluster_goes_on_here(ray_cluster: None, tmp_path: Path) -> None:
    recipe = plan(tmp_path)

    def stop(done: int, total: int, text: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(recipe, tmp_path / "out", cluster=Cluster(workers=2), progress=stop)
    report = sweep(recipe, tmp_path / "out", resume=True)
    assert (report.resumed, report.cells, report.failures) == (2, 6, 0)
    again = sweep(recipe, tmp_path / "whole", cluster=Cluster(workers=1))
    assert [line.value for line in again.lines] == [line.value for line in report.lines]


def test_a_node_that_does_not_see_the_bases_and_a_dead_process(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"this node does not see .*put it on shared storage"):
        _prepare(plan(tmp_path), tmp_path, tmp_path / "cluster-0.txt", 1)
    assert _lost(("cell", plan(tmp_path).rows[0], 0, None), "it died") == {"failed": "it died"}
