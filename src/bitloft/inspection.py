"""The inspect verb: what is inside a base or an adapter, per module; and ``machine``: versions and kernels.

Figures come from the files themselves: bytes from their headers, errors from the report that the verb which made them
left beside the weights.
"""

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bitloft import __version__
from bitloft.adapters import PackedModule, is_packed, read_adapter, read_packed
from bitloft.checkpoint import MANIFEST, ignored_pickles, read_header, read_json, read_manifest, weight_files
from bitloft.errors import CheckpointError
from bitloft.formats import Format, layout
from bitloft.kernels import ops

REPORT = "bitloft_report.json"


@dataclass(frozen=True)
class Inspection:
    """``kind`` is base, packed adapter or adapter; ``rows`` has one row per module under ``columns``."""

    kind: str
    summary: dict[str, object]
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(path: Path | str) -> Inspection:
    """Look into a directory. Raises CheckpointError where it is none of the kinds that bitloft knows."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; give a base or an adapter.")
    if is_packed(path):
        return _packed(path)
    if (path / "adapter_config.json").exists():
        return _adapter(path)
    if (path / "config.json").exists():
        return _base(path)
    raise CheckpointError(f"{path} holds neither config.json nor adapter_config.json; it is no base and no adapter.")


def _base(path: Path) -> Inspection:
    quantization = read_json(path / "config.json").get("quantization_config") or {}
    if quantization.get("quant_method") != "bitloft":
        raise CheckpointError(
            f"{path} is a model that bitloft did not quantize; `bitloft quantize` makes a base of it."
        )
    manifest = read_manifest(path, "base") if (path / MANIFEST).exists() else {}
    entries = _entries(path)
    report = read_json(path / REPORT) if (path / REPORT).exists() else {}
    found = {m["name"]: m for m in report.get("matrices", [])}
    rows, packed, start, weights = [], 0, 0, 0
    for name, spelling in quantization["modules"].items():
        fmt = Format.parse(spelling)
        shape = _dense_shape(name, fmt, entries, found)
        stored = sum(part.nbytes for part in layout(shape, fmt).values())
        start_bytes = _start_bytes(entries, name)
        count = shape[0] * shape[1]
        error = found.get(name, {})
        rows.append(
            (name, spelling, f"{shape[0]} x {shape[1]}", 8 * stored / count, 8 * start_bytes / count, float(fmt.bits),
             error.get("error_before", "-"), error.get("error_after", "-"))
        )  # fmt: skip
        packed, start, weights = packed + stored, start + start_bytes, weights + count
    summary = {
        "true bits": 8 * packed / max(weights, 1),
        "true bits with start": 8 * (packed + start) / max(weights, 1),
        "packed weights": f"{weights:,} in {len(rows)} matrices",
        "stored bytes": sum(f.stat().st_size for f in weight_files(path)),
        "options": ", ".join(f"{k}={v}" for k, v in quantization["options"].items()),
        "fingerprint": manifest.get("fingerprint", "no manifest"),
        "source": manifest.get("source", "unknown"),
        "left alone": f"{len(report.get('left', {}))} modules",
        "ignored": ", ".join(ignored_pickles(path)) or "nothing",
    }
    columns = ("module", "format", "shape", "true bits", "start bits", "payload bits", "error rounded", "with start")
    return Inspection("base", summary, columns, tuple(rows))


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    """The header entry of every stored tensor."""
    found: dict[str, dict[str, Any]] = {}
    for file in weight_files(path):
        found |= {name: entry for name, entry in read_header(file).items() if name != "__metadata__"}
    return found


def _start_bytes(entries: dict[str, dict[str, Any]], module: str) -> int:
    spans = [e["data_offsets"] for key, e in entries.items() if key.startswith((f"{module}.a0", f"{module}.b0"))]
    return sum(end - begin for begin, end in spans)


def _dense_shape(name: str, fmt: Format, entries: dict[str, dict[str, Any]], found: dict[str, Any]) -> tuple[int, int]:
    """[out, in] from the report; without one from the codes' own shape, where padding counts as columns."""
    if name in found:
        rows, columns = found[name]["shape"]
        return rows, columns
    if f"{name}.weight" not in entries:
        raise CheckpointError(f"the config lists {name}, but its packed codes are not in the weight files.")
    rows, width = entries[f"{name}.weight"]["shape"]
    return rows, 8 * width // fmt.bits


def _packed(path: Path) -> Inspection:
    adapter = read_packed(path)
    columns = ("module", "formats", "shape", "rank", "true bits", "payload bits", "error")
    summary = {
        "method": ", ".join(f"{key}={value}" for key, value in adapter.method.items()),
        "true bits": adapter.true_bits,
        "payload bits": adapter.payload_bits,
        "error": adapter.error,
        "modules": len(adapter.modules),
        "payload bytes": adapter.payload.numel(),
        "base": adapter.base or "unknown",
        "source": adapter.source or "unknown",
        "sha256": adapter.sha256,
    }
    return Inspection("packed adapter", summary, columns, tuple(_packed_row(m) for m in adapter.modules.values()))


def _packed_row(module: PackedModule) -> tuple[object, ...]:
    """Bits are per trained value, rank * (in + out); the module table, exponents in it, belongs to no module."""
    values = max(module.rank * (module.in_features + module.out_features), 1)
    formats = " + ".join(f"{block.a.shape[0]} x {block.a.format}" for block in module.blocks) or "nothing"
    factors = [factor for block in module.blocks for factor in (block.a, block.bt)]
    stored = sum(part.nbytes for factor in factors for name, part in factor.tensors().items() if name != "exponent")
    codes = sum(block.a.format.bits * (block.a.numel + block.bt.numel) for block in module.blocks)
    shape = f"{module.out_features} x {module.in_features}"
    return (module.name, formats, shape, module.rank, 8 * stored / values, codes / values, module.error)


def _adapter(path: Path) -> Inspection:
    adapter = read_adapter(path)
    rows = [(p.name, f"{p.b.shape[0]} x {p.a.shape[1]}", p.a.shape[0], p.scaling) for p in adapter.pairs]
    summary = {
        "modules": len(rows),
        "values": f"{adapter.values:,}",
        "base": adapter.base or "unknown",
        "source": adapter.source or "unknown",
        "ignored": ", ".join(ignored_pickles(path)) or "nothing",
    }
    return Inspection("adapter", summary, ("module", "shape", "rank", "scaling"), tuple(rows))


def machine() -> dict[str, object]:
    """Versions, processor, threads, and which implementation of the operators runs here and why."""
    import torch

    packages = ("transformers", "peft", "accelerate", "safetensors", "numpy")
    return {
        "bitloft": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in packages},
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "kernels": ops.explain(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
