"""Calibration batches: a text or rows, through the model's own tokenizer and template, as inputs of its forward.

A text is cut into sequences of one length, taken evenly over the whole of it (its beginning alone would be one topic);
rows stay themselves. A decoder or an encoder reads a sequence as it is. An encoder-decoder reads a row's prompt and is
taught its completion; of a text it reads the first half of each sequence and is taught the second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from bitloft.errors import CheckpointError, DataError, OptionError
from bitloft.tasks.lm import IGNORED, Collator, Example, check_length, encode_rows
from bitloft.tasks.rows import read_rows

BATCH_TOKENS = 4096  # of one forward: enough to keep a matrix product busy, little beside one block's weights


@dataclass(frozen=True)
class Batch:
    """Keyword arguments of one forward, and which positions of [batch, length] are text; None where all are."""

    inputs: dict[str, Tensor]
    masks: tuple[Bool[Tensor, "_ _"], ...] = ()

    @property
    def tokens(self) -> int:
        counted = [self.inputs[key].numel() for key in ("input_ids", "decoder_input_ids") if key in self.inputs]
        return int(sum(int(mask.sum()) for mask in self.masks)) if self.masks else sum(counted)


def read_batches(file: str | Path, model: Any, tokenizer: Any, *, samples: int, length: int) -> list[Batch]:
    """``samples`` sequences of ``length`` tokens from a .txt or .jsonl file, as batches for ``model``.

    Raises DataError for a file that is missing or holds too few sequences (with the number of tokens needed),
    CheckpointError for a model without a tokenizer, OptionError for one that does not read text.
    """
    if tokenizer is None:
        raise CheckpointError(
            f"{type(model).__name__} comes without a tokenizer; a calibration text cannot be encoded."
        )
    if model.main_input_name != "input_ids":
        raise OptionError(
            f"{type(model).__name__} reads {model.main_input_name}, not text; quantize it without calibrate."
        )
    check_length(length, model.config)
    examples, _ = encode_rows(read_rows(file), tokenizer, length)
    cut_from = {e.row for e in examples if len(e.ids) == length}
    whole = [e for e in examples if len(e.ids) == length or e.row not in cut_from]  # the rest is a document's tail
    if len(whole) < samples:
        found = sum(len(e.ids) for e in whole)
        raise DataError(
            f"calibration text {file} gives {len(whole)} sequences of at most {length} tokens ({found:,} tokens), and "
            f"samples is {samples}, which needs {samples * length:,}; give more text or samples {len(whole)}."
        )
    chosen = [whole[i * len(whole) // samples] for i in range(samples)]
    chosen.sort(key=lambda e: -len(e.ids))  # little padding
    size = max(BATCH_TOKENS // length, 1)
    collate = Collator.for_tokenizer(tokenizer)
    groups = [chosen[i : i + size] for i in range(0, samples, size)]
    return [_batch(group, model, collate) for group in groups]


def _batch(examples: Sequence[Example], model: Any, collate: Collator) -> Batch:
    if not model.config.is_encoder_decoder:
        inputs, mask = _padded([e.ids for e in examples], collate.pad)
        return Batch({"input_ids": inputs} | _given("attention_mask", mask), () if mask is None else (mask,))
    pairs = [_halves(example) for example in examples]
    source, read = _padded([pair[0] for pair in pairs], collate.pad)
    target, taught = _padded([pair[1] for pair in pairs], collate.pad)
    both = {"input_ids": source, "decoder_input_ids": target}
    masks = tuple(
        torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask
        for ids, mask in ((source, read), (target, taught))
        if read is not None or taught is not None
    )
    return Batch(both | _given("attention_mask", read) | _given("decoder_attention_mask", taught), masks)


def _halves(example: Example) -> tuple[Tensor, Tensor]:
    """What an encoder-decoder reads and what it writes."""
    prompt = int((example.labels != IGNORED).float().argmax())
    cut = prompt if 0 < prompt < len(example.ids) else max(len(example.ids) // 2, 1)
    return example.ids[:cut], example.ids[cut - (cut == len(example.ids)) :]


def _padded(rows: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor | None]:
    """Rows side by side, and the mask of what is no padding; None where nothing is padded."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return ids, None if bool(mask.all()) else mask


def _given(name: str, mask: Tensor | None) -> dict[str, Tensor]:
    return {} if mask is None else {name: mask.long()}
