"""LoRA adapters as PEFT writes them (read here, without peft) and as bitloft packs them (``adapter_files``).

A plain adapter is a directory: adapter_config.json and adapter_model.safetensors with ``base_model.model.NAME.lora_A.
weight`` [r, in] and ``lora_B.weight`` [out, r]; its module computes y += s * B A x. Directories trained by bitloft also
hold bitloft_adapter.json, which names the packed base and the source model by fingerprint.

peft itself is not used: loading through it builds the model, and it falls back to a pickle in silence.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.adapter_config import LoraRule, lora_rule, valid_name
from bitloft.adapter_files import (
    CONFIG_FILE,
    RECORD_FILE,
    PackedAdapter,
    PackedModule,
    is_packed,
    read_packed,
    read_record,
    serialize,
)
from bitloft.checkpoint import PICKLES, parse_json, parse_tensors
from bitloft.errors import AdapterError, CheckpointError
from bitloft.folder import Folder
from bitloft.solvers.adapter import PackedBlock

__all__ = [
    "CONFIG_FILE",
    "PREFIX",
    "RECORD_FILE",
    "WEIGHTS_FILE",
    "Adapter",
    "LoraPair",
    "PackedAdapter",
    "PackedBlock",
    "PackedModule",
    "is_packed",
    "read_adapter",
    "read_packed",
    "read_record",
    "serialize",
]

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
ENDINGS = {".lora_A.weight": "a", ".lora_B.weight": "b"}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CONFIG_LIMIT = 4 << 20


@dataclass(frozen=True)
class LoraPair:
    """The trained factors of one module: delta W [out, in] = scaling * b @ a, float32."""

    name: str
    a: Float[Tensor, "rank columns"]
    b: Float[Tensor, "out rank"]
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """A plain adapter in memory. ``base`` and ``source`` are fingerprints, None where the directory does not say."""

    path: Path
    config: dict[str, Any]
    pairs: tuple[LoraPair, ...]
    base: str | None
    source: str | None
    start: str | None = None

    @property
    def values(self) -> int:
        """Numbers that were trained: the sum of r * (m + n)."""
        return sum(pair.a.numel() + pair.b.numel() for pair in self.pairs)


def read_adapter(directory: Folder | Path | str) -> Adapter:
    """Read a PEFT LoRA directory; modules in name order, factors in float32.

    Raises AdapterError where the config or a tensor is not LoRA as bitloft knows it, CheckpointError where a file is
    missing, damaged or a pickle. Nothing but the two files (and bitloft_adapter.json) is opened, each once.
    """
    folder = Folder.of(directory)
    if is_packed(folder):
        raise AdapterError(f"{folder} is a packed adapter already; `bitloft expand` turns it back into a plain one.")
    config, raw = _files(folder)
    rule = lora_rule(config, str(folder))
    tensors = parse_tensors(raw, folder.path / WEIGHTS_FILE)
    _refuse_duplicates(raw, folder.path / WEIGHTS_FILE)
    record = read_record(folder)
    return Adapter(
        folder.path, config, _pairs(tensors, rule, str(folder)), record["base"], record["source"], record["start"]
    )


def _files(folder: Folder) -> tuple[Any, bytes]:
    """The config, parsed, and the bytes of the weights."""
    if not folder.is_directory():
        raise CheckpointError(f"{folder} is not a directory; give the folder of a PEFT adapter.")
    config = folder.read(CONFIG_FILE, CONFIG_LIMIT)
    if config is None:
        raise AdapterError(f"{folder} holds no {CONFIG_FILE}; it is not a PEFT adapter.")
    weights = folder.read(WEIGHTS_FILE)
    if weights is None:
        _refuse_without_weights(folder)
    return parse_json(config, folder.path / CONFIG_FILE), weights


def _refuse_without_weights(directory: Folder) -> NoReturn:
    pickles = [n for n in directory.names() if n.startswith("adapter_model") and Path(n).suffix in PICKLES]
    if pickles:
        raise CheckpointError(
            f"{directory} has its weights only as a pickle ({pickles[0]}), which can run code when opened; convert it "
            "to safetensors first."
        )
    raise CheckpointError(f"{directory} holds no {WEIGHTS_FILE}; it is not a PEFT adapter.")


def _refuse_duplicates(raw: bytes, weights: Path) -> None:
    """A header that names a tensor twice reads differently in different readers."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
        if twice is not None:
            raise AdapterError(f"{weights} names the tensor {twice} twice; it is damaged.")
        return dict(pairs)

    size = int.from_bytes(raw[:8], "little")
    json.loads(raw[8 : 8 + size], object_pairs_hook=unique)


def _pairs(tensors: dict[str, Tensor], rule: LoraRule, where: str) -> tuple[LoraPair, ...]:
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, side = _module_of(key, where)
        factors.setdefault(name, {})[side] = _checked(tensor, key, where)
    if not factors:
        raise AdapterError(f"adapter {where} holds no LoRA factors.")
    return tuple(_pair(name, factors[name], rule, where) for name in sorted(factors))


def _module_of(key: str, where: str) -> tuple[str, str]:
    for ending, side in ENDINGS.items():
        name = key.removeprefix(PREFIX).removesuffix(ending)
        if key.startswith(PREFIX) and key.endswith(ending):
            if not valid_name(name):
                raise AdapterError(f"adapter {where} names a module {name!r}, which is not a module path.")
            return name, side
    kind = next((k for k in ("lora_embedding", "lora_magnitude_vector", "modules_to_save") if k in key), None)
    reason = f"{kind} tensors are not supported" if kind else "only lora_A.weight and lora_B.weight are known"
    raise AdapterError(f"adapter {where} holds the tensor {key}: {reason}.")


def _checked(tensor: Tensor, key: str, where: str) -> Tensor:
    if tensor.dtype not in FLOATS:
        raise AdapterError(
            f"tensor {key} of adapter {where} is {str(tensor.dtype)[6:]}; factors are floats of 16 to 64 bits."
        )
    if tensor.ndim != 2:
        raise AdapterError(
            f"tensor {key} of adapter {where} has shape {tuple(tensor.shape)}; only linear layers (2-D)."
        )
    values = tensor.float()
    if not bool(torch.isfinite(values).all()):
        raise AdapterError(f"tensor {key} of adapter {where} holds NaN or infinity (in float32); it is damaged.")
    return values


def _pair(name: str, found: dict[str, Tensor], rule: LoraRule, where: str) -> LoraPair:
    if set(found) != {"a", "b"}:
        missing = "lora_B" if "a" in found else "lora_A"
        raise AdapterError(f"module {name} of adapter {where} lacks its {missing}.weight.")
    a, b = found["a"], found["b"]
    rank, scaling = rule.of(name)
    if a.shape[0] != b.shape[1] or a.shape[0] != rank:
        raise AdapterError(
            f"module {name} of adapter {where} has A {tuple(a.shape)} and B {tuple(b.shape)}; its config says rank "
            f"{rank}."
        )
    if rank > min(a.shape[1], b.shape[0]):
        raise AdapterError(
            f"module {name} of adapter {where} has rank {rank} above min(m, n) = {min(a.shape[1], b.shape[0])}; "
            "retrain it with a smaller rank."
        )
    return LoraPair(name, a.contiguous(), b.contiguous(), scaling)
