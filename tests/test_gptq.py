"""integrations/gptq.py and `convert --to gptq`: files that the layout's plain definition dequantizes to the base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bitloft.checkpoint import read_json
from bitloft.convert import convert
from bitloft.errors import OptionError
from bitloft.factors import read_factors
from bitloft.integrations.gptq import words
from bitloft.integrations.loading import load
from bitloft.modules.linear import quant_linears
from bitloft.quantize import quantize
from tests.helpers import make_adapter, tiny_llama


def stream(packed: Tensor, bits: int, count: int) -> Tensor:
    """[words, lanes] int32 -> [count, lanes]: value i is bits i*bits .. i*bits + bits of a lane's stream."""
    values = torch.zeros(count, packed.shape[1], dtype=torch.int64)
    for i in range(count):
        for bit in range(bits):
            word, place = divmod(i * bits + bit, 32)
            values[i] |= ((packed[word].to(torch.int64) >> place) & 1) << bit
    return values


def dequantized(tensors: dict[str, Tensor], name: str, bits: int) -> Tensor:
    """The layout's definition (gptq_v2): scale[g_idx] * (code - zero[g_idx]), [out, in] float32."""
    scales, group = tensors[f"{name}.scales"].float(), tensors[f"{name}.g_idx"].long()
    codes = stream(tensors[f"{name}.qweight"], bits, len(group))
    zeros = stream(tensors[f"{name}.qzeros"].T, bits, scales.shape[1]).T
    return (scales[group] * (codes - zeros[group])).T


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_definition_gives_the_base_back(bits: int, tiny_model: Path, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "base", format=f"uniform{bits}:32", rank=4)
    report = convert(tmp_path / "base", tmp_path / "out", to="gptq")
    assert max(report.changes.values()) < 2**-11
    tensors, base = (
        load_file(tmp_path / "out" / "model.safetensors"),
        quant_linears(load(tmp_path / "base", arrange=False)),
    )
    assert len(base) == 14
    start = read_factors(tmp_path / "out" / "start").pairs
    for name, layer in base.items():
        assert tensors[f"{name}.qweight"].dtype == tensors[f"{name}.qzeros"].dtype == torch.int32
        found = dequantized(tensors, name, bits)
        layer.start_enabled = False
        assert torch.allclose(found, layer.dense(), rtol=2**-10, atol=1e-7)
        layer.start_enabled = True
        assert torch.allclose(found + start[name].product(), layer.dense(), rtol=1e-3, atol=1e-4)
        assert f"{name}.weight" not in tensors
    settings = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert (settings["quant_method"], settings["bits"], settings["group_size"]) == ("gptq", bits, 32)
    assert settings["checkpoint_format"] == "gptq_v2"
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_three_bits_lie_over_the_ends_of_words_as_gptqs_own_code_lays_them() -> None:
    """GPTQ packs 32 values in three words: ten and a third, ten and two thirds, ten."""
    q = torch.randint(0, 8, (32, 1), generator=torch.Generator().manual_seed(0)).flatten().tolist()
    first = sum(q[j] << 3 * j for j in range(10)) | (q[10] & 3) << 30
    second = q[10] >> 2 | sum(q[j] << 3 * (j - 11) + 1 for j in range(11, 21)) | (q[21] & 1) << 31
    third = q[21] >> 1 | sum(q[j] << 3 * (j - 22) + 2 for j in range(22, 32))
    found = words(torch.tensor(q)[:, None], 3).flatten().tolist()
    assert [w % (1 << 32) for w in found] == [first, second, third]


def test_the_adapter_is_joined_to_the_start(tiny_model: Path, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "base", format="uniform4:32", rank=4)
    adapter = make_adapter(tmp_path / "a", base=tmp_path / "base")
    report = convert(tmp_path / "base", tmp_path / "out", to="gptq", adapter=adapter)
    assert report.rank == 8
    assert "no place for a start" in report.notes[0]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"format": "lm4:64"}, "holds uniform codes with a zero point per group"),
        ({"format": "uniform4:64+shift"}, "holds uniform codes with a zero point"),
        ({"format": "uniform4:64", "rules": ("*.q_proj=uniform2:64",)}, "has one width and group for all"),
        ({"format": "uniform4:40"}, "takes multiples of 32 and of the group 40"),
        ({"format": "uniform4:32", "skip": ("*.q_proj",)}, "q_proj is not packed .2 linears"),
    ],
)
def test_what_the_layout_cannot_say(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    quantize(model, tmp_path / "base", rank=4, **settings)
    with pytest.raises(OptionError, match=sentence):
        convert(tmp_path / "base", tmp_path / "out", to="gptq")
    assert not (tmp_path / "out").exists()


def test_no_loss_is_measured(tiny_model: Path, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "base", format="uniform4:32", rank=0)
    with pytest.raises(OptionError, match="needs its own packages to run"):
        convert(tmp_path / "base", tmp_path / "out", to="gptq", data=tmp_path / "x.txt")
    convert(tmp_path / "base", tmp_path / "out", to="gptq")
    assert not (tmp_path / "out" / "start").exists()
