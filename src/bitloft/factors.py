"""An adapter of either kind, plain or packed, as one pair of float factors a module: delta W [out, in] = b @ a.

The scaling is folded into the factors, so that what reads them needs no rule of alpha and rank. ``write_lora`` puts
such pairs on disk as PEFT lays them out, with alpha = r, hence s = 1. The alternative, the dense products, would take
as much memory as the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitloft.adapters import (
    CONFIG_FILE,
    PREFIX,
    RECORD_FILE,
    WEIGHTS_FILE,
    PackedModule,
    is_packed,
    read_adapter,
    read_packed,
)
from bitloft.checkpoint import SCHEMA, write_json, write_tensors
from bitloft.errors import AdapterError
from bitloft.kernels.ops import decode

# What a written config says beside rank, alpha and targets.
PLAIN = {"peft_type": "LORA", "bias": "none", "use_rslora": False, "inference_mode": True, "init_lora_weights": True,
         "lora_dropout": 0.0, "fan_in_fan_out": False, "modules_to_save": None}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """delta W = b @ a in float32."""

    a: Float[Tensor, "rank columns"]
    b: Float[Tensor, "rows rank"]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def product(self) -> Float[Tensor, "rows columns"]:
        return self.b @ self.a


@dataclass(frozen=True)
class Factors:
    """All pairs of an adapter by module path. ``base`` and ``source`` are fingerprints, None where unknown."""

    path: Path
    config: dict[str, Any]
    pairs: dict[str, Pair]
    base: str | None
    source: str | None
    start: str | None = None


def read_factors(directory: Path | str) -> Factors:
    """Read a plain PEFT directory or a packed adapter. Raises AdapterError or CheckpointError as their readers do."""
    directory = Path(directory)
    if is_packed(directory):
        packed = read_packed(directory)
        found = {module.name: _decoded(module) for module in packed.modules.values()}
        return Factors(directory, packed.config, found, packed.base, packed.source, packed.start)
    plain = read_adapter(directory)
    pairs = {pair.name: Pair(pair.a, pair.scaling * pair.b) for pair in plain.pairs}
    return Factors(directory, plain.config, pairs, plain.base, plain.source, plain.start)


def _decoded(module: PackedModule) -> Pair:
    a = [decode(block.a) for block in module.blocks]
    bt = [decode(block.bt) for block in module.blocks]
    if not a:
        return Pair(torch.zeros(0, module.in_features), torch.zeros(module.out_features, 0))
    return Pair(torch.cat(a), torch.cat(bt).T.contiguous())


def stacked(first: Pair, second: Pair) -> Pair:
    """The pair whose product is the sum of both products; its rank is the sum of the ranks."""
    return Pair(torch.cat([first.a, second.a]), torch.cat([first.b, second.b], dim=1))


def _rounded(name: str, pair: Pair, dtype: torch.dtype) -> Pair:
    """A pair in ``dtype``, each component's two sides brought to the same size by a power of two first."""
    norms = [torch.linalg.vector_norm(side, dim=1, keepdim=True).clamp_min(1e-30) for side in (pair.a, pair.b.T)]
    balance = torch.exp2(torch.round(torch.log2(norms[1] / norms[0]) / 2))
    found = Pair((pair.a * balance).to(dtype), (pair.b / balance.T).to(dtype))
    if not bool(torch.isfinite(found.a).all() and torch.isfinite(found.b).all()):
        raise AdapterError(f"the factors of {name} are beyond {str(dtype)[6:]}; they cannot be written in it.")
    return found


def write_lora(
    directory: Path,
    pairs: Mapping[str, Pair],
    *,
    base_name: str,
    config: Mapping[str, Any] | None = None,
    record: Mapping[str, str | None] | None = None,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Write pairs as a PEFT adapter into ``directory``; returns its rank.

    Every module gets the largest rank, zeros fill up, since not every reader knows ``rank_pattern``; a module too small
    for that rank gets its own. ``config`` may add fields such as task_type; ``record`` goes into bitloft_adapter.json.
    ``dtype`` is the files'; the pairs are balanced for a 16-bit one. Raises AdapterError without pairs, and where a
    factor holds NaN or infinity, in ``dtype`` too.
    """
    if not pairs:
        raise AdapterError(f"no module is left to write into the adapter for {base_name}.")
    rank = max(1, *(pair.rank for pair in pairs.values()))
    tensors, patterns = {}, {}
    for name, pair in sorted(pairs.items()):
        own = rank
        if min(pair.a.shape[1], pair.b.shape[0]) < rank:
            own = patterns[f"^{name}"] = max(pair.rank, 1)
        if not bool(torch.isfinite(pair.a).all() and torch.isfinite(pair.b).all()):
            raise AdapterError(f"the factors of {name} hold NaN or infinity; the adapter is damaged.")
        pair = pair if dtype == torch.float32 else _rounded(name, pair, dtype)
        pad = own - pair.rank
        tensors[f"{PREFIX}{name}.lora_A.weight"] = nn.functional.pad(pair.a, (0, 0, 0, pad)).contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = nn.functional.pad(pair.b, (0, pad)).contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    ranks = {"r": rank, "lora_alpha": rank, "rank_pattern": patterns, "alpha_pattern": patterns}
    about = {"base_model_name_or_path": base_name, "target_modules": sorted(pairs), "task_type": None}
    write_json(directory / CONFIG_FILE, about | dict(config or {}) | PLAIN | ranks)
    write_tensors(directory / WEIGHTS_FILE, tensors, {"format": "pt"})
    if record is not None:
        write_json(directory / RECORD_FILE, {"schema": SCHEMA, **record})
    return rank
