"""The skeleton: names, ties and conversions as transformers sees them, on tiny models of each sort."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from bitloft.errors import CheckpointError
from bitloft.integrations.loading import load
from bitloft.integrations.skeleton import check_names, open_skeleton
from bitloft.integrations.source import Source, open_source
from bitloft.integrations.transformers import BitloftConfig
from bitloft.options import QuantizeOptions
from bitloft.quantize import quantize
from tests.helpers import tiny_llama

SETTINGS: dict[str, Any] = {"format": "lm2:64", "rank": 2, "steps": 1}


def renamed(model: Path, **names: str) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    for old, new in names.items():
        tensors[new] = tensors.pop(old.replace("__", "."))
    save_file(tensors, file, metadata={"format": "pt"})


def opened(folder: Path) -> Source:
    return open_source(str(folder))


def test_everything_is_on_the_meta_device_and_named_as_in_the_model(tiny_model: Path) -> None:
    skeleton = open_skeleton(opened(tiny_model))
    assert all(p.is_meta for p in skeleton.model.parameters())
    dense = AutoModelForCausalLM.from_pretrained(tiny_model)
    for reading in skeleton.readings:
        for name, tensor in reading.read(skeleton.tensors, skeleton.model):
            assert torch.equal(tensor, dense.state_dict()[name])
    assert set(skeleton.dense()) == set(dense.state_dict()) - {"lm_head.weight"}
    assert not skeleton.dropped


def test_a_tied_tensor_may_be_stored_under_either_name_or_both(tmp_path: Path) -> None:
    fingerprints = set()
    for case in ("table", "head", "both"):
        model = tiny_llama(tmp_path / case)
        if case == "head":
            renamed(model, model__embed_tokens__weight="lm_head.weight")
        if case == "both":
            tensors = load_file(model / "model.safetensors")
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        fingerprints.add(quantize(model, tmp_path / f"q-{case}", **SETTINGS).fingerprint)
    assert len(fingerprints) == 1


def test_two_tables_that_differ_are_not_tied(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    quantize(model, tmp_path / "q", **SETTINGS)
    stored = load_file(tmp_path / "q" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"] + 1)


def test_a_checkpoint_of_the_base_model_alone(tmp_path: Path) -> None:
    """GPT-2's published files lack the prefix ``transformer.`` and hold a transposed linear."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert short.keys() != tensors.keys()
    save_file(short, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    skeleton = open_skeleton(opened(tmp_path / "m"))
    assert "transformer.h.0.attn.c_attn.weight" in skeleton.dense()
    report = quantize(tmp_path / "m", tmp_path / "q", **SETTINGS)
    assert {m.name for m in report.matrices} == {
        f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    load(tmp_path / "q")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose checkpoint has a tensor per expert, which transformers fuses on load."""
    out = tmp_path_factory.mktemp("moe") / "m"
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(out)
    assert any(".experts.3.w1.weight" in name for name in load_file(out / "model.safetensors"))
    return out


def test_converted_tensors_are_those_that_transformers_loads(mixtral: Path) -> None:
    skeleton = open_skeleton(opened(mixtral))
    state = AutoModelForCausalLM.from_pretrained(mixtral).state_dict()
    fused = [reading for reading in skeleton.readings if reading.converter is not None]
    assert {len(reading.sources) for reading in fused} == {4, 8}
    for reading in fused:
        for name, tensor in reading.read(skeleton.tensors, skeleton.model):
            assert torch.equal(tensor, state[name])
            assert tuple(tensor.shape) == reading.targets[name].shape


def test_fused_experts_are_packed_as_on_load(mixtral: Path, tmp_path: Path) -> None:
    report = quantize(mixtral, tmp_path / "q", **SETTINGS)
    assert len([m for m in report.matrices if ".experts." in m.name]) == 8
    config = BitloftConfig(QuantizeOptions(**SETTINGS))
    loaded = AutoModelForCausalLM.from_pretrained(mixtral, quantization_config=config)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "q").state_dict()
    assert ours.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in loaded.state_dict().items())


def test_experts_that_are_left_keep_the_checkpoint_s_names_and_bytes(mixtral: Path, tmp_path: Path) -> None:
    quantize(mixtral, tmp_path / "q", target=("self_attn.*",), **SETTINGS)
    before, after = (load_file(d / "model.safetensors") for d in (mixtral, tmp_path / "q"))
    names = [name for name in before if ".experts." in name]
    assert len(names) == 12
    assert all(torch.equal(before[name], after[name]) for name in names)
    load(tmp_path / "q")


def test_names_that_would_load_as_others_are_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.core_model_loading import WeightRenaming

    import bitloft.integrations.skeleton as module

    skeleton = open_skeleton(opened(tiny_model))
    monkeypatch.setattr(module, "get_model_conversion_mapping", lambda model: [WeightRenaming("q_proj", "o_proj")])
    with pytest.raises(CheckpointError, match=r"q_proj.weight would be loaded as .*o_proj.weight"):
        check_names(skeleton.model, ["model.layers.0.self_attn.q_proj.weight"])
