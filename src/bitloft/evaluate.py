"""The evaluate verb: the mean loss per token on held-out text, its standard error, and the perplexity of both.

With S_i the summed loss and n_i the target tokens of cluster i (a row of the file; where the file is one document, a
block of it), m clusters, N = sum n_i:

    L = sum S_i / N        se(L) = sqrt(m / (m - 1) * sum (S_i - L * n_i)^2) / N        (ratio estimator)
    perplexity = exp(L)    se(perplexity) = perplexity * se(L)                          (delta method)

Clusters, because the tokens of one row are not independent: a standard error over tokens would be too small by a factor
of a few. Neighboring blocks of one document are taken as independent, which makes that case a little too small still.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitloft.adapters import is_packed, read_adapter, read_packed
from bitloft.errors import CheckpointError, OptionError
from bitloft.integrations.mismatch import admitted
from bitloft.integrations.opening import open_model, quantized_by
from bitloft.integrations.record import base_record, load_tokenizer
from bitloft.modules.multi import AdapterBank
from bitloft.options import EvalOptions
from bitloft.tasks.lm import Collator, DataReport, Example, batches, check_length, encode_rows, target_losses
from bitloft.tasks.precision import Precision, choose_precision
from bitloft.tasks.rows import read_rows

# called with (sequences done, sequences in all, text) after each batch
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class EvalReport:
    """Loss in nats per target token, and its standard error (None where one cluster gives no spread to measure).
    ``mismatch`` is set where the adapter does not name this base by fingerprint."""

    base: str
    adapter: str | None
    data: DataReport
    loss: float
    stderr: float | None
    perplexity: float
    perplexity_stderr: float | None
    tokens: int
    sequences: int
    clusters: int
    dtype: str
    seconds: float
    mismatch: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    base: str | Path | PreTrainedModel,
    data: str | Path,
    adapter: str | Path | None = None,
    options: EvalOptions | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> EvalReport:
    """Mean loss per token of ``base`` (packed base, any model that ``quantize`` takes, or a loaded model) on ``data``.

    ``adapter`` is a PEFT directory or a packed adapter. A loaded model is left as it was; its tokenizer is looked for
    where it was loaded from. Settings are the fields of EvalOptions. Raises DataError for a bad row (file and line),
    AdapterError for an adapter of another base (``base_mismatch`` decides), OptionError for a length that the model
    does not take.
    """
    options = options or EvalOptions(**settings)
    rows = read_rows(data)
    began = time.perf_counter()
    model, tokenizer = _opened(base, tokenizer, options.activations)
    check_length(options.length, model.config)
    examples, report = encode_rows(rows, tokenizer, options.length)
    examples = examples[: options.limit]
    precision = choose_precision(options.dtype, model.device)
    bank = AdapterBank(model)
    note = None if adapter is None else _attach(bank, Path(adapter), base, options.base_mismatch)
    try:
        sums, counts = _measure(
            model, bank, examples, options.batch, Collator.for_tokenizer(tokenizer), precision, progress
        )
    finally:
        for name in bank.names:
            bank.detach(name)
    clusters = _clusters(examples, one_document=len(rows) == 1)
    loss, stderr = mean_and_stderr(_total(sums, clusters), _total(counts, clusters))
    return EvalReport(
        base=str(model.name_or_path if isinstance(base, PreTrainedModel) else base),
        adapter=None if adapter is None else str(adapter),
        data=report,
        loss=loss,
        stderr=stderr,
        perplexity=math.exp(loss),
        perplexity_stderr=None if stderr is None else math.exp(loss) * stderr,
        tokens=int(counts.sum()),
        sequences=len(examples),
        clusters=int(clusters.max()) + 1,
        dtype=precision.name,
        seconds=time.perf_counter() - began,
        mismatch=note,
    )


def mean_and_stderr(sums: Float[Tensor, "clusters"], counts: Float[Tensor, "clusters"]) -> tuple[float, float | None]:
    """The ratio sum(sums) / sum(counts) and its standard error between clusters (formula above); None for one cluster.

    Cochran, Sampling Techniques (1977), 2.11: the variance of a ratio estimator.
    """
    total = counts.sum()
    mean = sums.sum() / total
    m = len(sums)
    if m < 2:
        return float(mean), None
    spread = (sums - mean * counts).square().sum() * m / (m - 1)
    return float(mean), float(spread.sqrt() / total)


def _opened(
    base: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, activations: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in eval mode and its tokenizer."""
    if isinstance(base, PreTrainedModel):
        if activations is not None:
            raise OptionError(f"activations {activations} are chosen when a model is loaded; give load the option.")
        return base.eval(), tokenizer or load_tokenizer(base.name_or_path)
    opened = open_model(base, activations)
    if tokenizer is None and opened.tokenizer is None:
        raise CheckpointError(f"{base} holds no tokenizer; text cannot be encoded.")
    return opened.model, tokenizer or opened.tokenizer


def _attach(bank: AdapterBank, adapter: Path, base: str | Path | PreTrainedModel, asked: str | None) -> str | None:
    """Put the adapter on the model, as serving does; what is to be told about one that does not name this base."""
    found = read_packed(adapter) if is_packed(adapter) else read_adapter(adapter)
    directory = Path(base.name_or_path if isinstance(base, PreTrainedModel) else base)
    note = None
    if quantized_by(directory) == "bitloft":
        note = admitted(found, base_record(directory), asked)
    bank.attach("adapter", found)
    return note


@torch.inference_mode()
def _measure(
    model: PreTrainedModel,
    bank: AdapterBank,
    examples: Sequence[Example],
    size: int,
    collate: Collator,
    precision: Precision,
    progress: Progress | None,
) -> tuple[Float[Tensor, "sequences"], Float[Tensor, "sequences"]]:
    """Summed loss and number of targets of each example, float64."""
    sums, counts = torch.zeros(len(examples), dtype=torch.float64), torch.zeros(len(examples), dtype=torch.float64)
    names = bank.names or (None,)
    done = 0
    for chosen, batch in batches(examples, size, collate):
        batch = {key: value.to(model.device) for key, value in batch.items()}
        with precision.autocast(model.device), bank.rows(names * len(chosen)):
            losses, owners = target_losses(model, batch)
        index = torch.tensor(chosen)[owners.cpu()]
        sums.index_add_(0, index, losses.double().cpu())
        counts.index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
        done += len(chosen)
        if progress is not None:
            progress(done, len(examples), f"loss {float(sums.sum() / counts.sum()):.3f}")
    return sums, counts


def _clusters(examples: Sequence[Example], one_document: bool) -> Int[Tensor, "sequences"]:
    """The cluster of each example, numbered from 0: its row, or itself where all come from one document."""
    if one_document:
        return torch.arange(len(examples))
    numbers: Tensor = torch.unique(torch.tensor([example.row for example in examples]), return_inverse=True)[1]
    return numbers


def _total(values: Float[Tensor, "sequences"], clusters: Int[Tensor, "sequences"]) -> Float[Tensor, "clusters"]:
    totals = torch.zeros(int(clusters.max()) + 1, dtype=values.dtype)
    totals.index_add_(0, clusters, values)
    return totals
