"""fp8 weights with their scales: the product, whatever shape the scale has; without a scale a refusal."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitloft.errors import CheckpointError
from bitloft.float8 import Scaled, is_float8, with_scales
from bitloft.shards import open_shards

BLOCK = (4, 8)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale", ["one", "scalar", "rows", "column", "blocks"])
def test_values_are_weight_times_scale(tmp_path: Path, dtype: torch.dtype, scale: str) -> None:
    weight = torch.randn(10, 20).to(dtype)
    given = {"one": torch.tensor([0.5]), "scalar": torch.tensor(0.5), "rows": torch.rand(10) + 1,
             "column": torch.rand(10, 1) + 1, "blocks": torch.rand(3, 3) + 1}[scale]  # fmt: skip
    spread = given
    if scale == "rows":
        spread = given[:, None]
    if scale == "blocks":
        spread = given.repeat_interleave(4, 0)[:10].repeat_interleave(8, 1)[:, :20]
    name = "a.weight_scale_inv" if scale == "blocks" else "a.weight_scale"
    save_file({"a.weight": weight, name: given, "a.input_scale": torch.ones(1)}, tmp_path / "model.safetensors")
    found = with_scales(open_shards(tmp_path), BLOCK)
    assert list(found) == ["a.weight"]
    assert isinstance(found["a.weight"], Scaled)
    assert torch.equal(found["a.weight"].read(), weight.float() * spread)
    (copied,) = found["a.weight"].chunks()
    assert torch.equal(copied, (weight.float() * spread).bfloat16())
    assert found["a.weight"].spec == ("BF16", (10, 20))


def test_without_a_scale_it_is_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor a.weight is fp8 and no scale lies beside it"):
        with_scales(open_shards(tmp_path))


def test_a_scale_of_another_shape_is_refused(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.zeros(8, 8, dtype=torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(3, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = with_scales(open_shards(tmp_path), BLOCK)
    with pytest.raises(CheckpointError, match=r"blocks of \[4, 8\], but its scale has shape \[3, 2\] and not \[2, 1\]"):
        found["a.weight"].read()


def test_other_checkpoints_pass_through(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2, 2), "a.weight_scale": torch.ones(1)}, tmp_path / "model.safetensors")
    entries = open_shards(tmp_path)
    assert not is_float8(entries)
    assert with_scales(entries) == entries
