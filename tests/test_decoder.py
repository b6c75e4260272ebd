"""The native decoder gives what transformers gives, for rows of different lengths, and says which models it leaves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from bitloft.adapters import Adapter, LoraPair
from bitloft.errors import KernelError
from bitloft.formats import Format
from bitloft.integrations import decoder
from bitloft.integrations.decoder import Decoder, reason
from bitloft.kernels import cpu
from bitloft.kernels.ops import encode
from bitloft.modules.linear import QuantLinear, quant_linears, replace_module
from bitloft.modules.multi import AdapterBank
from bitloft.solvers.base import Solution, Start

native = pytest.mark.skipif(cpu.library() is None, reason=f"needs the native library: {cpu.explain()}")
SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 200,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama3": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "wide heads": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=32, mlp_bias=True, attention_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
}


def packed(model: Any, fmt: str = "lm2:64", rank: int = 8) -> Any:
    """``model`` with packed layers, each with a start and, where it has one, a bias."""
    for name, linear in list(model.model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            rows, columns = linear.weight.shape
            layer = QuantLinear(
                columns,
                rows,
                Format.parse(fmt),
                bias=None if linear.bias is None else torch.randn(rows),
                rank=rank,
                scaling=0.5,
                start_format=Format.parse("lm4:64") if rank else None,
            )
            a, bt = torch.randn(rank, columns), torch.randn(rank, rows) * 0.02
            start = Start(encode(a, "lm4:64"), encode(bt, "lm4:64"), 0.5) if rank else None
            layer.load_solution(Solution(encode(5 * linear.weight.data, fmt), start, 0.0, 0.0))
            replace_module(model.model.layers, name, layer)
    return model.eval()


@torch.no_grad()
def follow(model: Any, prompts: list[list[int]], steps: int) -> float:
    """The largest difference to transformers, relative, over the steps of a greedy continuation."""
    run, worst = Decoder(model), 0.0
    rows, logits = run.prefill(prompts)
    texts = [list(prompt) for prompt in prompts]
    for step in range(steps + 1):
        if step in (0, 1, steps // 2, steps):
            wanted = torch.stack([model(torch.tensor([text])).logits[0, -1] for text in texts])
            worst = max(worst, float((logits - wanted).abs().amax() / wanted.abs().amax()))
        tokens = logits.argmax(-1).tolist()
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        logits = run.step(rows, tokens)
    return worst


@native
@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("rank", [0, 8])
def test_a_step_is_the_model_s_forward(kind: str, rank: int) -> None:
    """One row and several of different lengths; 70 tokens, so that a row's memory grows on the way."""
    model = packed(MODELS[kind](), rank=rank)
    assert reason(model) is None
    assert follow(model, [[5, 6, 7]], 4) < 3e-6
    assert follow(model, [[5, 6, 7, 8], [9], [3] * 62], 70) < 3e-6


@native
@pytest.mark.parametrize("fmt", ["lm3:64", "nf4:64", "uniform4:32", "lm2:64+dq", "lm2:64+shift", "trellis2:64"])
def test_every_format_can_be_decoded(fmt: str) -> None:
    assert follow(packed(MODELS["llama"](), fmt), [[1, 2], [3, 4, 5]], 3) < 3e-6


@native
@torch.no_grad()
def test_rows_of_different_adapters(tmp_path: Path) -> None:
    """Two adapters, one of them on the head too, and the base, in one batch: what a bank's forward gives each row."""
    model = packed(MODELS["llama"]())
    bank = AdapterBank(model)
    paths = [
        f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    for adapter, touched in (("one", paths[:4]), ("two", [*paths[2:], "lm_head"])):
        sizes = [(path, model.get_submodule(path)) for path in touched]
        pairs = [
            LoraPair(path, torch.randn(4, linear.in_features), torch.randn(linear.out_features, 4) * 0.05, 1.0)
            for path, linear in sizes
        ]
        bank.attach(adapter, Adapter(tmp_path, {}, tuple(pairs), None, None))
    run, names = Decoder(model, bank), ["two", None, "one", "two"]
    texts = [[5, 6, 7], [5, 6, 7], [5, 6, 7], [8]]
    rows, logits = run.prefill(texts, names)
    for _ in range(3):
        tokens = logits.argmax(-1).tolist()
        texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
        logits = run.step(rows, tokens, names)
        for text, name, found in zip(texts, names, logits, strict=True):
            with bank.rows([name]):
                torch.testing.assert_close(found, model(torch.tensor([text])).logits[0, -1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[0], logits[1], atol=1e-2)


@native
def test_a_row_does_not_depend_on_when_it_joined() -> None:
    model = packed(MODELS["llama"]())
    run = Decoder(model)
    (alone,), _ = run.prefill([[7, 8, 9]])
    (other,), _ = run.prefill([[1] * 30])
    (again,), _ = run.prefill([[7, 8, 9]])
    for token in (4, 5):
        first = run.step([alone], [token])
        both = run.step([other, again], [2, token])
        torch.testing.assert_close(both[1], first[0], rtol=1e-5, atol=1e-6)
    assert (alone.length, other.length) == (5, 32)


@native
def test_a_switched_off_start_is_left_out() -> None:
    model = packed(MODELS["llama"]())
    for layer in quant_linears(model).values():
        layer.start_enabled = False
    assert follow(model, [[5, 6]], 2) < 3e-6


@native
def test_tables_of_angles_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "POSITIONS", 8)
    assert follow(packed(MODELS["llama"]()), [[5, 6, 7, 8, 9]], 20) < 3e-6


@native
def test_the_context_is_the_end() -> None:
    run = Decoder(packed(LlamaForCausalLM(LlamaConfig(**SIZES | {"max_position_embeddings": 64}))))
    rows, _ = run.prefill([[1] * 64])
    with pytest.raises(KernelError, match="64 positions are known"):
        run.step(rows, [1])


@native
@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4)), "GPT2LMHeadModel is not Llama"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), r"layers.0.self_attn.q_proj is a Linear, not packed"),
        (lambda: packed(LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu"))), "its gate is gelu"),
        (lambda: packed(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=32))), "attention has a window"),
        (lambda: packed(LlamaForCausalLM(LlamaConfig(**SIZES | {"intermediate_size": 72}))), "16 does not divide"),
        (lambda: packed(MODELS["llama"]()).bfloat16(), "it computes in torch.bfloat16"),
        (lambda: packed(MODELS["llama"](), "int8:row"), "self_attn.q_proj is stored in int8:row, which is decoded"),
        (lambda: packed(MODELS["llama"]()).train(), "it is in training mode"),
        (lambda: packed(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=DYNAMIC))), "are of type dynamic"),
    ],
)  # fmt: skip
def test_what_it_does_not_take_is_said(model: Any, why: str) -> None:
    with pytest.raises(KernelError, match=why):
        Decoder(model())


def test_without_native_code_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert reason(nn.Linear(1, 1)) == cpu.explain()
