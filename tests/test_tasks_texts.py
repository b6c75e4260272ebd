"""tasks/texts.py: what is asked, taught and written, on a decoder and on an encoder-decoder."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BartForConditionalGeneration

from bitloft.errors import OptionError
from bitloft.tasks.scores import Score, mean
from bitloft.tasks.sources import Source
from bitloft.tasks.texts import Answers, Sequences, TextTask, loss_score, perplexity_score
from bitloft.tasks.words import with_tokenizer, word_task
from tests.task_models import LETTERS, SOUNDS, tiny_words


def right(rows: Any, answers: Any) -> list[Score]:
    return [mean("right", [float(a[0] == row["b"]) for row, a in zip(rows, answers, strict=True)])]


TASK = TextTask(
    "demo",
    Source(("a", "b"), "x/y"),
    lambda r: r["a"],
    lambda r: r["b"],
    right,
    ("right",),
    6,
    stop=(".",),
    suffix=" ?",
)
ROWS = [{"a": "one two", "b": "three"}, {"a": "the quick brown fox", "b": "jumps over"}]


def test_loss_is_a_ratio_with_its_error_by_hand() -> None:
    found = loss_score(torch.tensor([4.0, 2.0]), torch.tensor([2.0, 2.0]))
    assert found.value == 1.5
    assert found.stderr == pytest.approx(math.sqrt(2 / 1 * (1.0 + 1.0)) / 4)
    assert loss_score(torch.tensor([1.0]), torch.tensor([2.0])).stderr is None
    perplexity = perplexity_score(found)
    assert perplexity.value == pytest.approx(math.exp(1.5))
    assert found.stderr is not None
    assert perplexity.stderr == pytest.approx(math.exp(1.5) * found.stderr)


def test_answers_end_at_the_first_stop() -> None:
    assert TASK.cut("three . four") == "three "
    assert TASK.cut("three") == "three"


def test_a_decoder_is_asked_what_it_was_taught(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    form = Answers(TASK, tokenizer, 64)
    prompt = tokenizer.decode(form._prompt_ids(ROWS[0]))
    example = form.examples(ROWS)[0]
    assert "one two ?" in prompt
    assert tokenizer.decode(example.ids).startswith(prompt)
    taught = example.labels[example.labels != -100]
    assert tokenizer.decode(taught, skip_special_tokens=True) == "three"


def test_a_batch_of_prompts_changes_no_answer(tiny_model: Path) -> None:
    """Left padding is masked: rows together say what they say alone."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    form = Answers(TASK, AutoTokenizer.from_pretrained(tiny_model), 64)
    together = form.answers(model, ROWS, 2)
    assert together == form.answers(model, ROWS, 1)
    scores = form.judge(model, ROWS, 2)
    assert [score.name for score in scores] == ["right", "loss"]
    (only,) = Answers(TASK, form.tokenizer, 64, generates=False).judge(model, ROWS, 2)
    assert only == scores[-1]


def test_sampled_answers_are_seeded(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    task = TextTask(**{**vars(TASK), "samples": 3})
    form = Answers(task, AutoTokenizer.from_pretrained(tiny_model), 64)
    one, two = form.answers(model, ROWS, 2), form.answers(model, ROWS, 2)
    assert one == two
    assert [len(answers) for answers in one] == [3, 3]
    with pytest.raises(OptionError, match="batch is 0"):
        form.answers(model, ROWS, 0)


def test_an_encoder_decoder_s_loss_is_the_model_s_own(tmp_path: Path) -> None:
    folder = with_tokenizer(tiny_words(tmp_path / "m"), tmp_path / "words")
    model = BartForConditionalGeneration.from_pretrained(folder).eval()
    task = word_task({"grapheme_chars": LETTERS, "phoneme_chars": SOUNDS})
    form = Sequences(task, AutoTokenizer.from_pretrained(folder), 32)
    rows = task.rows(tmp_path / "m", "test", 4)
    batch = form.collate(form.examples(rows))
    with torch.no_grad():
        assert form.losses(model, batch).mean().item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    scores = form.judge(model, rows, 3)
    assert [score.name for score in scores] == ["words", "phoneme_error", "loss"]
    assert scores[-1].value == pytest.approx(form.losses(model, batch).mean().item(), rel=1e-4)
