"""``encode`` by the native library (``native/encode.cpp``): the same bytes as ``encoding.encode``, without its passes.

What has no work per value stays in torch, shared with the definition: learned levels, which come from a sample, and the
one range of a TENSOR format. Half precision is a conversion, which torch does at memory speed.
"""

import ctypes
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from functools import cache
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.formats import TENSOR, UNIT, Format
from bitloft.kernels import cpu
from bitloft.kernels.books import learn_levels
from bitloft.kernels.encoding import empty_parts, not_finite, range_parts, tensor_range
from bitloft.packed import PackedTensor

# The rule of bitloft.h by which each family scales its groups; lm2 splits instead, and a searched range is its own.
_RULES = {"nf": 1, "int": 1, "sign": 2, "lm": 4, "book": 4, "uniform": 5}
_GIVEN, _SPLIT, _RANGE_SEARCHED = 0, 3, 6


def takes(x: Tensor, fmt: Format) -> bool:
    """Whether the native encoder does this: there is a library, the tensor is on the CPU, and has codes to choose."""
    return (
        cpu.library() is not None and x.device.type == "cpu" and x.dim() > 0 and fmt.family not in ("half", "trellis")
    )


def encode(x: Float[Tensor, "*shape"], fmt: Format, ranges: bool) -> PackedTensor:
    """See ``encoding.encode``. Raises KernelError on NaN or infinity."""
    shape = tuple(x.shape)
    rows = x.detach().reshape(prod(shape[:-1]), shape[-1]).float().contiguous()
    parts, given = empty_parts(shape, fmt, rows.device), None
    if rows.numel() and fmt.has_levels:
        if not bool(rows.sum().isfinite()) and not bool(rows.isfinite().all()):  # a finite sum has finite terms
            raise not_finite(shape, fmt)
        parts["levels"] = _halves(learn_levels(rows, fmt))
    if rows.numel() and fmt.group == TENSOR:
        low, scale = tensor_range(rows, 2**fmt.bits - 1)
        if not bool(low.isfinite()):
            raise not_finite(shape, fmt)
        parts |= range_parts(low, scale)
        given = (c_float * 2)(float(scale), float(low))
    packed = PackedTensor.from_tensors(fmt, shape, parts)
    status = _function()(
        rows.data_ptr(), rows.numel(), byref(cpu.matrix(packed)), _rule(fmt, ranges), given, cpu.threads()
    )
    if status > 0:
        raise not_finite(shape, fmt)
    cpu.done(status)
    return packed


def _rule(fmt: Format, ranges: bool) -> int:
    if fmt.group == UNIT:
        return _GIVEN
    if fmt.family == "lm" and fmt.bits == 2:
        return _SPLIT
    return _RANGE_SEARCHED if ranges and fmt.has_zeros else _RULES[fmt.family]


def _halves(levels: tuple[float, ...]) -> Tensor:
    return torch.tensor(levels).half().view(torch.int16)


@cache
def _function() -> "ctypes._NamedFuncPointer":
    native = cpu.library()
    if native is None:
        raise KernelError("encode has no native library here; use the plain definition.")
    call = native.bl_encode
    call.argtypes = (c_void_p, c_int64, POINTER(cpu.Matrix), c_int, POINTER(c_float), c_int)
    return call
