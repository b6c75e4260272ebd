"""The compress verb (plain adapter -> packed adapter) and its way back, expand (packed -> plain PEFT directory).

    true bits = 8 * (bytes of the manifest and of every file it lists) / sum of r * (m + n)

A budget of true bits covers names, sums and config as well, and their size depends on what is allocated (the table is
compressed). So the directory is serialized in memory, measured, and the rest of the budget allocated again, until what
is left is less than one component. The budget is never exceeded.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitloft.adapter_config import kept
from bitloft.adapters import (
    CONFIG_FILE,
    PREFIX,
    RECORD_FILE,
    WEIGHTS_FILE,
    Adapter,
    PackedBlock,
    PackedModule,
    read_adapter,
    read_packed,
    serialize,
)
from bitloft.checkpoint import SCHEMA, ignored_pickles, write_json, write_tensors, writing
from bitloft.errors import AdapterError, CheckpointError, OptionError
from bitloft.kernels.ops import decode
from bitloft.options import CompressOptions
from bitloft.solvers import waterfill
from bitloft.solvers.adapter import Components, components, product_error
from bitloft.solvers.loraquant import loraquant

Progress = Callable[[int, int, str], None]
EXPANDED = {"float32": torch.float32, "float16": torch.float16}
ROUNDS = 8  # of allocating and measuring; two or three are enough


@dataclass(frozen=True)
class ModuleReport:
    """One packed module: ``widths`` maps bits to components, ``bits`` counts codes, scales and zero points."""

    name: str
    shape: tuple[int, int]
    rank: int
    widths: dict[int, int]
    bits: float
    error: float


@dataclass(frozen=True)
class CompressReport:
    """What ``compress`` did. ``error`` is |s*B*A - packed|^2 / |s*B*A|^2 over the whole adapter, from stored bytes."""

    adapter: str
    out: str
    method: dict[str, Any]
    base: str | None
    true_bits: float
    payload_bits: float
    error: float
    modules: tuple[ModuleReport, ...]
    values: int
    bytes: int
    source_bytes: int
    seconds: float
    ignored: tuple[str, ...]
    notes: tuple[str, ...]


def compress(
    adapter: str | Path,
    out: str | Path,
    options: CompressOptions | None = None,
    *,
    base: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> CompressReport:
    """Pack the PEFT adapter in directory ``adapter`` into ``out``; the source is only read.

    Settings are the fields of CompressOptions. ``base`` is the base directory it must belong to. ``progress`` is called
    with (modules done, modules in all, module name). Raises OptionError where the budget is below the floor (the
    sentence names the least possible), AdapterError for an adapter that is not plain LoRA or fits another base,
    CheckpointError for damaged files.
    """
    began, options, out = time.perf_counter(), options or CompressOptions(**settings), Path(out)
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists already; remove it or choose another place.")
    source = read_adapter(adapter)
    if base is not None:
        _check_base(source, Path(base))
    job = _Job(source, options, progress)
    modules, notes = job.solve()
    files = job.files(modules)
    with writing(out, overwrite=overwrite) as directory:
        for name, data in files.items():
            (directory / name).write_bytes(data)
        packed = read_packed(directory)
    size = sum(len(data) for data in files.values())
    return CompressReport(
        adapter=str(adapter),
        out=str(out),
        method=dict(packed.method),
        base=packed.base,
        true_bits=packed.true_bits,
        payload_bits=packed.payload_bits,
        error=job.error(modules),
        modules=tuple(_report(module) for module in modules),
        values=packed.values,
        bytes=size,
        source_bytes=(source.path / WEIGHTS_FILE).stat().st_size,
        seconds=time.perf_counter() - began,
        ignored=tuple(ignored_pickles(source.path)),
        notes=tuple(notes),
    )


class _Job:
    """One adapter on its way: its singular components, and the bytes that a choice of blocks would take."""

    def __init__(self, source: Adapter, options: CompressOptions, progress: Progress | None) -> None:
        self.source, self.options, self._progress = source, options, progress
        self._errors: dict[tuple[Any, ...], float] = {}
        self.exact: list[Components] = []
        for pair in source.pairs:
            try:
                self.exact.append(components(pair.a, pair.b, pair.scaling))
            except AdapterError as error:
                raise AdapterError(f"module {pair.name} of adapter {source.path}: {error}") from error
        self.energy = sum(c.energy for c in self.exact)

    def solve(self) -> tuple[list[PackedModule], list[str]]:
        notes = [] if self.energy else [f"{self.source.path} changes nothing: every product is zero."]
        settings = self.options.settings
        if self.options.method == "waterfill":
            return self._waterfill(float(settings["bits"]), notes)
        high, ratio = int(settings["high"]), float(settings["ratio"])
        blocks = [loraquant(c, high=high, ratio=ratio) for c in self._each(self.exact)]
        return self._modules(blocks, [()] * len(blocks)), notes

    def _each(self, items: Sequence[Components]) -> Any:
        for i, item in enumerate(items):
            yield item
            if self._progress is not None:
                self._progress(i + 1, len(items), self.source.pairs[i].name)

    def _waterfill(self, bits: float, notes: list[str]) -> tuple[list[PackedModule], list[str]]:
        coded = [waterfill.code(c) for c in self._each(self.exact)]
        limit = int(bits * self.source.values / 8)
        widths = waterfill.least(coded)
        best = self._modules([()] * len(coded), [()] * len(coded))
        if widths is not None:
            best = self._packed(coded, widths)
        size = self._size(best)
        if size > limit:
            raise OptionError(self._below_floor(bits, best))
        room, seen = limit - size + _payload(best), -1
        for _ in range(ROUNDS):
            widths, spent = waterfill.allocate(coded, room)
            if spent == seen:
                break
            modules, seen = self._packed(coded, widths), spent
            spare = limit - self._size(modules)
            if spare >= 0 and _payload(modules) > _payload(best):
                best = modules
            room = spent + spare
        if self.energy and _payload(best) == waterfill.allocate(coded, 1 << 62)[1]:
            full = 8 * self._size(best) / self.source.values
            notes.append(f"every component is stored at 4 bits and takes {full:.3f} true bits of the {bits:g} allowed.")
        return best, notes

    def _packed(self, coded: list[waterfill.Coded], widths: list[Any]) -> list[PackedModule]:
        return self._modules(waterfill.pack(coded, widths), [tuple(w.tolist()) for w in widths])

    def _modules(
        self, blocks: Sequence[tuple[PackedBlock, ...]], keys: Sequence[tuple[int, ...]]
    ) -> list[PackedModule]:
        """Blocks with names, sizes and measured errors; ``keys`` tell equal choices apart, so each is measured once."""
        found = []
        for i, (pair, exact, parts, key) in enumerate(zip(self.source.pairs, self.exact, blocks, keys, strict=True)):
            if (i, key) not in self._errors:
                self._errors[i, key] = product_error(exact, parts) / exact.energy if exact.energy else 0.0
            rank, columns = pair.a.shape
            found.append(PackedModule(pair.name, columns, pair.b.shape[0], parts, rank, self._errors[i, key]))
        return found

    def error(self, modules: Sequence[PackedModule]) -> float:
        """Relative squared error of the whole adapter."""
        lost = sum(m.error * c.energy for m, c in zip(modules, self.exact, strict=True))
        return lost / self.energy if self.energy else 0.0

    def files(self, modules: Sequence[PackedModule]) -> dict[str, bytes]:
        source = self.source
        record = {
            "base": source.base,
            "source": source.source,
            "start": source.start,
            "method": self.options.settings,
            "values": source.values,
            "error": float(f"{self.error(modules):.3e}"),
        }
        return serialize(kept(source.config, [m.name for m in modules]), modules, record)

    def _size(self, modules: Sequence[PackedModule]) -> int:
        return sum(len(data) for data in self.files(modules).values())

    def _below_floor(self, bits: float, least: Sequence[PackedModule]) -> str:
        """The manifest records what was asked for, so the size of the floor includes the floor's own digits."""
        size, floor = self._size(least), bits
        for _ in range(3):
            floor = -(-8 * size * 10000 // self.source.values) / 10000  # rounded up, so that asking for it works
            self.options = replace(self.options, bits=floor)
            size = self._size(least)
        return (
            f"{bits:g} true bits allow {int(bits * self.source.values / 8)} bytes for {self.source.path}, but names, "
            f"sums, config and one component take {size}; the least possible is {floor:.4f}."
        )


def _payload(modules: Sequence[PackedModule]) -> int:
    return sum(_stored(block) for module in modules for block in module.blocks)


def _stored(block: PackedBlock) -> int:
    """Bytes of codes, scales and zero points (the exponents are in the table)."""
    return block.a.nbytes + block.bt.nbytes - block.a.exponent.element_size() - block.bt.exponent.element_size()


def _report(module: PackedModule) -> ModuleReport:
    widths: dict[int, int] = {}
    for block in module.blocks:
        widths[block.a.format.bits] = widths.get(block.a.format.bits, 0) + block.a.shape[0]
    values = module.rank * (module.in_features + module.out_features)
    bits = 8 * sum(_stored(block) for block in module.blocks) / values
    return ModuleReport(module.name, (module.out_features, module.in_features), module.rank, widths, bits, module.error)


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


def _check_base(source: Adapter, base: Path) -> None:
    from bitloft.integrations.loading import base_record, check_base

    check_base(source.base, base_record(base), str(source.path))
