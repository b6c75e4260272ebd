"""The compress verb (plain adapter -> packed adapter) and its way back, expand (packed -> plain PEFT directory).

    true bits = 8 * (bytes of the manifest and of every file it lists) / sum of r * (m + n)

``packing`` chooses the blocks; here they become a directory, written whole or not at all, and a report about it.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitloft.adapters import (
    CONFIG_FILE,
    PREFIX,
    RECORD_FILE,
    WEIGHTS_FILE,
    Adapter,
    PackedModule,
    read_adapter,
    read_packed,
)
from bitloft.checkpoint import SCHEMA, ignored_pickles, write_json, write_tensors, writing
from bitloft.errors import CheckpointError, OptionError
from bitloft.folder import Folder
from bitloft.kernels.ops import decode
from bitloft.options import CompressOptions
from bitloft.packing import Distilled, Metric, Packing, Progress, block_bytes
from bitloft.solvers.adapter import Components

EXPANDED = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class ModuleReport:
    """One packed module: ``widths`` maps bits (of A/B where they differ) to components, ``bits`` counts codes, scales
    and zero points; ``spectrum`` is each singular component's share of the energy before packing."""

    name: str
    shape: tuple[int, int]
    rank: int
    widths: dict[str, int]
    bits: float
    error: float
    spectrum: tuple[float, ...]


@dataclass(frozen=True)
class CompressReport:
    """What ``compress`` did. ``error`` is |s*B*A - packed|^2 / |s*B*A|^2 over the whole adapter, from stored bytes;
    ``weighed_error`` is the same in the metric of moments and gradients, None where none were given. ``mismatch`` says
    what an adapter that does not name the given base does there."""

    adapter: str
    out: str
    method: dict[str, Any]
    base: str | None
    true_bits: float
    payload_bits: float
    error: float
    weighed_error: float | None
    modules: tuple[ModuleReport, ...]
    values: int
    bytes: int
    source_bytes: int
    seconds: float
    ignored: tuple[str, ...]
    notes: tuple[str, ...]
    mismatch: str | None = None
    distilled: Distilled | None = None


def compress(
    adapter: str | Path | Folder,
    out: str | Path,
    options: CompressOptions | None = None,
    *,
    base: str | Path | None = None,
    data: str | Path | None = None,
    trained_on: str | Path | None = None,
    moments: Mapping[str, Tensor] | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> CompressReport:
    """Pack the PEFT adapter in directory ``adapter`` into ``out``; the source is only read.

    Settings are the fields of CompressOptions. ``base`` is the base directory it is meant for; an adapter that does not
    name it is refused, measured or allowed (``base_mismatch``): on ``data`` (rows or text, else a small built-in text),
    and on ``trained_on``, the model that it was trained on, if that is given. ``data`` is also what ``weigh`` measures
    and ``distill`` learns from. All of these load the whole base. In place of ``weigh``, ``moments`` maps module paths
    to second moments [in, in] of their inputs: errors then count where inputs are; ``gradients`` to those [out, out] of
    the loss's gradients by their outputs: errors count in the outputs that matter. Modules that are left out keep the
    plain norm. ``progress`` is called with (modules done, modules in all, module name), in a distillation with steps.
    Raises OptionError where the budget is below the floor (the sentence names the least possible) or the quality cannot
    be met, AdapterError for an adapter that is not plain LoRA or is refused on the base, DataError for bad rows,
    CheckpointError for damaged files.
    """
    began, options, out = time.perf_counter(), options or CompressOptions(**settings), Path(out)
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists already; remove it or choose another place.")
    source = read_adapter(adapter)
    job, modules, notes, distilled = _solved(
        source, options, base, data, trained_on, Metric(moments or {}, gradients or {}), progress
    )
    files = job.files(modules)
    with writing(out, overwrite=overwrite) as directory:
        for name, content in files.items():
            (directory / name).write_bytes(content)
        packed = read_packed(directory)
    size = sum(len(content) for content in files.values())
    return CompressReport(
        adapter=str(adapter),
        out=str(out),
        method=dict(packed.method),
        base=packed.base,
        true_bits=packed.true_bits,
        payload_bits=packed.payload_bits,
        error=job.error(modules),
        weighed_error=job.weighed_error(modules),
        modules=tuple(_report(m, c) for m, c in zip(modules, job.exact, strict=True)),
        values=packed.values,
        bytes=size,
        source_bytes=(source.path / WEIGHTS_FILE).stat().st_size,
        seconds=time.perf_counter() - began,
        ignored=tuple(ignored_pickles(source.path)),
        notes=tuple(notes),
        mismatch=job.mismatch,
        distilled=distilled,
    )


def _solved(
    source: Adapter,
    options: CompressOptions,
    base: str | Path | None,
    data: str | Path | None,
    trained_on: str | Path | None,
    metric: Metric,
    progress: Progress | None,
) -> tuple[Packing, list[PackedModule], list[str], Distilled | None]:
    """The packing with its modules, notes and distillation; the base is loaded only where one is given."""
    ground, mismatch, distilled = None, None, None
    if options.weigh and metric.name:
        raise OptionError("weigh measures what moments and gradients say; give one of them.")
    if _needs_base(options, base, data, trained_on):
        from bitloft.ground import Ground  # only here: it knows transformers, which take longer to load than to pack

        ground = Ground(Path(base or ""), None if data is None else Path(data), options)
        mismatch = ground.met(source, trained_on)
        if options.weigh:
            metric = ground.metric(options.weigh)
    job = Packing(source, options, metric=metric, mismatch=mismatch, progress=progress)
    modules, notes = job.solve()
    if ground is not None and options.distill:
        blocks, distilled = ground.distill(source, modules, progress)
        modules = job.modules_of([blocks.get(m.name, ()) for m in modules])
    return job, modules, notes, distilled


def _needs_base(options: CompressOptions, base: object, data: object, trained_on: object) -> bool:
    """Whether a base is given. Raises OptionError where something else asks for one."""
    running = next((name for name in ("distill", "weigh") if getattr(options, name)), None)
    if running and (base is None or data is None):
        raise OptionError(f"{running} runs the base on text; give base and data.")
    given = {"data": data, "trained_on": trained_on, "base_mismatch": options.base_mismatch}
    asking = next((name for name, value in given.items() if value is not None), None)
    if base is None and asking:
        raise OptionError(f"{asking} is about an adapter on a base; give base too.")
    return base is not None


def _report(module: PackedModule, exact: Components) -> ModuleReport:
    widths: dict[str, int] = {}
    for block in module.blocks:
        key = "/".join(dict.fromkeys(str(side.format.bits) for side in (block.a, block.bt)))
        widths[key] = widths.get(key, 0) + block.a.shape[0]
    values = module.rank * (module.in_features + module.out_features)
    bits = 8 * sum(block_bytes(block) for block in module.blocks) / values
    shape = (module.out_features, module.in_features)
    energy = exact.s.double().square()
    spectrum = tuple(round(x, 6) for x in (energy / energy.sum().clamp_min(1e-300)).tolist())
    return ModuleReport(module.name, shape, module.rank, widths, bits, module.error, spectrum)


def expand(packed: str | Path, out: str | Path, *, dtype: str = "float32", overwrite: bool = False) -> Path:
    """Write the packed adapter in ``packed`` as a plain PEFT directory ``out`` and return that path.

    A [r, in] and B [out, r] are what is stored, decoded exactly (float32) or rounded once (float16), balanced by a
    power of two per component; the factor s is 1 (alpha = r). Every module gets the same rank, zeros fill up, since not
    every reader knows ``rank_pattern``; a module too small for that rank gets its own. Raises OptionError for another
    dtype or values beyond float16, CheckpointError for damaged files.
    """
    out = Path(out)
    if dtype not in EXPANDED:
        raise OptionError(f"unknown dtype {dtype!r}; use one of {', '.join(EXPANDED)}.")
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists already; remove it or choose another place.")
    adapter = read_packed(packed)
    ranks = {m.name: max(sum(b.a.shape[0] for b in m.blocks), 1) for m in adapter.modules.values()}
    rank = max(ranks.values())
    small = {m.name for m in adapter.modules.values() if min(m.in_features, m.out_features) < rank}
    tensors = {}
    for module in adapter.modules.values():
        a, b = _factors(module, ranks[module.name] if module.name in small else rank, EXPANDED[dtype])
        tensors[f"{PREFIX}{module.name}.lora_A.weight"], tensors[f"{PREFIX}{module.name}.lora_B.weight"] = a, b
    patterns = {f"^{name}": ranks[name] for name in sorted(small)}
    config = adapter.config | {"r": rank, "lora_alpha": rank, "use_rslora": False, "inference_mode": True}
    config |= {"rank_pattern": patterns, "alpha_pattern": patterns, "init_lora_weights": True, "lora_dropout": 0.0}
    with writing(out, overwrite=overwrite) as directory:
        write_json(directory / CONFIG_FILE, config)
        write_tensors(directory / WEIGHTS_FILE, dict(sorted(tensors.items())), {"format": "pt"})
        if adapter.base is not None or adapter.source is not None:
            record = {"schema": SCHEMA, "base": adapter.base, "source": adapter.source, "start": adapter.start}
            write_json(directory / RECORD_FILE, record)
    return out


def _factors(module: PackedModule, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of one module, zero rows and columns at the end."""
    a = torch.zeros(rank, module.in_features)
    bt = torch.zeros(rank, module.out_features)
    at = 0
    for block in module.blocks:
        rows = slice(at, at + block.a.shape[0])
        a[rows], bt[rows], at = decode(block.a), decode(block.bt), rows.stop
    norms = [torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-30) for x in (a, bt)]
    balance = torch.exp2(torch.round(torch.log2(norms[1] / norms[0]) / 2))
    a, b = (a * balance).to(dtype), (bt / balance).T.to(dtype)
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise OptionError(f"module {module.name} holds values beyond float16; expand to float32.")
    return a.contiguous(), b.contiguous()
