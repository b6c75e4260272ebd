"""tasks/documents.py: a text in blocks, judged by perplexity as `bitloft eval` judges it."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitloft.errors import DataError
from bitloft.evaluate import evaluate
from bitloft.tasks.documents import TASKS, Documents
from tests.helpers import WORDS


def test_perplexity_is_that_of_eval(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text(f"{WORDS} {WORDS}")
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    form = Documents(AutoTokenizer.from_pretrained(tiny_model), 32)
    scores = form.judge(model, TASKS["wikitext2"].rows(tmp_path, "test"), 3)
    report = evaluate(tiny_model, tmp_path / "test.txt", length=32)
    assert [score.name for score in scores] == ["perplexity", "loss"]
    assert scores[1].value == pytest.approx(report.loss, rel=1e-5)
    assert scores[1].stderr == pytest.approx(report.stderr, rel=1e-3)
    assert scores[0].value == pytest.approx(report.perplexity, rel=1e-5)
    limited = Documents(form.tokenizer, 32, limit=2).judge(model, TASKS["wikitext2"].rows(tmp_path, "test"), 3)
    assert limited[1].count == 2


def test_valid_stands_in_for_train_and_missing_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("text")
    assert TASKS["wikitext2"].rows(tmp_path, "train") == [{"text": "text"}]
    with pytest.raises(DataError, match=r"no test text of wikitext2 at .*: put test.txt there"):
        TASKS["wikitext2"].rows(tmp_path, "test")
