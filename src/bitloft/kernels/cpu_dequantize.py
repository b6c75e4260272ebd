"""``decode`` and rows by number by the native library (``native/dequantize.cpp``): the same bytes as the definition.

A row is decoded straight to the wanted dtype; the definition goes through a table per byte and passes over the whole
matrix for scales and shifts. Other dtypes than float32, bfloat16 and float16 are left to it.
"""

import ctypes
import math
import threading
from collections.abc import Iterator
from ctypes import POINTER, byref, c_double, c_int, c_int32, c_int64, c_void_p
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.kernels import cpu
from bitloft.kernels.plain import TILE
from bitloft.packed import PackedTensor

BLOCK = 64  # rows of which the native library finds those in codes that run down columns


def takes(packed: PackedTensor, dtype: torch.dtype) -> bool:
    """Whether the native library decodes this: it is there, the parts are on the CPU, and it knows the dtype."""
    return cpu.takes(packed) and dtype in cpu.DTYPES


def decode(packed: PackedTensor, dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """See ``plain.decode``."""
    if packed.format.by_column:
        turned = torch.empty(packed.shape[-1], math.prod(packed.shape[:-1]), dtype=dtype)
        _columns_to(packed, 0, turned)
        return turned.T.reshape(packed.shape)
    out = torch.empty(packed.shape, dtype=dtype)
    _run(packed, None, packed.codes.shape[0], out)
    return out


def decode_rows(packed: PackedTensor, rows: Int[Tensor, " some"], dtype: torch.dtype) -> Float[Tensor, "some columns"]:
    """See ``plain.decode_rows``. Raises IndexError for a row that does not exist."""
    if len(packed.shape) != 2:
        raise KernelError(f"decode_rows takes a matrix; the tensor has shape {packed.shape}.")
    if packed.format.by_column:
        return decode(packed, dtype).index_select(0, rows.flatten())
    out = torch.empty(rows.numel(), packed.shape[1], dtype=dtype)
    _run(packed, rows.to(torch.int64).contiguous(), rows.numel(), out)
    return out


def tiles(packed: PackedTensor, dtype: torch.dtype) -> Iterator[tuple[slice, Float[Tensor, "rows columns"]]]:
    """A matrix some rows at a time, of about ``plain.TILE`` values; a tile is good until the next one is asked for.

    Tiles lie in memory that each thread keeps. Fresh memory costs more than decoding: the system clears every page.
    Where codes run down columns, so do the values of a tile.
    """
    count, columns = packed.shape
    step = max(TILE // max(columns, 1), 1)
    step = -(-step // BLOCK) * BLOCK if packed.format.by_column else step
    for begin in range(0, count, step):
        end = min(begin + step, count)
        room = _room((end - begin) * columns, dtype)
        if packed.format.by_column:
            tile = room.view(columns, end - begin)
            _columns_to(packed, begin, tile)
            yield slice(begin, end), tile.T
            continue
        tile = room.view(end - begin, columns)
        rows = None if begin == 0 and end == count else torch.arange(begin, end)
        _run(packed, rows, end - begin, tile)
        yield slice(begin, end), tile


_kept = threading.local()


def _room(count: int, dtype: torch.dtype) -> Tensor:
    """``count`` values of this thread's memory."""
    held: Tensor | None = getattr(_kept, "bytes", None)
    nbytes = count * dtype.itemsize
    if held is None or held.numel() < nbytes:
        with torch.inference_mode(False):
            _kept.bytes = held = torch.empty(nbytes, dtype=torch.uint8)
    return held[:nbytes].view(dtype)


def residual(x: Float[Tensor, "*shape"], packed: PackedTensor, out: Tensor | None) -> float:
    """See ``plain.residual``; the squares are summed in double."""
    total = c_double()
    to = None if out is None else out.data_ptr()
    cpu.done(_residual()(byref(cpu.matrix(packed)), x.data_ptr(), x.numel(), to, byref(total), cpu.threads()))
    return math.sqrt(total.value)


def takes_residual(x: Tensor, packed: PackedTensor, out: Tensor | None) -> bool:
    """Whether the native library takes these: float32 on the CPU, contiguous, codes that run along rows."""
    given = (x,) if out is None else (x, out)
    plain = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in given)
    return plain and cpu.takes(packed) and not packed.format.by_column


def _run(packed: PackedTensor, rows: Tensor | None, count: int, out: Tensor) -> None:
    index = None if rows is None else rows.data_ptr()
    call, kind = _function(), cpu.DTYPES[out.dtype]
    status = call(byref(cpu.matrix(packed)), index, count, out.data_ptr(), out.nbytes, kind, cpu.threads())
    if status > 0:
        raise IndexError(f"a row number is outside the {packed.format} matrix of shape {packed.shape}.")
    cpu.done(status)


def _columns_to(packed: PackedTensor, row: int, out: Tensor) -> None:
    """Rows from ``row`` on as the columns of ``out`` [columns, rows]."""
    call, kind = _columns_function(), cpu.DTYPES[out.dtype]
    cpu.done(call(byref(cpu.matrix(packed)), row, out.shape[1], out.data_ptr(), out.nbytes, kind, cpu.threads()))


@cache
def _function() -> "ctypes._NamedFuncPointer":
    call = _library().bl_dequantize
    call.argtypes = (POINTER(cpu.Matrix), c_void_p, c_int64, c_void_p, c_int64, c_int32, c_int)
    return call


@cache
def _columns_function() -> "ctypes._NamedFuncPointer":
    call = _library().bl_dequantize_columns
    call.argtypes = (POINTER(cpu.Matrix), c_int64, c_int64, c_void_p, c_int64, c_int32, c_int)
    return call


@cache
def _residual() -> "ctypes._NamedFuncPointer":
    call = _library().bl_residual
    call.argtypes = (POINTER(cpu.Matrix), c_void_p, c_int64, c_void_p, POINTER(c_double), c_int)
    return call


def _library() -> ctypes.CDLL:
    native = cpu.library()
    if native is None:
        raise KernelError("dequantize has no native library here; use the plain definition.")
    return native
