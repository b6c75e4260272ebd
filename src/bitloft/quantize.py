"""The quantize verb: a model in, a complete packed base out (weights, start, tokenizer, template, card, manifest).

One matrix at a time is replaced in a loaded model, so memory falls as the run goes on. The directory is written beside
and renamed: an interrupted run leaves nothing under the final name.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bitloft import __version__, card
from bitloft.checkpoint import fingerprint, weight_files, write_json, write_manifest, writing
from bitloft.errors import CheckpointError
from bitloft.integrations.source import Source, open_source
from bitloft.integrations.transformers import choose, mark_quantized, quantize_module, register
from bitloft.modules.linear import QuantLinear, quant_linears
from bitloft.options import QuantizeOptions
from bitloft.rules import ModulePlan, resolve

REPORT = "bitloft_report.json"

# called with (done, total, module name) after each matrix
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class MatrixReport:
    """One packed matrix. Errors are relative Frobenius norms; bits count scales and padding."""

    name: str
    format: str
    shape: tuple[int, int]
    error_before: float
    error_after: float
    bytes: int
    start_bytes: int
    seconds: float


@dataclass(frozen=True)
class QuantizeReport:
    """What ``quantize`` did. Bytes are those of stored tensors; ``true_bits`` are per weight of the packed matrices."""

    out: str
    source: str
    fingerprint: str
    matrices: tuple[MatrixReport, ...]
    left: dict[str, str]
    ignored: tuple[str, ...]
    embedding_bytes: int
    other_bytes: int
    source_bytes: int
    stored_bytes: int
    seconds: float

    @property
    def weights(self) -> int:
        return sum(m.shape[0] * m.shape[1] for m in self.matrices)

    @property
    def true_bits(self) -> float:
        """Bits per packed weight, start left out."""
        return 8 * sum(m.bytes for m in self.matrices) / self.weights

    @property
    def true_bits_with_start(self) -> float:
        return 8 * sum(m.bytes + m.start_bytes for m in self.matrices) / self.weights

    def to_dict(self) -> dict[str, Any]:
        totals = {"true_bits": self.true_bits, "true_bits_with_start": self.true_bits_with_start}
        return asdict(self) | {"weights": self.weights} | totals


def quantize(
    model: str | Path,
    out: str | Path,
    options: QuantizeOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> QuantizeReport:
    """Quantize ``model`` (hub name, safetensors folder or GGUF file) into the directory ``out``.

    Settings are the fields of QuantizeOptions: ``quantize("m", "out", format="lm2:64", rank=16)``. Raises OptionError
    for options that do not exist or fit, CheckpointError for a source that is missing, unsafe or damaged.
    """
    options = options or QuantizeOptions(**settings)
    began = time.perf_counter()
    register()
    with writing(out, overwrite=overwrite) as directory, torch.no_grad():
        source = open_source(str(model))
        dense = source.load()
        source_bytes = sum(t.numel() * t.element_size() for t in _stored_tensors(dense))
        selection = choose(dense, options)
        plans = resolve(selection.chosen, options)
        matrices = _solve_all(dense, plans, options, progress)
        mark_quantized(dense, options, plans)
        _save(dense, source, directory)
        embedding, other = _unpacked_bytes(dense)
        report = QuantizeReport(
            out=str(out),
            source=source.name,
            fingerprint=fingerprint(weight_files(directory)),
            matrices=tuple(matrices),
            left=selection.left,
            ignored=source.ignored,
            embedding_bytes=embedding,
            other_bytes=other,
            source_bytes=source_bytes,
            stored_bytes=sum(f.stat().st_size for f in weight_files(directory)),
            seconds=time.perf_counter() - began,
        )
        write_json(directory / REPORT, report.to_dict())
        (directory / "README.md").write_text(card.of_base(report, options), encoding="utf-8")
        record = {"fingerprint": report.fingerprint, "source": source.fingerprint(), "bitloft_version": __version__}
        write_manifest(directory, "base", record)
    return report


def _solve_all(
    model: PreTrainedModel, plans: dict[str, ModulePlan], options: QuantizeOptions, progress: Progress | None
) -> list[MatrixReport]:
    reports = []
    for done, (name, plan) in enumerate(plans.items(), start=1):
        began = time.perf_counter()
        solution = quantize_module(model, name, plan, options)
        start = solution.start
        reports.append(
            MatrixReport(
                name=name,
                format=plan.format,
                shape=(solution.weight.shape[0], solution.weight.shape[1]),
                error_before=solution.error_before,
                error_after=solution.error_after,
                bytes=solution.weight.nbytes,
                start_bytes=0 if start is None else start.a.nbytes + start.bt.nbytes,
                seconds=time.perf_counter() - began,
            )
        )
        if progress is not None:
            progress(done, len(plans), name)
    return reports


def _save(model: PreTrainedModel, source: Source, directory: Path) -> None:
    """Weights, config, generation config and tokenizer, through transformers' own save_pretrained."""
    try:
        model.save_pretrained(directory)
    except OSError:
        raise
    except Exception as error:  # safetensors reports a full disk as its own error type
        if "os error" in str(error).lower() or "I/O" in str(error):
            raise CheckpointError(f"cannot write the packed weights: {error}; nothing was left there.") from error
        raise
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(directory)


def _stored_tensors(model: PreTrainedModel) -> list[torch.Tensor]:
    """Parameters that a file holds: tied ones once."""
    return [p.data for p in model.parameters()]


def _unpacked_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes of embeddings (input, and head where it is not tied) and of everything else that is not packed."""
    packed = {id(t) for layer in quant_linears(model).values() for t in (layer.weight, *layer.buffers())}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None and not isinstance(head, QuantLinear):
        tables.add(id(head.weight))
    embedding = other = 0
    for parameter in model.parameters():
        size = parameter.numel() * parameter.element_size()
        embedding += size if id(parameter) in tables else 0
        other += 0 if id(parameter) in tables or id(parameter) in packed else size
    return embedding, other
