"""The operators of bitloft in plain torch: the only specification, the fallback and the oracle of every kernel.

``ops`` is what everybody calls; it hands over to native code where there is some.

``encode``         x -> PackedTensor (groups along the last axis)
``decode``         PackedTensor -> values
``decode_rows``    the same, for some rows of a matrix; ``decode_columns`` for some columns
``packed_linear``  y[n, out] = sum_in x[n, in] * decode(W)[out, in]
``packed_linear_grad_input``  dx[n, in] = sum_out dy[n, out] * decode(W)[out, in]

Simulation is ``decode(encode(x))``: there is no second path that only pretends. Level tables come from the format and
are looked up a byte at a time (one table row holds the values of all codes in that byte), which is as plain as shifts
and masks and several times faster in torch.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import embedding

from bitloft.errors import KernelError
from bitloft.formats import UNIT, Format
from bitloft.kernels import columnwise, trellis
from bitloft.kernels.encoding import TILE, encode, unpack_zeros
from bitloft.packed import PackedTensor, Rows, rows_of, scales_of, unpack_bits, unpack_halves

__all__ = [
    "TILE",
    "decode",
    "decode_columns",
    "decode_rows",
    "encode",
    "packed_linear",
    "packed_linear_grad_input",
    "residual",
    "rounded_linear",
    "tiles",
]


def decode(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """The values that ``packed`` stands for, in ``dtype`` and its own shape."""
    if packed.format.by_column:
        return columnwise.decode(packed, dtype, trellis.decode)
    columns = packed.shape[-1]
    values = _decode_rows(packed, slice(None), dtype)
    return values[:, :columns].reshape(packed.shape)


def decode_rows(
    packed: PackedTensor, rows: Int[Tensor, " some"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "some columns"]:
    """The values of some rows of a matrix, by number, in ``dtype``: equal to ``decode(packed, dtype)[rows]``.

    Raises KernelError for a tensor that is no matrix, IndexError (on CPU) for a row that does not exist.
    """
    if len(packed.shape) != 2:
        raise KernelError(f"decode_rows takes a matrix; the tensor has shape {packed.shape}.")
    if packed.format.by_column:
        return decode(packed, dtype).index_select(0, rows.flatten())
    return _decode_rows(packed, rows, dtype)[:, : packed.shape[1]]


def decode_columns(
    packed: PackedTensor, columns: Int[Tensor, " some"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "rows some"]:
    """The values of some columns of a matrix, by number, in ``dtype``: equal to ``decode(packed, dtype)[:, columns]``.

    Costs a few operations per value asked for, and all scales. Raises KernelError for a tensor that is no matrix.
    """
    if len(packed.shape) != 2:
        raise KernelError(f"decode_columns takes a matrix; the tensor has shape {packed.shape}.")
    fmt, width = packed.format, packed.shape[1]
    if fmt.by_column:
        return columnwise.some(packed, columns, dtype, trellis.decode)
    if fmt.family == "half":
        values = packed.codes.clone().view(torch.float16)[:, columns].to(dtype)  # a view may begin at an odd byte
    elif fmt.family == "trellis":
        values = trellis.levels_of(packed.codes, fmt.bits, dtype)[:, columns]
    else:
        levels = torch.tensor(levels_of(packed), dtype=dtype, device=packed.codes.device)
        values = levels[_codes_at(packed, columns).int()]
    if fmt.group == UNIT or not values.numel():
        return values
    group = columns // fmt.group_size(width)
    if packed.zeros is not None:
        values -= unpack_zeros(packed.zeros, fmt.bits, fmt.groups(width))[:, group].to(dtype)
    values *= scales_of(packed, slice(None), dtype)[:, group]
    if packed.shifts is not None:
        values += unpack_halves(packed.shifts, packed.exponent, dtype)[:, group]
    return values


def _codes_at(packed: PackedTensor, columns: Int[Tensor, " some"]) -> UInt8[Tensor, "rows some"]:
    """The codes of some columns: shifts and masks on the bytes that hold them."""
    codes, bits = packed.codes.view(torch.uint8), packed.format.bits
    if bits == 3:  # a plane of two bits, then one of one bit
        low, high = codes.split([packed.format.width(packed.shape[1]) // 8 * n for n in (2, 1)], dim=1)
        return _bits_at(low, columns, 2) | (_bits_at(high, columns, 1) << 2)
    return _bits_at(codes, columns, bits)


def _bits_at(
    plane: UInt8[Tensor, "rows bytes"], columns: Int[Tensor, " some"], bits: int
) -> UInt8[Tensor, "rows some"]:
    shift = (columns * bits % 8).to(torch.uint8)
    found: Tensor = (plane.index_select(1, columns * bits // 8) >> shift) & (2**bits - 1)
    return found


def _decode_rows(
    packed: PackedTensor, rows: Rows, dtype: torch.dtype, levels: tuple[float, ...] | None = None
) -> Float[Tensor, "rows width"]:
    """Values of some rows, padding columns included; ``levels`` in place of the tensor's own."""
    fmt, columns = packed.format, packed.shape[-1]
    width = fmt.width(columns)
    codes = packed.codes[rows] if isinstance(rows, slice) else embedding(rows, packed.codes)  # refuses numbers below 0
    if fmt.family == "trellis":
        values = trellis.levels_of(codes, fmt.bits, dtype)
    else:
        values = _levels_of_bytes(codes, fmt, levels or levels_of(packed), width, dtype)
    if fmt.group == UNIT or not values.numel():
        return values
    scales = scales_of(packed, rows, dtype)
    grouped = values.view(values.shape[0], scales.shape[1], -1)
    if packed.zeros is not None:
        zeros = unpack_zeros(packed.zeros[rows], fmt.bits, scales.shape[1])
        grouped -= zeros.to(dtype).unsqueeze(-1)
    grouped *= scales.unsqueeze(-1)
    if packed.shifts is not None:
        grouped += unpack_halves(rows_of(packed.shifts, rows), packed.exponent, dtype).unsqueeze(-1)
    return values


def residual(x: Float[Tensor, "*shape"], packed: PackedTensor, out: Tensor | None) -> float:
    """The norm of x - decode(packed), which is written to ``out`` where that is given."""
    difference = torch.sub(x, decode(packed), out=out)
    return float(torch.linalg.vector_norm(difference, dtype=torch.float64))


def levels_of(packed: PackedTensor) -> tuple[float, ...]:
    """The level of each code: the format's, or those stored with the tensor."""
    if packed.levels is None:
        return packed.format.levels
    return tuple(packed.levels.view(torch.float16).float().tolist())


def _levels_of_bytes(
    codes: Tensor, fmt: Format, levels: tuple[float, ...], width: int, dtype: torch.dtype
) -> Float[Tensor, "rows width"]:
    if fmt.family == "half":  # a copy: a view into a payload may begin at an odd byte
        aligned = codes.clone(memory_format=torch.contiguous_format).flatten()
        return aligned.view(torch.float16).to(dtype).view(codes.shape[0], width)
    if fmt.bits == 3:  # two planes: no single byte holds a code
        table = torch.tensor(levels, dtype=dtype, device=codes.device)
        return table[unpack_bits(codes, 3, width).int()]
    table = _byte_table(fmt.bits, levels, dtype, str(codes.device))
    return embedding(codes.view(torch.uint8).int(), table).reshape(codes.shape[0], width)


@lru_cache(maxsize=64)
def _byte_table(bits: int, levels: tuple[float, ...], dtype: torch.dtype, device: str) -> Float[Tensor, "256 per_byte"]:
    """Row i holds the levels of the codes in byte i."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.int8).unsqueeze(1)
    codes = unpack_bits(every, bits, 8 // bits)
    return torch.tensor(levels, dtype=dtype)[codes.int()].to(device)


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
    check_matrix(x, weight, axis=1)
    if weight.format.by_column:
        return columnwise.linear(x, weight, columnwise.tiles(weight, x.dtype, trellis.decode))
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    for rows, tile in tiles(weight, x.dtype):
        out[..., rows] = x @ tile.T
    return out


def rounded_linear(
    x: Float[Tensor, "*batch columns"], weight: PackedTensor, activations: str
) -> Float[Tensor, "*batch rows"]:
    """The product of rounded operands in float32: ``bf16``, x in bfloat16; ``int8``, x and levels in 8 bits.

    ``int8``: q = round(x * 127 / max|x|) of each row, level = round(level * 127 / max|level|), each times what 1 of it
    stands for. Weights of 1 to 4 bits; levels of trellis codes have 8 bits as they are.
    """
    x = x.float()
    if activations == "bf16":
        return packed_linear(x.bfloat16().float(), weight)
    most = x.abs().amax(-1, keepdim=True)
    step = torch.where(most > 0, most / 127, 1)
    if weight.format.by_column:
        return ((x / step).round() * step) @ decode(weight).T
    levels = torch.tensor(levels_of(weight))
    unit = levels.abs().max() / 127
    table = (levels / unit).round() * unit
    dense = _decode_rows(weight, slice(None), torch.float32, tuple(table.tolist()))[:, : weight.shape[1]]
    return ((x / step).round() * step) @ dense.T


def packed_linear_grad_input(
    grad: Float[Tensor, "*batch rows"], weight: PackedTensor
) -> Float[Tensor, "*batch columns"]:
    """dx = grad @ decode(weight), in the dtype of ``grad``: all that backward needs, the weight being frozen."""
    check_matrix(grad, weight, axis=0)
    if weight.format.by_column:
        return columnwise.grad_input(grad, weight, columnwise.tiles(weight, grad.dtype, trellis.decode))
    out = grad.new_zeros(*grad.shape[:-1], weight.shape[1])
    for rows, tile in tiles(weight, grad.dtype):
        out += grad[..., rows] @ tile
    return out


def check_matrix(x: Tensor, weight: PackedTensor, axis: int) -> None:
    if len(weight.shape) != 2:
        raise KernelError(f"packed_linear takes a matrix; the weight has shape {weight.shape}.")
    if x.shape[-1] != weight.shape[axis]:
        raise KernelError(
            f"the input has {x.shape[-1]} columns, the {weight.format} weight of shape {weight.shape} needs "
            f"{weight.shape[axis]}."
        )
