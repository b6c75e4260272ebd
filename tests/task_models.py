"""Tiny models of the three kinds that tasks run on, with data in the tasks' own columns."""

import json
import random
from pathlib import Path

import torch
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForSequenceClassification, BertModel

from tests.helpers import tiny_tokenizer, write_rows

LETTERS, SOUNDS = "____abcdefghijklmnopqrstuvwxyz'", "____abdefghijklmnopstuvwz"


def tiny_bert(directory: Path, *, labels: int | None = None) -> Path:
    """A random two-layer BERT with its tokenizer; with a head where ``labels`` are given."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(directory)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, num_labels=labels or 2,
    )  # fmt: skip
    model = BertModel(config) if labels is None else BertForSequenceClassification(config)
    model.save_pretrained(directory)
    return directory


def tiny_words(directory: Path, words: int = 60) -> Path:
    """A random BART with letters and phonemes in its config, and gold.json with a dictionary."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(LETTERS), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=2,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(directory)
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    settings |= {"grapheme_chars": LETTERS, "phoneme_chars": SOUNDS}
    (directory / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    draw = random.Random(0)
    made = ["".join(draw.choices(LETTERS[4:-1], k=draw.randint(3, 7))) for _ in range(words)]
    gold = {word: "".join(c for c in word if c in SOUNDS) or "a" for word in made}
    (directory / "gold.json").write_text(json.dumps(gold), encoding="utf-8")
    return directory


def sentiment(directory: Path, rows: int = 24) -> Path:
    """SST-2's columns: what ends in "good" is 1, in "bad" 0; a word that decides it, so that it can be learned."""
    directory.mkdir(parents=True, exist_ok=True)
    made: list[dict[str, object]] = [
        {"sentence": f"the {i} fox is {'good' if i % 2 else 'bad'}", "label": i % 2} for i in range(rows)
    ]
    write_rows(directory / "train.jsonl", made)
    write_rows(directory / "validation.jsonl", made[: rows // 2])
    return directory
