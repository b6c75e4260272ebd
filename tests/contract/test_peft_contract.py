"""What bitloft relies on in PEFT 0.21: a release that changes one of these fails here, with its name."""

import inspect
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors import safe_open
from transformers import PreTrainedModel

from bitloft.integrations import peft as ours
from bitloft.integrations.loading import load
from bitloft.modules.linear import QuantLinear
from bitloft.quantize import quantize

IDS = torch.arange(3, 19).reshape(2, 8)


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT as it is for someone who did not register bitloft."""
    original = inspect.unwrap(LoraConfig.__post_init__)
    monkeypatch.setattr(LoraConfig, "__post_init__", original)
    monkeypatch.setattr(ours, "register", lambda: None)  # load() registers


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("contract") / "base"
    quantize(tiny_model, out, format="lm2:32", rank=4)
    return out


def adapted(model: PreTrainedModel, name: str = "default") -> PeftModel:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config, adapter_name=name)


@pytest.mark.usefixtures("unregistered")
def test_default_dispatch_takes_an_nn_linear_subclass(base: Path) -> None:
    model = adapted(load(base))
    layers = [m for m in model.modules() if isinstance(m, LoraLinear)]
    assert {type(layer) for layer in layers} == {LoraLinear}
    assert len(layers) == 14  # all-linear leaves the output head out
    assert all(isinstance(layer.get_base_layer(), QuantLinear) for layer in layers)
    assert all(layer.lora_A["default"].weight.dtype == torch.float32 for layer in layers)  # int8 is not copied


@pytest.mark.usefixtures("unregistered")
@pytest.mark.parametrize("safe", [False, True])
def test_default_merge_fails_loudly(base: Path, safe: bool) -> None:
    """Packed codes have another shape than the delta, so adding it cannot go unnoticed."""
    with pytest.raises(RuntimeError, match=r"size of tensor|shape|broadcast"):
        adapted(load(base)).merge_and_unload(safe_merge=safe)


def test_adapter_files_and_keys(base: Path, tmp_path: Path) -> None:
    adapted(load(base)).save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in tmp_path.iterdir()}
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert len(shapes) == 28
    assert shapes["base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight"] == (4, 64)
    assert shapes["base_model.model.model.layers.0.mlp.gate_proj.lora_B.weight"] == (96, 4)


def test_other_adapters_go_to_a_subfolder(base: Path, tmp_path: Path) -> None:
    adapted(load(base), name="other").save_pretrained(tmp_path)
    assert (tmp_path / "other" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_reload_without_our_layer_gives_equal_logits(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_ours = adapted(load(base)).eval()
    assert any(isinstance(m, ours.QuantLora) for m in with_ours.modules())
    with_ours.save_pretrained(tmp_path)
    monkeypatch.setattr(LoraConfig, "__post_init__", inspect.unwrap(LoraConfig.__post_init__))
    monkeypatch.setattr(ours, "register", lambda: None)
    without = PeftModel.from_pretrained(load(base), tmp_path).eval()
    assert not any(isinstance(m, ours.QuantLora) for m in without.modules())
    with torch.no_grad():
        assert torch.equal(with_ours(input_ids=IDS).logits, without(input_ids=IDS).logits)


def test_mixed_batches_are_for_eval_mode_and_know_the_base(base: Path) -> None:
    model = adapted(load(base))
    model.eval()
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=["default", "__base__"]).logits
        with model.disable_adapter():
            plain = model(input_ids=IDS).logits
    torch.testing.assert_close(mixed[1], plain[1])
    assert (mixed[0] - plain[0]).abs().max() > 1e-3
    model.train()
    with pytest.raises(ValueError, match="adapter_names"):
        model(input_ids=IDS, adapter_names=["default", "__base__"])


def test_config_fields_that_we_read_and_write(tmp_path: Path) -> None:
    known = {field.name for field in fields(LoraConfig)}
    assert {
        "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "bias", "fan_in_fan_out", "modules_to_save",
        "rank_pattern", "alpha_pattern", "init_lora_weights", "use_dora", "lora_bias", "target_parameters", "task_type",
        "base_model_name_or_path", "inference_mode", "peft_type", "layers_to_transform", "trainable_token_indices",
        "alora_invocation_tokens",
    } <= known  # fmt: skip
    variants = {field.name for field in fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    assert {"use_dora", "kasa_config", "alora_invocation_tokens", "arrow_config"} <= variants
    LoraConfig(r=4, lora_alpha=2.5, target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (written["peft_type"], written["lora_alpha"], written["target_modules"]) == ("LORA", 2.5, ["q_proj"])


def test_scaling_follows_rslora(base: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj"])
    layers = [m for m in get_peft_model(load(base), config).modules() if isinstance(m, LoraLinear)]
    assert {layer.scaling["default"] for layer in layers} == {3.0}


def test_custom_modules_are_per_config_and_not_saved() -> None:
    config = LoraConfig(target_modules=["q_proj"])
    config._register_custom_module({torch.nn.Identity: LoraLinear})
    assert config._custom_modules[torch.nn.Identity] is LoraLinear
    assert torch.nn.Identity not in (LoraConfig()._custom_modules or {})
    assert "_custom_modules" not in config.to_dict()


def test_layer_hooks_that_we_override() -> None:
    assert list(inspect.signature(LoraLinear.merge).parameters) == ["self", "safe_merge", "adapter_names"]
    assert list(inspect.signature(LoraLinear.unmerge).parameters) == ["self"]
    names = list(inspect.signature(LoraLinear.update_layer).parameters)
    assert names == ["self", "adapter_name", "r", "lora_alpha", "config", "kwargs"]
