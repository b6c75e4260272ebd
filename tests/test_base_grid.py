"""The grid of bench/quality_base.py: figures follow their definitions, cells come in order, the rate is held-out's."""

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import harness
import quality_base
from base_grid.plan import AUTOROUND, LORA16, ONE_WIDTH, OURS, PUBLISHED, ROWS, Cell, Effort, effort_of
from base_grid.summary import figures, show
from base_grid.tasks import Text, judge, split_files
from base_grid.work import Work

ROW = {row.name: row for row in ROWS}
EFFORT = Effort(ROWS, (2.25,), ("wikitext2",), (0, 1), (120, 480), (2e-4, 5e-4), 120)
LOSSES = {LORA16: 2.8, PUBLISHED: 4.8, OURS: 3.1, AUTOROUND: 3.2}


def filled(path: Path | None = None) -> harness.Cells:
    """Losses as above at 240 steps in all; 0.1 more where the steps of refining are not granted; +- 0.01 by seed."""
    cells = harness.Cells(path)

    def add(name: str, seed: int, steps: int, loss: float) -> None:
        row = ROW[name]
        cell = Cell(row, 16.0 if row.maker == "none" else 2.25, "wikitext2", seed, steps)
        cells.get(cell.key, lambda: {"loss": loss, "true_bits": 2.25, "true_bits_with_start": 3.0})

    for name, loss in LOSSES.items():
        add(name, 0, 0, loss + 1)
        for seed, shift in ((0, 0.01), (1, -0.01)):
            add(name, seed, 120, loss + shift + (0 if name == OURS else 0.1))
            if name != OURS:
                add(name, seed, 240, loss + shift)
    return cells


def test_figures_follow_their_definitions(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(filled(), EFFORT)
    assert found["ours"] == OURS
    assert found["gap_closed_at_2bit"] == pytest.approx(1 - 0.3 / 2.0)
    assert found["nats_above_lora16"] == pytest.approx(0.3)
    assert found["loss_vs_autoround_2bit"] == pytest.approx(-0.1)
    assert found["loss_225_vs_loftq_325"] is None
    assert found["perplexity_at_steps"]["0"][OURS] == pytest.approx(math.exp(4.1), rel=1e-3)
    assert found["perplexity_at_steps"]["120"][PUBLISHED] == pytest.approx(math.exp(4.8), rel=1e-3)
    assert found["perplexity_at_steps"]["480"] == {}
    assert (found["seeds"], found["true_bits"][OURS]) == (2, 2.25)
    show(filled(), EFFORT)
    out = capsys.readouterr().out
    assert "3.1000 +- 0.0100" in out
    assert "2.9000 +- 0.0100" in out  # 16-bit LoRA at 120 steps, beside 2.8 at 240


def test_differences_are_taken_over_the_seeds_that_both_rows_have() -> None:
    cells, more = filled(), replace(EFFORT, seeds=(0, 1, 2))
    for name, steps, loss in ((OURS, 120, 3.7), (LORA16, 240, 2.8)):
        key = Cell(ROW[name], 16.0 if name == LORA16 else 2.25, "wikitext2", 2, steps).key
        cells.get(key, partial(dict, loss=loss, true_bits=2.25, true_bits_with_start=3.0))
    found = figures(cells, more)
    assert found["nats_above_lora16"] == pytest.approx((0.3 + 0.3 + 0.9) / 3)
    assert found["seeds"] == 3
    assert found["gap_closed_at_2bit"] == pytest.approx(1 - 0.3 / 2.0)  # without the third seed, which LoftQ lacks
    assert found["loss_vs_autoround_2bit"] == pytest.approx(-0.1)


def test_figures_without_cells_are_none() -> None:
    found = figures(harness.Cells(None), EFFORT)
    assert found["gap_closed_at_2bit"] is None
    assert found["seeds"] == 0


def test_the_two_bit_column_comes_first_and_ablations_last() -> None:
    full = effort_of("full")
    cells = list(full.cells())
    assert len({str(c.key) for c in cells if c.row.maker != "none"}) == sum(c.row.maker != "none" for c in cells)
    first = cells[: len(cells) // len(full.tasks)]
    assert {c.task for c in first} == {"wikitext2"}
    assert cells[0].key == {"row": LORA16, "bits": 16.0, "task": "wikitext2", "seed": 0, "steps": 240}
    column = [c for c in first if c.bits in (16.0, 2.25) and c.steps in (120, 240)][: 3 * len(full.rows)]
    assert [c.seed for c in column] == sorted(c.seed for c in column)
    bits = [c.bits for c in first if c.row.maker != "none"]
    assert bits == sorted(bits)
    assert {c.steps for c in cells if c.row.refined} == {120, 480}
    assert {c.steps for c in cells if not c.row.refined} == {120, 240, 480, 600}


def test_held_out_rows_choose_the_rate_and_test_rows_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float, str]] = []

    def run(self: Work, cell: Cell, rate: float, which: str) -> dict[str, Any]:
        asked.append((rate, which))
        return {"loss": 1.0 + abs(rate - 5e-4)}

    monkeypatch.setattr(Work, "_run", run)
    work = Work(tmp_path, EFFORT, harness.Cells(None), {}, {}, lambda name: pytest.fail("no task is opened"))
    found = [work.cell(Cell(ROW[LORA16], 16.0, "wikitext2", seed, steps)) for seed in (0, 1) for steps in (120, 240)]
    assert {cell["rate"] for cell in found} == {5e-4}
    assert asked[:2] == [(2e-4, "held"), (5e-4, "held")]
    assert asked[2:] == [(5e-4, "test")] * 4


@pytest.mark.parametrize(
    ("best", "tried"), [(2e-4, [2e-4, 5e-4, 1e-3]), (5e-4, [2e-4, 5e-4, 1e-3]), (1e-3, [5e-4, 1e-3])]
)
def test_rates_are_tried_from_the_middle_while_the_loss_falls(
    best: float, tried: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def run(self: Work, cell: Cell, rate: float, which: str) -> dict[str, Any]:
        asked.append(rate)
        return {"loss": abs(math.log(rate / best))}

    monkeypatch.setattr(Work, "_run", run)
    effort = replace(EFFORT, rates=(2e-4, 5e-4, 1e-3))
    work = Work(tmp_path, effort, harness.Cells(None), {}, {}, lambda name: pytest.fail("no task is opened"))
    assert work.rate(Cell(ROW[LORA16], 16.0, "wikitext2", 1, 240)) == best
    assert sorted(asked) == tried


def test_what_chose_the_rate_is_not_trained_twice(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    trained: list[int] = []
    usual = Work._tune

    def tune(self: Work, task: Any, model: Any, tuned: Any, seed: int, steps: int, rate: float) -> float:
        trained.append(steps)
        return usual(self, task, model, tuned, seed, steps, rate)

    monkeypatch.setattr(Work, "_tune", tune)
    text = "the quick brown fox jumps over the lazy dog " * 200
    files = split_files(tmp_path, "t", ".txt", text, text[:900], text[:2000])
    effort = Effort(ROWS, (2.25,), ("t",), (0, 1), (2,), (5e-4, 1e-3), 1, 2, 16, judged=2, held=1)
    task = Text(AutoTokenizer.from_pretrained(tiny_model), files, 2, 16, 2, 1)
    work = Work(tmp_path, effort, harness.Cells(None), {"t": tiny_model}, {"t": files["train"]}, lambda name: task)
    found = work.cell(Cell(ROW[LORA16], 16.0, "t", 0, 2))
    assert trained == [2, 2]  # one run for each rate; the judged cell is one of them
    assert found["loss"] != work.cells.find({**Cell(ROW[LORA16], 16.0, "t", 0, 2).key, "rate": found["rate"]})["loss"]  # type: ignore[index]
    again = Work(**{**vars(work), "cells": harness.Cells(None), "directory": tmp_path / "fresh"})
    assert again.cell(Cell(ROW[LORA16], 16.0, "t", 0, 2))["loss"] == pytest.approx(found["loss"], abs=1e-5)
    work.cell(Cell(ROW[LORA16], 16.0, "t", 1, 2))
    assert trained[-1] == 2
    assert len(trained) == 5


def test_a_part_of_the_grid_can_be_chosen() -> None:
    part = effort_of("full").only([LORA16, OURS], [2.25], [120], [1])
    found = {(c.row.name, c.bits, c.steps, c.seed) for c in part.cells() if c.task == "wikitext2"}
    assert found == {(LORA16, 16.0, 120, 1), (LORA16, 16.0, 240, 1), (OURS, 2.25, 120, 1)}
    quick = effort_of("quick")
    assert [(c.row.name, c.steps) for c in quick.cells()] == [(LORA16, 16), (PUBLISHED, 16), (ONE_WIDTH, 8)]
    assert quick.ours == ONE_WIDTH
    with pytest.raises(ValueError, match="'my row' is none of the rows 16-bit LoRA, LoftQ nf"):
        effort_of("full").only(["my row"], [], [], [])


def test_report_reads_cells_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(quality_base, "effort_of", lambda mode: EFFORT)
    monkeypatch.setattr(quality_base, "opened", lambda *given: pytest.fail("a model is opened"))
    filled(tmp_path / "cells" / "quality_base-full.jsonl")
    monkeypatch.setattr(sys, "argv", ["quality_base.py", "--report", "--threads", "1", "--work", str(tmp_path)])
    assert quality_base.main() == 0
    assert '"nats_above_lora16": 0.3' in capsys.readouterr().out.splitlines()[-1]


def test_a_cell_that_is_not_what_it_was_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Work, "_trained", lambda self, cell: {"loss": LOSSES[cell.row.name] + 0.5})
    work = Work(tmp_path, EFFORT, filled(), {}, {}, lambda name: pytest.fail("no task is opened"))
    differing = quality_base.verify(work, 100)
    assert len(differing) == 14
    monkeypatch.setattr(Work, "_trained", lambda self, cell: {"loss": work.cells.get(cell.key, dict)["loss"]})
    assert quality_base.verify(work, 100) == []


def test_losses_are_means_over_tokens(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bitloft.evaluate import evaluate

    text = "the quick brown fox jumps over the lazy dog " * 200
    files = split_files(tmp_path, "t", ".txt", text, text[:900], text[:2000])
    task = Text(AutoTokenizer.from_pretrained(tiny_model), files, 2, 16, 10, 3)
    monkey = pytest.MonkeyPatch()
    monkey.setattr("base_grid.tasks.JUDGED_LENGTH", 64)
    monkey.setattr("base_grid.tasks.choose_precision", lambda asked, device: _exact())
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    found = judge(task, model, "test")
    monkey.undo()
    wanted = evaluate(model, files["test"], tokenizer=task.tokenizer, length=64, limit=10)
    assert found["loss"] == pytest.approx(wanted.loss, rel=1e-5)
    assert found["stderr"] == pytest.approx(wanted.stderr, rel=1e-4)
    assert task.batch(1, 2)["input_ids"].shape == (2, 16)
    assert torch.equal(task.batch(1, 2)["input_ids"], task.batch(1, 2)["input_ids"])
    assert not torch.equal(task.batch(1, 2)["input_ids"], task.batch(1, 3)["input_ids"])


def _exact() -> Any:
    from bitloft.tasks.precision import Precision

    return Precision(torch.float32, "asked for")
