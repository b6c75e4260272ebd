"""``decode`` and rows by number by the native library (``native/dequantize.cpp``): the same bytes as the definition.

A row is decoded straight to the wanted dtype; the definition goes through a table per byte and passes over the whole
matrix for scales and shifts. Other dtypes than float32, bfloat16 and float16 are left to it.
"""

import ctypes
from ctypes import POINTER, byref, c_int, c_int32, c_int64, c_void_p
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.kernels import cpu
from bitloft.packed import PackedTensor


def takes(packed: PackedTensor, dtype: torch.dtype) -> bool:
    """Whether the native library decodes this: it is there, the parts are on the CPU, and it knows the dtype."""
    return cpu.takes(packed) and dtype in cpu.DTYPES


def decode(packed: PackedTensor, dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """See ``plain.decode``."""
    out = torch.empty(packed.shape, dtype=dtype)
    _run(packed, None, packed.codes.shape[0], out)
    return out


def decode_rows(packed: PackedTensor, rows: Int[Tensor, " some"], dtype: torch.dtype) -> Float[Tensor, "some columns"]:
    """See ``plain.decode_rows``. Raises IndexError for a row that does not exist."""
    if len(packed.shape) != 2:
        raise KernelError(f"decode_rows takes a matrix; the tensor has shape {packed.shape}.")
    out = torch.empty(rows.numel(), packed.shape[1], dtype=dtype)
    _run(packed, rows.to(torch.int64).contiguous(), rows.numel(), out)
    return out


def _run(packed: PackedTensor, rows: Tensor | None, count: int, out: Tensor) -> None:
    index = None if rows is None else rows.data_ptr()
    call, kind = _function(), cpu.DTYPES[out.dtype]
    status = call(byref(cpu.matrix(packed)), index, count, out.data_ptr(), out.nbytes, kind, cpu.threads())
    if status > 0:
        raise IndexError(f"a row number is outside the {packed.format} matrix of shape {packed.shape}.")
    cpu.done(status)


@cache
def _function() -> "ctypes._NamedFuncPointer":
    native = cpu.library()
    if native is None:
        raise KernelError("dequantize has no native library here; use the plain definition.")
    call = native.bl_dequantize
    call.argtypes = (POINTER(cpu.Matrix), c_void_p, c_int64, c_void_p, c_int64, c_int32, c_int)
    return call
