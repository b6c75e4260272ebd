"""bitsandbytes' NF4 checkpoints, written without that package: what transformers loads as ``load_in_4bit``.

For a weight [out, in] such a file holds, under the weight's own name,

    weight                                uint8 [out*in/2, 1]     two codes a byte, the first in the high nibble
    weight.absmax                         float32 [out*in/block]  one scale per block of the flat weight
    weight.quant_map                      float32 [16]            the NF4 levels
    weight.quant_state.bitsandbytes__nf4  uint8                   JSON text: quant_type, blocksize, dtype, shape

Blocks run over the flat weight, ours along a row. They are the same blocks where the block divides the row, so the
largest block is taken that divides both the row and our group, each scale repeated as often as that splits a group.
The values are equal to the bit: the level tables are, and our scales are float32 numbers. Rows that no block divides
cannot be said in this layout, and it has no place for a start.
"""

import json
from collections.abc import Iterable
from math import gcd
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from bitloft.errors import OptionError
from bitloft.formats import NF4_LEVELS, Format
from bitloft.integrations.loading import quiet_loading
from bitloft.modules.linear import QuantLinear
from bitloft.packed import PackedTensor, scales_of, unpack_bits

BLOCKS = (4096, 2048, 1024, 512, 256, 128, 64, 32)  # what bitsandbytes 0.50 takes
STATE = "quant_state.bitsandbytes__nf4"


def block_of(fmt: Format, columns: int) -> int | None:
    """The largest block that divides rows of ``columns`` values and the groups of ``fmt``; None where none does."""
    common = columns if fmt.group <= 0 else gcd(columns, fmt.group)
    return next((block for block in BLOCKS if common % block == 0), None)


def dense_reason(model: PreTrainedModel, name: str, layer: QuantLinear) -> str | None:
    """Why a packed linear has to be written dense for ``load_in_4bit``; None where it need not be."""
    if layer.rotated:
        return "its codes stand for rotated inputs"
    if block_of(layer.format, layer.in_features) is None:
        return f"no block of bitsandbytes divides its rows of {layer.in_features}"
    if not should_convert_module(name, list(model._keep_in_fp32_modules or [])):
        return f"transformers keeps it in float32 in a {type(model).__name__}"
    return None


def require_nf4(name: str, fmt: Format) -> None:
    """Raise OptionError unless bitsandbytes has the levels of ``fmt``."""
    if (fmt.family, fmt.bits) != ("nf", 4) or fmt.group < 0 or fmt.shift:
        raise OptionError(
            f"{name} is stored as {fmt}, and bitsandbytes knows nf4 alone; quantize with --format nf4:64, or convert "
            "to dense."
        )


def stored_tensors(weight: PackedTensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of an nf4 weight [out, in] by their name after the module's, for dequantizing to ``dtype``.

    Raises OptionError for another format, or where no block divides the rows.
    """
    rows, columns = weight.shape
    block = block_of(weight.format, columns)
    require_nf4("the weight", weight.format)
    if block is None:
        raise OptionError(f"rows of {columns} values in groups of {weight.format} hold no block of bitsandbytes.")
    state = {"quant_type": "nf4", "blocksize": block, "dtype": str(dtype)[6:], "shape": [rows, columns]}
    return {
        "weight": _flat_codes(weight),
        "weight.absmax": _flat_scales(weight, block),
        "weight.quant_map": torch.tensor(NF4_LEVELS, dtype=torch.float32),
        f"weight.{STATE}": torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8),
    }


def _flat_codes(weight: PackedTensor) -> UInt8[Tensor, "bytes 1"]:
    columns = weight.shape[-1]
    codes = unpack_bits(weight.codes, 4, weight.format.width(columns))[:, :columns].reshape(-1, 2)
    return ((codes[:, 0] << 4) | codes[:, 1]).unsqueeze(1)


def _flat_scales(weight: PackedTensor, block: int) -> Float[Tensor, " blocks"]:
    columns = weight.shape[-1]
    scales = scales_of(weight, slice(None), torch.float32)
    size = weight.format.group_size(columns)
    return scales.repeat_interleave(size // block, dim=1)[:, : columns // block].reshape(-1).contiguous()


def quantization_config(dtype: torch.dtype, dense: Iterable[str]) -> dict[str, Any]:
    """config.json's ``quantization_config``; ``dense`` are the linears that are not quantized."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(dtype)[6:],
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_skip_modules": sorted(dense),
    }


class Stored(nn.Module):
    """Stands where a layer was, so that the model's own ``save_pretrained`` writes these tensors under its path."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: tensor for name, tensor in self.tensors.items()})


def require_linears(model: PreTrainedModel) -> None:
    """Raise OptionError where a base packs anything but linears."""
    for name, stored in model.config.quantization_config.stored().items():
        if stored.kind not in ("linear", "conv1d"):
            raise OptionError(
                f"{name} is packed as {stored.kind}, and bitsandbytes stores linears alone; convert to dense."
            )


def save(model: PreTrainedModel, directory: Path, dtype: torch.dtype, dense: Iterable[str]) -> None:
    """Write a model whose packed layers were replaced by ``Stored``; ``dense`` are the linears left as they are."""
    model.config.quantization_config = quantization_config(dtype, dense)
    model.hf_quantizer = None  # it would refuse what the model now holds
    with quiet_loading():
        model.save_pretrained(directory)
