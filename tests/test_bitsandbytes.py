"""integrations/bitsandbytes.py: the tensors are the ones that the package itself would write for the same values."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitloft.errors import OptionError
from bitloft.formats import Format
from bitloft.integrations.bitsandbytes import STATE, Stored, block_of, quantization_config, require_nf4, stored_tensors
from bitloft.kernels.ops import decode, encode


def dequantized(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the installed bitsandbytes makes of such tensors."""
    functional = pytest.importorskip("bitsandbytes.functional")
    parts = {k.removeprefix("weight."): t for k, t in tensors.items() if k != "weight"}
    state = functional.QuantState.from_dict(parts, torch.device("cpu"))
    values: torch.Tensor = functional.dequantize_4bit(tensors["weight"], state)
    return values


@pytest.mark.parametrize(
    ("spelling", "shape", "block"),
    [
        ("nf4:64", (6, 128), 64),
        ("nf4:128", (5, 256), 128),
        ("nf4:64", (4, 96), 32),  # rows end in a padded group: blocks of 32 divide both
        ("nf4:row", (3, 192), 64),
        ("nf4:64+dq", (6, 128), 64),
        ("nf4:96", (2, 192), 32),
    ],
)
def test_bitsandbytes_reads_the_same_values(spelling: str, shape: tuple[int, int], block: int) -> None:
    packed = encode(torch.randn(shape) * 0.02, spelling)
    tensors = stored_tensors(packed, torch.float32)
    state = json.loads(tensors[f"weight.{STATE}"].numpy().tobytes())
    assert state == {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": list(shape)}
    assert torch.equal(dequantized(tensors), decode(packed))


def test_codes_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(8, 128)
    theirs, _ = functional.quantize_4bit(x, blocksize=64, quant_type="nf4")
    assert torch.equal(stored_tensors(encode(x, "nf4:64"), torch.float32)["weight"], theirs)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    blocks=st.integers(1, 8),
    group=st.sampled_from(["32", "64", "96", "128", "256", "row"]),
    dq=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_layout_as_documented_gives_the_values(rows: int, blocks: int, group: str, dq: bool, seed: int) -> None:
    """High nibble first, blocks over the flat weight: read without the package."""
    columns = 32 * blocks
    spelling = f"nf4:{group}" + "+dq" * (dq and group != "row")
    packed = encode(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), spelling)
    tensors = stored_tensors(packed, torch.float32)
    byte = tensors["weight"].flatten().int()
    codes = torch.stack([byte >> 4, byte & 15], dim=1).flatten()
    block = json.loads(tensors[f"weight.{STATE}"].numpy().tobytes())["blocksize"]
    values = tensors["weight.quant_map"][codes] * tensors["weight.absmax"].repeat_interleave(block)
    assert torch.equal(values.view(rows, columns), decode(packed))


def test_rows_that_no_block_divides_are_refused() -> None:
    assert block_of(Format.parse("nf4:64"), 100) is None
    assert block_of(Format.parse("nf4:8"), 64) is None
    with pytest.raises(OptionError, match="rows of 100 values in groups of nf4:64 hold no block"):
        stored_tensors(encode(torch.randn(2, 100), "nf4:64"), torch.float32)


@pytest.mark.parametrize("spelling", ["nf3:64", "lm4:64", "uniform4:64", "nf4:64+shift", "nf4:unit"])
def test_other_formats_are_refused_by_name(spelling: str) -> None:
    with pytest.raises(OptionError, match=r"m\.q is stored as .*, and bitsandbytes knows nf4 alone"):
        require_nf4("m.q", Format.parse(spelling))


def test_stored_tensors_are_saved_under_the_layer_s_path() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Stored({"weight": torch.ones(1), "weight.absmax": torch.zeros(1)}))
    assert set(model.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.weight.absmax"}


def test_the_config_names_what_is_left_dense() -> None:
    config = quantization_config(torch.bfloat16, {"lm_head", "a.b"})
    assert config["llm_int8_skip_modules"] == ["a.b", "lm_head"]
    assert config["bnb_4bit_compute_dtype"] == "bfloat16"
    assert config["quant_method"] == "bitsandbytes"
