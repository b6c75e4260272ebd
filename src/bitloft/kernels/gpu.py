"""Packed tensors on a GPU: the Triton kernels and when they are used.

Same definitions as ``plain``. Tiles are decoded in float32 and multiplied in the dtype of the input, sums are float32.
Block sizes are plain powers of two, not tuned: no GPU was at hand, the kernels were only run in Triton's interpreter
(``TRITON_INTERPRET=1``), which also lets them take CPU tensors. Tile and row limits here are therefore guesses.
"""

import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.formats import TENSOR, Format
from bitloft.kernels import cpu, trellis
from bitloft.kernels.plain import levels_of
from bitloft.packed import PackedTensor

Factor = PackedTensor | Tensor  # components as rows, [k, width]

TRELLIS = 64  # added to the bits of trellis codes; gpu_kernels knows it
LORA_ROWS = 256  # rows up to which multi_lora has a program for each; a prompt is decoded and multiplied by torch
FEW = 4  # rows up to which one program sums a whole output; beyond, tiles go through the matrix units
BLOCK = {"BR": 16, "BC": 128}
TILE = {"BN": 32, "BO": 64, "BI": 32}


@cache
def reason() -> str | None:
    """Why the Triton kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if interpreted() or torch.cuda.is_available() else "no CUDA device"


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def explain() -> str:
    """Which implementation CUDA tensors get, and why."""
    why = reason()
    return "Triton" + " (interpreted)" * interpreted() if why is None else f"plain torch definition ({why})"


def takes(tensor: Tensor) -> bool:
    """Whether the Triton kernels run on this tensor: it lies on a CUDA device and triton is there."""
    return tensor.device.type == "cuda" and reason() is None


def takes_lora(x: Tensor, factors: Sequence[Factor]) -> bool:
    """Whether ``multi_lora`` runs on these: few rows, no gradient asked for, all on a CUDA device, scales by group."""
    return (
        takes(x)
        and x.dtype in cpu.DTYPES
        and x.numel() <= LORA_ROWS * max(x.shape[-1], 1)
        and not (torch.is_grad_enabled() and x.requires_grad)
        and all(
            factor.codes.device == x.device and factor.format.group != TENSOR
            if isinstance(factor, PackedTensor) else factor.device == x.device
            for factor in factors
        )
    )  # fmt: skip


def decode(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """The values that ``packed`` stands for, in ``dtype`` and its own shape; computed in float32, rounded once."""
    columns, rows = packed.shape[-1], packed.codes.shape[0]
    out = torch.empty(rows, columns, dtype=dtype, device=packed.codes.device)
    if out.numel():
        grid = (_blocks(rows, BLOCK["BR"]), _blocks(columns, BLOCK["BC"]))
        _kernels().dequantize[grid](*_parts(packed), out, rows, columns, **_facts(packed.format, columns), **BLOCK)
    return out.view(packed.shape)


def packed_linear(x: Float[Tensor, "*batch columns"], weight: PackedTensor) -> Float[Tensor, "*batch rows"]:
    """y = x @ decode(weight).T, in the dtype of ``x``; weight [rows, columns]. Raises KernelError on a wrong width."""
    return _product(x, weight, transposed=False)


def packed_linear_grad_input(
    grad: Float[Tensor, "*batch rows"], weight: PackedTensor
) -> Float[Tensor, "*batch columns"]:
    """dx = grad @ decode(weight), in the dtype of ``grad``. Raises KernelError on a wrong width."""
    return _product(grad, weight, transposed=True)


def multi_lora(
    x: Float[Tensor, "batch *length columns"],
    segments: Sequence[tuple[Sequence[int], Sequence[tuple[Factor, Factor]]]],
    features: int,
    start: tuple[PackedTensor, PackedTensor, float] | None = None,
) -> Float[Tensor, "batch *length features"]:
    """The deltas of all rows in float32, as ``lora.multi_lora_plain`` defines them, in two launches for all blocks.

    One program a row: made for the few tokens of a decoding step. A prompt is right but slow.
    """
    rows = x.shape[0]
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.zeros(flat.shape[0], features, device=x.device)
    blocks = [(a, bt, 1.0) for _, pairs in segments for a, bt in pairs]
    lists = [[] if start is None else [len(blocks)] for _ in range(rows)]
    first = 0
    for numbers, pairs in segments:
        for row in numbers:
            lists[row] += range(first, first + len(pairs))
        first += len(pairs)
    if start is not None:
        blocks.append(start)
    if any(lists) and y.numel():
        repeat = flat.shape[0] // rows
        _launch_lora(flat, y, blocks, [found for found in lists for _ in range(repeat)])
    return y.view(*x.shape[:-1], features)


def _launch_lora(
    x: Tensor, y: Tensor, blocks: Sequence[tuple[Factor, Factor, float]], lists: Sequence[Sequence[int]]
) -> None:
    """Describe the blocks to the kernels and run both; ``lists`` has the blocks of each row."""
    device, features = x.device, y.shape[1]
    held = [[_described(a), _described(bt)] for a, bt, _ in blocks]  # keeps converted factors alive until the end
    table = [[*a[0], *bt[0], a[1].shape[0]] for a, bt in held]
    sizes = [row[-1] for row in table]
    places = [list(accumulate((sizes[b] for b in found), initial=0)) for found in lists]
    most = max(max(found) for found in places)
    counts = list(accumulate(map(len, lists), initial=0))
    described = torch.tensor(table, dtype=torch.int64, device=device)
    flat, begin, offsets = (
        torch.tensor(values, dtype=torch.int32, device=device)
        for values in ([b for found in lists for b in found], counts, [p for found in places for p in found[:-1]])
    )
    scalings = torch.tensor([scaling for _, _, scaling in blocks], dtype=torch.float32, device=device)
    t = torch.empty(x.shape[0], most, device=device)
    kernels, grid = _kernels(), (x.shape[0], max(map(len, lists)))
    kernels.lora_down[grid](described, flat, begin, offsets, scalings, x, t, x.shape[1], most, **BLOCK)
    grid = (x.shape[0], _blocks(features, BLOCK["BC"]))
    kernels.lora_up[grid](described, flat, begin, offsets, t, y, features, most, **BLOCK)


def _described(factor: Factor) -> tuple[list[int], Factor | Tensor]:
    """The sixteen numbers that ``gpu_kernels._factor`` reads, and the factor whose addresses are among them."""
    if isinstance(factor, PackedTensor):
        facts = _facts(factor.format, factor.shape[-1])
        names = ("row_bytes", "width", "group", "groups", "bits")
        scales = facts["scaled"] + facts["dq"]
        tail = [*(facts[name] for name in names), scales, facts["zero_bits"], facts["shifted"]]
        return [*(part.data_ptr() for part in _parts(factor)), *map(int, tail)], factor
    plain = factor.float().contiguous()
    columns = plain.shape[1]
    return [*[plain.data_ptr()] * 8, 4 * columns, columns, columns, 0, 32, 0, 0, 0], plain


def _product(x: Tensor, weight: PackedTensor, *, transposed: bool) -> Tensor:
    if len(weight.shape) != 2:
        raise KernelError(f"packed_linear takes a matrix; the weight has shape {weight.shape}.")
    rows, columns = weight.shape
    inner, outer = (rows, columns) if transposed else (columns, rows)
    if x.shape[-1] != inner:
        raise KernelError(
            f"the input has {x.shape[-1]} columns, the {weight.format} weight of shape {weight.shape} needs {inner}."
        )
    flat = x.reshape(-1, inner).contiguous()
    count = flat.shape[0]
    y = torch.zeros(count, outer, dtype=x.dtype, device=x.device)
    if y.numel() and inner:
        facts, parts = _facts(weight.format, columns), _parts(weight)
        if count <= FEW and not transposed:
            grid = (_blocks(rows, BLOCK["BR"]), count)
            _kernels().few[grid](*parts, flat, y, rows, columns, **facts, **BLOCK)
        else:
            grid = (_blocks(count, TILE["BN"]), _blocks(outer, TILE["BO"]))
            options = {"transposed": transposed, "dtype": _dtype(x.dtype), **TILE}
            _kernels().many[grid](*parts, flat, y, count, rows, columns, **facts, **options)
    return y.view(*x.shape[:-1], outer)


@cache
def _kernels() -> Any:
    from bitloft.kernels import gpu_kernels

    return gpu_kernels


def _dtype(dtype: torch.dtype) -> Any:
    """What tiles are multiplied in; the interpreter computes in numpy, which has no bfloat16."""
    import triton.language as tl

    if interpreted():
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _parts(packed: PackedTensor) -> tuple[Tensor, ...]:
    """The pointers that every kernel takes, in order; for a part that the format lacks, any tensor (it is not read)."""
    codes = packed.codes.view(torch.uint8)
    zeros = codes if packed.zeros is None else packed.zeros.view(torch.uint8)
    optional = (packed.shifts, packed.scale_low, packed.scale_step)
    shifts, low, step = (packed.scales if part is None else part for part in optional)
    coded = packed.format.family == "trellis"
    levels = _levels(trellis.table(packed.format.bits) if coded else levels_of(packed), str(codes.device))
    return codes, packed.scales, packed.exponent, zeros, shifts, levels, low, step


@cache
def _levels(levels: tuple[float, ...], device: str) -> Tensor:
    """A level table on the device; one unused entry where a format has none."""
    return torch.tensor(levels or (0.0,), dtype=torch.float32, device=device)


def _facts(fmt: Format, columns: int) -> dict[str, Any]:
    """What the kernels must know of a format, by parameter name."""
    return {
        "row_bytes": fmt.width(columns) * fmt.bits // 8, "width": fmt.width(columns),
        "group": fmt.group_size(columns), "groups": fmt.groups(columns),
        "bits": fmt.bits + TRELLIS * (fmt.family == "trellis"),
        "scaled": fmt.groups(columns) > 0, "one_range": fmt.group == TENSOR, "dq": fmt.dq,
        "zero_bits": (4 if fmt.bits == 3 else fmt.bits) if fmt.has_zeros else 0, "shifted": fmt.has_shifts,
    }  # fmt: skip


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
