"""``trellis.encode`` by the native library (``native/trellis.cpp``): the same bytes, sixteen states at once."""

from ctypes import c_int, c_int32, c_int64, c_void_p
from functools import cache
from math import prod
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.formats import UNIT, Format
from bitloft.kernels import cpu, trellis
from bitloft.packed import PackedTensor

if TYPE_CHECKING:
    import ctypes


def takes(x: Tensor) -> bool:
    """Whether the native library encodes this: it is there, and the tensor is on the CPU."""
    return cpu.library() is not None and x.device.type == "cpu"


def encode(
    x: Float[Tensor, "*shape"],
    fmt: Format,
    weights: Float[Tensor, " columns"] | None = None,
) -> PackedTensor:
    """See ``trellis.encode``. Raises KernelError on NaN or infinity."""
    columns = x.shape[-1]
    rows = x.detach().reshape(prod(x.shape[:-1]), columns).float().contiguous()
    mass = None if weights is None else weights.detach().float().contiguous()
    if mass is not None and mass.shape != (columns,):
        raise KernelError(f"{tuple(mass.shape)} weights do not fit rows of {columns} values.")
    codes = torch.zeros(rows.shape[0], fmt.width(columns) // 8 * fmt.bits, dtype=torch.int8)
    scaled = fmt.group != UNIT
    scales = torch.zeros(rows.shape[0], 1)
    status = _function()(
        rows.data_ptr(), None if mass is None else mass.data_ptr(), rows.shape[0], columns, fmt.bits,
        codes.data_ptr(), codes.nbytes, scales.data_ptr() if scaled else None, cpu.threads(),
    )  # fmt: skip
    if status > 0:
        raise KernelError(f"cannot encode a tensor of shape {tuple(x.shape)} to {fmt}: it holds NaN or infinity.")
    cpu.done(status)
    return trellis.assembled(tuple(x.shape), fmt, codes, scales)


@cache
def _function() -> "ctypes._NamedFuncPointer":
    native = cpu.library()
    if native is None:
        raise KernelError("trellis codes have no native library here; use the plain definition.")
    call = native.bl_encode_trellis
    call.argtypes = (
        c_void_p, c_void_p, c_int64, c_int64, c_int32, c_void_p, c_int64, c_void_p, c_int,
    )  # fmt: skip
    return call
