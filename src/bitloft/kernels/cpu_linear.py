"""``packed_linear`` by the native library (``native/linear.cpp``), and the order of codes that it reads fastest.

A product with one row of input takes a tenth of a millisecond, so what surrounds it is kept small: a packed tensor is
described once (``described``) and a call fills two structs. Levels of 1 to 4 bits in groups that fill whole 32-bit words
are multiplied from their codes; other formats are decoded first (``ops.packed_linear``).
"""

import ctypes
from ctypes import POINTER, byref, c_int, c_int32, c_int64, c_void_p
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.formats import TENSOR, Format
from bitloft.kernels import cpu
from bitloft.packed import PackedTensor

INVARIANT = 1  # BL_INVARIANT
BLOCK = 64  # rows that are interleaved


class _Input(ctypes.Structure):
    _fields_ = (
        ("values", c_void_p), ("rows", c_int64), ("columns", c_int64), ("stride", c_int64), ("dtype", c_int32),
    )  # fmt: skip


class _Product(ctypes.Structure):
    _fields_ = (
        ("weight", POINTER(cpu.Matrix)), ("bias", c_void_p), ("addend", c_void_p), ("out", c_void_p),
        ("stride", c_int64), ("dtype", c_int32),
    )  # fmt: skip


@cache
def _function() -> "ctypes._NamedFuncPointer":
    call = _library().bl_packed_linear
    call.argtypes = (c_void_p, c_void_p, c_int64, c_int32, c_int)
    return call


def _library() -> ctypes.CDLL:
    native = cpu.library()
    if native is None:
        raise KernelError("packed_linear has no native library here; use the plain definition.")
    return native


@cache
def multiplies(fmt: Format) -> bool:
    """Whether products are computed from codes of this format, not from decoded values."""
    unit = 32 if fmt.bits == 3 else 32 // fmt.bits
    return fmt.bits <= 4 and (fmt.group <= 0 or fmt.group % unit == 0)


def can_arrange(fmt: Format, columns: int) -> bool:
    """Whether rows of ``columns`` values fill whole words, so that codes of 64 rows can trade places in memory."""
    unit = 32 if fmt.bits == 3 else 32 // fmt.bits
    return multiplies(fmt) and fmt.width(columns) % unit == 0


def takes(x: Tensor, packed: PackedTensor) -> bool:
    """Whether the native library multiplies these: on the CPU, floats of 16 or 32 bits, a format that it knows."""
    return (
        x.dtype in cpu.DTYPES
        and x.device.type == "cpu"
        and multiplies(packed.format)
        and len(packed.shape) == 2
        and x.shape[-1] == packed.shape[1]
        and cpu.takes(packed)
    )


def described(packed: PackedTensor, *, arranged: bool = False) -> cpu.Matrix:
    """``packed`` as the native side sees it, kept with it: its tensors are not replaced, only their contents may."""
    kept: cpu.Matrix | None = packed.__dict__.get("_native")
    if kept is None:
        kept = cpu.matrix(packed)
        kept.flags |= cpu.ARRANGED * arranged
        object.__setattr__(packed, "_native", kept)
    return kept


def packed_linear(
    x: Float[Tensor, "*batch columns"],
    weight: cpu.Matrix,
    *,
    bias: Float[Tensor, " rows"] | None = None,
    addend: Float[Tensor, "*batch rows"] | None = None,
    invariant: bool = False,
) -> Float[Tensor, "*batch rows"]:
    """x W^T + bias + addend in the dtype of ``x``; ``bias`` and ``addend`` are float32, contiguous, added before
    rounding. ``invariant``: a row's result does not depend on how many there are."""
    x = x if x.is_contiguous() else x.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.rows)
    columns, dtype = weight.columns, cpu.DTYPES[x.dtype]
    rows = x.numel() // columns if columns else out.numel() // max(weight.rows, 1)
    product = _Product(
        ctypes.pointer(weight),
        None if bias is None else bias.data_ptr(),
        None if addend is None else addend.data_ptr(),
        out.data_ptr(),
        weight.rows,
        dtype,
    )
    given = _Input(x.data_ptr(), rows, columns, columns, dtype)
    cpu.done(_function()(byref(given), byref(product), 1, INVARIANT * invariant, torch.get_num_threads()))
    return out


def arrange(packed: PackedTensor, *, back: bool = False) -> None:
    """Bring the codes of ``packed`` (and plain scales) into the order that the kernels read fastest, or back, in place.

    Rows beyond the last whole 64 keep their order. The caller remembers which order it is: nothing in ``packed`` says so.
    """
    fmt = packed.format
    matrix = cpu.matrix(packed)
    matrix.flags |= cpu.ARRANGED * back
    plain = fmt.groups(packed.shape[-1]) > 0 and not fmt.dq and fmt.group != TENSOR
    call = _library().bl_arrange
    call.argtypes = (POINTER(cpu.Matrix), c_void_p, c_void_p, c_int, c_int)
    scales = packed.scales.data_ptr() if plain else None
    cpu.done(call(byref(matrix), packed.codes.data_ptr(), scales, back, cpu.threads()))
