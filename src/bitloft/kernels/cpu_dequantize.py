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


def takes(packed: PackedTensor, dtype: torch.dtype) -> bool:
    """Whether the native library decodes rows of this: it is there, parts are on the CPU, and it knows the dtype."""
    return cpu.takes(packed) and dtype in cpu.DTYPES and not packed.format.by_column


def takes_columns(packed: PackedTensor, dtype: torch.dtype) -> bool:
    """The same for columns, of codes that run down them."""
    return cpu.takes(packed) and dtype in cpu.DTYPES and packed.format.by_column


def columns(packed: PackedTensor, begin: int, end: int, dtype: torch.dtype) -> Float[Tensor, "columns rows"]:
    """Columns ``begin`` to ``end`` of the matrix that ``packed`` is with its leading axes flattened."""
    out = torch.empty(end - begin, packed.scales.shape[0], dtype=dtype)
    return _columns_to(packed, begin, out)


def column_tiles(
    packed: PackedTensor, dtype: torch.dtype
) -> Iterator[tuple[slice, Float[Tensor, "columns rows"]]]:
    """A matrix some columns at a time, as ``tiles`` gives rows."""
    rows, count = packed.shape
    step = max(TILE // max(rows, 1), 1)
    step = max(step - step % packed.format.group, 1)
    for begin in range(0, count, step):
        end = min(begin + step, count)
        tile = _room((end - begin) * rows, dtype).view(end - begin, rows)
        yield slice(begin, end), _columns_to(packed, begin, tile)


def _columns_to(packed: PackedTensor, begin: int, out: Tensor) -> Tensor:
    status = _columns_function()(
        byref(cpu.matrix(packed)), begin, out.shape[0], out.data_ptr(), out.nbytes, cpu.DTYPES[out.dtype], cpu.threads()
    )
    cpu.done(status)
    return out


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


def tiles(packed: PackedTensor, dtype: torch.dtype) -> Iterator[tuple[slice, Float[Tensor, "rows columns"]]]:
    """A matrix some rows at a time, of about ``plain.TILE`` values; a tile is good until the next one is asked for.

    Tiles lie in memory that each thread keeps. Fresh memory costs more than decoding: the system clears every page.
    """
    count, columns = packed.shape
    step = max(TILE // max(columns, 1), 1)
    for begin in range(0, count, step):
        end = min(begin + step, count)
        tile = _room((end - begin) * columns, dtype).view(end - begin, columns)
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
    """Whether the native library takes these: float32 on the CPU, contiguous."""
    given = (x,) if out is None else (x, out)
    plain = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in given)
    return plain and takes(packed, x.dtype)


def _run(packed: PackedTensor, rows: Tensor | None, count: int, out: Tensor) -> None:
    index = None if rows is None else rows.data_ptr()
    call, kind = _function(), cpu.DTYPES[out.dtype]
    status = call(byref(cpu.matrix(packed)), index, count, out.data_ptr(), out.nbytes, kind, cpu.threads())
    if status > 0:
        raise IndexError(f"a row number is outside the {packed.format} matrix of shape {packed.shape}.")
    cpu.done(status)


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
