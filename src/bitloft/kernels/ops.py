"""The operators of bitloft in plain torch: the only specification, the fallback and the oracle of every kernel.

``encode``         x -> PackedTensor (groups along the last axis)
``decode``         PackedTensor -> values
``packed_linear``  y[n, out] = sum_in x[n, in] * decode(W)[out, in]
``packed_linear_grad_input``  dx[n, in] = sum_out dy[n, out] * decode(W)[out, in]

Simulation is ``decode(encode(x))``: there is no second path that only pretends. Level tables come from the format and
are looked up a byte at a time (one table row holds the values of all codes in that byte), which is as plain as shifts
and masks and several times faster in torch.
"""

from collections.abc import Iterator
from functools import lru_cache
from math import prod

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import embedding

from bitloft.errors import KernelError
from bitloft.formats import UNIT, Format, layout
from bitloft.kernels import search
from bitloft.packed import PackedTensor, pack_bits, pack_scales, unpack_bits, unpack_scales

# Values handled at once: bounds the memory of encode and of a dequantized tile (4 MiB of float32).
TILE = 1 << 20


def encode(x: Float[Tensor, "*shape"], fmt: Format | str, *, ranges: bool = False) -> PackedTensor:
    """Quantize ``x`` to the nearest codes of ``fmt``, groups along the last axis.

    The last axis is padded with zeros to whole groups; padding does not influence a scale. ``nf`` takes the absolute
    maximum as scale (QLoRA), ``lm`` the scale of least squared error, ``uniform`` the range from min to max with zero
    on the grid (``ranges`` searches the range of least squared error instead), ``sign`` the mean of absolute values
    (LoRAQuant). Raises KernelError on NaN or infinity.
    """
    fmt = Format.parse(fmt)
    layout(tuple(x.shape), fmt)  # refuses a scalar
    rows = x.reshape(prod(x.shape[:-1]), x.shape[-1]).float().contiguous()
    if not bool(torch.isfinite(rows).all()):
        raise KernelError(f"cannot encode a tensor of shape {tuple(x.shape)} to {fmt}: it holds NaN or infinity.")
    columns = rows.shape[1]
    step = max(TILE // max(fmt.width(columns), 1), 1)
    tiles = [_encode_rows(chunk, fmt, ranges) for chunk in rows.split(step)] if rows.numel() else []
    return _assemble(tuple(x.shape), fmt, tiles, rows)


def _assemble(
    shape: tuple[int, ...], fmt: Format, tiles: list[tuple[Tensor, Tensor, Tensor | None]], rows: Tensor
) -> PackedTensor:
    columns = rows.shape[1]
    if not tiles:
        empty = torch.zeros(rows.shape[0], fmt.width(columns), dtype=torch.uint8)
        tiles = [(empty, rows.new_zeros(rows.shape[0], fmt.groups(columns)), None)]
        if fmt.has_zeros:
            tiles = [(empty, tiles[0][1], torch.zeros(rows.shape[0], fmt.groups(columns), dtype=torch.uint8))]
    codes = torch.cat([pack_bits(t[0], fmt.bits) for t in tiles])
    scales, exponent = pack_scales(torch.cat([t[1] for t in tiles]))
    zeros = None
    if fmt.has_zeros:
        stored = torch.cat([t[2] for t in tiles if t[2] is not None])
        zeros = pack_zeros(stored, fmt.bits)
    return PackedTensor(fmt, shape, codes, scales, exponent, zeros)


def _encode_rows(
    rows: Float[Tensor, "rows columns"], fmt: Format, ranges: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [rows, width], scales [rows, groups] and zero points of a few rows."""
    count, columns = rows.shape
    size, pad = fmt.group_size(columns), fmt.width(columns) - columns
    padded = torch.nn.functional.pad(rows, (0, pad)) if pad else rows
    mask = None
    if pad:
        mask = torch.ones_like(padded)
        mask[:, columns:] = 0
        mask = mask.reshape(-1, size)
    found = search.codes_and_scales(padded.reshape(-1, size), mask, fmt, ranges)
    shape = (count, -1)
    scales = found.scales.reshape(shape) if fmt.group != UNIT else rows.new_zeros(count, 0)
    codes = found.codes if mask is None else found.codes * mask.to(torch.uint8)  # padding is stored as code 0
    return codes.reshape(shape), scales, None if found.zeros is None else found.zeros.reshape(shape)


def decode(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """The values that ``packed`` stands for, in ``dtype`` and its own shape."""
    columns = packed.shape[-1]
    values = _decode_rows(packed, slice(None), dtype)
    return values[:, :columns].reshape(packed.shape)


def _decode_rows(packed: PackedTensor, rows: slice, dtype: torch.dtype) -> Float[Tensor, "rows width"]:
    """Values of some rows, padding columns included."""
    fmt, columns = packed.format, packed.shape[-1]
    width = fmt.width(columns)
    values = _levels_of_bytes(packed.codes[rows], fmt, width, dtype)
    if fmt.group == UNIT or not values.numel():
        return values
    scales = unpack_scales(packed.scales[rows], packed.exponent, dtype)
    grouped = values.view(values.shape[0], scales.shape[1], -1)
    if packed.zeros is not None:
        zeros = unpack_zeros(packed.zeros[rows], fmt.bits, scales.shape[1])
        grouped -= zeros.to(dtype).unsqueeze(-1)
    grouped *= scales.unsqueeze(-1)
    return values


def _levels_of_bytes(codes: Tensor, fmt: Format, width: int, dtype: torch.dtype) -> Float[Tensor, "rows width"]:
    if fmt.bits == 3:  # two planes: no single byte holds a code
        levels = torch.tensor(fmt.levels, dtype=dtype, device=codes.device)
        return levels[unpack_bits(codes, 3, width).int()]
    table = _byte_table(fmt, dtype, str(codes.device))
    return embedding(codes.view(torch.uint8).int(), table).reshape(codes.shape[0], width)


@lru_cache(maxsize=64)
def _byte_table(fmt: Format, dtype: torch.dtype, device: str) -> Float[Tensor, "256 per_byte"]:
    """Row i holds the levels of the codes in byte i."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.int8).unsqueeze(1)
    codes = unpack_bits(every, fmt.bits, 8 // fmt.bits)
    return torch.tensor(fmt.levels, dtype=dtype)[codes.int()].to(device)


def pack_zeros(zeros: UInt8[Tensor, "rows groups"], bits: int) -> Tensor:
    """Zero points of ``bits`` bits, a row's padded to whole bytes (4 bits each where codes take 3)."""
    width = _zero_width(bits)
    pad = -zeros.shape[1] % 8
    packed = pack_bits(torch.nn.functional.pad(zeros, (0, pad)), width)
    return packed[:, : -(-zeros.shape[1] * width // 8)].contiguous()


def unpack_zeros(packed: Tensor, bits: int, groups: int) -> UInt8[Tensor, "rows groups"]:
    width = _zero_width(bits)
    full = -(-groups // 8) * 8 * width // 8
    padded = torch.nn.functional.pad(packed.view(torch.uint8), (0, full - packed.shape[1])).view(torch.int8)
    return unpack_bits(padded, width, -(-groups // 8) * 8)[:, :groups]


def _zero_width(bits: int) -> int:
    return 4 if bits == 3 else bits


def tiles(packed: PackedTensor, dtype: torch.dtype) -> Iterator[tuple[slice, Float[Tensor, "rows columns"]]]:
    """Dequantize a matrix a few rows at a time, so that no more than one tile of about TILE values lives at once."""
    columns = packed.shape[-1]
    count = packed.codes.shape[0]
    step = max(TILE // max(packed.format.width(columns), 1), 1)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        yield rows, _decode_rows(packed, rows, dtype)[:, :columns]


def packed_linear(x: Float[Tensor, "*batch columns"], weight: PackedTensor) -> Float[Tensor, "*batch rows"]:
    """y = x @ decode(weight).T, in the dtype of ``x``; weight [rows, columns]. Raises KernelError on a wrong width."""
    _check_matrix(x, weight, axis=1)
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    for rows, tile in tiles(weight, x.dtype):
        out[..., rows] = x @ tile.T
    return out


def packed_linear_grad_input(
    grad: Float[Tensor, "*batch rows"], weight: PackedTensor
) -> Float[Tensor, "*batch columns"]:
    """dx = grad @ decode(weight), in the dtype of ``grad``: all that backward needs, the weight being frozen."""
    _check_matrix(grad, weight, axis=0)
    out = grad.new_zeros(*grad.shape[:-1], weight.shape[1])
    for rows, tile in tiles(weight, grad.dtype):
        out += grad[..., rows] @ tile
    return out


def _check_matrix(x: Tensor, weight: PackedTensor, axis: int) -> None:
    if len(weight.shape) != 2:
        raise KernelError(f"packed_linear takes a matrix; the weight has shape {weight.shape}.")
    if x.shape[-1] != weight.shape[axis]:
        raise KernelError(
            f"the input has {x.shape[-1]} columns, the {weight.format} weight of shape {weight.shape} needs "
            f"{weight.shape[axis]}."
        )


def explain() -> str:
    """Which implementation runs, and why: printed by ``bitloft info``."""
    return "plain torch definition (no native kernels are part of this version)"
