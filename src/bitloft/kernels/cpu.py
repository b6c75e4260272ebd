"""The native CPU library: loading it, describing packed tensors to it, and what it says when it refuses.

The library (``native/*.cpp``, interface ``native/bitloft.h``) knows neither Python nor torch. It is bound by ctypes: a
compiled binding would have to follow Python's and torch's versions, and costs no less per call once the structs are
kept. ``BITLOFT_ISA`` chooses ``avx512``, ``avx2``, ``portable`` or ``plain`` (no native code at all).
"""

import ctypes
import os
from ctypes import POINTER, byref, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.formats import TENSOR, Format
from bitloft.packed import PackedTensor

INTERFACE = 4  # BL_INTERFACE of bitloft.h
LIBRARY = Path(__file__).with_name("_native.so")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HALF, DQ, ONE_RANGE, ARRANGED, TRELLIS, COLUMNS = 1, 2, 4, 8, 16, 32  # flags of bl_matrix


class Matrix(ctypes.Structure):
    """bl_matrix of bitloft.h, field by field."""

    _fields_ = (
        ("rows", c_int64), ("columns", c_int64), ("width", c_int64), ("group", c_int64), ("groups", c_int64),
        ("bits", c_int32), ("flags", c_int32),
        ("codes", c_void_p), ("codes_bytes", c_int64),
        ("scales", c_void_p), ("scales_bytes", c_int64),
        ("zeros", c_void_p), ("zeros_bytes", c_int64),
        ("shifts", c_void_p), ("shifts_bytes", c_int64),
        ("low", c_void_p), ("step", c_void_p), ("range_bytes", c_int64),
        ("levels", POINTER(c_float)), ("learned", c_void_p), ("exponent", c_void_p),
    )  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """The native library, or None; ``reason`` says why. Loaded once."""
    found = _load()
    return found if isinstance(found, ctypes.CDLL) else None


@cache
def _load() -> ctypes.CDLL | str:
    if os.environ.get("BITLOFT_ISA") == "plain":
        return "BITLOFT_ISA=plain"
    if not LIBRARY.exists():
        return "no native library: the package was built without a C++ compiler"
    try:
        native = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"the native library cannot be loaded: {error}"
    if native.bl_interface() != INTERFACE:
        return f"the native library has interface {native.bl_interface()}, this version needs {INTERFACE}; build again"
    native.bl_error.restype = native.bl_isa.restype = c_char_p
    native.bl_use_openmp.argtypes = (c_void_p,)
    native.bl_use_openmp.restype = None
    native.bl_check.argtypes = (POINTER(Matrix),)
    if native.bl_isa() is None:
        raise KernelError(native.bl_error().decode())
    native.bl_use_openmp(_torch_openmp())
    return native


def _torch_openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch brought into this process, if there is one."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p).value
    except AttributeError:
        return None


def isa() -> str | None:
    """The instruction set that the native kernels use here, None without them."""
    native = library()
    return None if native is None else native.bl_isa().decode()


def explain() -> str:
    """Which implementation runs, and why."""
    found = _load()
    if isinstance(found, str):
        return f"plain torch definition ({found})"
    threads = "torch's OpenMP threads" if _torch_openmp() else "its own threads"
    return f"native {isa()} on {threads}; codes of more than 4 bits and groups of odd widths are decoded first"


def done(status: int) -> None:
    """Raise KernelError with the library's sentence if a call was refused."""
    if status:
        native = library()
        raise KernelError(native.bl_error().decode() if native else "no native library")


def takes(packed: PackedTensor) -> bool:
    """Whether the native library can be handed ``packed``: it is there, and the parts are on the CPU."""
    return library() is not None and packed.codes.device.type == "cpu"


def matrix(packed: PackedTensor) -> Matrix:
    """``packed`` as the native side sees it, rows being its flattened leading axes; shares its memory.

    The struct holds addresses: the caller keeps ``packed`` alive for as long as it uses it.
    """
    fmt, columns = packed.format, packed.shape[-1]
    parts = packed.tensors()
    for name, part in parts.items():
        if not part.is_contiguous():
            raise KernelError(f"part {name!r} of a {fmt} tensor of shape {packed.shape} is not contiguous; copy it.")
    return Matrix(
        rows=prod(packed.shape[:-1]), columns=columns, width=fmt.width(columns), group=fmt.group_size(columns),
        groups=fmt.groups(columns), bits=fmt.bits,
        flags=_flags(fmt) | ARRANGED * packed.arranged, **_addresses(parts),
        levels=None if fmt.family in ("half", "trellis") else _levels(fmt),
    )  # fmt: skip


def check(packed: PackedTensor) -> None:
    """Raise KernelError where the parts of ``packed`` do not have the sizes that its format asks for."""
    native = library()
    if native is not None:
        done(native.bl_check(byref(matrix(packed))))


def _flags(fmt: Format) -> int:
    return (
        HALF * (fmt.family == "half")
        | DQ * fmt.dq
        | ONE_RANGE * (fmt.group == TENSOR)
        | TRELLIS * (fmt.family == "trellis")
        | COLUMNS * fmt.by_column
    )


def _addresses(parts: dict[str, Tensor]) -> dict[str, int]:
    """Fields of bl_matrix that point at tensors."""
    fields: dict[str, int] = {}
    for part, field in _FIELDS.items():
        tensor = parts.get(part)
        if tensor is not None:
            fields[field] = tensor.data_ptr()
            if field in ("codes", "scales", "zeros", "shifts"):
                fields[f"{field}_bytes"] = tensor.nbytes
    if "scale_low" in parts:
        fields["range_bytes"] = min(parts["scale_low"].nbytes, parts["scale_step"].nbytes)
    return fields


_FIELDS = {
    "codes": "codes", "scales": "scales", "exponent": "exponent", "zeros": "zeros", "shifts": "shifts",
    "levels": "learned", "scale_low": "low", "scale_step": "step",
}  # fmt: skip


@cache
def _levels(fmt: Format) -> ctypes.Array[c_float]:
    """The format's level table in float32, kept for as long as the process."""
    return (c_float * len(fmt.levels))(*fmt.levels)


def threads() -> int:
    """Threads for one call: as many as torch uses."""
    return torch.get_num_threads()
