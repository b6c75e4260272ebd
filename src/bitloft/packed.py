"""PackedTensor: codes squeezed into bytes plus scales, as plain tensors in a frozen dataclass.

Layout of a row of codes (rows are the flattened leading axes, padded to whole groups with code 0):

* 1, 2, 4 bits: ``8 // bits`` codes per byte, the first code in the lowest bits;
* 3 bits: a plane of the two low bits (packed as above), then a plane of the high bit, so exactly 3.0 payload bits;
* trellis codes: a plane for each bit.

Scales are fp16 bit patterns in int16, in units of ``2**exponent`` chosen so that the largest is near 2**14 and none
of use is subnormal. Integers, because ``module.half()`` or ``.to(bfloat16)`` casts every float buffer and must not
touch a stored byte; a tensor subclass would have had to intercept those casts one by one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int8, Int16, UInt8
from torch import Tensor

from bitloft.errors import FormatError
from bitloft.formats import DQ_BLOCK, Format, layout

DTYPES = {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32}
PARTS = ("codes", "scales", "exponent", "zeros", "shifts", "levels", "scale_low", "scale_step")
SCALE_TOP = 14  # the largest scale lies in [2**14, 2**15): fp16 ends at 65504, its subnormals begin 28 octaves below


Rows = slice | Int[Tensor, " _"]  # a range of rows, or their numbers


@dataclass(frozen=True)
class PackedTensor:
    """A tensor of ``shape`` stored in ``format``; see ``formats.layout`` for the parts.

    ``kernels.ops.encode`` makes one and ``kernels.ops.decode`` gives the values back.
    """

    format: Format
    shape: tuple[int, ...]
    codes: Int8[Tensor, "rows bytes"]
    scales: Int[Tensor, "scaled groups"]
    exponent: Int[Tensor, ""]
    zeros: Int8[Tensor, "rows zero_bytes"] | None = None
    shifts: Int16[Tensor, "scaled groups"] | None = None
    levels: Int16[Tensor, " levels"] | None = None
    scale_low: Int16[Tensor, " blocks"] | None = None
    scale_step: Int16[Tensor, " blocks"] | None = None
    arranged: bool = False  # codes in the order of ``cpu_linear.arrange``: for products only, never stored

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles are made of the fields, not of what kernels keep beside them."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def tensors(self) -> dict[str, Tensor]:
        """The stored parts by name, in file order."""
        parts = {name: getattr(self, name) for name in PARTS}
        return {name: part for name, part in parts.items() if part is not None}

    @classmethod
    def from_tensors(cls, fmt: Format, shape: tuple[int, ...], parts: Mapping[str, Tensor]) -> "PackedTensor":
        """Check parts against ``layout`` and hold them, without a copy. Raises FormatError naming the part."""
        expected = layout(shape, fmt)
        if set(parts) != set(expected):
            raise FormatError(f"a {fmt} tensor of shape {shape} has parts {sorted(expected)}, found {sorted(parts)}.")
        for name, part in expected.items():
            found = parts[name]
            if tuple(found.shape) != part.shape or found.dtype != DTYPES[part.dtype]:
                raise FormatError(
                    f"part {name!r} of a {fmt} tensor of shape {shape} must be {part.dtype} {part.shape}, "
                    f"found {str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}."
                )
        return cls(fmt, shape, **parts)  # type: ignore[arg-type]  # every part is a tensor, `arranged` is none

    def to(self, device: "torch.device | str") -> "PackedTensor":
        moved = {name: t.to(device) for name, t in self.tensors().items()}
        return replace(self, **moved)  # type: ignore[arg-type]  # every part is a tensor

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def true_bits(self) -> float:
        """Stored bits per value: codes, scales, zero points and padding."""
        return 8 * self.nbytes / max(self.numel, 1)

    @property
    def payload_bits(self) -> float:
        """Bits of one code: the number that papers quote."""
        return float(self.format.bits)


def pack_bits(codes: UInt8[Tensor, "rows width"], bits: int) -> Int8[Tensor, "rows bytes"]:
    """Squeeze codes below 2**bits into bytes; the width must be a multiple of 8."""
    if codes.shape[-1] % 8:
        raise FormatError(f"a row of {codes.shape[-1]} codes does not fill whole bytes; pad it to a multiple of 8.")
    if bits == 3:
        return torch.cat([pack_bits(codes & 3, 2), pack_bits(codes >> 2, 1)], dim=1)
    per_byte = 8 // bits
    lanes = codes.reshape(codes.shape[0], codes.shape[1] // per_byte, per_byte)
    out = lanes[..., 0].clone()
    for lane in range(1, per_byte):
        out |= lanes[..., lane] << (lane * bits)
    return out.view(torch.int8)


def unpack_bits(packed: Int8[Tensor, "rows bytes"], bits: int, width: int) -> UInt8[Tensor, "rows width"]:
    """The inverse of ``pack_bits`` for rows of ``width`` codes."""
    if bits == 3:
        low, high = packed.split([width // 4, width // 8], dim=1)
        return unpack_bits(low, 2, width) | (unpack_bits(high, 1, width) << 2)
    per_byte = 8 // bits
    shifts = torch.arange(per_byte, device=packed.device, dtype=torch.uint8) * bits
    lanes: Tensor = (packed.view(torch.uint8).unsqueeze(-1) >> shifts) & (2**bits - 1)
    return lanes.reshape(packed.shape[0], width)


def pack_planes(codes: UInt8[Tensor, "rows width"], bits: int) -> Int8[Tensor, "rows bytes"]:
    """Trellis codes as ``bits`` planes, the lowest bit's first; the width must be a multiple of 8."""
    return torch.cat([pack_bits(codes >> plane & 1, 1) for plane in range(bits)], dim=1)


def unpack_planes(packed: Int8[Tensor, "rows bytes"], bits: int) -> UInt8[Tensor, "rows width"]:
    """The inverse of ``pack_planes``."""
    width = packed.shape[1] * 8 // bits
    planes = [unpack_bits(plane, 1, width) << i for i, plane in enumerate(packed.chunk(bits, dim=1))]
    found = planes[0]
    for plane in planes[1:]:
        found |= plane
    return found


def scale_exponent(*values: Tensor) -> Int[Tensor, ""]:
    """The exponent at which the largest magnitude among ``values`` lies in [2**14, 2**15); 0 where all are zero."""
    top = max((float(v.abs().amax()) for v in values if v.numel()), default=0.0)
    exponent = math.frexp(top)[1] - 1 - SCALE_TOP if top > 0 else 0
    return torch.tensor(exponent, dtype=torch.int32, device=values[0].device)


def pack_halves(values: Float[Tensor, "*any"], exponent: Int[Tensor, ""]) -> Int16[Tensor, "*any"]:
    """fp16 bit patterns of ``values / 2**exponent``."""
    # ldexp in double: 2**-exponent alone may overflow float32 when the values are near its subnormals
    return torch.ldexp(values.double(), -exponent).to(torch.float16).view(torch.int16)


def unpack_halves(
    stored: Int16[Tensor, "*any"], exponent: Int[Tensor, ""], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*any"]:
    """The inverse of ``pack_halves``, up to fp16 rounding."""
    values: Tensor = torch.ldexp(stored.view(torch.float16).float(), exponent)
    return values.to(dtype)


def pack_scales(scales: Float[Tensor, "rows groups"]) -> tuple[Int16[Tensor, "rows groups"], Int[Tensor, ""]]:
    """fp16 bit patterns of ``scales / 2**exponent`` and that exponent, set by the largest magnitude."""
    exponent = scale_exponent(scales)
    return pack_halves(scales, exponent), exponent


def unpack_scales(
    scales: Int16[Tensor, "rows groups"], exponent: Int[Tensor, ""], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "rows groups"]:
    return unpack_halves(scales, exponent, dtype)


class DoubleQuantized(NamedTuple):
    """Scales in 8 bits: low + step * code, one low and step (fp16 patterns) per DQ_BLOCK scales in row-major order."""

    codes: Int8[Tensor, "rows groups"]
    low: Int16[Tensor, " blocks"]
    step: Int16[Tensor, " blocks"]


def double_quantize(scales: Float[Tensor, "rows groups"], exponent: Int[Tensor, ""]) -> DoubleQuantized:
    """Double quantization of scales (QLoRA, section 3): 8 bits each, 32 bits per 256 for their range.

    QLoRA subtracts one mean and takes an absolute maximum per block; a minimum and a step per block cost as much and
    spend no code outside the range that occurs.
    """
    flat = scales.reshape(-1)
    blocks = -(-flat.numel() // DQ_BLOCK)
    if not blocks:
        empty = torch.zeros(0, dtype=torch.int16, device=scales.device)
        return DoubleQuantized(scales.to(torch.int8), empty, empty)
    tail = flat[-1:].expand(blocks * DQ_BLOCK - flat.numel())
    grouped = torch.cat([flat, tail]).view(blocks, DQ_BLOCK)
    low = pack_halves(grouped.amin(1), exponent)
    above = grouped - unpack_halves(low, exponent).unsqueeze(1)
    step = pack_halves(above.amax(1).clamp_min(0) / 255, exponent)
    width = unpack_halves(step, exponent).unsqueeze(1)
    codes = torch.where(width > 0, (above / width.clamp_min(1e-38)).round(), torch.zeros_like(above))
    stored = codes.clamp(0, 255).to(torch.uint8).view(-1)[: flat.numel()].view(torch.int8)
    return DoubleQuantized(stored.view(scales.shape), low, step)


def scales_of(packed: PackedTensor, rows: Rows, dtype: torch.dtype) -> Float[Tensor, "scaled groups"]:
    """The scales of some rows as numbers, double quantization undone; one row for a TENSOR format."""
    if packed.scale_low is None or packed.scale_step is None:
        return unpack_halves(rows_of(packed.scales, rows), packed.exponent, dtype)
    count, groups = packed.scales.shape
    index = torch.arange(count, device=packed.scales.device)[rows]
    block = (index[:, None] * groups + torch.arange(groups, device=index.device)) // DQ_BLOCK
    low = unpack_halves(packed.scale_low, packed.exponent)[block]
    step = unpack_halves(packed.scale_step, packed.exponent)[block]
    return (low + step * packed.scales[rows].view(torch.uint8)).to(dtype)


def rows_of(part: Int[Tensor, "scaled groups"], rows: Rows) -> Int[Tensor, "some groups"]:
    """Some rows of scales or shifts; a TENSOR format has one row that holds for all."""
    return part if part.shape[0] == 1 else part[rows]
