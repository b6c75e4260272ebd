"""The transformers integration: quantize on load, save, reload bit-equal through any Auto class, train, dequantize."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import bitloft
from bitloft.errors import CheckpointError
from bitloft.integrations.transformers import BitloftConfig
from bitloft.modules.linear import QuantLinear, quant_linears
from bitloft.modules.select import select_modules
from bitloft.options import QuantizeOptions
from bitloft.quantize import quantize

bitloft.register()
bitloft.register()  # calling it twice does nothing
IDS = torch.arange(2, 22).unsqueeze(0)


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if "lm_head" not in k}


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("b") / "base"
    quantize(tiny_model, out, format="uniform3:64", rank=4)
    return out


def test_quantize_on_load_gives_the_verbs_bytes(tiny_model: Path, base: Path) -> None:
    config = BitloftConfig(QuantizeOptions(format="uniform3:64", rank=4))
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=config)
    verb = AutoModelForCausalLM.from_pretrained(base)
    ours, theirs = state(loaded), state(verb)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert len(loaded.hf_quantizer.errors) == 14
    assert all(after < before for before, after in loaded.hf_quantizer.errors.values())


def test_save_and_reload_are_bit_equal(tiny_model: Path, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(
        tiny_model, quantization_config=BitloftConfig(format="lm2:64", rank=4)
    )
    loaded.save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(state(loaded).values(), state(again).values(), strict=True))
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, again(IDS).logits)
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_other_auto_classes_read_the_same_layers(base: Path) -> None:
    """A headless class has no ``model.`` prefix; a classifier has another head."""
    causal = AutoModelForCausalLM.from_pretrained(base)
    headless = AutoModel.from_pretrained(base)
    assert len(quant_linears(headless)) == 14
    with torch.no_grad():
        assert torch.equal(headless(IDS).last_hidden_state, causal.model(IDS).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    assert len(quant_linears(classifier)) == 14
    assert not isinstance(classifier.score, QuantLinear)
    headless.save_pretrained(base.parent / "headless")
    assert len(quant_linears(AutoModel.from_pretrained(base.parent / "headless"))) == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_moves_the_rest_and_no_stored_byte(base: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    assert model.model.embed_tokens.weight.dtype == dtype
    reference = state(AutoModelForCausalLM.from_pretrained(base))
    for name, tensor in state(model).items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, reference[name]), name
    assert model(IDS).logits.dtype == dtype


def test_dequantize_gives_a_dense_model_of_the_same_outputs(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        before = model(IDS).logits
        dense = model.dequantize(dtype=torch.float32)
        torch.testing.assert_close(dense(IDS).logits, before, rtol=1e-3, atol=1e-4)
    assert not quant_linears(dense)


def test_gradients_reach_the_input(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    embedded = model.model.embed_tokens(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None
    assert float(embedded.grad.abs().sum()) > 0


def test_a_config_from_the_future_or_with_unknown_options_is_refused() -> None:
    with pytest.raises(CheckpointError, match="schema 9"):
        BitloftConfig(schema=9)
    with pytest.raises(CheckpointError, match="unknown option 'bits'"):
        BitloftConfig(bits=4)
    config = BitloftConfig(format="lm3:64", modules={"a": "lm3:64"})
    assert BitloftConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_the_head_is_left_alone_even_when_it_is_not_tied(tmp_path: Path) -> None:
    from tests.helpers import tiny_llama

    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "m", tied=False))
    assert "lm_head" not in select_modules(model, QuantizeOptions()).chosen
