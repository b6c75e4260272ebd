"""Reading a base: identity, start, adapters by name, and refusals that name what is wrong."""

import json
from pathlib import Path

import pytest
import torch

from bitloft.checkpoint import read_tensors
from bitloft.compress import compress
from bitloft.errors import AdapterError, CheckpointError, OptionError
from bitloft.integrations.loading import load
from bitloft.kernels import cpu
from bitloft.modules.arrangement import ORDER
from bitloft.modules.linear import quant_linears
from bitloft.quantize import quantize
from tests.helpers import make_adapter

IDS = torch.arange(2, 22).unsqueeze(0)


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("b") / "base"
    quantize(tiny_model, out, format="lm4:64", rank=4)
    return out


@pytest.fixture(scope="module")
def packed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two packed adapters of this base."""
    root = tmp_path_factory.mktemp("adapters")
    found = {}
    for seed, name in enumerate(("one", "two")):
        compress(make_adapter(root / f"{name}-plain", seed=seed, base=base), root / name, bits=4.0)
        found[name] = root / name
    return found


def test_a_damaged_base_is_refused(base: Path, tmp_path: Path) -> None:
    import shutil

    bad = tmp_path / "bad"
    shutil.copytree(base, bad)
    weights = bad / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 4
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="differs from its manifest"):
        load(bad)


def test_what_is_not_a_base_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a bitloft base; make one with"):
        load(tiny_model)
    with pytest.raises(CheckpointError, match="not a directory"):
        load(tmp_path / "none")


def test_an_architecture_that_transformers_lacks_is_named(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["GhostForCausalLM"]}))
    (tmp_path / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="GhostForCausalLM"):
        load(tmp_path)


def test_the_start_can_be_handed_out(base: Path) -> None:
    frozen, bare = load(base), load(base, start="trainable")
    assert not bare.training
    for layer in quant_linears(bare).values():
        assert not layer.start_enabled
    with torch.no_grad():
        assert not torch.equal(frozen(IDS).logits, bare(IDS).logits)
    with pytest.raises(OptionError, match="start is 'warm'"):
        load(base, start="warm")


@pytest.mark.skipif(cpu.library() is None, reason="no native library was built")
def test_codes_are_arranged_unless_that_is_left_out(base: Path, tmp_path: Path) -> None:
    """The same outputs, and what is saved again is in the stored order."""
    model, stored = load(base), load(base, arrange=False)
    layers = quant_linears(model)
    assert layers
    assert all(layer.arranged == ORDER for layer in layers.values())
    assert not any(layer.arranged for layer in quant_linears(stored).values())
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(model(ids).logits, stored(ids).logits)
    model.save_pretrained(tmp_path)
    written, expected = (read_tensors(folder / "model.safetensors") for folder in (tmp_path, base))
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())


@pytest.mark.skipif(cpu.library() is None, reason="no native library was built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_layers_do_not_see_other_rows(base: Path, dtype: torch.dtype) -> None:
    for layer in quant_linears(load(base, dtype=dtype, batch_invariant=True)).values():
        x = torch.randn(32, layer.in_features).to(dtype)
        with torch.no_grad():
            whole = layer(x)
            assert torch.equal(layer(x[:1]), whole[:1])
            assert torch.equal(layer(x[:7]), whole[:7])


def test_packed_adapters_attach_by_name_and_mix_in_one_batch(base: Path, packed: dict[str, Path]) -> None:
    model = load(base, adapters=packed)
    with torch.no_grad():
        alone = {name: model(IDS, adapter_names=[name]).logits[0] for name in ("one", "two", "__base__")}
        mixed = model(IDS.expand(3, -1), adapter_names=["two", "__base__", "one"]).logits
        plain = load(base)(IDS).logits[0]
    for row, name in enumerate(("two", "__base__", "one")):
        torch.testing.assert_close(mixed[row], alone[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone["__base__"], plain, rtol=1e-5, atol=1e-5)
    assert float((alone["one"] - plain).abs().max()) > 0.01
    assert float((alone["one"] - alone["two"]).abs().max()) > 0.01


def test_generate_takes_adapter_names(base: Path, packed: dict[str, Path]) -> None:
    model = load(base, adapters=packed)
    settings = {"max_new_tokens": 5, "do_sample": False}
    both = model.generate(IDS[:, :4].expand(2, -1), adapter_names=["one", "two"], **settings)
    for row, name in enumerate(("one", "two")):
        assert torch.equal(both[row : row + 1], model.generate(IDS[:, :4], adapter_names=[name], **settings))


def test_adapters_of_another_base_are_refused(tiny_model: Path, packed: dict[str, Path], tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "other", format="lm2:64", rank=4)
    with pytest.raises(AdapterError, match="was trained for another base"):
        load(tmp_path / "other", adapters={"one": packed["one"]})
    with pytest.raises(AdapterError, match="is not a packed adapter; make one with"):
        load(tmp_path / "other", adapters={"x": tiny_model})
