"""LoRA on packed tables and experts: PEFT's own tensors and files, the same function as on the dense experts."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

import bitloft
from bitloft.errors import AdapterError
from bitloft.integrations.lora_layers import ExpertsLora, TableLora
from bitloft.integrations.transformers import BitloftConfig
from bitloft.modules.experts import QuantExperts
from bitloft.options import QuantizeOptions
from tests.architectures import MIXTURES, inputs, make
from tests.test_architectures import on_load, output, quiet_peft

bitloft.register()


def packed(name: str, directory: Path) -> PreTrainedModel:
    dense = make(name)
    dense.save_pretrained(directory)
    config = BitloftConfig(QuantizeOptions(format="lm4:64", rank=4, steps=1))
    model: PreTrainedModel = type(dense).from_pretrained(directory, quantization_config=config, dtype=torch.float32)
    return model.eval()


def config(**settings: object) -> LoraConfig:
    projections = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=projections, **settings)


def randomized(model: PeftModel) -> PeftModel:
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("name", MIXTURES)
def test_an_adapter_is_what_it_is_on_the_dequantized_model(name: str, tmp_path: Path) -> None:
    """Row orders, transposed experts and the scaling are PEFT's; saved and loaded by PEFT on either model."""
    model = packed(name, tmp_path / "dense")
    before = output(model, name)
    model.save_pretrained(tmp_path / "base")
    with quiet_peft():
        adapted = randomized(get_peft_model(model, config()))
        assert len([m for m in adapted.modules() if isinstance(m, ExpertsLora)]) == 2
        y = output(adapted, name)
        adapted.save_pretrained(tmp_path / "adapter")
        again = type(model).from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
        assert torch.equal(output(PeftModel.from_pretrained(again, tmp_path / "adapter").eval(), name), y)
        dense = type(model).from_pretrained(tmp_path / "base", dtype=torch.float32).dequantize(torch.float32)
        theirs = output(PeftModel.from_pretrained(dense, tmp_path / "adapter").eval(), name)
    torch.testing.assert_close(theirs, y, rtol=1e-3, atol=1e-4)
    assert float((y - before).norm() / before.norm()) > 0.02
    with adapted.disable_adapter():
        assert torch.equal(output(adapted, name), before)


def gradients(model: PeftModel, name: str) -> dict[str, Tensor]:
    model(**inputs(name))[0].square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_the_dense_experts(tmp_path: Path) -> None:
    model = packed("mixtral", tmp_path / "dense")
    model.save_pretrained(tmp_path / "base")
    dense = type(model).from_pretrained(tmp_path / "base", dtype=torch.float32).dequantize(torch.float32)
    with quiet_peft():
        ours = gradients(randomized(get_peft_model(model, config())), "mixtral")
        theirs = gradients(randomized(get_peft_model(dense, config())), "mixtral")
    assert len(ours) == 4
    for key, grad in ours.items():
        torch.testing.assert_close(grad, theirs[key], rtol=1e-2, atol=1e-6)


def test_what_a_packed_expert_cannot_do_is_a_sentence(tmp_path: Path) -> None:
    model = packed("qwen3_moe", tmp_path / "dense")
    with quiet_peft(), pytest.raises(AdapterError, match="init_lora_weights='olora' needs a dense weight"):
        get_peft_model(model, config(init_lora_weights="olora"))
    model = packed("qwen3_moe", tmp_path / "again")
    with quiet_peft():
        adapted = get_peft_model(model, config())
    with pytest.raises(AdapterError, match="cannot be merged into packed experts"):
        adapted.merge_adapter()
    with pytest.raises(AdapterError, match="nothing is merged"):
        next(m for m in adapted.modules() if isinstance(m, ExpertsLora)).unmerge()
    experts = next(m for m in adapted.modules() if isinstance(m, QuantExperts))
    assert experts.deltas == {}


def test_an_adapter_on_a_packed_table(tmp_path: Path) -> None:
    """DeBERTa's table, as LoftQ quantizes it: the same rows as PEFT adds to the dequantized table."""
    model = on_load("deberta_v3", tmp_path / "dense", embeddings=True)
    model.save_pretrained(tmp_path / "base")
    before = output(model, "deberta_v3")
    with quiet_peft():
        adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=["word_embeddings"]))
        (layer,) = (m for m in adapted.modules() if isinstance(m, TableLora))
        assert torch.equal(output(adapted.eval(), "deberta_v3"), before)
        y = output(randomized(adapted), "deberta_v3")
        adapted.save_pretrained(tmp_path / "adapter")
        dense = type(model).from_pretrained(tmp_path / "base", dtype=torch.float32).dequantize(torch.float32)
        theirs = output(PeftModel.from_pretrained(dense, tmp_path / "adapter").eval(), "deberta_v3")
    torch.testing.assert_close(theirs, y, rtol=1e-3, atol=1e-5)
    assert not torch.equal(y, before)
    adapted(**inputs("deberta_v3"))[0].sum().backward()
    assert bool(layer.lora_embedding_B["default"].grad.abs().sum() > 0)
    with pytest.raises(AdapterError, match="cannot be merged into a packed table"):
        adapted.merge_adapter()
    with pytest.raises(AdapterError, match="nothing is merged"):
        layer.unmerge()
    with quiet_peft(), pytest.raises(AdapterError, match="use_dora needs a dense weight"):
        adapted.add_adapter("other", LoraConfig(r=2, target_modules=["word_embeddings"], use_dora=True))
