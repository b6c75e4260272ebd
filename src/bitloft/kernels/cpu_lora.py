"""multi_lora's native side: what is described once and used at every step.

``Blocks`` are the factors of one adapter at one module, ``Rows`` the segments of a batch, a ``Job`` brings both
together for one matrix. All hold C structs with addresses and the tensors behind them, so a step costs one call:
nothing is looked up or converted again.
"""

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import POINTER, byref, c_float, c_int, c_int32, c_int64, c_void_p, pointer
from functools import cache

import torch
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.kernels import cpu
from bitloft.packed import PackedTensor


class Factor(ctypes.Structure):
    _fields_ = (
        ("rows", c_int64), ("columns", c_int64), ("packed", POINTER(cpu.Matrix)), ("plain", c_void_p),
        ("plain_bytes", c_int64), ("dtype", c_int32),
    )  # fmt: skip


class _Block(ctypes.Structure):
    _fields_ = (("a", Factor), ("bt", Factor), ("scaling", c_float))


class BlockList(ctypes.Structure):
    _fields_ = (("count", c_int64), ("block", POINTER(_Block)))


class Lora(ctypes.Structure):
    _fields_ = (
        ("columns", c_int64), ("shared", BlockList), ("own", POINTER(BlockList)),
        ("out", c_void_p), ("out_stride", c_int64), ("out_dtype", c_int32), ("accumulate", c_int32),
    )  # fmt: skip


class Segments(ctypes.Structure):
    _fields_ = (("count", c_int64), ("repeat", c_int64), ("begin", POINTER(c_int64)), ("rows", POINTER(c_int32)))


@cache
def _function() -> "ctypes._NamedFuncPointer":
    native = cpu.library()
    if native is None:
        raise KernelError("multi_lora has no native library here; use multi_lora_plain.")
    found = native.bl_multi_lora
    found.argtypes = (
        c_void_p, c_int32, c_int64, c_int64, c_int64, POINTER(Segments), POINTER(Lora), c_int64, c_int,
    )  # fmt: skip
    return found


def takes(x: Tensor, factors: Iterable[PackedTensor | Tensor]) -> bool:
    """Whether native code computes with these: floats of 16 or 32 bits, everything on the CPU."""
    return at_once(x) and all(
        cpu.takes(factor) and not factor.format.by_column if isinstance(factor, PackedTensor) else
        factor.device.type == "cpu" and factor.dtype in cpu.DTYPES
        for factor in factors
    )  # fmt: skip


def at_once(x: Tensor, out: Tensor | None = None) -> bool:
    """Whether a step may call ``run`` on these as they are: no gradient, no tracing, no other device or dtype."""
    return (
        x.device.type == "cpu"
        and x.dtype in cpu.DTYPES
        and (out is None or (out.dtype in cpu.DTYPES and out.is_contiguous()))
        and not (torch.is_grad_enabled() and (x.requires_grad or (out is not None and out.requires_grad)))
        and not torch.compiler.is_compiling()
        and cpu.library() is not None
    )


class Blocks:
    """The blocks of one adapter at one module: pairs of A [k, in] and Bt [k, out]."""

    def __init__(self, blocks: Sequence[tuple[PackedTensor | Tensor, PackedTensor | Tensor]], scaling: float = 1.0):
        self._held = [[_contiguous(factor) for factor in block] for block in blocks]  # the addresses stay true
        array = (_Block * len(self._held))(*(_Block(_factor(a), _factor(bt), scaling) for a, bt in self._held))
        self.struct = BlockList(len(self._held), array)


def _contiguous(factor: PackedTensor | Tensor) -> PackedTensor | Tensor:
    return factor if isinstance(factor, PackedTensor) else factor.contiguous()


def _factor(factor: PackedTensor | Tensor) -> Factor:
    rows, columns = factor.shape
    if isinstance(factor, PackedTensor):
        return Factor(rows, columns, pointer(cpu.matrix(factor)), None, 0, 0)
    return Factor(rows, columns, None, factor.data_ptr(), factor.nbytes, cpu.DTYPES[factor.dtype])


class Rows:
    """Which rows of a batch belong together, one segment for each list; those that none lists are one more segment."""

    def __init__(self, batch: int, segments: Sequence[Sequence[int]]) -> None:
        listed = {row for rows in segments for row in rows}
        every = [*segments, [row for row in range(batch) if row not in listed]]
        flat = [row for rows in every for row in rows]
        begin = [0]
        for rows in every:
            begin.append(begin[-1] + len(rows))
        self.batch, self.count = batch, len(every)
        self.struct = Segments(self.count, 1, (c_int64 * len(begin))(*begin), (c_int32 * len(flat))(*flat))


_NOTHING = BlockList(0, None)


class Job:
    """One matrix of a call: its output's width, what all rows take, and the blocks of each segment (None: nothing)."""

    def __init__(self, features: int, rows: Rows, own: Sequence[Blocks | None], shared: Blocks | None = None) -> None:
        self._held = (*own, shared)
        structs = [blocks.struct if blocks is not None else _NOTHING for blocks in own]
        array = (BlockList * rows.count)(*structs, *[_NOTHING] * (rows.count - len(structs)))
        self.struct = Lora(features, shared.struct if shared is not None else _NOTHING, array, None, features, 0, 0)

    def to(self, out: Tensor, *, add: bool) -> "Job":
        """Write to ``out`` [batch, *length, features], contiguous; ``add`` to what it holds, in float32."""
        struct = self.struct
        struct.out, struct.out_dtype, struct.accumulate = out.data_ptr(), cpu.DTYPES[out.dtype], add
        return self


def run(x: Tensor, rows: Rows, jobs: Sequence[Job]) -> None:
    """Compute all jobs, which share the input x [batch, *length, columns]. Raises KernelError where sizes disagree."""
    x = x if x.is_contiguous() else x.contiguous()
    columns = x.shape[-1]
    count = x.numel() // columns if columns else 0
    segments = rows.struct
    segments.repeat = max(count // max(rows.batch, 1), 1)
    array = jobs[0].struct if len(jobs) == 1 else (Lora * len(jobs))(*(job.struct for job in jobs))
    cpu.done(
        _function()(
            x.data_ptr(), cpu.DTYPES[x.dtype], count, columns, columns, byref(segments),
            byref(array) if len(jobs) == 1 else array, len(jobs), torch.get_num_threads(),
        )
    )  # fmt: skip
