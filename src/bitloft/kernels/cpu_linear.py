"""``packed_linear`` by the native library (``native/linear.cpp``), and the order of codes that it reads fastest.

A product with one row of input takes a tenth of a millisecond, so what surrounds it is kept small: a packed tensor is
described once (``described``) and a call fills two structs. Codes of 1 to 4 bits in groups that fill whole 32-bit words
are multiplied as they are; other formats are decoded first (``ops.packed_linear``).
"""

import ctypes
from ctypes import POINTER, byref, c_int, c_int32, c_int64, c_void_p
from dataclasses import replace
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.formats import TENSOR, Format
from bitloft.kernels import cpu
from bitloft.packed import PackedTensor

INVARIANT, INT8, WIDE = 1, 2, 4  # BL_INVARIANT, BL_INT8, BL_WIDE


@cache
def _function() -> "ctypes._NamedFuncPointer":
    call = _library().bl_packed_linear_one
    call.argtypes = (
        c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int32, c_int,
    )  # fmt: skip
    return call


def _library() -> ctypes.CDLL:
    native = cpu.library()
    if native is None:
        raise KernelError("packed_linear has no native library here; use the plain definition.")
    return native


@cache
def multiplies(fmt: Format) -> bool:
    """Whether products are computed from codes of this format, not from decoded values."""
    if fmt.by_column:
        return True
    unit = 32 if fmt.bits == 3 else 32 // fmt.bits
    return fmt.bits <= 4 and fmt.family != "trellis" and (fmt.group <= 0 or fmt.group % unit == 0)


def can_arrange(fmt: Format, columns: int) -> bool:
    """Whether rows of ``columns`` values fill whole words, so that codes of 64 rows can trade places in memory.

    Codes that run down columns have another order on AVX-512 only, where eight columns fill the cells of its kernel.
    """
    if fmt.by_column:
        return columns % 8 == 0 and cpu.isa() == "avx512"
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


def takes_int8() -> bool:
    """Whether the native library multiplies rows in 8 bits here: on AVX-512."""
    return cpu.isa() == "avx512"


class Weight:
    """A packed matrix as the native side sees it. Holds addresses: the caller keeps the tensors alive."""

    __slots__ = ("address", "columns", "matrix", "rows")

    def __init__(self, packed: PackedTensor) -> None:
        self.matrix = cpu.matrix(packed)
        self.address = ctypes.addressof(self.matrix)
        self.rows, self.columns = packed.shape


def described(packed: PackedTensor) -> Weight:
    """``packed`` as the native side sees it, kept with it: its tensors are not replaced, only their contents may."""
    kept: Weight | None = packed.__dict__.get("_native")
    if kept is None:
        kept = Weight(packed)
        object.__setattr__(packed, "_native", kept)
    return kept


def fits(x: Tensor, weight: Weight) -> bool:
    """``takes`` for a weight that was taken before."""
    return x.dtype in cpu.DTYPES and x.shape[-1] == weight.columns and x.is_cpu


def packed_linear(
    x: Float[Tensor, "*batch columns"],
    weight: Weight,
    *,
    bias: Float[Tensor, " rows"] | None = None,
    addend: Float[Tensor, "*batch rows"] | None = None,
    invariant: bool = False,
    activations: str | None = None,
) -> Float[Tensor, "*batch rows"]:
    """x W^T + bias + addend in the dtype of ``x``, for a weight that was ``described``.

    ``activations``: ``bf16`` or ``int8`` rounds what is multiplied, never what is added or returned (``ops``).

    ``bias`` and ``addend`` are float32 and contiguous, and added before the sum is rounded. ``invariant``: what a row
    gets does not depend on how many there are.
    """
    x = x if x.is_contiguous() else x.contiguous()
    batch = x.shape[:-1]
    rows = 1
    for count in batch:
        rows *= count
    out = x.new_empty((*batch, weight.rows))
    flags = INVARIANT * invariant
    if activations is not None:
        flags |= INT8 if activations == "int8" else WIDE * (x.dtype is torch.float32)
        x = x.bfloat16() if flags & WIDE else x
    status = _function()(
        x.data_ptr(), cpu.DTYPES[x.dtype], rows, weight.address, None if bias is None else bias.data_ptr(),
        None if addend is None else addend.data_ptr(), out.data_ptr(), flags, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        cpu.done(status)
    return out


def arrange(packed: PackedTensor) -> PackedTensor:
    """Bring the codes of ``packed`` (and plain scales) into the order that the kernels read fastest, in place.

    Same size; rows beyond the last whole 64 keep their order. Returns what products take from now on: the stored order
    is gone until ``restore``. Raises KernelError for a format or width that has no other order.
    """
    _reorder(packed, back=False)
    return replace(packed, arranged=True)


def restore(packed: PackedTensor) -> PackedTensor:
    """Bring the stored order back, in place."""
    _reorder(packed, back=True)
    return replace(packed, arranged=False)


def canonical(packed: PackedTensor) -> PackedTensor:
    """``packed`` in the stored order: itself, or a copy of what is arranged."""
    if not packed.arranged:
        return packed
    return restore(replace(packed, codes=packed.codes.clone(), scales=packed.scales.clone()))


def _reorder(packed: PackedTensor, *, back: bool) -> None:
    if packed.arranged is not back:
        raise KernelError(
            f"a {packed.format} tensor of shape {packed.shape} {'is not arranged' if back else 'is arranged already'}."
        )
    if not can_arrange(packed.format, packed.shape[-1]):
        raise KernelError(
            f"a {packed.format} tensor of shape {packed.shape} has no other order; its rows do not fill whole words."
        )
    fmt, call = packed.format, _library().bl_arrange
    call.argtypes = (POINTER(cpu.Matrix), c_void_p, c_void_p, c_int, c_int)
    scaled = fmt.groups(packed.shape[-1]) > 0 and not fmt.dq and fmt.group != TENSOR
    scales = packed.scales.data_ptr() if scaled else None
    cpu.done(call(byref(cpu.matrix(packed)), packed.codes.data_ptr(), scales, back, cpu.threads()))
