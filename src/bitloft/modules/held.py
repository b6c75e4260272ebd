"""One adapter as a bank holds it: its bytes stay, the views of them that a forward needs come and go.

The views of a packed adapter (a few tensors per block, some thousand objects in all) weigh as much as its bytes at 0.8
bits, so a bank of thousands keeps them only for the adapters in use. Making them again takes under a tenth of a second
for a 135M model's adapter: far too long for every step, nothing for an adapter that comes back.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.adapters import Adapter, PackedAdapter
from bitloft.kernels.ops import decode
from bitloft.packed import PackedTensor

Factor = PackedTensor | Tensor  # [k, width]
Block = tuple[Factor, Factor]  # a [k, in], bt [k, out], scaling folded in


class Held:
    """An adapter and, while it is in use, its blocks by module."""

    def __init__(self, adapter: PackedAdapter | Adapter) -> None:
        self.adapter = adapter
        self._blocks: dict[str, list[Block]] | None = None
        self.nbytes = sum(factor.nbytes for pairs in self.blocks().values() for pair in pairs for factor in pair)

    def blocks(self) -> dict[str, list[Block]]:
        """The blocks of every module that is touched; a plain adapter's factors stay floats, with B scaled."""
        if self._blocks is None:
            if isinstance(self.adapter, PackedAdapter):
                named = ((name, module.blocks) for name, module in self.adapter.modules.items())
                self._blocks = {name: [(block.a, block.bt) for block in blocks] for name, blocks in named if blocks}
            else:
                pairs = self.adapter.pairs
                self._blocks = {p.name: [(p.a, (p.b * p.scaling).T.contiguous())] for p in pairs}
        return self._blocks

    def widths(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of every module, also of those whose components were all dropped."""
        if isinstance(self.adapter, PackedAdapter):
            return {name: (module.in_features, module.out_features) for name, module in self.adapter.modules.items()}
        return {pair.name: (pair.a.shape[1], pair.b.shape[0]) for pair in self.adapter.pairs}

    def release(self) -> None:
        """Drop the views of a packed adapter; the next use makes them again."""
        if isinstance(self.adapter, PackedAdapter):
            self._blocks = None
            forget = getattr(self.adapter.modules, "release", None)  # a plain dict of modules has nothing to forget
            if forget is not None:
                forget()

    def finite(self, module: str) -> bool:
        """Whether no value of the module's factors is NaN or infinite."""
        factors = (factor for pair in self.blocks().get(module, ()) for factor in pair)
        return all(bool(torch.isfinite(values(factor, torch.float32)).all()) for factor in factors)


def delta(x: Float[Tensor, "rows *length in"], blocks: list[Block]) -> Float[Tensor, "rows *length out"]:
    """sum over blocks of (x @ a.T) @ bt, in the dtype of x."""
    parts = [(x @ values(a, x.dtype).T) @ values(bt, x.dtype) for a, bt in blocks]
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def values(factor: Factor, dtype: torch.dtype) -> Float[Tensor, "k width"]:
    """What a factor stands for."""
    return decode(factor, dtype) if isinstance(factor, PackedTensor) else factor.to(dtype)


def device_of(factor: Factor) -> torch.device:
    return factor.codes.device if isinstance(factor, PackedTensor) else factor.device
