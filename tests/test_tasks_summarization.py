"""tasks/summarization.py: ROUGE against hand-counted overlaps, and the columns of the files at hand."""

import sys

import pytest

from bitloft.errors import OptionError
from bitloft.tasks.summarization import TASKS, rouge
from tests.helpers import shared


def test_rouge_by_hand() -> None:
    one, two, last = rouge(["the cat sat on"], ["the cat on mats sat"], by_lines=False)
    # given 4 words, wanted 5, 4 shared; bigrams 3 and 4, "the cat" shared; longest common: the cat sat (or on)
    assert one.value == pytest.approx(2 * (4 / 4) * (4 / 5) / (4 / 4 + 4 / 5))
    assert two.value == pytest.approx(2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4))
    assert last.value == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert [score.name for score in (one, two, last)] == ["rouge1", "rouge2", "rougeL"]


def test_sentences_are_lines_for_cnn() -> None:
    given, wanted = ["b c. a d."], ["a d. b c."]
    assert rouge(given, wanted, by_lines=True)[2].value == 1.0  # sentence by sentence, order does not count
    assert rouge(given, wanted, by_lines=False)[2].value < 1.0


def test_rouge_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(OptionError, match="needs rouge-score"):
        rouge(["a"], ["a"], by_lines=False)


@pytest.mark.parametrize(("name", "rows"), [("xsum", 1000), ("cnn_dailymail", 100)])
def test_real_rows(name: str, rows: int) -> None:
    found = TASKS[name].rows(shared(f"data/{name}"), "test")
    assert len(found) == rows
    wanted = [TASKS[name].completion(row) for row in found[:3]]
    scores = TASKS[name].scores(found[:3], [[text] for text in wanted])
    assert [score.value for score in scores] == [1.0, 1.0, 1.0]
