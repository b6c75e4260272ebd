"""``encode``: a tensor to codes, scales and what else its format stores. See ``ops`` for the other operators."""

from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.formats import TENSOR, UNIT, Format, layout
from bitloft.kernels import columnwise, search, trellis
from bitloft.kernels.books import learn_levels
from bitloft.packed import (
    DTYPES,
    PackedTensor,
    double_quantize,
    pack_bits,
    pack_halves,
    scale_exponent,
    scales_of,
    unpack_bits,
    unpack_halves,
)

# Values handled at once: bounds the memory of encode and of a dequantized tile (4 MiB of float32).
TILE = 1 << 20


def encode(x: Float[Tensor, "*shape"], fmt: Format | str, *, ranges: bool = False) -> PackedTensor:
    """Quantize ``x`` to the nearest codes of ``fmt``, groups along the last axis.

    The last axis is padded with zeros to whole groups; padding does not influence a scale. ``nf`` takes the absolute
    maximum as scale (QLoRA), ``lm`` and ``book`` the scale of least squared error, ``uniform`` the range from min to
    max with zero on the grid (``ranges`` searches the range of least squared error instead; with +shift min and max as
    they are; per tensor mean +- 2 standard deviations, LoftQ's GLUE code), ``sign`` the mean of absolute values
    (LoRAQuant). With +dq, codes are chosen for the scales as they are stored, but for ``nf``, which QLoRA codes first.
    ``int`` takes the absolute maximum; ``half`` rounds; ``trellis`` walks (``trellis.encode``, by groups
    ``columnwise.encode``).
    Raises KernelError on NaN or infinity (``half`` also beyond its range), FormatError for a scalar.
    """
    fmt = Format.parse(fmt)
    layout(tuple(x.shape), fmt)  # refuses a scalar
    rows = x.reshape(prod(x.shape[:-1]), x.shape[-1]).float().contiguous()
    if rows.numel() and not bool(torch.isfinite(torch.stack(rows.aminmax())).all()):  # both ends pass NaN on
        raise not_finite(tuple(x.shape), fmt)
    if not rows.numel():
        return PackedTensor.from_tensors(fmt, tuple(x.shape), empty_parts(tuple(x.shape), fmt, rows.device))
    if fmt.family == "half":
        return _encode_half(tuple(x.shape), rows, fmt)
    if fmt.by_column:
        return columnwise.encode(x, fmt, trellis.encode, trellis.decode)
    if fmt.family == "trellis":
        return trellis.encode(x, fmt)
    levels = learn_levels(rows, fmt) if fmt.has_levels else fmt.levels
    if fmt.group == TENSOR:
        return _encode_tensor(tuple(x.shape), rows, fmt)
    step = max(TILE // fmt.width(rows.shape[1]), 1)
    chunks = rows.split(step)
    packed = _assemble(tuple(x.shape), fmt, [_encode_rows(c, fmt, levels, ranges) for c in chunks], levels)
    if fmt.dq and fmt.family != "nf":
        codes = torch.cat(
            [_recode(c, slice(i * step, i * step + len(c)), packed, levels) for i, c in enumerate(chunks)]
        )
        packed = PackedTensor.from_tensors(fmt, packed.shape, packed.tensors() | {"codes": codes})
    return packed


def not_finite(shape: tuple[int, ...], fmt: Format) -> KernelError:
    """The error of a tensor that cannot be encoded."""
    return KernelError(f"cannot encode a tensor of shape {shape} to {fmt}: it holds NaN or infinity.")


class _Tile(NamedTuple):
    """What a few rows became: packed codes, and numbers per group."""

    codes: Tensor
    scales: Float[Tensor, "rows groups"]
    zeros: UInt8[Tensor, "rows groups"] | None
    shifts: Float[Tensor, "rows groups"] | None


def _encode_rows(rows: Float[Tensor, "rows columns"], fmt: Format, levels: tuple[float, ...], ranges: bool) -> _Tile:
    grouped, mask = _grouped(rows, fmt)
    found = search.codes_and_scales(grouped, mask, fmt, levels, ranges)
    count = rows.shape[0]
    scales = found.scales.reshape(count, -1) if fmt.group != UNIT else rows.new_zeros(count, 0)
    zeros = None if found.zeros is None else found.zeros.reshape(count, -1)
    shifts = None if found.shifts is None else found.shifts.reshape(count, -1)
    return _Tile(_packed_codes(found.codes, mask, count, fmt), scales, zeros, shifts)


def _grouped(rows: Float[Tensor, "rows columns"], fmt: Format) -> tuple[Float[Tensor, "groups size"], Tensor | None]:
    """Rows cut into groups, padded with zeros, and the mask of what is not padding (None without padding)."""
    columns = rows.shape[1]
    size, pad = fmt.group_size(columns), fmt.width(columns) - columns
    if not pad:
        return rows.reshape(-1, size), None
    mask = torch.ones(rows.shape[0], columns + pad, device=rows.device)
    mask[:, columns:] = 0
    return torch.nn.functional.pad(rows, (0, pad)).reshape(-1, size), mask.reshape(-1, size)


def _packed_codes(codes: UInt8[Tensor, "groups size"], mask: Tensor | None, count: int, fmt: Format) -> Tensor:
    """Codes of ``count`` rows squeezed into bytes; padding is stored as code 0."""
    stored = codes if mask is None else codes * mask.to(torch.uint8)
    return pack_bits(stored.reshape(count, -1), fmt.bits)


def _assemble(shape: tuple[int, ...], fmt: Format, tiles: list[_Tile], levels: tuple[float, ...]) -> PackedTensor:
    scales = torch.cat([t.scales for t in tiles])
    shifts = torch.cat([t.shifts for t in tiles if t.shifts is not None]) if fmt.has_shifts else None
    exponent = scale_exponent(scales) if shifts is None else scale_exponent(scales, shifts)
    parts = {"codes": torch.cat([t.codes for t in tiles]), "exponent": exponent}
    if fmt.dq:
        stored = double_quantize(scales, exponent)
        parts |= {"scales": stored.codes, "scale_low": stored.low, "scale_step": stored.step}
    else:
        parts["scales"] = pack_halves(scales, exponent)
    if fmt.has_zeros:
        parts["zeros"] = pack_zeros(torch.cat([t.zeros for t in tiles if t.zeros is not None]), fmt.bits)
    if shifts is not None:
        parts["shifts"] = pack_halves(shifts, exponent)
    if fmt.has_levels:
        parts["levels"] = torch.tensor(levels, device=scales.device).half().view(torch.int16)
    return PackedTensor.from_tensors(fmt, shape, parts)


def _recode(rows: Tensor, where: slice, packed: PackedTensor, levels: tuple[float, ...]) -> Tensor:
    """Codes of some rows again, for the scales that double quantization left."""
    fmt = packed.format
    grouped, mask = _grouped(rows, fmt)
    scales = scales_of(packed, where, torch.float32).reshape(-1, 1)
    if packed.shifts is not None:
        shifts = torch.ldexp(packed.shifts[where].view(torch.float16).float(), packed.exponent).reshape(-1, 1)
        grouped = grouped - shifts
    if fmt.family != "uniform":
        codes = search.nearest(grouped, scales, levels)
    else:
        zeros = torch.zeros_like(scales)
        if packed.zeros is not None:
            zeros = unpack_zeros(packed.zeros[where], fmt.bits, fmt.groups(rows.shape[1])).reshape(-1, 1).float()
        codes = search.on_grid(grouped, scales, 2**fmt.bits - 1, zeros)
    return _packed_codes(codes, mask, rows.shape[0], fmt)


def _encode_tensor(shape: tuple[int, ...], rows: Float[Tensor, "rows columns"], fmt: Format) -> PackedTensor:
    """One grid for the tensor: 2**bits even levels between mean - 2 std and mean + 2 std, values outside clipped."""
    top = 2**fmt.bits - 1
    low, scale = tensor_range(rows, top)
    parts = range_parts(low, scale)
    step = max(TILE // fmt.width(rows.shape[1]), 1)
    codes = []
    for chunk in rows.split(step):
        grouped, mask = _grouped(chunk, fmt)
        found = search.on_grid(grouped - low, scale.expand(grouped.shape[0], 1), top)
        codes.append(_packed_codes(found, mask, chunk.shape[0], fmt))
    return PackedTensor.from_tensors(fmt, shape, parts | {"codes": torch.cat(codes)})


def tensor_range(rows: Float[Tensor, "rows columns"], top: int) -> tuple[Float[Tensor, "1 1"], Float[Tensor, "1 1"]]:
    """Lower end and step of ``top`` steps over mean +- 2 std, from the moments of each row."""
    variances, means = (moment.double() for moment in torch.var_mean(rows, dim=1, correction=0))
    mean = means.mean()
    spread = 2 * (variances.mean() + (means - mean).square().mean()).sqrt().float()
    mean = mean.float()
    return (mean - spread).reshape(1, 1), (2 * spread / top).reshape(1, 1)


def range_parts(low: Float[Tensor, "1 1"], scale: Float[Tensor, "1 1"]) -> dict[str, Tensor]:
    """The stored parts of one range for a whole tensor."""
    exponent = scale_exponent(low, scale)
    return {"exponent": exponent, "scales": pack_halves(scale, exponent), "shifts": pack_halves(low, exponent)}


def _encode_half(shape: tuple[int, ...], rows: Float[Tensor, "rows columns"], fmt: Format) -> PackedTensor:
    """Half-precision patterns, of rows divided by their largest magnitude where the format stores a scale."""
    scales = rows.abs().amax(1, keepdim=True) if fmt.group != UNIT else rows.new_zeros(rows.shape[0], 0)
    exponent = scale_exponent(scales)
    stored = pack_halves(scales, exponent)
    divisors = unpack_halves(stored, exponent) if fmt.group != UNIT else rows.new_ones(rows.shape[0], 1)
    values = (rows / torch.where(divisors > 0, divisors, 1.0)).to(torch.float16)
    if not bool(torch.isfinite(values).all()):
        raise KernelError(f"cannot encode a tensor of shape {shape} to {fmt}: a value is beyond half precision.")
    padded = torch.nn.functional.pad(values, (0, fmt.width(rows.shape[1]) - rows.shape[1])).contiguous()
    parts = {"codes": padded.view(torch.int8), "scales": stored, "exponent": exponent}
    return PackedTensor.from_tensors(fmt, shape, parts)


def empty_parts(shape: tuple[int, ...], fmt: Format, device: torch.device) -> dict[str, Tensor]:
    """The parts of a tensor of ``shape``, all zeros."""
    return {k: torch.zeros(p.shape, dtype=DTYPES[p.dtype], device=device) for k, p in layout(shape, fmt).items()}


def pack_zeros(zeros: UInt8[Tensor, "rows groups"], bits: int) -> Tensor:
    """Zero points of ``bits`` bits, a row's padded to whole bytes (4 bits each where codes take 3)."""
    width = _zero_width(bits)
    pad = -zeros.shape[1] % 8
    packed = pack_bits(torch.nn.functional.pad(zeros, (0, pad)), width)
    return packed[:, : -(-zeros.shape[1] * width // 8)].contiguous()


def unpack_zeros(packed: Tensor, bits: int, groups: int) -> UInt8[Tensor, "rows groups"]:
    """The inverse of ``pack_zeros``."""
    width = _zero_width(bits)
    full = -(-groups // 8) * width
    padded = torch.nn.functional.pad(packed.view(torch.uint8), (0, full - packed.shape[1])).view(torch.int8)
    return unpack_bits(padded, width, -(-groups // 8) * 8)[:, :groups]


def _zero_width(bits: int) -> int:
    return 4 if bits == 3 else bits
