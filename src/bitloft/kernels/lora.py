"""multi_lora: the low-rank products of a batch whose rows belong to different adapters.

    delta[row] = scaling * (x[row] @ A0.T) @ B0t + sum over the blocks of its segment of (x[row] @ A.T) @ Bt

A [k, in] and Bt [k, out] are packed, each block in a format of its own, or plain floats; A0 and B0t are the start of a
base, which all rows take. The sum is float32 whatever ``x`` is: added to the base's product before that is rounded, a
young adapter survives; rounded first, it is lost in the last bit of bfloat16 (docs/decisions.md).

``multi_lora_plain`` is the definition. ``multi_lora`` runs native code, or Triton's for a few rows on CUDA, where there
is some; under ``torch.compile`` it is the operator ``bitloft::multi_lora``, which takes the stored parts of all blocks
as one list of tensors. A list of some hundred tensors costs more than the products themselves, so eager calls go past
the operator.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.formats import Format, layout
from bitloft.kernels import cpu_lora, gpu
from bitloft.kernels.plain import decode
from bitloft.packed import PackedTensor

Factor = PackedTensor | Tensor  # [k, width]
Block = tuple[Factor, Factor]  # A [k, in], Bt [k, out]


class Segment(NamedTuple):
    """Rows of a batch, by number and none twice, and the blocks that they take."""

    rows: tuple[int, ...]
    blocks: tuple[Block, ...]


class Start(NamedTuple):
    """The pair that all rows take: A0 [rank, in] and B0t [rank, out], and the factor s0 = alpha / rank."""

    a: PackedTensor
    bt: PackedTensor
    scaling: float


def multi_lora(
    x: Float[Tensor, "batch *length columns"], segments: Sequence[Segment], features: int, start: Start | None = None
) -> Float[Tensor, "batch *length features"]:
    """The deltas of all rows in float32; rows that no segment lists get the start alone.

    Raises KernelError for factors that do not fit the input or each other, and for a row that does not exist or is
    listed twice.
    """
    _check(x, segments, features, start)
    if torch.compiler.is_compiling():
        parts, described = _flatten(segments, start)
        found: Tensor = torch.ops.bitloft.multi_lora(x, parts, described, features)
        return found
    return _run(x, segments, features, start)


def multi_lora_plain(
    x: Float[Tensor, "batch *length columns"], segments: Sequence[Segment], features: int, start: Start | None = None
) -> Float[Tensor, "batch *length features"]:
    """What ``multi_lora`` computes, in plain torch."""
    wide = x.float()
    y = wide.new_zeros(*x.shape[:-1], features)
    if start is not None:
        y += start.scaling * ((wide @ values(start.a).T) @ values(start.bt))
    for rows, blocks in segments:
        index = torch.tensor(rows, dtype=torch.long, device=x.device)
        for a, bt in blocks:
            y[index] += (wide[index] @ values(a).T) @ values(bt)
    return y


def values(factor: Factor, dtype: torch.dtype = torch.float32) -> Float[Tensor, "k width"]:
    """What a factor stands for."""
    return decode(factor, dtype) if isinstance(factor, PackedTensor) else factor.to(dtype)


def _run(x: Tensor, segments: Sequence[Segment], features: int, start: Start | None) -> Tensor:
    factors = [*(f for s in segments for block in s.blocks for f in block), *([] if start is None else start[:2])]
    if gpu.takes_lora(x, factors):
        return gpu.multi_lora(x, segments, features, start)
    if not cpu_lora.takes(x, factors):
        return multi_lora_plain(x, segments, features, start)
    rows = cpu_lora.Rows(x.shape[0], [segment.rows for segment in segments])
    shared = None if start is None else cpu_lora.Blocks([(start.a, start.bt)], start.scaling)
    own = [cpu_lora.Blocks(segment.blocks) for segment in segments]
    out = torch.empty(*x.shape[:-1], features)
    cpu_lora.run(x, rows, [cpu_lora.Job(features, rows, own, shared).to(out, add=False)])
    return out


def _check(x: Tensor, segments: Sequence[Segment], features: int, start: Start | None) -> None:
    listed = [row for segment in segments for row in segment.rows]
    if len(set(listed)) < len(listed) or any(not 0 <= row < x.shape[0] for row in listed):
        raise KernelError(f"segments list rows {listed[:8]} of a batch of {x.shape[0]}; list each row once at most.")
    blocks = [block for segment in segments for block in segment.blocks]
    for a, bt in [*blocks, *([start[:2]] if start is not None else [])]:
        shapes = tuple(a.shape), tuple(bt.shape)
        if shapes != ((a.shape[0], x.shape[-1]), (a.shape[0], features)):
            raise KernelError(f"factors of shapes {shapes} do not fit {x.shape[-1]} -> {features} features.")


# ---- the operator ----------------------------------------------------------------------------------------------------


def _flatten(segments: Sequence[Segment], start: Start | None) -> tuple[list[Tensor], str]:
    """All stored tensors in order, and what says how to put them together again."""
    parts: list[Tensor] = []

    def described(factor: Factor) -> list[object]:
        if isinstance(factor, PackedTensor):
            parts.extend(factor.tensors().values())
            return [str(factor.format), *factor.shape]
        parts.append(factor)
        return ["", *factor.shape]

    record = {
        "start": start and [described(start.a), described(start.bt), start.scaling],
        "segments": [[s.rows, [[described(a), described(bt)] for a, bt in s.blocks]] for s in segments],
    }
    return parts, json.dumps(record)


def _unflatten(parts: list[Tensor], text: str) -> tuple[list[Segment], Start | None]:
    remaining = iter(parts)

    def factor(spelling: str, rows: int, columns: int) -> Factor:
        if not spelling:
            return next(remaining)
        fmt = Format.parse(spelling)
        names = layout((rows, columns), fmt)
        return PackedTensor.from_tensors(fmt, (rows, columns), {name: next(remaining) for name in names})

    record = json.loads(text)
    start = None
    if record["start"] is not None:
        a, bt, scaling = record["start"]
        start = Start(factor(*a), factor(*bt), scaling)  # type: ignore[arg-type]
    segments = [
        Segment(tuple(rows), tuple((factor(*a), factor(*bt)) for a, bt in blocks))
        for rows, blocks in record["segments"]
    ]
    return segments, start


@torch.library.custom_op("bitloft::multi_lora", mutates_args=())
def _operator(x: Tensor, parts: list[Tensor], described: str, features: int) -> Tensor:
    segments, start = _unflatten(parts, described)
    return _run(x, segments, features, start)


@_operator.register_fake
def _fake(x: Tensor, parts: list[Tensor], described: str, features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], features, dtype=torch.float32)
