"""The native rows: pieces of prompts beside single tokens, many adapters in a step, each row as it is alone."""

import random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bitloft.errors import KernelError
from bitloft.integrations import decoder
from bitloft.kernels import cpu
from bitloft.modules.multi import AdapterBank
from bitloft.serve.backend import Backend, NativeRows, Piece
from bitloft.serve.batch import ModelRows
from bitloft.serve.engine import backend_for
from tests.test_decoder import packed
from tests.test_multi import linears, packed_adapter

pytestmark = pytest.mark.skipif(cpu.library() is None, reason=f"needs the native library: {cpu.explain()}")
SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 400,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> NativeRows:
    torch.manual_seed(0)
    model = packed(LlamaForCausalLM(LlamaConfig(**SIZES)))
    bank = AdapterBank(model)
    for seed, name in enumerate("abc"):
        bank.attach(name, packed_adapter(model, linears(model), seed=seed))
    bank.attach("few", packed_adapter(model, ["model.layers.1.mlp.up_proj"], seed=7))
    bank.attach("head", packed_adapter(model, ["lm_head", "model.layers.0.self_attn.q_proj"], seed=8))
    made = backend_for(model, bank)
    assert isinstance(made, NativeRows)
    return made


def alone(rows: NativeRows, tokens: list[int], key: str | None) -> torch.Tensor:
    model: Any = rows.decoder.model
    with torch.no_grad(), rows.decoder.bank.rows([key]):
        found: torch.Tensor = model(torch.tensor([tokens])).logits[0, -1]
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4 * float(expected.abs().max()), rtol=1e-3)


def test_pieces_and_tokens_in_one_step(rows: NativeRows) -> None:
    random.seed(0)
    keys = ["a", None, "b", "few", "c", "a", "head"]
    texts = [[random.randrange(300) for _ in range(n)] for n in (70, 5, 130, 9, 1, 33, 12)]
    opened = [rows.open(200) for _ in texts]
    done = [0] * len(texts)
    while any(n < len(text) for n, text in zip(done, texts, strict=True)):
        pieces, which = [], []
        for i, text in enumerate(texts):
            if done[i] == len(text):
                text.append(random.randrange(300))  # it answers, beside those that are being read
            count = min(random.choice((1, 20, 64)), len(text) - done[i])
            pieces.append(Piece(opened[i], text[done[i] : done[i] + count], keys[i]))
            done[i] += count
            which.append(i)
        logits = rows.run(pieces)
        for i, found in zip(which, logits, strict=True):
            close(found, alone(rows, texts[i][: done[i]], keys[i]))
        if all(len(text) > 140 for text in texts[2:3]):
            break


def test_many_segments_of_odd_sizes(rows: NativeRows) -> None:
    """One long piece and many single tokens, all adapters distinct or all the same."""
    random.seed(1)
    for keys in (["a"] + ["b", "c", None, "few"] * 4, ["b"] * 17, [None] * 17):
        opened = [rows.open(400) for _ in keys]
        texts = [[random.randrange(300) for _ in range(300 if i == 0 else 1)] for i in range(len(keys))]
        logits = rows.run([Piece(row, text, key) for row, text, key in zip(opened, texts, keys, strict=True)])
        for found, text, key in zip(logits, texts, keys, strict=True):
            close(found, alone(rows, text, key))


def test_a_row_takes_no_more_memory_than_it_may_need(rows: NativeRows) -> None:
    row = rows.open(130)
    for _ in range(130):
        rows.run([Piece(row, [5], None)])
    assert row.capacity == 192
    assert rows.bytes_for(130) == row.keys.nbytes + row.values.nbytes


def test_beyond_the_context(rows: NativeRows) -> None:
    row = rows.open(500)
    with pytest.raises(KernelError, match="400 positions are known"):
        rows.run([Piece(row, [5] * 401, None)])
    assert row.length == 0
    close(rows.run([Piece(row, [5, 6], None)])[0], alone(rows, [5, 6], None))


def test_an_adapter_elsewhere_is_refused_not_ignored(rows: NativeRows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows.decoder, "modules", rows.decoder.modules[1:])
    with pytest.raises(KernelError, match="touches modules that the native decoder does not run"):
        rows.run([Piece(rows.open(4), [5], "a")])


def test_other_models_go_through_transformers(tiny_model: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    found = backend_for(model, AdapterBank(model))
    assert isinstance(found, ModelRows)
    assert isinstance(found, Backend)
    assert decoder.reason(model) is not None
