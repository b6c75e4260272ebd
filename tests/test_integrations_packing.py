"""Dense modules replaced by packed ones and back: names, kinds, ties, what a checkpoint holds, what a save keeps."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel

import bitloft
from bitloft.errors import CheckpointError, OptionError
from bitloft.integrations.packing import local_name, matrices_of, pack, packed_at, packed_names, unpack, weights_in
from bitloft.integrations.transformers import BitloftConfig
from bitloft.modules.embedding import QuantEmbedding, TiedEmbedding, TiedHead
from bitloft.modules.experts import QuantExperts
from bitloft.modules.linear import QuantConv1D
from bitloft.options import QuantizeOptions
from bitloft.rules import StoredModule
from tests.architectures import make
from tests.test_architectures import on_load, output

bitloft.register()


def stored(kind: str) -> StoredModule:
    return StoredModule("lm4:64", 4, 1.0, kind, "lm4:64")


def test_each_kind_becomes_its_module_and_has_one_name() -> None:
    gpt2, mixtral = make("gpt2"), make("mixtral")
    assert isinstance(pack(gpt2, "transformer.h.0.attn.c_attn", stored("conv1d")), QuantConv1D)
    assert packed_at(gpt2, "transformer.h.0.attn.c_attn.weight") == ("transformer.h.0.attn.c_attn", "conv1d")
    assert packed_at(gpt2, "transformer.h.1.attn.c_attn.weight") is None
    name = "model.layers.0.mlp.experts.down_proj"
    assert isinstance(pack(mixtral, name, stored("experts")), QuantExperts)
    assert packed_at(mixtral, name) == (name, "experts")
    assert packed_at(mixtral, name.replace("down", "gate_up")) is None
    assert packed_names(mixtral) == {name: "experts"}


def test_a_table_takes_what_is_tied_to_it_along() -> None:
    bart = make("bart")
    table = pack(bart, "model.shared", stored("embedding"))
    assert isinstance(table, QuantEmbedding)
    assert isinstance(bart.lm_head, TiedHead)
    for part in (bart.model.encoder, bart.model.decoder):
        assert isinstance(part.embed_tokens, TiedEmbedding)
        assert part.embed_tokens.scale is not None
        assert part.embed_tokens.scale.value == pytest.approx(8.0)  # sqrt(64), from the dense class
    assert packed_names(bart) == {"model.shared": "embedding"}
    assert packed_at(bart, "model.decoder.embed_tokens.weight") == ("model.shared", "embedding")
    unpack(bart, torch.float32)
    assert bart.lm_head.weight is bart.model.shared.weight is bart.model.encoder.embed_tokens.weight


def test_matrices_come_as_rows_of_outputs() -> None:
    gpt2, oss = make("gpt2"), make("gpt_oss")
    weight = gpt2.transformer.h[0].mlp.c_fc.weight
    ((name, matrix),) = matrices_of(gpt2, "transformer.h.0.mlp.c_fc", "conv1d", weight)
    assert (name, matrix.shape) == ("transformer.h.0.mlp.c_fc", (256, 64))
    down = oss.model.layers[0].mlp.experts.down_proj
    found = dict(matrices_of(oss, "model.layers.0.mlp.experts.down_proj", "experts", down))
    assert torch.equal(found["model.layers.0.mlp.experts.down_proj.2"], down[2].T)


def test_a_listed_module_of_another_kind_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"packs model\.norm as linear, but in this .* is a LlamaRMSNorm"):
        pack(make("llama"), "model.norm", stored("linear"))


def test_names_with_and_without_the_prefix_of_the_class() -> None:
    headless = make("llama").model
    assert local_name(headless, "model.layers.0.mlp.up_proj", "linear") == "layers.0.mlp.up_proj"
    assert local_name(headless, "lm_head", "linear") is None
    assert local_name(make("mixtral").model, "model.layers.0.mlp.experts.down_proj", "experts") is not None


def test_what_a_checkpoint_holds_goes_by_the_models_names(tmp_path: Path) -> None:
    model = make("mixtral")
    model.save_pretrained(tmp_path)
    files = [str(tmp_path / "model.safetensors")]
    assert any("block_sparse_moe" in name for name in load_file(files[0]))  # transformers saves the published names
    found = weights_in(model, files)
    assert found is not None
    assert {n for n, _ in model.named_parameters()} - {"lm_head.weight"} <= found
    assert weights_in(model, None) is None
    with pytest.raises(CheckpointError, match=r"model\.bin is no safetensors file"):
        weights_in(model, ["model.bin"])


def test_packed_experts_are_saved_as_they_are(tmp_path: Path) -> None:
    model = on_load("qwen3_moe", tmp_path / "dense")
    model.save_pretrained(tmp_path / "base")
    names = load_file(tmp_path / "base" / "model.safetensors").keys()
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert "model.layers.0.mlp.experts.gate_up_proj_a0_scales" in names
    assert not any(".experts.0." in name for name in names)
    headless = AutoModel.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert set(packed_names(headless).values()) == {"linear", "experts"}


def test_the_same_base_in_a_class_without_its_head(tmp_path: Path) -> None:
    model = on_load("t5", tmp_path / "dense", embeddings=True, head=True)
    model.save_pretrained(tmp_path / "base")
    headless = AutoModel.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        ours = headless(input_ids=ids, decoder_input_ids=ids).last_hidden_state
        theirs = model(input_ids=ids, decoder_input_ids=ids, output_hidden_states=True).decoder_hidden_states[-1]
    assert torch.equal(ours, theirs)


def quantized(name: str, directory: Path, tensors: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The model ``name`` quantized from a checkpoint with exactly these tensors."""
    make(name).save_pretrained(directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = BitloftConfig(QuantizeOptions(rank=4, steps=1, embeddings=True, head=True))
    loaded: PreTrainedModel = type(make(name)).from_pretrained(
        directory, quantization_config=config, dtype=torch.float32
    )
    return loaded.eval()


def test_a_tied_table_under_any_of_its_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Checkpoints hold a tied table once, by either name, or twice with equal values; two that differ are refused."""
    make("gpt2").save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    table = tensors["transformer.wte.weight"]
    expected = output(quantized("gpt2", tmp_path / "a", tensors), "gpt2")
    both = tensors | {"lm_head.weight": table.clone()}
    assert torch.equal(output(quantized("gpt2", tmp_path / "b", both), "gpt2"), expected)
    other = {n: t for n, t in both.items() if n != "transformer.wte.weight"}
    assert torch.equal(output(quantized("gpt2", tmp_path / "c", other), "gpt2"), expected)
    with pytest.raises(RuntimeError, match="CONVERSION"):  # transformers logs our sentence and raises its own
        quantized("gpt2", tmp_path / "d", tensors | {"lm_head.weight": table + 1})
    assert "two tables for transformer.wte, which this model ties, and they differ" in caplog.text


def test_a_packed_table_or_head_is_not_resized(tmp_path: Path) -> None:
    for name, settings in (("gpt2", {"embeddings": True, "head": True}), ("llama", {"head": True})):
        model = on_load(name, tmp_path / name, **settings)
        with pytest.raises(CheckpointError, match="packed and cannot be resized; resize the dense model"):
            model.resize_token_embeddings(100)
        assert model.dequantize(torch.float32).resize_token_embeddings(100).num_embeddings == 100
    assert on_load("llama", tmp_path / "dense").resize_token_embeddings(100).num_embeddings == 100


def test_half_of_a_tied_matrix_is_refused_on_load(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="ask for both"):
        on_load("gpt2", tmp_path, embeddings=True)
