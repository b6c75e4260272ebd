"""Packed adapters on disk and in memory: one payload buffer, one module table, one manifest.

    adapter_config.json                  PEFT's, cut to what readers need (the factor s is folded into the scales)
    adapter_model.bitloft.safetensors    ``payload`` uint8 [n] and ``table`` uint8 [m], nothing else
    manifest.json                        size and sha256 of both, base, source, method, error, and a sum of itself

True bits are the bytes of these three files x 8 / values. Every byte is covered by a sum, so a flipped bit anywhere is
refused; each file is read once, and what was summed is what is parsed. The weight file never carries the name that
PEFT looks for, so PEFT fails on the directory instead of loading half of it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import UInt8
from safetensors import SafetensorError
from torch import Tensor

from bitloft.adapter_table import (
    BlockSpec,
    ModuleSpec,
    code_bits,
    parts,
    payload_size,
    read_table,
    scales_size,
    write_table,
)
from bitloft.checkpoint import JSON_LIMIT, MANIFEST, SCHEMA, parse_json
from bitloft.errors import AdapterError, CheckpointError
from bitloft.folder import Folder
from bitloft.packed import DTYPES, PackedTensor
from bitloft.solvers.adapter import PackedBlock

CONFIG_FILE = "adapter_config.json"
PACKED_FILE = "adapter_model.bitloft.safetensors"
RECORD_FILE = "bitloft_adapter.json"
KIND = "adapter"
SIZE_LIMIT = 1 << 33  # bytes of one file of a packed adapter; a 70B model's r64 adapter at 4 bits has 0.4e9


@dataclass(frozen=True)
class PackedModule:
    """One adapted module: delta W [out, in] = sum over blocks of decode(bt).T @ decode(a), the factor s folded in.

    ``rank`` is the trained pair's, ``error`` the relative squared error of its product, to a thousandth.
    """

    name: str
    in_features: int
    out_features: int
    blocks: tuple[PackedBlock, ...]
    rank: int = 0
    error: float = 0.0


@dataclass(frozen=True)
class PackedAdapter:
    """A packed adapter in memory: ``payload`` is its one buffer, ``modules`` are views into it, made on first use.

    ``base`` and ``source`` are fingerprints (None where unknown); ``sha256`` is the manifest's and identifies the
    whole bundle; ``values`` counts the trained numbers, r * (m + n) summed. ``mismatch`` says how it did on a base
    that it does not name, where it was packed for one.
    """

    path: Path
    config: dict[str, Any]
    modules: Mapping[str, PackedModule]
    base: str | None
    source: str | None
    payload: UInt8[Tensor, " bytes"]
    true_bits: float
    payload_bits: float
    sha256: str
    values: int = 0
    method: Mapping[str, Any] = field(default_factory=dict)
    error: float = 0.0
    start: str | None = None
    mismatch: str | None = None


class ModuleViews(Mapping[str, PackedModule]):
    """Modules by name, built as views into the payload when first asked for; ``release`` drops them again."""

    def __init__(self, payload: Tensor, table: bytes, where: str) -> None:
        self._payload, self._table, self._where = payload, table, where
        self.nbytes = payload.numel() + len(table)
        self._built: dict[str, PackedModule] | None = None

    def _modules(self) -> dict[str, PackedModule]:
        if self._built is None:
            self._built = {m.name: m for m in _views(self._payload, read_table(self._table, self._where))}
        return self._built

    @property
    def payload(self) -> UInt8[Tensor, " bytes"]:
        """The bytes that the views look into."""
        return self._payload

    def specs(self) -> tuple[ModuleSpec, ...]:
        """The module table, read again: what there is without making views."""
        return read_table(self._table, self._where)

    def release(self) -> None:
        """Forget the views (a few hundred bytes each); the payload stays."""
        self._built = None

    def __getitem__(self, name: str) -> PackedModule:
        return self._modules()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules())

    def __len__(self) -> int:
        return len(self._modules())


def is_packed(directory: Folder | Path | str) -> bool:
    """True where the directory holds a packed adapter (whole or damaged)."""
    return Folder.of(directory).has(PACKED_FILE)


def read_record(directory: Folder | Path | str) -> dict[str, Any]:
    """bitloft_adapter.json as ``base``, ``source`` and ``start``, each None where the file does not exist.

    Raises AdapterError for another schema or for values that are not strings.
    """
    folder = Folder.of(directory)
    file, raw = folder.path / RECORD_FILE, folder.read(RECORD_FILE, JSON_LIMIT)
    if raw is None:
        return {"base": None, "source": None, "start": None}
    record = parse_json(raw, file)
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise AdapterError(f"{file} has a schema that is not {SCHEMA}; it was written by another version of bitloft.")
    found = {key: record.get(key) for key in ("base", "source", "start")}
    if any(value is not None and not isinstance(value, str) for value in found.values()):
        raise AdapterError(f"{file} must give base, source and start as strings.")
    return found


def serialize(
    config: Mapping[str, Any], modules: Sequence[PackedModule], record: Mapping[str, Any]
) -> dict[str, bytes]:
    """The three files of a packed adapter by name, as bytes; equal input gives equal bytes.

    ``record`` holds what the manifest says beside the sums: base, source, start, method, values, error.
    """
    specs = [_spec(module) for module in modules]
    tensors = {"payload": _payload(modules, specs), "table": _bytes_tensor(write_table(specs))}
    return seal({CONFIG_FILE: canonical(config), PACKED_FILE: safetensors.torch.save(tensors)}, record)


def seal(files: dict[str, bytes], record: Mapping[str, Any]) -> dict[str, bytes]:
    """The files with a manifest that has their sums, its own, and ``record``."""
    sums = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    manifest = {"schema": SCHEMA, "kind": KIND, "files": sums, **record}
    return files | {MANIFEST: canonical(manifest | {"self": _self_sum(manifest)})}


def read_packed(directory: Folder | Path | str) -> PackedAdapter:
    """Read and verify a packed adapter; the payload lies in memory of its own.

    Raises CheckpointError naming the file that is missing, damaged or changed, or what in it cannot be.
    """
    folder = Folder.of(directory)
    directory, raw = folder.path, _read(folder, MANIFEST)
    manifest = _manifest(raw, directory)
    data = {name: _verified(folder, name, record) for name, record in manifest["files"].items()}
    payload, table = _tensors(data[PACKED_FILE], directory)
    specs = read_table(table, str(directory))
    if payload.numel() != payload_size(specs):
        raise CheckpointError(
            f"the payload of {directory} has {payload.numel()} bytes, its module table needs {payload_size(specs)}."
        )
    _refuse_values(payload, specs, directory)
    values = sum(m.rank * (m.in_features + m.out_features) for m in specs)
    if manifest["values"] != values or not specs:
        raise CheckpointError(
            f"{directory} counts {manifest['values']} values, its module table {values}; it is damaged."
        )
    return PackedAdapter(
        directory,
        _parse(data[CONFIG_FILE], directory / CONFIG_FILE),
        ModuleViews(payload, table, str(directory)),
        manifest["base"],
        manifest["source"],
        payload,
        8 * (len(raw) + sum(len(d) for d in data.values())) / values,
        code_bits(specs) / values,
        hashlib.sha256(raw).hexdigest(),
        values,
        manifest["method"],
        manifest["error"],
        manifest["start"],
        manifest.get("mismatch"),
    )


def canonical(value: Mapping[str, Any]) -> bytes:
    """The one JSON spelling of a value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _self_sum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical({k: v for k, v in manifest.items() if k != "self"})).hexdigest()


def _read(folder: Folder, name: str) -> bytes:
    raw = folder.read(name, SIZE_LIMIT)
    if raw is None:
        raise CheckpointError(f"{folder} lacks {name}; it is not a whole packed adapter.")
    return raw


def _parse(raw: bytes, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON; it is damaged.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is {type(value).__name__}; it must be a JSON object.")
    return value


_FIELDS = {"base": (str, type(None)), "source": (str, type(None)), "start": (str, type(None)),
           "method": (dict,), "values": (int,), "error": (float, int), "files": (dict,)}  # fmt: skip


def _manifest(raw: bytes, directory: Path) -> dict[str, Any]:
    file = directory / MANIFEST
    manifest = _parse(raw, file)
    if manifest.get("kind") != KIND or manifest.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{file} describes kind {manifest.get('kind')!r}, schema {manifest.get('schema')!r}; this version reads "
            f"{KIND!r}, {SCHEMA}."
        )
    if canonical(manifest) != raw or manifest.get("self") != _self_sum(manifest):
        raise CheckpointError(f"{file} does not match its own sum: it is damaged or was changed.")
    if any(not isinstance(manifest.get(k, ...), kinds) for k, kinds in _FIELDS.items()):
        raise CheckpointError(f"{file} lacks one of {', '.join(_FIELDS)}, or gives it another type.")
    if not isinstance(manifest.get("mismatch"), str | None):
        raise CheckpointError(f"{file} gives mismatch as {manifest['mismatch']!r}; it must be a text.")
    if set(manifest["files"]) != {CONFIG_FILE, PACKED_FILE}:
        raise CheckpointError(f"{file} must list {CONFIG_FILE} and {PACKED_FILE}, found {sorted(manifest['files'])}.")
    return manifest


def _verified(folder: Folder, name: str, record: object) -> bytes:
    data = _read(folder, name)
    if record != {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}:
        raise CheckpointError(f"{folder.path / name} differs from its manifest: it is damaged or was changed.")
    return data


def _tensors(data: bytes, directory: Path) -> tuple[Tensor, bytes]:
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{directory / PACKED_FILE} is not a valid safetensors file ({error}).") from error
    if set(tensors) != {"payload", "table"} or any(t.dtype != torch.uint8 or t.ndim != 1 for t in tensors.values()):
        raise CheckpointError(f"{directory / PACKED_FILE} must hold two byte vectors, payload and table.")
    return tensors["payload"], tensors["table"].numpy().tobytes()


def _refuse_values(payload: Tensor, specs: Sequence[ModuleSpec], directory: Path) -> None:
    """Half-precision numbers (all scales, which come first, and codes of ``half``) must be finite."""
    found = [("scale", payload[: scales_size(specs)])]
    if any(16 in (block.a_format.bits, block.bt_format.bits) for spec in specs for block in spec.blocks):
        found += [("value", codes) for codes in _halves(payload, specs)]
    for what, stored in found:
        if not bool(torch.isfinite(stored.clone().view(torch.float16)).all()):
            raise CheckpointError(f"{directory} holds a {what} that is NaN or infinite; it is damaged.")


def _halves(payload: Tensor, specs: Sequence[ModuleSpec]) -> Iterator[Tensor]:
    at = 0
    for m, b, side, name, part in parts(specs):
        block = specs[m].blocks[b]
        if name == "codes" and (block.a_format if side == "a" else block.bt_format).bits == 16:
            yield payload[at : at + part.nbytes]
        at += part.nbytes


def _spec(module: PackedModule) -> ModuleSpec:
    blocks = tuple(
        BlockSpec(b.a.format, b.bt.format, b.a.shape[0], int(b.a.exponent), int(b.bt.exponent)) for b in module.blocks
    )
    error = round(1000 * module.error)
    return ModuleSpec(module.name, module.in_features, module.out_features, module.rank, error, blocks)


def _payload(modules: Sequence[PackedModule], specs: Sequence[ModuleSpec]) -> Tensor:
    pieces = []
    for m, b, side, name, _ in parts(specs):
        block = modules[m].blocks[b]
        packed = block.a if side == "a" else block.bt
        pieces.append(packed.tensors()[name].contiguous().view(torch.uint8).flatten())
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.uint8)


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _views(payload: Tensor, specs: Sequence[ModuleSpec]) -> list[PackedModule]:
    found: dict[tuple[int, int, str], dict[str, Tensor]] = {}
    at = 0
    for m, b, side, name, part in parts(specs):
        view = payload[at : at + part.nbytes].view(DTYPES[part.dtype]).view(part.shape)
        found.setdefault((m, b, side), {})[name] = view
        at += part.nbytes
    return [
        PackedModule(
            spec.name,
            spec.in_features,
            spec.out_features,
            tuple(_block(spec, block, found[m, b, "a"], found[m, b, "bt"]) for b, block in enumerate(spec.blocks)),
            spec.rank,
            spec.error / 1000,
        )
        for m, spec in enumerate(specs)
    ]


def _block(spec: ModuleSpec, block: BlockSpec, a: dict[str, Tensor], bt: dict[str, Tensor]) -> PackedBlock:
    a = a | {"exponent": torch.tensor(block.a_exponent, dtype=torch.int32)}
    bt = bt | {"exponent": torch.tensor(block.bt_exponent, dtype=torch.int32)}
    return PackedBlock(
        PackedTensor.from_tensors(block.a_format, (block.components, spec.in_features), a),
        PackedTensor.from_tensors(block.bt_format, (block.components, spec.out_features), bt),
    )
