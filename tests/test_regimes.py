"""regimes.py: the same data and seeds for every regime, on an encoder, an encoder-decoder and a decoder."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bitloft.errors import OptionError
from bitloft.modules.linear import quant_linears
from bitloft.options import TrainOptions
from bitloft.options.recipe import Recipe, Row, recipe_of
from bitloft.regimes import Bench, fit, in_head, main_score, opened, reset_head
from bitloft.tasks.glue import TASKS, Classes
from tests.helpers import WORDS, write_rows
from tests.task_models import sentiment, tiny_bert, tiny_words

ROWS: list[dict[str, Any]] = [
    {"regime": "full", "lr": 1e-3},
    {"regime": "lora", "rank": 4},
    {"regime": "qlora", "format": "nf2:32", "rank": 4},
    {"regime": "qalora", "format": "uniform4:16+shift", "rank": 4},
    {"regime": "loftq", "format": "nf2:32", "rank": 4},
    {"regime": "calibrated", "format": "lm2:32", "rank": 4},
]


def recipe(model: Path, task: str, data: Path, **change: Any) -> Recipe:
    table: dict[str, Any] = {"model": str(model), "task": task, "data": str(data), "length": 32, "batch": 4}
    table |= {"rows": ROWS, "train": {"steps": 2, "batch": 4, "lr": 1e-3}}
    table["quantize"] = {"samples": 4, "calibrate_length": 16 if task == "sst2" else 48}
    return recipe_of(table | change)


@pytest.mark.parametrize("kind", ["encoder", "encoder-decoder", "decoder"])
def test_every_regime_runs_on_every_kind(kind: str, tmp_path: Path, tiny_model: Path) -> None:
    if kind == "encoder":
        plan = recipe(tiny_bert(tmp_path / "m"), "sst2", sentiment(tmp_path / "data"))
    elif kind == "encoder-decoder":
        model = tiny_words(tmp_path / "m")
        plan = recipe(model, "g2p", model, test_rows=4)
    else:
        (tmp_path / "data").mkdir()
        rows: list[dict[str, object]] = [{"question": WORDS[:20], "answer": f"#### {i}"} for i in range(8)]
        write_rows(tmp_path / "data" / "train.jsonl", rows)
        write_rows(tmp_path / "data" / "test.jsonl", rows[:2])
        plan = recipe(tiny_model, "gsm8k", tmp_path / "data", generates=False, length=64)
    bench = Bench.open(plan, tmp_path / "work")
    found = {row.regime: bench.run(row, seed) for row, seed in plan.cells()}
    assert set(found) == {row["regime"] for row in ROWS}
    for regime, cell in found.items():
        assert cell["scores"][-1]["count"] > 0
        assert cell["trained"] > 0
        assert (cell["true_bits"] == 16.0) == (regime in ("full", "lora"))
    assert found["loftq"]["error_after"] < found["loftq"]["error_before"]
    assert found["full"]["trained"] > found["lora"]["trained"] == found["qlora"]["trained"]


def test_a_cell_is_the_same_twice(tmp_path: Path) -> None:
    plan = recipe(tiny_bert(tmp_path / "m"), "sst2", sentiment(tmp_path / "data"), seeds=[3])
    cells = []
    for place in ("one", "two"):
        bench = Bench.open(plan, tmp_path / place)
        cells.append(bench.run(plan.rows[4], 3, keep=tmp_path / f"{place}.safetensors"))
    assert cells[0]["scores"] == cells[1]["scores"]
    assert cells[0]["loss"] == cells[1]["loss"]
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_what_is_trained_of_each_regime(tmp_path: Path) -> None:
    plan = recipe(tiny_bert(tmp_path / "m"), "sst2", sentiment(tmp_path / "data"))
    bench = Bench.open(plan, tmp_path / "work")
    for row in plan.rows:
        model = opened(bench.base(row), row, 0)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert any(in_head(name) for name in names)
        assert any(not in_head(name) and "lora_" in name for name in names) == (row.regime != "full")
    start = opened(bench.base(plan.rows[4]), plan.rows[4], 0)
    assert any(float(p.detach().abs().sum()) > 0 for n, p in start.named_parameters() if "lora_B" in n)
    frozen = opened(bench.base(plan.rows[4]), Row("loftq", "nf2:32", rank=4, start="frozen"), 0)
    assert all(float(p.detach().abs().sum()) == 0 for n, p in frozen.named_parameters() if "lora_B" in n)
    assert all(layer.start_enabled for layer in quant_linears(frozen).values())


def test_heads_come_from_the_seed(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(tiny_bert(tmp_path / "m", labels=2))
    heads = []
    for seed in (0, 0, 1):
        reset_head(model, seed)
        heads.append(model.classifier.weight.clone())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_held_out_rows_choose_and_are_not_trained_on(tmp_path: Path) -> None:
    plan = recipe(tiny_bert(tmp_path / "m"), "sst2", sentiment(tmp_path / "data"), rates=[1e-3, 5e-3])
    bench = Bench.open(plan, tmp_path / "work")
    assert len(bench.train) == 22
    assert len(bench.held) == 2
    assert bench.run(plan.rows[1], 0, rate=5e-3, held=True)["scores"][0]["count"] == 2


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no parameter to train"):
        fit(torch.nn.Linear(2, 2).requires_grad_(False), Classes(TASKS["sst2"], None, 8), [], TrainOptions())
    with pytest.raises(OptionError, match="has no metric 'f1'; it has accuracy"):
        main_score([{"name": "accuracy"}], "f1")
