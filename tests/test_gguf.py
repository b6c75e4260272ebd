"""A GGUF file as a source: read, completed with its rotary tables, quantized."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bitloft.integrations.source import open_source
from bitloft.quantize import quantize
from tests.helpers import tiny_llama


def _write_gguf(folder: Path, file: Path) -> None:
    """The tiny Llama as a float GGUF file with its own tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    import json

    raw = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"] | {t["content"]: t["id"] for t in raw["added_tokens"]}
    writer.add_token_list([t for t, _ in sorted(vocabulary.items(), key=lambda kv: kv[1])])
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(vocabulary))])
    merges = [" ".join(m) if isinstance(m, list) else m for m in raw["model"]["merges"]]
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        target = names.get_name(name, try_suffixes=(".weight",))
        if target is None or "lm_head" in name:
            continue
        array = tensor.numpy()
        leaf = name.split(".")[-2]
        if leaf in heads:  # llama.cpp keeps rotary halves interleaved
            n = heads[leaf]
            array = array.reshape(n, 2, array.shape[0] // n // 2, -1).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(target, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_base(tmp_path: Path) -> None:
    """transformers refuses to save a model that it read from GGUF: the weights go through a fresh one."""
    folder = tiny_llama(tmp_path / "m")
    _write_gguf(folder, tmp_path / "tiny.gguf")
    ids = torch.arange(2, 12).unsqueeze(0)
    read = open_source(str(tmp_path / "tiny.gguf")).load().float()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():  # float16 weights; the rotary tables must be there too
        torch.testing.assert_close(read(ids).logits, reference(ids).logits, rtol=0.02, atol=0.02)
    report = quantize(tmp_path / "tiny.gguf", tmp_path / "base", rank=4)
    assert len(report.matrices) == 14
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    from bitloft.integrations.loading import load
    from bitloft.integrations.record import load_tokenizer
    from bitloft.modules.linear import quant_linears

    layers = quant_linears(load(tmp_path / "base"))
    for matrix in report.matrices:
        weight = dense.get_submodule(matrix.name).weight.detach().float()
        error = torch.linalg.vector_norm(weight - layers[matrix.name].dense()) / torch.linalg.vector_norm(weight)
        assert float(error) == pytest.approx(matrix.error_after, rel=0.01)
    assert load_tokenizer(tmp_path / "base")("the quick").input_ids
