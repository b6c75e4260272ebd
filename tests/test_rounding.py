"""Rounded activations of a whole model: chosen at load, measured, told."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bitloft.errors import OptionError
from bitloft.integrations import decoder, rounding
from bitloft.integrations.loading import load
from bitloft.integrations.opening import open_model
from bitloft.kernels import cpu_linear
from bitloft.modules.linear import quant_linears
from bitloft.options import EvalOptions, GenerateOptions, QuantizeOptions, ServeOptions
from bitloft.quantize import quantize

KINDS = ["bf16", *(["int8"] if cpu_linear.takes_int8() else [])]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, intermediate_size=128, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("source")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("packed") / "base"
    quantize(str(source), place, QuantizeOptions(format="lm4:64", solver="qlora", rank=4))
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_what_rounding_moves_is_measured_and_told(base: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.arange(20)[None]
    with torch.no_grad():
        exact = load(base)(input_ids=ids).logits
        with caplog.at_level(logging.WARNING, "bitloft"):
            model = load(base, activations=kind)
        found = model(input_ids=ids).logits
    assert f"activations {kind}: products of packed layers differ from float32's by" in caplog.text
    assert {layer.activations for layer in quant_linears(model).values()} == {kind}
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < 0.1
    moved = rounding.round_activations(model, kind)
    assert moved is not None
    assert 1e-4 < moved.median <= moved.worst < 0.05
    assert moved.layer in quant_linears(model)
    assert kind in str(decoder.reason(model))


def test_gradients_pass_a_rounded_layer(base: Path) -> None:
    layer = next(iter(quant_linears(load(base, activations=KINDS[-1])).values()))
    x = torch.randn(3, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.dense().sum(0).expand(3, -1), rtol=1e-3, atol=1e-3)


def test_what_is_refused(base: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="unknown activations 'fp4'; use one of bf16, int8"):
        load(base, activations="fp4")
    for options in (GenerateOptions, ServeOptions, EvalOptions):
        with pytest.raises(OptionError, match="unknown activations 'fp4'"):
            options(activations="fp4")
    with pytest.raises(OptionError, match="activations int8 are for packed layers"):
        open_model(source, "int8")
    monkeypatch.setattr(cpu_linear, "takes_int8", lambda: False)
    with pytest.raises(OptionError, match="activations int8 cannot be used here: products in 8 bits of lm4:64"):
        load(base, activations="int8")


def test_a_model_without_packed_layers_has_nothing_to_round(source: Path) -> None:
    assert rounding.round_activations(LlamaForCausalLM.from_pretrained(source), "bf16") is None
