"""Causal language modeling: rows to examples (token ids, labels), batches, and the loss on the positions that count.

Labels follow transformers: ``labels[t]`` is ``ids[t]`` where the loss is taken and -100 elsewhere; the model predicts
``labels[t + 1]`` from ``ids[:t + 1]``. A document is cut into blocks of ``length`` tokens, nothing of it is lost; a
prompt or conversation is one example, cut at ``length``, and every cut is counted in ``DataReport``.

The loss reads logits only where a label exists (``logits_to_keep``), and its gradient is written in chunks: with a
vocabulary of 49152 the logits of a batch are larger than the model, and a float copy of them three times as large.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bitloft.errors import DataError, OptionError
from bitloft.tasks.chat import encode_chat_labels
from bitloft.tasks.rows import Row

IGNORED = -100
CHUNK = 1 << 22  # logits handled at once in the loss: 16 MiB of float32


@dataclass(frozen=True)
class Example:
    """Token ids and labels of one sequence; ``row`` numbers the row it came from (blocks of a document share it)."""

    ids: Int[Tensor, "length"]
    labels: Int[Tensor, "length"]
    row: int

    @property
    def targets(self) -> int:
        """How many tokens are predicted: the first has nothing before it."""
        return int((self.labels[1:] != IGNORED).sum())


@dataclass
class DataReport:
    """What became of the rows: counts only, in rows and tokens."""

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    truncated_rows: int = 0
    rows_without_target: int = 0
    unused_keys: dict[str, int] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """What the user must be told, nothing if all is well."""
        said = []
        if self.truncated_rows:
            said.append(
                f"{self.truncated_rows} of {self.rows} rows were cut at the length; raise it to keep them whole."
            )
        if self.rows_without_target:
            said.append(
                f"{self.rows_without_target} of {self.rows} rows have nothing left to learn from after the cut and "
                "are not used."
            )
        for key, count in self.unused_keys.items():
            said.append(f"key {key!r} of {count} rows is not used.")
        return said


def check_length(length: int, config: Any) -> None:
    """Raise OptionError where ``length`` is beyond the positions that a transformers config allows."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None and length > most:
        raise OptionError(f"length {length} is beyond the {most} positions of this model; use {most} or less.")


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[list[Example], DataReport]:
    """Examples of at most ``length`` tokens, in the order of the rows, and what was cut.

    Raises DataError naming file and line where a row cannot be encoded, and where no row has a target left.
    """
    report = DataReport(rows=len(rows), unused_keys=dict(Counter(key for row in rows for key in row.unused)))
    examples: list[Example] = []
    for number, row in enumerate(rows):
        ids, target = _encode(row, tokenizer)
        if row.kind == "text":
            found = list(_blocks(ids, target, length, number))
        else:
            report.truncated_rows += len(ids) > length
            found = [_example(ids[:length], target[:length], number)]
        found = [example for example in found if example.targets]
        report.rows_without_target += not found
        examples += found
    report.examples = len(examples)
    report.tokens = sum(len(example.ids) for example in examples)
    report.target_tokens = sum(example.targets for example in examples)
    if not examples:
        raise DataError(
            f"none of the {len(rows)} rows of {rows[0].file} has a token to learn from within {length} tokens; "
            "raise the length."
        )
    return examples, report


def _encode(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids of a row and which of them are targets."""
    if row.kind == "text":
        return _document(row, tokenizer)
    if row.kind == "prompt" and not tokenizer.chat_template:
        return _plain_pair(row, tokenizer)
    pair = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion}]
    try:
        return encode_chat_labels(tokenizer, row.messages or pair)
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from None


def _document(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """A row's text, closed by the end token; a .txt file stays open, since it is cut into blocks anyway."""
    ids: list[int] = list(tokenizer(row.text, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id
    if row.file.endswith(".jsonl") and end is not None and ids[-1:] != [end]:
        ids.append(end)
    return ids, [True] * len(ids)


def _plain_pair(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Without a chat template: prompt and completion one after the other, closed by the end token."""
    prompt: list[int] = list(tokenizer(row.prompt)["input_ids"])
    completion: list[int] = list(tokenizer(row.completion, add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id is not None:
        if prompt[-1:] == [tokenizer.eos_token_id]:  # some tokenizers close every text they are given
            prompt.pop()
        completion.append(tokenizer.eos_token_id)
    return prompt + completion, [False] * len(prompt) + [True] * len(completion)


def _blocks(ids: list[int], target: list[bool], length: int, row: int) -> Iterator[Example]:
    for start in range(0, len(ids), length):
        yield _example(ids[start : start + length], target[start : start + length], row)


def _example(ids: list[int], target: list[bool], row: int) -> Example:
    tokens = torch.tensor(ids, dtype=torch.long)
    return Example(tokens, torch.where(torch.tensor(target, dtype=torch.bool), tokens, IGNORED), row)


@dataclass(frozen=True)
class Collator:
    """Pads on the right to the longest example of the batch: ids with ``pad``, labels with -100, mask with 0."""

    pad: int

    @classmethod
    def for_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> "Collator":
        """Pads with the tokenizer's padding id (its end id, or 0, where it has none: padding is masked anyway)."""
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return cls(0 if pad is None else int(pad))

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, each [batch, longest] int64."""
        longest = max(len(example.ids) for example in examples)
        shape = (len(examples), longest)
        batch = {
            "input_ids": torch.full(shape, self.pad, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED, dtype=torch.long),
        }
        for i, example in enumerate(examples):
            count = len(example.ids)
            batch["input_ids"][i, :count] = example.ids
            batch["attention_mask"][i, :count] = 1
            batch["labels"][i, :count] = example.labels
        return batch


def target_losses(model: Any, batch: dict[str, Tensor], **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Losses [targets] float32 of every labeled token of a batch, and the batch row [targets] each belongs to.

    ``model`` is a transformers causal model (or PEFT over one) whose forward takes ``logits_to_keep``; ``kwargs`` go to
    its forward. Differentiable.
    """
    logits, rows = target_logits(model, batch, **kwargs)
    labels = batch["labels"][:, 1:]
    losses: Tensor = _TokenLosses.apply(logits, labels[labels != IGNORED])  # type: ignore[no-untyped-call]
    return losses, rows


def target_logits(
    model: Any, batch: dict[str, Tensor], **kwargs: Any
) -> tuple[Float[Tensor, "targets vocabulary"], Int[Tensor, " targets"]]:
    """The logits that predict every labeled token of a batch, and the batch row of each; see ``target_losses``."""
    wanted = batch["labels"][:, 1:] != IGNORED  # [batch, length - 1]: position t predicts label t + 1
    kept = wanted.any(dim=0).nonzero().squeeze(1)  # positions that any row of the batch needs
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, logits_to_keep=kept, use_cache=False, **kwargs).logits
    where = wanted[:, kept]
    return _rows(logits, where), where.nonzero()[:, 0]


def _rows(
    logits: Float[Tensor, "batch kept vocabulary"], where: Bool[Tensor, "batch kept"]
) -> Float[Tensor, "targets vocabulary"]:
    """The logits of the targets, without a copy where every kept position of the batch is one."""
    return logits.flatten(0, 1) if bool(where.all()) else logits[where]


class _TokenLosses(torch.autograd.Function):
    """-log softmax(logits)[label] per row, in float32 a few rows at a time; the gradient keeps the logits' dtype."""

    @staticmethod
    def forward(
        ctx: Any, logits: Float[Tensor, "targets vocabulary"], labels: Int[Tensor, "targets"]
    ) -> Float[Tensor, "targets"]:
        normalizers = torch.cat([chunk.float().logsumexp(dim=1) for chunk in logits.split(_step(logits))])
        ctx.save_for_backward(logits, labels, normalizers)
        return normalizers - logits.gather(1, labels.unsqueeze(1)).squeeze(1).float()

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "targets"]) -> tuple[Float[Tensor, "targets vocabulary"], None]:
        logits, labels, normalizers = ctx.saved_tensors
        out = torch.empty_like(logits)
        for rows in torch.arange(len(labels), device=labels.device).split(_step(logits)):
            chunk = slice(int(rows[0]), int(rows[-1]) + 1)
            slope = (logits[chunk].float() - normalizers[chunk].unsqueeze(1)).exp_()
            slope[torch.arange(len(rows), device=labels.device), labels[chunk]] -= 1
            out[chunk] = slope.mul_(grad[chunk].unsqueeze(1))
        return out, None


def divergences(
    logits: Float[Tensor, "rows vocabulary"], wanted: Float[Tensor, "rows vocabulary"]
) -> Float[Tensor, " rows"]:
    """KL(softmax(wanted) || softmax(logits)) of every row in nats, float32; differentiable in ``logits`` alone."""
    losses: Tensor = _Divergences.apply(logits, wanted.detach())  # type: ignore[no-untyped-call]
    return losses


class _Divergences(torch.autograd.Function):
    """Both softmaxes in float32 a few rows at a time, as in ``_TokenLosses``."""

    @staticmethod
    def forward(
        ctx: Any, logits: Float[Tensor, "rows vocabulary"], wanted: Float[Tensor, "rows vocabulary"]
    ) -> Float[Tensor, " rows"]:
        ctx.save_for_backward(logits, wanted)
        found = []
        for one, other in zip(logits.split(_step(logits)), wanted.split(_step(logits)), strict=True):
            target = other.float().log_softmax(dim=1)
            found.append((target.exp() * (target - one.float().log_softmax(dim=1))).sum(dim=1))
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, " rows"]) -> tuple[Float[Tensor, "rows vocabulary"], None]:
        logits, wanted = ctx.saved_tensors
        out = torch.empty_like(logits)
        pieces = (tensor.split(_step(logits)) for tensor in (out, logits, wanted, grad))
        for to, one, other, slope in zip(*pieces, strict=True):
            to.copy_((one.float().softmax(dim=1) - other.float().softmax(dim=1)) * slope.unsqueeze(1))
        return out, None


def _step(logits: Tensor) -> int:
    return max(CHUNK // max(logits.shape[1], 1), 1)


def batches(examples: Sequence[Example], size: int, collate: Collator) -> Iterable[tuple[list[int], dict[str, Tensor]]]:
    """Batches of examples of about the same length (so little padding), with the indices of their examples."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, collate([examples[i] for i in chosen])
