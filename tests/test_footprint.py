"""footprint.py: the bytes that are planned are the bytes that come out, from a config without weights too."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bitloft.adapters import WEIGHTS_FILE
from bitloft.checkpoint import weight_files
from bitloft.errors import CheckpointError
from bitloft.footprint import footprint, random_llama, sketched
from bitloft.integrations.loading import load
from bitloft.integrations.peft import fresh_adapter, save_adapter
from bitloft.options import PlanOptions
from bitloft.quantize import quantize


@pytest.mark.parametrize(
    "settings",
    [
        {"format": "lm2:64", "rank": 4},
        {"format": "nf4:64+dq", "rank": 0, "solver": "qlora"},
        {"format": "uniform3:32", "rank": 8, "rules": ("*.down_proj=book2:32",)},
    ],
)
def test_planned_bytes_are_the_bytes_of_the_files(settings: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    options = PlanOptions(adapter_rank=4, **settings)
    with sketched(str(tiny_model)) as source:
        found = footprint(source, options)
    report = quantize(tiny_model, tmp_path / "base", options.quantizing())
    assert found.base == sum(file.stat().st_size for file in weight_files(tmp_path / "base"))
    assert found.true_bits == pytest.approx(report.true_bits)
    assert found.start == sum(matrix.start_bytes for matrix in report.matrices)
    assert (found.weights, found.source) == (report.weights, report.source_bytes)
    model = load(tmp_path / "base")
    assert found.loaded == pytest.approx(model.get_memory_footprint(), rel=0.01)
    adapted = fresh_adapter(model, rank=4, alpha=4)
    (tmp_path / "adapter").mkdir()
    record = {"base": None, "source": None, "start": "frozen"}
    save_adapter(adapted, tmp_path / "adapter", base="x", record=record)
    assert found.adapter_plain == (tmp_path / "adapter" / WEIGHTS_FILE).stat().st_size
    assert found.adapter_values == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    cache = model(input_ids=model.dummy_inputs["input_ids"][:1], use_cache=True).past_key_values
    tokens = model.dummy_inputs["input_ids"].shape[1]
    assert found.cache * tokens == sum(t.nbytes for layer in cache for t in layer[:2])


def test_a_config_alone_gives_the_same(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / tiny_model.name).mkdir()
    shutil.copy(tiny_model / "config.json", tmp_path / tiny_model.name)
    options = PlanOptions(format="lm2:64", rank=4)
    with sketched(str(tiny_model)) as whole, sketched(str(tmp_path / tiny_model.name)) as alone:
        assert footprint(whole, options) == footprint(alone, options)
        place = Path(alone.folder)
    assert not place.exists()


def test_large_models_are_sketched_in_sparse_shards(tmp_path: Path) -> None:
    """LLaMA-2-70B's shape: 138 GB of files that take no space, counted in seconds."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float16", "hidden_size": 8192,
        "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "vocab_size": 32000, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with sketched(str(tmp_path)) as source:
        found = footprint(source, PlanOptions(format="lm2:64"))
        taken = sum(file.stat().st_blocks * 512 for file in Path(source.folder).iterdir())
    assert found.source == 137_953_296_384
    assert taken < 1 << 20
    assert 2.25 < found.true_bits < 2.26
    assert found.cache == 2 * 4 * 80 * 8 * 128


def test_what_cannot_be_planned(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no config that can be read"), sketched(str(tmp_path / "nothing")):
        pass
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="names no architecture"), sketched(str(tmp_path)):
        pass


def test_random_llama(tmp_path: Path) -> None:
    folder = random_llama(tmp_path / "m", 64, 128, 1, 128)
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 64
