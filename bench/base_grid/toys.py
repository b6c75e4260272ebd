"""What --smoke runs on: a random decoder and a random encoder, a few words of text."""

from pathlib import Path
from typing import Any

import torch

from base_grid.tasks import split_files

WORDS = "the quick brown fox jumps over the lazy dog . a base is packed once and an adapter is trained on it in turn"


def toys(place: Path) -> tuple[dict[str, Path], dict[str, Path], dict[str, dict[str, Path]], dict[str, Any]]:
    """(models, calibration texts, files of text tasks, rows of pair tasks), by task."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    for name, kind, config in (("decoder", LlamaForCausalLM, LlamaConfig), ("encoder", BertModel, BertConfig)):
        tokenizer = tokenizer_of(place / name)
        kind(config(vocab_size=len(tokenizer), **shape)).save_pretrained(place / name)
    text = " ".join([WORDS] * 300)
    files = {"words": split_files(place / "data", "words", ".txt", text, " ".join([WORDS] * 8), " ".join([WORDS] * 9))}
    rows = [(WORDS[i : i + 20], None, i % 2) for i in range(80)]
    pairs = {"pairs": {"train": rows[:64], "held": rows[64:72], "test": rows[72:]}}
    models = {"words": place / "decoder", "pairs": place / "encoder"}
    return models, dict.fromkeys(models, files["words"]["train"]), files, pairs


def tokenizer_of(directory: Path) -> Any:
    """A tokenizer of WORDS, saved in ``directory``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", "<unknown>", *sorted(set(WORDS.split()))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>", unk_token="<unknown>")
    made.save_pretrained(directory)
    return made
