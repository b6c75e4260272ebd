"""One adapter as a bank holds it: its bytes stay, the views of them that a forward needs come and go.

The views of a packed adapter (a few tensors per block, some thousand objects in all) weigh as much as its bytes at 0.8
bits, so a bank of thousands keeps them only for the adapters in use. Making them again takes under a tenth of a second
for a 135M model's adapter: far too long for every step, nothing for an adapter that comes back.
"""

from collections.abc import Mapping, Sequence

import torch

from bitloft.adapter_files import ModuleViews
from bitloft.adapter_table import ModuleSpec
from bitloft.adapters import Adapter, PackedAdapter
from bitloft.kernels import cpu_lora
from bitloft.kernels.lora import Block, Factor, values
from bitloft.modules.described import Described, describe, described_blocks
from bitloft.packed import PackedTensor

SAFE_EXPONENT = 90  # scales are finite halves, below 2**16, as levels are: products stay finite up to here


class Views:
    """The blocks of an adapter by module, and how native code sees them: described once, used at every step."""

    def __init__(self, blocks: dict[str, list[Block]]) -> None:
        self.blocks = blocks
        self._native: dict[str, cpu_lora.Blocks | None] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"blocks": self.blocks, "_native": {}}  # addresses are of no use to a copy

    def native(self, module: str) -> cpu_lora.Blocks | None:
        """The blocks of a module for ``cpu_lora``; None where the adapter does not touch it."""
        if module not in self._native:
            found = self.blocks.get(module)
            self._native[module] = None if found is None else cpu_lora.Blocks(found)
        return self._native[module]

    def on(self, module: str, device: torch.device) -> list[Block]:
        """The blocks of a module on ``device``, where they stay from then on."""
        found = self.blocks.get(module, [])
        if found and device_of(found[0][0]) != device:
            found = self.blocks[module] = [(a.to(device), bt.to(device)) for a, bt in found]
            self._native.pop(module, None)
        return found


class Held:
    """An adapter and, while it is in use, its blocks by module."""

    def __init__(self, adapter: PackedAdapter | Adapter) -> None:
        self.adapter = adapter
        self._views: Views | None = None
        self._described: tuple[Sequence[str], Described] | None = None
        self._specs: Sequence[ModuleSpec] | None = None
        read = self._read()
        self.nbytes = (
            read.nbytes
            if read is not None
            else sum(f.nbytes for pairs in self.blocks().values() for p in pairs for f in p)
        )

    def _read(self) -> ModuleViews | None:
        """The modules of an adapter that was read from a file; such need no views to be known."""
        modules = getattr(self.adapter, "modules", None)
        return modules if isinstance(modules, ModuleViews) else None

    def specs(self) -> Sequence[ModuleSpec]:
        """The module table of an adapter that was read from a file, kept until ``release``; else nothing."""
        if self._specs is None:
            read = self._read()
            self._specs = read.specs() if read is not None else ()
        return self._specs

    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """(in, out) features of every module that it touches."""
        read = self._read()
        if read is None:
            return {name: pair for name, pair in self.widths().items() if name in self.blocks()}
        return {spec.name: (spec.in_features, spec.out_features) for spec in self.specs() if spec.blocks}

    def sound(self) -> bool:
        """Whether the module table alone shows that shapes fit each other and all values are finite."""
        read = self._read()
        return read is not None and all(
            max(block.a_exponent, block.bt_exponent) <= SAFE_EXPONENT for spec in self.specs() for block in spec.blocks
        )

    def described(self, modules: Sequence[str]) -> Described:
        """As native code reads it, for a model's ``modules``: kept until ``release``."""
        if self._described is None or self._described[0] is not modules:
            read = self._read()
            if read is not None:
                found = describe(read.payload, self.specs(), modules)
            else:
                views = self.views()
                native = ((name, views.native(name)) for name in views.blocks)
                found = described_blocks({name: blocks for name, blocks in native if blocks is not None}, modules)
            self._described = modules, found
        return self._described[1]

    def views(self) -> Views:
        """The blocks of every module that is touched; a plain adapter's factors stay floats, with B scaled."""
        if self._views is None:
            if isinstance(self.adapter, PackedAdapter):
                named = ((name, module.blocks) for name, module in self.adapter.modules.items())
                self._views = Views({name: [(b.a, b.bt) for b in blocks] for name, blocks in named if blocks})
            else:
                pairs = self.adapter.pairs
                self._views = Views({p.name: [(p.a, (p.b * p.scaling).T.contiguous())] for p in pairs})
        return self._views

    def blocks(self) -> dict[str, list[Block]]:
        return self.views().blocks

    def widths(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of every module, also of those whose components were all dropped."""
        read = self._read()
        if read is not None:
            return {spec.name: (spec.in_features, spec.out_features) for spec in self.specs()}
        if isinstance(self.adapter, PackedAdapter):
            return {name: (module.in_features, module.out_features) for name, module in self.adapter.modules.items()}
        return {pair.name: (pair.a.shape[1], pair.b.shape[0]) for pair in self.adapter.pairs}

    def release(self) -> None:
        """Drop the views of a packed adapter; the next use makes them again."""
        self._described = self._specs = None
        if isinstance(self.adapter, PackedAdapter):
            self._views = None
            forget = getattr(self.adapter.modules, "release", None)  # a plain dict of modules has nothing to forget
            if forget is not None:
                forget()

    def finite(self, module: str) -> bool:
        """Whether no value of the module's factors is NaN or infinite."""
        factors = (factor for pair in self.blocks().get(module, ()) for factor in pair)
        return all(bool(torch.isfinite(values(factor)).all()) for factor in factors)


def device_of(factor: Factor) -> torch.device:
    return factor.codes.device if isinstance(factor, PackedTensor) else factor.device
