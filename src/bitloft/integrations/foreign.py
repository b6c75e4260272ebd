"""Reading somebody else's quantized base, one dequantized matrix at a time: bitsandbytes 4 bit, GPTQ, GGUF.

bitsandbytes   value[i] = map[code[i]] * absmax[i // block] over the flat weight, the first code in the high nibble;
               double quantized: absmax[b] = nested_map[absmax[b]] * nested_absmax[b // nested_block] + offset
GPTQ           W[i, o] = scales[g[i], o] * (code[i, o] - zero[g[i], o]), codes a stream of bits down each column,
               zeros along each row; the usual files store zero - 1 (``gptq``, not ``gptq_v2``)
GGUF           transformers converts it, since llama.cpp also renames and permutes rows

Written out here, because bitsandbytes and GPTQ's packages want a GPU, a kernel build or a whole model to say the same.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitloft.checkpoint import fingerprint, read_json, sha256
from bitloft.errors import CheckpointError
from bitloft.integrations.source import open_source
from bitloft.shards import Entry, open_shards, shard_files

GPTQ_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class ForeignBase:
    """A quantized checkpoint of another tool. ``matrices`` are the module paths that it quantizes."""

    name: str
    kind: str
    fingerprint: str
    matrices: tuple[str, ...]
    read: Callable[[str], Tensor]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Module path and dequantized weight [out, in], float32."""
        return ((name, self.read(name)) for name in self.matrices)


def open_foreign(base: str | Path) -> ForeignBase:
    """Find out what ``base`` is: a folder of bitsandbytes (4 bit) or GPTQ, or a GGUF file.

    Raises CheckpointError where it is none of them, or damaged.
    """
    path = Path(base)
    if path.is_file() and path.suffix == ".gguf":
        return _gguf(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{base} is no quantized base; give a bitsandbytes or GPTQ folder, or a .gguf file.")
    settings = read_json(path / "config.json").get("quantization_config") or {}
    entries, print_ = open_shards(path), fingerprint(shard_files(path))
    method = settings.get("quant_method", "bitsandbytes" if settings.get("load_in_4bit") else None)
    if method == "bitsandbytes" and settings.get("load_in_4bit"):
        names = tuple(k.removesuffix(".weight.quant_map") for k in entries if k.endswith(".weight.quant_map"))
        kind = f"bitsandbytes {settings.get('bnb_4bit_quant_type', '4 bit')}"
        found = ForeignBase(path.name, kind, print_, names, lambda name: _read_bnb(entries, name))
    elif method == "gptq":
        rule = GptqRule.of(settings, str(base))
        names = tuple(k.removesuffix(".qweight") for k in entries if k.endswith(".qweight"))
        found = ForeignBase(path.name, f"gptq {rule.bits} bit", print_, names, lambda n: _read_gptq(entries, n, rule))
    else:
        raise CheckpointError(
            f"{base} is quantized by {method or 'nothing'}; a start can be made for bitsandbytes 4 bit, GPTQ and GGUF."
        )
    if not found.matrices:
        raise CheckpointError(f"{base} says that it is {found.kind}, but holds no matrix of that kind.")
    return found


def _gguf(path: Path) -> ForeignBase:
    """A GGUF file through transformers, whole in memory. Its matrices are the model's linears but the head."""
    model = open_source(str(path)).load()
    weights = {
        name: module.weight.data for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    head = model.get_output_embeddings()
    names = tuple(name for name in weights if model.get_submodule(name) is not head)
    return ForeignBase(path.stem, "gguf", sha256(path), names, lambda name: weights[name].float())


def _part(entries: Mapping[str, Entry], name: str) -> Tensor:
    if name not in entries:
        raise CheckpointError(f"the quantized base lacks the tensor {name}; it is damaged.")
    return entries[name].read()


def _read_bnb(entries: Mapping[str, Entry], name: str) -> Float[Tensor, "rows columns"]:
    key = f"{name}.weight"
    states = [k for k in entries if k.startswith(f"{key}.quant_state.bitsandbytes__")]
    if len(states) != 1:
        raise CheckpointError(f"the quantized base lacks the quant_state of {key}; it is damaged.")
    try:
        state: dict[str, Any] = json.loads(bytes(_part(entries, states[0]).tolist()))
        shape, block = tuple(state["shape"]), int(state["blocksize"])
        nested = (int(state["nested_blocksize"]), float(state["nested_offset"])) if "nested_offset" in state else None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the quant_state of {key} cannot be read ({error}); the base is damaged.") from error
    absmax = _part(entries, f"{key}.absmax")
    if nested is not None:
        size, offset = nested
        scale = _part(entries, f"{key}.nested_absmax").float().repeat_interleave(size)[: absmax.numel()]
        absmax = _part(entries, f"{key}.nested_quant_map").float()[absmax.int()] * scale + offset
    packed = _part(entries, key).reshape(-1).view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1).int()
    count = shape[0] * shape[1] if len(shape) == 2 else -1
    if not 0 <= codes.numel() - count <= 1 or absmax.numel() != -(-count // block):
        raise CheckpointError(f"{key} holds {codes.numel()} codes and {absmax.numel()} scales for a shape of {shape}.")
    values = _part(entries, f"{key}.quant_map").float()[codes[:count]]
    dequantized: Tensor = values * absmax.float().repeat_interleave(block)[:count]
    return dequantized.reshape(shape)


@dataclass(frozen=True)
class GptqRule:
    """How a GPTQ folder stores codes; ``offset`` is what was taken off its zeros."""

    bits: int
    offset: int

    @classmethod
    def of(cls, settings: Mapping[str, Any], where: str) -> "GptqRule":
        """From config.json. Raises CheckpointError for a width that is not known here."""
        bits = settings.get("bits")
        if bits not in GPTQ_BITS:
            raise CheckpointError(f"{where} has GPTQ codes of {bits} bits; 2, 3, 4 and 8 can be read.")
        return cls(bits, 0 if settings.get("checkpoint_format") == "gptq_v2" else 1)


def _read_gptq(entries: Mapping[str, Entry], name: str, rule: GptqRule) -> Float[Tensor, "rows columns"]:
    scales, packed = _part(entries, f"{name}.scales").float(), _part(entries, f"{name}.qweight")
    groups, rows = scales.shape
    columns = packed.shape[0] * 32 // rule.bits
    codes = stream(packed.T, columns, rule.bits)
    zeros = (stream(_part(entries, f"{name}.qzeros"), rows, rule.bits) + rule.offset) % 2**rule.bits
    index = torch.arange(columns) // -(-columns // groups)
    if f"{name}.g_idx" in entries:
        index = _part(entries, f"{name}.g_idx").long()
    if codes.shape != (rows, columns) or zeros.shape != (groups, rows) or index.shape != (columns,):
        raise CheckpointError(f"the GPTQ parts of {name} do not fit each other; the base is damaged.")
    if not bool(((index >= 0) & (index < groups)).all()):
        raise CheckpointError(f"{name}.g_idx names groups that do not exist; the base is damaged.")
    dequantized: Tensor = (codes - zeros.T[:, index]) * scales.T[:, index]
    return dequantized


def stream(words: Int[Tensor, "rows words"], count: int, bits: int) -> Float[Tensor, "rows count"]:
    """``count`` numbers of ``bits`` bits from rows of 32-bit words, lowest bits first, words joined end to end."""
    unsigned = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    if count * bits > words.shape[1] * 32:
        raise CheckpointError(f"{words.shape[1]} words cannot hold {count} codes of {bits} bits; the base is damaged.")
    at = torch.arange(count) * bits
    word = at // 32
    joined = unsigned[:, word] | (unsigned[:, word + 1] & 0x7FFFFFFF) << 32
    codes: Tensor = (joined >> (at % 32)) & (2**bits - 1)
    return codes.float()
