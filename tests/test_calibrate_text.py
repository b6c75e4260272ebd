"""Calibration batches: whole sequences spread over a text, rows as they are, and a sentence for what does not do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from bitloft.calibrate.text import read_batches
from bitloft.errors import CheckpointError, DataError, OptionError
from tests.architectures import make
from tests.helpers import WORDS, write_rows

SIZES = {"samples": 6, "length": 16}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def test_sequences_are_whole_and_spread_over_the_text(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "t.txt"
    file.write_text(" ".join(str(7919 * i) for i in range(400)), encoding="utf-8")
    batches = read_batches(file, make("llama"), tokenizer, **SIZES)
    ids = torch.cat([b.inputs["input_ids"] for b in batches])
    everything = torch.tensor(tokenizer(file.read_text())["input_ids"])
    assert ids.shape == (6, 16)
    assert sum(b.tokens for b in batches) == 96
    assert not any(b.masks for b in batches)
    starts = [next(i for i in range(0, len(everything), 16) if torch.equal(everything[i : i + 16], row)) for row in ids]
    assert starts[0] == 0
    assert starts[-1] > len(everything) // 2


def test_rows_keep_their_length_and_padding_is_masked(tmp_path: Path, tokenizer: Any) -> None:
    file = write_rows(tmp_path / "r.jsonl", [{"text": "the quick brown fox " * (1 + i % 2)} for i in range(6)])
    (batch,) = read_batches(file, make("bert"), tokenizer, **SIZES)
    assert batch.inputs["attention_mask"].sum() == batch.tokens
    assert batch.tokens < batch.inputs["input_ids"].numel()
    assert torch.equal(batch.masks[0], batch.inputs["attention_mask"].bool())


def test_an_encoder_decoder_reads_the_prompt_and_is_taught_the_rest(tmp_path: Path, tokenizer: Any) -> None:
    model = make("t5")
    text = tmp_path / "t.txt"
    text.write_text(" ".join([WORDS] * 5), encoding="utf-8")
    (batch,) = read_batches(text, model, tokenizer, **SIZES)
    assert batch.inputs["input_ids"].shape == batch.inputs["decoder_input_ids"].shape == (6, 8)
    assert batch.tokens == 96
    rows = write_rows(tmp_path / "r.jsonl", [{"prompt": "the quick", "completion": "fox " * (1 + i)} for i in range(6)])
    (batch,) = read_batches(rows, model, tokenizer, samples=6, length=64)
    assert batch.inputs["decoder_attention_mask"].sum(1).unique().numel() > 1
    assert len(batch.masks) == 2


def test_what_does_not_do_is_said(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "t.txt"
    file.write_text(WORDS, encoding="utf-8")
    with pytest.raises(DataError, match=r"gives \d+ sequences of at most 16 tokens .* which needs 1,600; give more"):
        read_batches(file, make("llama"), tokenizer, samples=100, length=16)
    with pytest.raises(DataError, match="there is no data file"):
        read_batches(tmp_path / "none.txt", make("llama"), tokenizer, **SIZES)
    with pytest.raises(CheckpointError, match="comes without a tokenizer"):
        read_batches(file, make("llama"), None, **SIZES)
    with pytest.raises(OptionError, match="reads input_features, not text"):
        read_batches(file, make("whisper"), tokenizer, **SIZES)
