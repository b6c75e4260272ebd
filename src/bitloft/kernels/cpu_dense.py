"""Products with a plain float32 matrix by the native library (``native/dense.cpp``): the output head of a decoder.

torch's product copies the matrix into another order for every call of a few rows, which took longer than multiplying
(docs/decisions.md). Here a row also gets the same bits whatever rows lie beside it.
"""

from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.kernels import cpu

LANES = 16  # DENSE_LANES of dense.hpp


def takes(weight: Tensor) -> bool:
    """Whether the native library multiplies with ``weight`` [out, in]: it is there, and knows dtype, place, width."""
    plain = weight.ndim == 2 and weight.dtype == torch.float32 and weight.device.type == "cpu"
    return cpu.library() is not None and plain and weight.is_contiguous() and weight.shape[1] % LANES == 0


def dense_linear(x: Float[Tensor, "rows columns"], weight: Tensor) -> Float[Tensor, "rows outs"]:
    """``x @ weight.T``, weight [outs, columns], every number a sum of its own.

    Raises KernelError for what ``takes`` refuses, and for another width.
    """
    if not takes(weight) or x.dtype != torch.float32 or x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise KernelError(
            f"a plain product takes contiguous float32 rows; it got {tuple(x.shape)} and {tuple(weight.shape)}."
        )
    x = x.contiguous()
    out = torch.empty(len(x), len(weight))
    call = _function()
    cpu.done(call(x.data_ptr(), len(x), x.shape[1], weight.data_ptr(), len(weight), out.data_ptr(), cpu.threads()))
    return out


@cache
def _function() -> Any:
    native = cpu.library()
    if native is None:
        raise KernelError(f"a plain product needs the native library: {cpu.explain()}.")
    native.bl_dense_linear.argtypes = (c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int)
    return native.bl_dense_linear
