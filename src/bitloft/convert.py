"""The convert verb: a packed base, or an adapter with it, for use without bitloft.

    dense         Q + s0*B0*A0 (+ s*B*A) per matrix, as a plain transformers folder in 16 bit
    portable      the adapter as a LoRA for the original model W: exact in the difference alone, since the two models
                  differ by W - Q - s0*B0*A0; that norm is given, and the loss of both where a text is
    gptq          the codes of a base in one uniform format, in the layout that vLLM and GPTQModel read
    bitsandbytes  the codes of an nf4 base as a load_in_4bit checkpoint, equal to the bit; such a file has no place for
                  a start, which becomes a LoRA beside it (with the adapter, where one is given)

A portable LoRA has rank r where the adapter holds the task (bitloft's own always do), at most 2r where it holds the
start too, as LoftQ trains it: then s0*B0*A0 is taken off. The alternative for both, folding everything into dense
weights, is ``dense`` with an adapter.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bitloft.checkpoint import copy_companions, read_json, writing
from bitloft.errors import CheckpointError, OptionError
from bitloft.evaluate import evaluate
from bitloft.factors import Factors, Pair, read_factors, stacked, write_lora
from bitloft.integrations import bitsandbytes, gptq, loading
from bitloft.integrations.mismatch import admitted
from bitloft.integrations.packing import dense_linear
from bitloft.integrations.record import BaseRecord, base_record, load_tokenizer, stored_dtype
from bitloft.integrations.source import open_source
from bitloft.modules.adapted import linear_of
from bitloft.modules.linear import QuantLinear, quant_linears, replace_module
from bitloft.options import ConvertOptions, EvalOptions
from bitloft.packed import scales_of
from bitloft.solvers.base import relative

REPORT = "bitloft_report.json"
START = "start"  # folder of the start as a LoRA, beside a bitsandbytes checkpoint

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ConvertReport:
    """What ``convert`` did. ``changes`` is per matrix the relative Frobenius norm of what the result lacks: dense, the
    rounding to its dtype; portable, |W - Q - s0*B0*A0| / |W|; bitsandbytes, 0. ``losses`` are nats per token."""

    to: str
    base: str
    out: str
    changes: dict[str, float]
    rank: int | None = None
    notes: tuple[str, ...] = ()
    losses: dict[str, float] = field(default_factory=dict)
    stored_bytes: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Job:
    """What every target needs: the base, the adapter (None for the base alone), where to and what to measure on."""

    base: Path
    record: BaseRecord
    factors: Factors | None
    out: Path
    options: ConvertOptions
    source: str | None
    data: Path | None
    progress: Progress | None

    def loss(self, model: str | Path | PreTrainedModel, adapter: Path | None = None, tokenizer: Any = None) -> float:
        asked = self.options
        options = EvalOptions(
            length=asked.length, limit=asked.limit, batch=asked.batch, base_mismatch=asked.base_mismatch
        )
        data = self.data or Path()
        return evaluate(model, data, adapter, options, tokenizer=tokenizer, progress=self.progress).loss

    @property
    def adapter(self) -> Path | None:
        return None if self.factors is None else self.factors.path

    def loss_of_base(self) -> float:
        return self.loss(self.base, self.adapter)

    def step(self, done: int, total: int, name: str) -> None:
        if self.progress is not None:
            self.progress(done, total, name)


def convert(
    base: str | Path,
    out: str | Path,
    options: ConvertOptions | None = None,
    *,
    adapter: str | Path | None = None,
    source: str | Path | None = None,
    data: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> ConvertReport:
    """Write ``base`` (with ``adapter``) into the directory ``out`` for use without bitloft.

    ``source`` is the original model, for ``portable``: its norms are measured anew and its loss too; without it they
    are those that ``quantize`` reported. ``data`` is a text to measure losses on. Settings are the fields of
    ConvertOptions: ``convert("base", "out", to="dense")``. Raises OptionError where the target cannot say what the base
    holds, AdapterError for an adapter of another base, CheckpointError for damaged files or another source.
    """
    options, began, base = options or ConvertOptions(**settings), time.perf_counter(), Path(base)
    record = base_record(base)
    factors = None if adapter is None else read_factors(adapter)
    mismatch = None
    if factors is not None:
        mismatch = admitted(factors, record, options.base_mismatch)
    if source is not None and options.to != "portable":
        raise OptionError(f"source does not apply to {options.to}; leave it out.")
    named, text = None if source is None else str(source), None if data is None else Path(data)
    job = _Job(base, record, factors, Path(out), options, named, text, progress)
    with writing(out, overwrite=overwrite) as directory, torch.no_grad():
        report = _TARGETS[options.to](job, directory)
        stored = sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())
    known = {k: v for k, v in report.__dict__.items() if k not in ("stored_bytes", "seconds")}
    if mismatch is not None:
        known["notes"] = (*report.notes, f"The adapter was {mismatch}")
    return ConvertReport(**known, stored_bytes=stored, seconds=time.perf_counter() - began)


def _dense(job: _Job, directory: Path) -> ConvertReport:
    """The whole model. Linears are summed with the adapter in float32 and rounded once; the rest is dequantized."""
    dtype = _dtype(job)
    model = loading.load(job.base, dtype=dtype)
    pairs = {} if job.factors is None else job.factors.pairs
    linears = {name: linear_of(model, name, pair, job.adapter) for name, pair in pairs.items()}
    layers, changes = quant_linears(model), {}
    for done, (name, layer) in enumerate(layers.items(), start=1):
        exact = layer.dense() + pairs[name].product() if name in pairs else layer.dense()
        changes[name] = _replace_dense(model, name, layer, exact, dtype)
        job.step(done, len(layers), name)
    for name in pairs.keys() - layers.keys():
        weight = linears[name].weight
        exact = weight.data.float() + pairs[name].product()
        weight.data = exact.to(weight.dtype)
        changes[name] = relative(exact - weight.data.float(), exact)
    model = model.dequantize(dtype)
    _require_finite(model)
    with loading.quiet_loading():
        model.save_pretrained(directory)
    copy_companions(job.base, directory)
    losses = {} if job.data is None else {"base": job.loss_of_base(), "converted": job.loss(directory)}
    return ConvertReport("dense", str(job.base), str(job.out), changes, losses=losses)


def _dtype(job: _Job) -> Any:
    """The torch.dtype that is asked for, or that of what the base does not pack."""
    return stored_dtype(job.base) if job.options.dtype == "auto" else getattr(torch, job.options.dtype)


def _require_finite(model: PreTrainedModel) -> None:
    """A value beyond float16 would be infinite there, and the model silent about it."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise OptionError(f"{name} holds values beyond {str(parameter.dtype)[6:]}; convert to bfloat16 or float32.")


def _replace_dense(
    model: PreTrainedModel, name: str, layer: QuantLinear, exact: torch.Tensor, dtype: torch.dtype
) -> float:
    """Put the dense module that the layer was in its place; what rounding its weight changed."""
    rounded = exact.to(dtype)
    replace_module(model, name, dense_linear(layer, rounded))
    return relative(exact - rounded.float(), exact)


def _portable(job: _Job, directory: Path) -> ConvertReport:
    """The adapter alone, relative to the original model."""
    if job.factors is None:
        raise OptionError("a portable LoRA is made of an adapter; give one (a base alone is converted to dense).")
    model = loading.load(job.base, dtype=stored_dtype(job.base))
    pairs = {}
    for name, pair in job.factors.pairs.items():
        layer = linear_of(model, name, pair, job.adapter)
        pairs[name] = _without_start(layer, pair) if job.options.contains == "start" else pair
    changes, notes = _distances(job, model, pairs)
    name = job.source or str(_report(job.base).get("source", "unknown"))
    record = {"base": None, "source": job.record.source, "start": None}
    rank = write_lora(directory, pairs, base_name=name, config={"task_type": _task_type(job)}, record=record)
    return ConvertReport(
        "portable", str(job.base), str(job.out), changes, rank, notes, _portable_losses(job, directory)
    )


def _portable_losses(job: _Job, directory: Path) -> dict[str, float]:
    if job.data is None:
        return {}
    if job.source is None:
        raise OptionError("the loss of a portable LoRA is that on the original model; name it as source.")
    losses = {"base with adapter": job.loss_of_base(), "source": job.loss(job.source)}
    return losses | {"source with portable": job.loss(job.source, directory)}


def _without_start(layer: nn.Module, pair: Pair) -> Pair:
    """s*B*A - s0*B0*A0, at its numerical rank; all of ``pair`` where the layer has no start."""
    from bitloft.integrations.peft import difference

    if not isinstance(layer, QuantLinear) or not layer.rank:
        return pair
    return Pair(*difference(pair.a, pair.b, 1.0, layer.start_a(), layer.start_b(), layer.scaling))


def _report(base: Path) -> dict[str, Any]:
    """What ``quantize`` left beside the weights; empty where it is gone."""
    return dict(read_json(base / REPORT)) if (base / REPORT).exists() else {}


def _distances(
    job: _Job, model: PreTrainedModel, pairs: Mapping[str, Pair]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """|W - Q - s0*B0*A0| / |W| of each adapted matrix: measured on the source, or as ``quantize`` reported it."""
    layers = {name: layer for name, layer in quant_linears(model).items() if name in pairs}
    if job.source is None:
        known = {m["name"]: m["error_after"] for m in _report(job.base).get("matrices", []) if "error_after" in m}
        if not layers.keys() <= known.keys():
            return {}, ("how far the base is from the original model is unknown; name that model as source.",)
        return {name: float(known[name]) for name in layers}, ("norms are those that quantize reported.",)
    source = open_source(job.source)
    if job.record.source is not None and source.fingerprint() != job.record.source:
        raise CheckpointError(f"{job.source} is not the model that {job.base} was made of; their fingerprints differ.")
    original, changes = source.load(), {}
    for done, (name, layer) in enumerate(layers.items(), start=1):
        module = original.get_submodule(name)
        weight = (module.weight.T if isinstance(module, Conv1D) else module.weight).data.float()
        changes[name] = relative(weight - layer.dense(), weight)
        job.step(done, len(layers), name)
    return changes, ()


def _bitsandbytes(job: _Job, directory: Path) -> ConvertReport:
    """Codes and scales as they are; the start, and the adapter where one is given, as a LoRA in ``start``."""
    dtype = _dtype(job)
    model = loading.load(job.base, dtype=dtype)
    layers = quant_linears(model)
    bitsandbytes.require_linears(model)
    pairs = {} if job.factors is None else dict(job.factors.pairs)
    for name, pair in pairs.items():
        linear_of(model, name, pair, job.adapter)
    dense = {n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)}
    changes, notes = {}, []
    for done, (name, layer) in enumerate(layers.items(), start=1):
        bitsandbytes.require_nf4(name, layer.format)
        if layer.rank:
            start = Pair(layer.start_a(), layer.scaling * layer.start_b())
            pairs[name] = stacked(start, pairs[name]) if name in pairs else start
        reason = bitsandbytes.dense_reason(model, name, layer)
        changes[name] = _export(model, name, layer, dtype, reason)
        if reason is not None:
            dense.add(name)
            notes.append(f"{name} is written dense: {reason}.")
        job.step(done, len(layers), name)
    bitsandbytes.save(model, directory, dtype, dense)
    copy_companions(job.base, directory)
    rank = None
    if pairs:
        rank = write_lora(directory / START, pairs, base_name=str(job.out), config={"task_type": _task_type(job)})
        what = "the start" if job.factors is None else "the start with the adapter"
        place = f"{what} is the LoRA in {job.out / START}; load it with PEFT."
        notes.append(f"bitsandbytes has no place for a start: {place}")
    losses = _bitsandbytes_losses(job, directory, bool(pairs)) if job.data is not None else {}
    return ConvertReport("bitsandbytes", str(job.base), str(job.out), changes, rank, tuple(notes), losses)


def _export(model: PreTrainedModel, name: str, layer: QuantLinear, dtype: torch.dtype, reason: str | None) -> float:
    """Put bitsandbytes' tensors in the layer's place, a dense one where there is a ``reason``; what that changed."""
    if reason is not None:
        layer.start_enabled = False
        return _replace_dense(model, name, layer, layer.dense(), dtype)
    tensors = bitsandbytes.stored_tensors(layer.packed_weight(), dtype)
    bias = {} if layer.bias is None else {"bias": layer.bias.data}
    replace_module(model, name, bitsandbytes.Stored(tensors | bias))
    return 0.0


def _task_type(job: _Job) -> str | None:
    if job.factors is not None and job.factors.config.get("task_type"):
        return str(job.factors.config["task_type"])
    kind = loading.model_class(read_json(job.base / "config.json"), str(job.base))
    return "CAUSAL_LM" if kind.__name__.endswith("ForCausalLM") else None


def _bitsandbytes_losses(job: _Job, directory: Path, started: bool) -> dict[str, float]:
    """Loss of the export as transformers reads it, start included."""
    try:
        kind = loading.model_class(read_json(directory / "config.json"), str(directory))
        model = kind.from_pretrained(directory, dtype=torch.float32)
    except ImportError as error:
        raise OptionError(f"measuring the export needs bitsandbytes ({str(error).splitlines()[0]}).") from error
    adapter = directory / START if started else None
    return {"base": job.loss_of_base(), "converted": job.loss(model, adapter, load_tokenizer(job.base))}


def _gptq(job: _Job, directory: Path) -> ConvertReport:
    """Codes and zero points as they are, scales in float16; the start, and the adapter, as a LoRA in ``start``."""
    if job.data is not None:
        raise OptionError(
            "a GPTQ checkpoint needs its own packages to run, so no loss is measured here; leave data out."
        )
    dtype = _dtype(job)
    model = loading.load(job.base, dtype=dtype)
    bitsandbytes.require_linears(model)
    layers, fmt = gptq.layers_of(model)
    pairs = {} if job.factors is None else dict(job.factors.pairs)
    for name, pair in pairs.items():
        linear_of(model, name, pair, job.adapter)
    changes = {}
    for done, (name, layer) in enumerate(layers.items(), start=1):
        if layer.rank:
            start = Pair(layer.start_a(), layer.scaling * layer.start_b())
            pairs[name] = stacked(start, pairs[name]) if name in pairs else start
        layer.start_enabled = False
        tensors, exact = gptq.stored_tensors(layer.packed_weight()), layer.dense()
        size = fmt.group_size(layer.in_features)
        # rounding a scale is all that can change: the same share of every value of its group
        scales = scales_of(layer.packed_weight(), slice(None), torch.float32)
        ratio = torch.where(scales == 0, 1.0, tensors["scales"].T.float() / scales).repeat_interleave(size, dim=1)
        changes[name] = relative(exact * ratio - exact, exact)
        bias = {} if layer.bias is None else {"bias": layer.bias.data}
        replace_module(model, name, bitsandbytes.Stored(tensors | bias))
        job.step(done, len(layers), name)
    gptq.save(model, directory, fmt)
    copy_companions(job.base, directory)
    rank, notes = None, []
    if pairs:
        rank = write_lora(directory / START, pairs, base_name=str(job.out), config={"task_type": _task_type(job)})
        notes.append(f"GPTQ's layout has no place for a start: it is the LoRA in {job.out / START}.")
    return ConvertReport("gptq", str(job.base), str(job.out), changes, rank, tuple(notes))


_TARGETS = {"dense": _dense, "portable": _portable, "bitsandbytes": _bitsandbytes, "gptq": _gptq}
