"""The inspect verb: what is inside a base or an adapter, per module; and ``machine``: versions and kernels.

Figures come from the files themselves: bytes from their headers, errors from the report that the verb which made them
left beside the weights.
"""

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod, sqrt
from pathlib import Path
from typing import Any

from bitloft import __version__
from bitloft.adapters import PackedModule, is_packed, read_adapter, read_packed
from bitloft.checkpoint import MANIFEST, ignored_pickles, read_header, read_json, read_manifest, weight_files
from bitloft.errors import CheckpointError
from bitloft.formats import Format
from bitloft.kernels import ops
from bitloft.modules.parts import stored_names
from bitloft.options import QuantizeOptions
from bitloft.report import Section, Table, is_number, lines, page
from bitloft.rules import StoredModule

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
    given: dict[str, Any] = quantization["options"]
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    options = QuantizeOptions(**settings)
    rows, packed, start, weights = [], 0, 0, 0
    for name, entry in quantization["modules"].items():
        stored = StoredModule.read(entry, options, name)
        found = [m for m in report.get("matrices", []) if m["name"] == name or m["name"].startswith(f"{name}.")]
        spans = _spans(name, stored, entries)
        shape = _dense_shape(name, stored, entries, found)
        count, bits = prod(shape), float(Format.parse(stored.format).bits)
        errors = (_mean_error(found, "error_before"), _mean_error(found, "error_after"))
        size = " x ".join(str(n) for n in shape)
        rows.append((name, stored.format, size, 8 * spans[0] / count, 8 * spans[1] / count, bits, *errors))
        packed, start, weights = packed + spans[0], start + spans[1], weights + count
    summary = {
        "true bits": 8 * packed / max(weights, 1),
        "true bits with start": 8 * (packed + start) / max(weights, 1),
        "packed weights": f"{weights:,} in {len(rows)} matrices",
        "stored bytes": sum(f.stat().st_size for f in weight_files(path)),
        "options": ", ".join(f"{k}={v}" for k, v in given.items()),
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


def _spans(name: str, stored: StoredModule, entries: dict[str, dict[str, Any]]) -> tuple[int, int]:
    """Bytes in the files of a module's weight and of its start. Raises CheckpointError where a part is missing."""
    weight = start = 0
    for key in stored_names(name, stored):
        if key not in entries:
            raise CheckpointError(f"the config lists {name}, but its part {key} is not in the weight files.")
        begin, end = entries[key]["data_offsets"]
        if key.removeprefix(name)[1:].startswith(("a0", "b0")):  # name.a0... in a layer, name_a0... among experts
            start += end - begin
        else:
            weight += end - begin
    return weight, start


def _dense_shape(
    name: str, stored: StoredModule, entries: dict[str, dict[str, Any]], found: list[dict[str, Any]]
) -> tuple[int, ...]:
    """[out, in] from the report (experts: [experts, out, in]); without one from the codes' own shape, where padding
    counts as columns."""
    codes = entries[name if stored.kind == "experts" else f"{name}.weight"]["shape"]
    if found:
        return (*codes[:-2], *found[0]["shape"])
    return (*codes[:-1], 8 * codes[-1] // Format.parse(stored.format).bits)


def _mean_error(found: list[dict[str, Any]], key: str) -> object:
    """The error that quantize reported; of several experts the root of the mean square."""
    return sqrt(sum(m[key] ** 2 for m in found) / len(found)) if found else "-"


def compare(one: Path | str, other: Path | str) -> Inspection:
    """Two bases side by side, module by module: formats, true bits, errors with the start and the change from A to B.

    Raises CheckpointError where either is not a base, or where they share no module.
    """
    sides = [inspect(one), inspect(other)]
    for path, side in zip((one, other), sides, strict=True):
        if side.kind != "base":
            raise CheckpointError(f"{path} is no base but of kind {side.kind!r}; bases are compared with bases.")
    rows = [{str(row[0]): dict(zip(side.columns, row, strict=True)) for row in side.rows} for side in sides]
    names = [name for name in rows[0] if name in rows[1]]
    if not names:
        raise CheckpointError(f"{one} and {other} have no packed module in common; they are of different models.")
    made = []
    for name in names:
        a, b = rows[0][name], rows[1][name]
        errors = (a["with start"], b["with start"])
        known = all(isinstance(error, float) and error > 0 for error in errors)
        change = f"{float(str(errors[1])) / float(str(errors[0])) - 1:+.1%}" if known else "-"
        made.append((name, a["format"], b["format"], a["true bits"], b["true bits"], *errors, change))
    shared = ("true bits", "true bits with start", "packed weights", "stored bytes", "fingerprint")
    summary: dict[str, object] = {key: f"{_short(sides[0], key)} | {_short(sides[1], key)}" for key in shared}
    same = sides[0].summary["source"] == sides[1].summary["source"]
    summary["source"] = sides[0].summary["source"] if same else "different models"
    alone = [
        f"{len(rows[i]) - len(names)} in {path}" for i, path in enumerate((one, other)) if len(rows[i]) > len(names)
    ]
    summary["only in one"] = ", ".join(alone) or "nothing"
    columns = ("module", "format A", "format B", "bits A", "bits B", "error A", "error B", "change")
    return Inspection("comparison", summary, columns, tuple(made))


def _short(side: Inspection, key: str) -> str:
    value = side.summary[key]
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:40]


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
        **({} if adapter.mismatch is None else {"it was": adapter.mismatch}),
        "sha256": adapter.sha256,
    }
    return Inspection("packed adapter", summary, columns, tuple(_packed_row(m) for m in adapter.modules.values()))


def _packed_row(module: PackedModule) -> tuple[object, ...]:
    """Bits are per trained value, rank * (in + out); the module table, exponents in it, belongs to no module."""
    values = max(module.rank * (module.in_features + module.out_features), 1)
    formats = " + ".join(f"{block.a.shape[0]} x {block.a.format}" for block in module.blocks) or "nothing"
    factors = [factor for block in module.blocks for factor in (block.a, block.bt)]
    stored = sum(part.nbytes for factor in factors for name, part in factor.tensors().items() if name != "exponent")
    codes = sum(factor.format.bits * factor.numel for factor in factors)
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


def page_of(found: Inspection, title: str) -> str:
    """One HTML page: facts, the errors of all modules as a plot, the table. Raises OptionError without matplotlib."""
    facts = Table(("", ""), tuple((key, _cell(value)) for key, value in found.summary.items()))
    modules = Table(found.columns, tuple(tuple(_cell(cell) for cell in row) for row in found.rows))
    series: dict[str, list[tuple[float, float]]] = {}
    for column, name in enumerate(found.columns):
        if "error" in name or name == "with start":
            cells = [(float(n), _cell(row[column])) for n, row in enumerate(found.rows, 1)]
            series[name] = [(n, float(cell)) for n, cell in cells if is_number(cell)]
    shown = {name: points for name, points in series.items() if points}
    plot = (lines(shown, x="module, in the table's order", y="error", caption="Errors"),) if shown else ()
    return page(f"{found.kind} {title}", [Section("Facts", (facts,)), Section("Modules", (*plot, modules))])


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
