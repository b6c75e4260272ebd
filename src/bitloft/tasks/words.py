"""Pronunciation: letters in, phonemes out, on the one small BART whose weights and dictionary are at hand.

It stands in for BART-large where a machine is small: an encoder-decoder that generates, with a metric of its own (words
exactly right, and the phoneme error: edit distance over the reference's length). The model has no tokenizer,
its symbols are ``grapheme_chars`` and ``phoneme_chars`` in its config, and ids are positions in them;
``with_tokenizer`` writes the one that transformers then loads: letters, and phonemes by the letter of the same id.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitloft.checkpoint import read_json
from bitloft.errors import CheckpointError, DataError
from bitloft.tasks.scores import Score, mean
from bitloft.tasks.sources import Row, Source
from bitloft.tasks.texts import TextTask

TEST_ROWS = 2000
LONGEST = 32  # symbols of an answer
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")  # ids 0 to 3
SOURCE = Source(("word", "phonemes"), "mlalma/MisakiSwift", files={"train": ("gold",), "test": ("gold",)})


class WordTask(TextTask):
    """Rows of ``gold.json`` (word -> phonemes): a fixed shuffle, whose first ``TEST_ROWS`` judge and the rest train."""

    def rows(self, where: str | Path | None, split: str, limit: int | None = None) -> list[Row]:
        file = None if where is None else Path(where) / "gold.json" if Path(where).is_dir() else Path(where)
        if file is None or not file.is_file():
            raise DataError(
                f"{self.name} wants a file gold.json (an object, word -> phonemes); none is at {where or 'the hub'}."
            )
        found = json.loads(file.read_text(encoding="utf-8"))
        letters = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz'")
        words = sorted(word for word, sound in found.items() if isinstance(sound, str) and set(word) <= letters)
        words = [word for word in words if 2 <= len(word) <= LONGEST - 2 and len(found[word]) <= LONGEST - 2]
        if len(words) < 2:
            raise DataError(f"{file} holds no words with phonemes.")
        import random

        random.Random(0).shuffle(words)
        cut = min(TEST_ROWS, len(words) // 5 or 1)
        chosen = words[:cut] if split == "test" else words[cut:]
        return [{"word": word, "phonemes": found[word]} for word in chosen[:limit]]


def symbols(config: dict[str, Any]) -> tuple[str, str]:
    """Letters and phonemes by id. Raises CheckpointError where a config has none."""
    letters, sounds = config.get("grapheme_chars"), config.get("phoneme_chars")
    if not isinstance(letters, str) or not isinstance(sounds, str) or len(sounds) > len(letters):
        raise CheckpointError(
            "this model's config has no grapheme_chars and phoneme_chars; it does not pronounce words."
        )
    return letters, sounds


def spelled(text: str, given: str, wanted: str) -> str:
    """``text`` in the symbols ``given``, written in the symbols ``wanted`` of the same ids; others are left out."""
    return "".join(wanted[at] for symbol in text if (at := given.find(symbol, len(SPECIALS))) >= 0)


def with_tokenizer(model: Path, out: Path) -> Path:
    """A copy of the model's folder with a tokenizer of its letters; ``out`` as it is where it exists."""
    if (out / "tokenizer_config.json").exists():
        return out
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    config = read_json(model / "config.json")
    letters, _ = symbols(config)
    vocabulary = {token: i for i, token in enumerate(SPECIALS)}
    vocabulary |= {letter: i for i, letter in enumerate(letters) if i >= len(SPECIALS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    out.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(model / name, out / name)
    made.save_pretrained(out)
    return out


def word_task(config: dict[str, Any]) -> WordTask:
    """The task for a model with these symbols."""
    letters, sounds = symbols(config)

    def scores(rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[Score]:
        given = [spelled(answer[0].replace(" ", ""), letters, sounds) for answer in answers]
        wanted = [row["phonemes"] for row in rows]
        exact = [float(a == b) for a, b in zip(given, wanted, strict=True)]
        wrong = [distance(a, b) / max(len(b), 1) for a, b in zip(given, wanted, strict=True)]
        return [mean("words", exact), mean("phoneme_error", wrong, "low")]

    return WordTask(
        name="g2p",
        source=SOURCE,
        prompt=lambda row: row["word"],
        completion=lambda row: spelled(row["phonemes"], sounds, letters),
        scores=scores,
        metrics=("words", "phoneme_error"),
        tokens=LONGEST,
    )


def distance(given: str, wanted: str) -> int:
    """Levenshtein's edit distance."""
    row = list(range(len(wanted) + 1))
    for i, a in enumerate(given, start=1):
        previous, row[0] = row[0], i
        for j, b in enumerate(wanted, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]
