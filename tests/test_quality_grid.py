"""The grid of bench/quality_adapter.py: cells survive a kill, figures follow their definitions."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from adapter_grid.cells import Cell, Cells
from adapter_grid.summary import summary
from adapter_grid.work import Setting

SETTING = Setting("lm2:64", "words", 16, 0)


def filled(file: Path, stderr: float = 0.001) -> Cells:
    """Base loss 3, whole adapter 2; LoRAQuant keeps 0.8 of the gain, ours 0.7, 0.9 and 0.98 at three sizes."""
    cells = Cells(file)

    def add(cell: Cell, loss: float, error: float) -> None:
        cells.add(cell | {"loss": loss, "stderr": stderr, "error": error, "true_bits": 1.0})

    add(Setting("lm2:64", "words", 0, 0).cell("base", ""), 3.0, 1.0)
    add(SETTING.cell("full", ""), 2.0, 0.0)
    add(SETTING.cell("loraquant 2@0.8", ""), 2.2, 0.3)
    add(SETTING.cell("waterfill", "loraquant's bits"), 2.05, 0.03)
    for size, gain in ((0.2, 0.7), (0.4, 0.9), (0.5, 0.98)):
        add(SETTING.cell("waterfill", size), 3 - gain, 0.1)
    return cells


def test_figures_follow_their_definitions(tmp_path: Path) -> None:
    found = summary(filled(tmp_path / "c.jsonl"), [SETTING])["lm2:64"]
    assert isinstance(found, dict)
    assert found["error_vs_loraquant_same_bits"] == pytest.approx(0.1)
    assert found["loraquant_gain"] == pytest.approx(0.8)
    assert found["bits_for_loraquant_gain"] == pytest.approx(0.3)
    assert (found["retained_gain_050"], found["retained_gain_080"]) == (pytest.approx(0.98), None)
    assert found["added_nats_050"] == pytest.approx(0.02)
    assert found["worst_adapter_050"] == SETTING.name
    assert found["left_out"] == []


def test_a_gain_within_its_noise_is_left_out_by_name(tmp_path: Path) -> None:
    found = summary(filled(tmp_path / "c.jsonl", stderr=0.2), [SETTING])["lm2:64"]
    assert isinstance(found, dict)
    assert 5 * math.hypot(0.2, 0.2) > 1
    assert found["left_out"] == [SETTING.name]
    assert found["retained_gain_050"] is None


def test_cells_survive_a_cut_line(tmp_path: Path) -> None:
    cells = filled(tmp_path / "c.jsonl")
    count = sum(1 for _ in cells)
    file = tmp_path / "c.jsonl"
    file.write_text(file.read_text() + '{"base": "lm2:64", "ta')
    again = Cells(file)
    assert sum(1 for _ in again) == count
    assert SETTING.cell("full", "") in again
    assert SETTING.cell("sign", "") not in again
