"""What a base directory says of itself: the fingerprints of weights and source, bits, name, dtype, tokenizer."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitloft
from bitloft.errors import CheckpointError
from bitloft.integrations.record import base_record, load_tokenizer, stored_dtype
from bitloft.quantize import quantize


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("b") / "base"
    quantize(tiny_model, out, format="lm4:64", rank=4)
    return out


def test_the_record_identifies_weights_and_source(base: Path, tiny_model: Path, tmp_path: Path) -> None:
    record = base_record(base, verify=True)
    assert record.options["format"] == "lm4:64"
    assert record.source is not None
    bitloft.register()
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "resaved")
    resaved = base_record(tmp_path / "resaved")
    assert resaved.source is None
    assert resaved.fingerprint == record.fingerprint  # the same weight bytes
    other = tmp_path / "other"
    quantize(tiny_model, other, format="lm4:64", rank=4, seed=1)
    assert base_record(other).source == record.source
    assert base_record(other).fingerprint != record.fingerprint  # the start is part of the base


def test_it_knows_its_bits_and_the_name_of_its_source(base: Path, tiny_model: Path, tmp_path: Path) -> None:
    record = base_record(base)
    assert record.bits == 4
    assert record.source_name is not None
    assert Path(record.source_name).name == tiny_model.name
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    assert base_record(tmp_path).source_name is None  # no report says it


def test_a_model_that_is_not_packed_has_no_record(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a bitloft base; make one with"):
        base_record(tiny_model)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_the_stored_dtype_is_the_config_s(tmp_path: Path) -> None:
    for dtype, expected in (("float16", torch.float16), ("bfloat16", torch.bfloat16), ("nonsense", torch.float32)):
        (tmp_path / "config.json").write_text(json.dumps({"dtype": dtype}), encoding="utf-8")
        assert stored_dtype(tmp_path) == expected
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert stored_dtype(tmp_path) == torch.float32
