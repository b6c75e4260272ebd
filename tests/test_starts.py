"""The start of somebody else's base: its error is the reported one, PEFT loads it, it brings the model nearer."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

from bitloft.adapters import read_adapter
from bitloft.checkpoint import fingerprint
from bitloft.cli import app
from bitloft.errors import CheckpointError, OptionError
from bitloft.integrations.foreign import open_foreign
from bitloft.starts import start_for
from tests.helpers import tiny_llama
from tests.test_foreign import gptq_folder


@pytest.fixture(scope="module")
def bnb(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as transformers and bitsandbytes save it in 4 bits."""
    pytest.importorskip("bitsandbytes")
    out = tmp_path_factory.mktemp("bnb") / "base"
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "down_proj"],  # its processor kernel takes no row that cuts a block
    )
    AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=config, device_map="cpu").save_pretrained(out)
    return out


def test_errors_are_those_of_the_written_factors(bnb: Path, tiny_model: Path, tmp_path: Path) -> None:
    report = start_for(bnb, tiny_model, tmp_path / "start", rank=8)
    assert len(report.matrices) == 12
    adapter, foreign = read_adapter(tmp_path / "start"), open_foreign(bnb)
    original = load_file(tiny_model / "model.safetensors")
    rows = {row.name: row for row in report.matrices}
    for pair in adapter.pairs:
        weight = original[f"{pair.name}.weight"].float()
        left = weight - foreign.read(pair.name)
        after = left - pair.scaling * pair.b @ pair.a
        row = rows[pair.name]
        assert row.error_before == pytest.approx(float(left.norm() / weight.norm()), rel=1e-4)
        assert row.error_after == pytest.approx(float(after.norm() / weight.norm()), rel=1e-4)
        assert row.error_after < row.error_before
        best = torch.linalg.svdvals(left)[8:].norm() / weight.norm()
        assert row.error_after <= float(best) * 1.01
    assert adapter.base == report.fingerprint == fingerprint([bnb / "model.safetensors"])
    assert adapter.source == fingerprint([tiny_model / "model.safetensors"])
    assert json.loads((tmp_path / "start" / "bitloft_adapter.json").read_text())["kind"] == "bitsandbytes nf4"


def test_peft_puts_it_on_the_base_and_the_model_comes_nearer(bnb: Path, tiny_model: Path, tmp_path: Path) -> None:
    start_for(bnb, tiny_model, tmp_path / "start", rank=24)
    ids = torch.arange(2, 66).reshape(2, 32)
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)(ids).logits
        base = AutoModelForCausalLM.from_pretrained(bnb, device_map="cpu", dtype=torch.float32)
        before = (base(ids).logits - wanted).norm()
        after = (PeftModel.from_pretrained(base, tmp_path / "start")(ids).logits - wanted).norm()
    assert float(after) < 0.75 * float(before)


def test_the_same_seed_gives_the_same_bytes(bnb: Path, tiny_model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        start_for(bnb, tiny_model, tmp_path / name, rank=4, target=["q_proj", "layers.1.*"])
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second
    assert {pair.name for pair in read_adapter(tmp_path / "one").pairs} >= {"model.layers.0.self_attn.q_proj"}
    assert len(read_adapter(tmp_path / "one").pairs) == 7


def write_gguf(file: Path, model: Path) -> Path:
    """The tiny Llama as llama.cpp stores it: its names, rotary rows in its order, matrices in Q8_0."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    writer.add_vocab_size(len(load_file(model / "model.safetensors")["model.embed_tokens.weight"]))
    for key, tensor in load_file(model / "model.safetensors").items():
        module, values = key.removesuffix(".weight"), tensor.float()
        if module in whole:
            name = whole[module]
        else:
            _, _, layer, part = module.split(".", 3)
            name = f"blk.{layer}.{names[part]}"
            heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(part)
            if heads:
                values = values.view(heads, 2, len(values) // heads // 2, -1).transpose(1, 2).reshape(values.shape)
        data = values.contiguous().numpy()
        if values.ndim == 1:
            writer.add_tensor(f"{name}.weight", data)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_base(tiny_model: Path, tmp_path: Path) -> None:
    report = start_for(write_gguf(tmp_path / "tiny.gguf", tiny_model), tiny_model, tmp_path / "start", rank=16)
    assert len(report.matrices) == 14
    for row in report.matrices:
        assert 1e-3 < row.error_before < 0.01  # 8 bits; rows in the wrong order would be above 1
        assert row.error_after < row.error_before


def test_the_command_line(bnb: Path, tiny_model: Path, tmp_path: Path) -> None:
    flags = ["--out", str(tmp_path / "start"), "--rank", "4", "--target", "q_proj"]
    done = CliRunner().invoke(app, ["start-for", str(bnb), str(tiny_model), *flags])
    assert done.exit_code == 0, done.output
    assert "base (bitsandbytes nf4); the start fits no other" in done.stdout
    assert len(read_adapter(tmp_path / "start").pairs) == 2


def test_bad_input_is_refused_and_nothing_is_left(bnb: Path, tiny_model: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "start", tiny_llama(tmp_path / "other", seed=1)
    narrow = tiny_llama(tmp_path / "narrow", hidden=32)
    gptq, _ = gptq_folder(tmp_path / "gptq", 4)
    with pytest.raises(OptionError, match="rank is 0; use 1 or more"):
        start_for(bnb, tiny_model, out, rank=0)
    with pytest.raises(OptionError, match=r"rank 33 exceeds min\(m, n\) = 32 of model.layers.0.self_attn.k_proj"):
        start_for(bnb, tiny_model, out, rank=33)
    with pytest.raises(OptionError, match="target 'q_porj' matches none of the base's 12 matrices"):
        start_for(bnb, tiny_model, out, target=["q_porj"])
    with pytest.raises(CheckpointError, match="is no nearer to the model's than zero is; the models differ"):
        start_for(bnb, other, out)
    with pytest.raises(CheckpointError, match=r"in the model but \(96, 64\) in the base|in the model but \(64, 64\)"):
        start_for(bnb, narrow, out)
    with pytest.raises(CheckpointError, match=r"is \(64, 64\) in the model but \(64, 96\) in the base"):
        start_for(gptq, tiny_model, out)
    with pytest.raises(CheckpointError, match="is quantized already"):
        start_for(bnb, bnb, out)
    (tmp_path / "a.gguf").touch()
    with pytest.raises(CheckpointError, match=r"a\.gguf is a GGUF file; give the folder of the 16-bit original"):
        start_for(bnb, tmp_path / "a.gguf", out)
    assert not out.exists()
