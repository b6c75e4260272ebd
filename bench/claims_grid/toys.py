"""What --smoke runs on: a random BART with letters and phonemes in its config, and a dictionary."""

import json
import random
from pathlib import Path

import torch

LETTERS, SOUNDS = "____abcdefghijklmnopqrstuvwxyz'", "____abdefghijklmnopstuvwz"


def words(place: Path) -> Path:
    """The model's folder, with gold.json beside the weights."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(LETTERS), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=2,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(place)
    settings = json.loads((place / "config.json").read_text(encoding="utf-8"))
    settings |= {"grapheme_chars": LETTERS, "phoneme_chars": SOUNDS}
    (place / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    draw = random.Random(0)
    made = {"".join(draw.choices(LETTERS[4:-1], k=draw.randint(3, 7))): "" for _ in range(80)}
    gold = {word: "".join(c for c in word if c in SOUNDS) or "a" for word in made}
    (place / "gold.json").write_text(json.dumps(gold), encoding="utf-8")
    return place
