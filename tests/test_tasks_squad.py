"""tasks/squad.py: the official normalization and F1 by hand, windows, and answers that are pieces of the passage."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

from bitloft.tasks.squad import TASKS, Spans, exact, f1, normalized
from tests.helpers import shared, tiny_tokenizer

ROW = {
    "context": "the quick brown fox jumps over the lazy dog . " * 6 + "paris is the capital of france .",
    "question": "what is the capital of france ?",
    "answers": {"text": ["paris"], "answer_start": [276]},
}


def test_metrics_by_hand() -> None:
    assert normalized("The  Cat, an apple!") == "cat apple"
    assert exact("the Eiffel Tower.", ["Eiffel tower", "tower"]) == 1.0
    assert exact("towers", ["tower"]) == 0.0
    # given {in, paris, france}, wanted {paris}: precision 1/3, recall 1
    assert f1("in Paris, France", ["Paris"]) == pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1))
    assert f1("a b b", ["b c", "b b"]) == pytest.approx(2 * 2 / (2 + 2))  # "a" is an article
    assert f1("x", ["y"]) == 0.0


def test_windows_hold_the_answer_s_tokens(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    form = Spans(TASKS["squad"], tokenizer, 64)
    examples = form.examples([ROW])
    assert len(examples) > 2
    found = [e for e in examples if e["labels"] != [0, 0]]
    assert found
    for example in found:
        first, last = example["labels"]
        assert tokenizer.decode(example["input_ids"][first : last + 1]).strip() == "paris"
    assert all(len(e["input_ids"]) <= 64 for e in examples)


class Pointer(torch.nn.Module):
    """Points at the token that stands for the first letters of "paris" wherever it is."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token = token

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        logits = (input_ids == self.token).float() * 5
        return SimpleNamespace(start_logits=logits, end_logits=logits)


def test_answers_come_from_the_best_window(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    form = Spans(TASKS["squad"], tokenizer, 64)
    token = next(e["input_ids"][e["labels"][0]] for e in form.examples([ROW]) if e["labels"] != [0, 0])
    (answer,) = form.answers(Pointer(token), [ROW], 3)
    assert answer
    assert answer in ROW["context"]
    assert "paris".startswith(answer.strip())


def test_losses_and_figures_on_a_random_model(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                        num_attention_heads=2, max_position_embeddings=64)  # fmt: skip
    model = BertForQuestionAnswering(config).eval()
    form = Spans(TASKS["squad"], tokenizer, 64)
    examples = form.examples([ROW])
    batch = form.collate(examples)
    assert form.losses(model, batch).shape == (2 * len(examples),)
    names = [score.name for score in form.judge(model, [ROW, ROW], 4)]
    assert names == ["f1", "exact"]


def test_real_slice() -> None:
    rows = TASKS["squad"].rows(shared("data/squad_v1"), "test", 50)
    assert len(rows) == 50
    for row in rows:
        start = row["answers"]["answer_start"][0]
        assert row["context"][start:].startswith(row["answers"]["text"][0])
