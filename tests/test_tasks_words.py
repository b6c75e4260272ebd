"""tasks/words.py: symbols by id, edit distance by hand, a split that never moves."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from bitloft.errors import CheckpointError, DataError
from bitloft.tasks.words import distance, spelled, symbols, with_tokenizer, word_task
from tests.helpers import shared
from tests.task_models import LETTERS, SOUNDS, tiny_words

CONFIG = {"grapheme_chars": LETTERS, "phoneme_chars": SOUNDS}


def test_edit_distance_by_hand() -> None:
    assert distance("kitten", "sitting") == 3
    assert distance("", "abc") == 3
    assert distance("abc", "abc") == 0


def test_phonemes_are_spelled_by_ids_and_back() -> None:
    text = "dez"
    there = spelled(text, SOUNDS, LETTERS)
    assert there != text
    assert spelled(there, LETTERS, SOUNDS) == text
    assert spelled("d?", SOUNDS, LETTERS) == spelled("d", SOUNDS, LETTERS)
    with pytest.raises(CheckpointError, match="does not pronounce words"):
        symbols({})


def test_the_tokenizer_s_ids_are_positions(tmp_path: Path) -> None:
    folder = with_tokenizer(tiny_words(tmp_path / "m"), tmp_path / "w")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("cab")["input_ids"] == [1, LETTERS.index("c", 4), LETTERS.index("a", 4), LETTERS.index("b", 4), 2]
    assert tokenizer.decode(tokenizer("cab")["input_ids"], skip_special_tokens=True) == "cab"
    assert with_tokenizer(tmp_path / "absent", folder) == folder


def test_rows_are_split_once_and_for_all(tmp_path: Path) -> None:
    folder, task = tiny_words(tmp_path / "m"), word_task(CONFIG)
    train, test = task.rows(folder, "train"), task.rows(folder / "gold.json", "test")
    assert not {row["word"] for row in train} & {row["word"] for row in test}
    assert task.rows(folder, "test") == test
    with pytest.raises(DataError, match=r"g2p wants a file gold.json \(an object, word -> phonemes\); none is at"):
        task.rows(tmp_path / "m2", "train")


def test_words_and_phoneme_error_by_hand() -> None:
    task = word_task(CONFIG)
    rows = [{"word": "x", "phonemes": "abd"}, {"word": "y", "phonemes": "de"}]
    given = [[spelled("abd", SOUNDS, LETTERS)], [spelled("db", SOUNDS, LETTERS)]]
    words, error = task.scores(rows, given)
    assert words.value == 0.5
    assert error.value == pytest.approx((0 + 1 / 2) / 2)
    assert error.better == "low"


def test_real_dictionary() -> None:
    folder = shared("models/bart-g2p-us")
    import json

    task = word_task(json.loads((folder / "config.json").read_text()))
    assert len(task.rows(folder, "test")) == 2000
