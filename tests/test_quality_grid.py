"""The grid of bench/quality_adapter.py: figures follow their definitions, what is kept apart stays apart."""

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def bench_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


def part(name: str) -> Any:
    return importlib.import_module(f"adapter_grid.{name}")


def setting(seed: int = 0, base: str = "lm2:64", rank: int = 16, start: str = "frozen") -> Any:
    plan = part("plan")
    return plan.Setting(base, "words", rank, seed, plan.TOY, start)


def filled(file: Path, *settings: Any, stderr: float = 0.001) -> Any:
    """Base loss 3, whole adapter 2; LoRAQuant keeps 0.8 of the gain, ours 0.7, 0.9 and 0.98 at three sizes."""
    cells = importlib.import_module("harness").Cells(file)

    def add(key: dict[str, Any], loss: float, error: float, judged: bool = True, bits: float = 1.0) -> None:
        figures = {"loss": loss, "stderr": stderr, "error": error, "true_bits": bits}
        cells.get(key | {"judged": judged}, lambda: figures)

    for chosen in settings:
        add(chosen.alone.key("base"), 3.0, 1.0)
        add(chosen.key("full"), 2.0, 0.0)
        add(chosen.key("loraquant 2@0.8"), 2.2, 0.3)
        add(chosen.key("waterfill blind", "loraquant's bits"), 9.0, 0.03, judged=False)
        add(chosen.key("truncate 16", 1), 2.15, 0.3, bits=0.45)
        for size, gain in ((0.2, 0.7), (0.4, 0.9), (0.5, 0.98)):
            add(chosen.key("waterfill", size), 3 - gain, 0.1, bits=size)
    return cells


def test_figures_follow_their_definitions(tmp_path: Path) -> None:
    one = setting()
    cells = filled(tmp_path / "c.jsonl", one)
    cells.get(one.key("waterfill", 0.1) | {"judged": True}, lambda: {"skipped": "below the floor"})
    found = part("summary").summary(cells, [one, setting(seed=1)])
    base = found["bases"]["lm2:64"]
    assert base["adapters"] == [one.name]
    assert base["not_run"] == [setting(seed=1).name]
    assert base["error_vs_loraquant_same_bits"] == pytest.approx(0.1)
    assert base["loraquant_gain"] == pytest.approx(0.8)
    assert base["bits_for_loraquant_gain"] == pytest.approx(0.3)
    assert base["retained_gain"] == {"0.2": 0.7, "0.4": 0.9, "0.5": 0.98}
    assert (base["retained_gain_050"], base["retained_gain_080"]) == (pytest.approx(0.98), None)
    assert base["added_nats_050"] == pytest.approx(0.02)
    assert base["worst_adapter_050"] == one.name
    assert base["better_than_truncation"] == {"truncate 16 rank 1": True}


def test_the_worst_base_is_what_a_figure_says(tmp_path: Path) -> None:
    good, bad = setting(), setting(base="nf4:64")
    cells = filled(tmp_path / "c.jsonl", good, bad)
    worse = importlib.import_module("harness").Cells(None)
    for cell in cells:
        loss = cell["loss"] + 0.1 * (cell["key"]["base"] == "nf4:64" and cell["key"]["asked"] == 0.5)
        worse.get(cell["key"], lambda cell=cell, loss=loss: cell | {"loss": loss})
    found = part("summary").summary(worse, [good, bad])
    assert found["retained_gain_050"] == found["bases"]["nf4:64"]["retained_gain_050"] == pytest.approx(0.88)
    assert found["added_nats_050"] == pytest.approx(0.12)


def test_a_gain_within_its_noise_is_left_out_by_name(tmp_path: Path) -> None:
    assert 5 * math.hypot(0.2, 0.2) > 1
    found = part("summary").summary(filled(tmp_path / "c.jsonl", setting(), stderr=0.2), [setting()])
    assert found["bases"]["lm2:64"]["left_out"] == [setting().name]
    assert found["retained_gain_050"] is None


def test_frozen_and_trained_starts_stand_side_by_side(tmp_path: Path) -> None:
    both = [setting(), setting(start="trainable")]
    found = part("summary").starts(filled(tmp_path / "c.jsonl", *both), both)
    assert set(found["lm2:64"]) == {"frozen", "trainable"}
    assert found["lm2:64"]["frozen"] == {"whole": 2.0, "0.2": 2.3, "0.4": 2.1, "0.5": 2.02}


def test_what_the_figures_need_comes_first() -> None:
    plan = part("plan")
    found = plan.settings("full", plan.BASES)
    assert [(s.base, s.task, s.rank, s.seed) for s in found[:6]] == [
        (base, "gsm8k", 16, seed) for base in plan.BASES for seed in range(3)
    ]
    assert len(found) == len(set(found)) == len({s.name for s in found})
    assert {s.rank for s in found} == {8, 16, 64}
    assert {way.method for way in plan.ways("full")} >= {"sign", "rtn", "gptq", "pb_llm", "billm", "truncate 8"}


def test_a_refined_base_is_made_as_in_quality_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, work, decoder = part("plan"), part("work"), part("decoder")
    asked: dict[str, Any] = {}
    monkeypatch.setattr(work, "quantize", lambda source, out, **how: asked.update(how))
    monkeypatch.setattr(decoder, "text_files", lambda place, shared: {"wikitext2": {"train": tmp_path / "text"}})
    family = decoder.Decoder(tmp_path, tmp_path, tmp_path / "model")
    made = work.Work(tmp_path, filled(tmp_path / "c.jsonl"), lambda task: family)
    out = made.base(plan.Setting("lm2:64+refine", "gsm8k", 16, 0, plan.TOY))
    assert out == tmp_path / "bases" / "model-lm2_64+refine"
    base_plan = importlib.import_module("base_grid.plan")
    row = next(row for row in base_plan.ABLATIONS if row.name == "+refine")
    assert asked == {"format": row.formats[2.25], "calibrate": str(tmp_path / "text"), **row.settings}


def test_bases_of_encoders_are_not_refined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, work, encoder = part("plan"), part("work"), part("encoder")
    planned = [s for s in plan.settings("full", plan.BASES) if s.task in plan.ENCODER_TASKS]
    assert {s.task for s in planned} == set(plan.ENCODER_TASKS)
    assert not any(s.base.endswith(plan.REFINED) for s in planned)
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(work, "quantize", lambda source, out, **how: asked.append(how))
    monkeypatch.setattr(encoder.Encoder, "__init__", lambda self: None)
    monkeypatch.setattr(encoder.Encoder, "source", lambda self, task: tmp_path / task)
    made = work.Work(tmp_path, filled(tmp_path / "c.jsonl"), lambda task: encoder.Encoder())
    for setting in planned:
        made.base(setting)
    assert asked == [{"format": s.base, "rank": made.start_rank} for s in planned]


def test_cells_of_another_effort_are_other_cells() -> None:
    plan = part("plan")
    one = plan.Setting("nf4:64", "gsm8k", 16, 0, plan.FULL)
    other = plan.Setting("nf4:64", "gsm8k", 16, 0, plan.Effort(80, plan.FULL.rows))
    assert one.name != other.name
    assert one.key("waterfill", 0.5)["code"] == "trellis"  # cells of scalar codes, which have no such key, are not its
    assert one.key("waterfill scalar", 0.5)["code"] == "scalar"
    assert "code" not in one.key("loraquant 2@0.8")
    assert one.key("full") != other.key("full")
    assert one.alone.key("base") == other.alone.key("base")  # the base alone was not trained


def test_half_products_are_rounded_once() -> None:
    decoder = part("decoder")
    weight, bias, x = torch.randn(32, 64), nn.Parameter(torch.randn(32)), torch.randn(5, 64)
    y = decoder.HalfLinear(weight, bias)(x)
    assert y.dtype == torch.float32
    exact = x.bfloat16().double() @ weight.bfloat16().double().T
    assert torch.allclose((y - bias).double(), exact, rtol=2**-8, atol=1e-2)
