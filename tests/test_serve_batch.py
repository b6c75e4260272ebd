"""Rows join and leave a running batch, and every row computes what it would compute alone."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from bitloft.errors import CheckpointError
from bitloft.modules.multi import AdapterBank
from bitloft.serve.backend import Piece
from bitloft.serve.batch import ModelRows, Row
from tests.test_multi import linears, packed_adapter

SIZES = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = ("llama", "windowed mistral", "gpt2")


class Text:
    """A row beside the tokens that it has taken."""

    def __init__(self, rows: ModelRows, length: int, key: str | None = None) -> None:
        self.rows, self.key = rows, key
        self.prompt = [random.randrange(3, 300) for _ in range(length)]
        self.tokens: list[int] = []
        self.row: Row = rows.open(200)

    def piece(self, count: int | None = None) -> Piece:
        """The next tokens: of the prompt while there are some, else a random one."""
        left = self.prompt[len(self.tokens) :]
        taken = left[: count or len(left)] if left else [random.randrange(3, 300)]
        self.tokens += taken
        return Piece(self.row, taken, self.key)


def check(rows: ModelRows, texts: list[Text], *, piece: int | None = None) -> None:
    """One step of all texts; logits equal those of a plain forward over each text's own tokens."""
    logits = rows.run([text.piece(piece) for text in texts])
    for found, text in zip(logits, texts, strict=True):
        with torch.no_grad(), rows.bank.rows([text.key]):
            alone = rows.model(torch.tensor([text.tokens])).logits[0, -1]
        torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-4)


@pytest.fixture(params=KINDS)
def rows(request: pytest.FixtureRequest, tiny_model: Path) -> ModelRows:
    model: Any
    if request.param == "llama":
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
    elif request.param == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=256))
    else:
        config = MistralConfig(**SIZES, intermediate_size=96, num_key_value_heads=2, sliding_window=9)
        model = MistralForCausalLM(config)
    model.eval()
    return ModelRows(model, AdapterBank(model))


def test_rows_join_and_leave(rows: ModelRows) -> None:
    random.seed(0)
    first, second = Text(rows, 5), Text(rows, 2)
    check(rows, [first, second])
    for _ in range(3):
        check(rows, [second, first])
    longer, shorter = Text(rows, 41), Text(rows, 1)
    check(rows, [first, second, longer, shorter])
    check(rows, [first, second, longer, shorter])
    rows.close(second.row)
    rows.close(longer.row)
    assert [row.place for row in rows.joined] == list(range(len(rows.joined)))
    for _ in range(2):
        check(rows, [shorter, first])
    assert rows.end - rows.begin == max(first.row.length, shorter.row.length)


def test_random_traffic(rows: ModelRows) -> None:
    random.seed(1)
    texts: list[Text] = []
    for _ in range(60):
        if len(texts) < 6 and random.random() < 0.5:
            texts.append(Text(rows, random.randint(1, 24)))
        if len(texts) > 1 and random.random() < 0.3:
            rows.close(texts.pop(random.randrange(len(texts))).row)
        if texts:
            random.shuffle(texts)
            check(rows, texts)
            assert {id(row) for row in rows.joined} <= {id(text.row) for text in texts}


def test_prompts_in_pieces(rows: ModelRows) -> None:
    random.seed(2)
    answering = Text(rows, 3)
    check(rows, [answering])
    long = Text(rows, 50)
    for _ in range(4):
        check(rows, [answering, long], piece=16)
    assert long.tokens == long.prompt
    check(rows, [answering, long])


def test_room_is_doubled_not_made_anew(rows: ModelRows) -> None:
    random.seed(3)
    text, made = Text(rows, 4), []
    check(rows, [text])
    for _ in range(150):
        rows.run([text.piece()])
        made.append(rows._layers[0].room[0].data_ptr())
    assert len(set(made)) <= 4
    rows.close(text.row)
    assert rows.begin == rows.end


def test_rows_of_several_adapters(tiny_model: Path) -> None:
    random.seed(4)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    bank = AdapterBank(model)
    for seed, name in enumerate(("a", "b")):
        bank.attach(name, packed_adapter(model, linears(model), seed=seed))
    found = ModelRows(model, bank)
    texts = [Text(found, 6, key) for key in ("a", None, "b", "a")]
    for _ in range(4):
        check(found, texts)


def test_after_a_reset_everything_is_new(rows: ModelRows) -> None:
    random.seed(5)
    text = Text(rows, 5)
    check(rows, [text])
    check(rows, [text])
    rows.reset()
    assert rows.joined == []
    fresh = Text(rows, 3)
    check(rows, [fresh])
    check(rows, [fresh])


def test_models_that_cannot_be_served(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    with pytest.raises(CheckpointError, match="batch_invariant needs a model that the native decoder runs"):
        ModelRows(model, AdapterBank(model), batch_invariant=True)
    monkeypatch.setattr(model.config, "layer_types", ["full_attention", "linear_attention"], raising=False)
    with pytest.raises(CheckpointError, match="a model with linear_attention layers cannot be served"):
        ModelRows(model, AdapterBank(model))
