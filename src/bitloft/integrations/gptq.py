"""GPTQ's layout, written without its packages: what vLLM, GPTQModel and transformers read as quant_method gptq.

For a weight [out, in] in uniform codes of ``bits`` bits with a scale per ``group`` inputs such a file holds

    qweight  int32 [in * bits / 32, out]     codes down the inputs, a stream of bits, the lowest first
    qzeros   int32 [groups, out * bits / 32] zero points along the outputs, packed alike
    scales   float16 [groups, out]
    g_idx    int32 [in]                      the group of each input

and value = scale * (code - zero). The first version of the layout stored zero - 1, which has no room for a zero of 0;
the second (``checkpoint_format`` gptq_v2) stores it as it is, and that is what is written. Codes and zero points are
ours to the bit; scales are fp16 in units of a power of two with us, so they may be rounded once where they leave fp16's
normal range. The layout has no place for a start.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from bitloft.errors import OptionError
from bitloft.formats import Format
from bitloft.integrations.loading import quiet_loading
from bitloft.kernels.encoding import unpack_zeros
from bitloft.modules.linear import QuantLinear, quant_linears
from bitloft.packed import PackedTensor, scales_of, unpack_bits

WORD = 32


def require_uniform(layers: dict[str, QuantLinear]) -> Format:
    """The one format of all packed layers. Raises OptionError where GPTQ's layout cannot say what they hold."""
    formats = {str(layer.format) for layer in layers.values()}
    if len(formats) != 1:
        raise OptionError(
            f"the base mixes {', '.join(sorted(formats))}, and a GPTQ checkpoint has one width and group for all; "
            "quantize without rules, or convert to dense."
        )
    fmt = Format.parse(next(iter(formats)))
    if fmt.family != "uniform" or not fmt.has_zeros or fmt.group < 0:
        raise OptionError(
            f"the base is stored in {fmt}, and GPTQ's layout holds uniform codes with a zero point per group; quantize "
            "with --format uniform4:128 or the like, or convert to dense."
        )
    for name, layer in layers.items():
        group = fmt.group_size(layer.in_features)
        if layer.in_features % WORD or layer.out_features % WORD or layer.in_features % group:
            raise OptionError(
                f"{name} is {layer.out_features} x {layer.in_features}, and GPTQ takes multiples of {WORD} and "
                f"of the group {group}; skip it or convert to dense."
            )
    return fmt


def stored_tensors(weight: PackedTensor) -> dict[str, Tensor]:
    """The tensors of a uniform weight [out, in] by their name after the module's.

    Raises OptionError where a scale is beyond float16.
    """
    columns = weight.shape[1]
    fmt, group = weight.format, weight.format.group_size(columns)
    groups = columns // group
    codes = unpack_bits(weight.codes, fmt.bits, fmt.width(columns))[:, :columns]
    zeros = weight.zeros
    if zeros is None:
        raise OptionError(f"a weight in {fmt} has no zero points; GPTQ's layout needs them.")
    points = unpack_zeros(zeros, fmt.bits, groups)
    scales = scales_of(weight, slice(None), torch.float32).T.contiguous()
    if not bool((scales.abs() <= torch.finfo(torch.float16).max).all()):
        raise OptionError("a scale is beyond float16, which GPTQ's layout stores; convert to dense.")
    return {
        "qweight": words(codes.T.to(torch.int64), fmt.bits),
        "qzeros": words(points.to(torch.int64), fmt.bits).T.contiguous(),
        "scales": scales.half(),
        "g_idx": (torch.arange(columns) // group).to(torch.int32),
    }


def words(values: Int[Tensor, "count lanes"], bits: int) -> Int[Tensor, "words lanes"]:
    """Values of ``bits`` bits as one stream of bits down the first axis, the lowest first, in 32-bit words.

    ``count`` * ``bits`` is a multiple of 32. Three bits lie over the ends of words, as in GPTQ's own code.
    """
    count, lanes = values.shape
    found = torch.zeros(count * bits // WORD, lanes, dtype=torch.int64)
    for bit in range(bits):
        place = torch.arange(count) * bits + bit
        found.index_add_(0, place // WORD, ((values >> bit) & 1) << (place % WORD)[:, None])
    return torch.where(found >= 1 << 31, found - (1 << 32), found).to(torch.int32)


def quantization_config(fmt: Format, group: int) -> dict[str, Any]:
    """config.json's ``quantization_config``."""
    return {
        "quant_method": "gptq",
        "bits": fmt.bits,
        "group_size": group,
        "desc_act": False,
        "sym": False,
        "lm_head": False,
        "checkpoint_format": "gptq_v2",
        "true_sequential": True,
        "damp_percent": 0.0,
    }


def save(model: PreTrainedModel, directory: Path, fmt: Format) -> None:
    """Write a model whose packed layers were replaced by ``bitsandbytes.Stored``."""
    model.config.quantization_config = quantization_config(fmt, fmt.group if fmt.group > 0 else -1)
    model.hf_quantizer = None  # it would refuse what the model now holds
    with quiet_loading():
        model.save_pretrained(directory)


def dense_linears(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Linears inside the blocks that are not among ``names``: readers of GPTQ expect all of them packed."""
    kinds = set(model._no_split_modules or ())
    known, found = set(names), []
    for path, block in model.named_modules():
        if type(block).__name__ in kinds:
            linears = (
                f"{path}.{name}" for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)
            )
            found += [name for name in linears if name not in known]
    return found


def layers_of(model: PreTrainedModel) -> tuple[dict[str, QuantLinear], Format]:
    """The packed layers and their format, after all checks. Raises OptionError as ``require_uniform``."""
    layers = quant_linears(model)
    fmt = require_uniform(layers)
    left = dense_linears(model, layers)
    if left:
        raise OptionError(
            f"{left[0]} is not packed ({len(left)} linears of the blocks are not), and a GPTQ checkpoint packs all of "
            "them; quantize without skip and target, or convert to dense."
        )
    return layers, fmt
