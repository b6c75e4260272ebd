"""PackedTensor: codes squeezed into bytes plus scales, as plain tensors in a frozen dataclass.

Layout of a row of codes (rows are the flattened leading axes, padded to whole groups with code 0):

* 1, 2, 4 bits: ``8 // bits`` codes per byte, the first code in the lowest bits;
* 3 bits: a plane of the two low bits (packed as above), then a plane of the high bit, so exactly 3.0 payload bits.

Scales are fp16 bit patterns in int16, in units of ``2**exponent`` chosen so that the largest is near 2**14 and none
of use is subnormal. Integers, because ``module.half()`` or ``.to(bfloat16)`` casts every float buffer and must not
touch a stored byte; a tensor subclass would have had to intercept those casts one by one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int8, Int16, UInt8
from torch import Tensor

from bitloft.errors import FormatError
from bitloft.formats import Format, layout

DTYPES = {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32}
SCALE_TOP = 14  # the largest scale lies in [2**14, 2**15): fp16 ends at 65504, its subnormals begin 28 octaves below


@dataclass(frozen=True)
class PackedTensor:
    """A tensor of ``shape`` stored in ``format``; see ``formats.layout`` for the parts.

    ``kernels.ops.encode`` makes one and ``kernels.ops.decode`` gives the values back.
    """

    format: Format
    shape: tuple[int, ...]
    codes: Int8[Tensor, "rows bytes"]
    scales: Int16[Tensor, "rows groups"]
    exponent: Int[Tensor, ""]
    zeros: Int8[Tensor, "rows zero_bytes"] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The stored parts by name, in file order."""
        parts = {"codes": self.codes, "scales": self.scales, "exponent": self.exponent}
        return parts if self.zeros is None else parts | {"zeros": self.zeros}

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
        return cls(fmt, shape, parts["codes"], parts["scales"], parts["exponent"], parts.get("zeros"))

    def to(self, device: "torch.device | str") -> "PackedTensor":
        moved = {name: t.to(device) for name, t in self.tensors().items()}
        return PackedTensor(self.format, self.shape, **moved)

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


def pack_scales(scales: Float[Tensor, "rows groups"]) -> tuple[Int16[Tensor, "rows groups"], Int[Tensor, ""]]:
    """fp16 bit patterns of ``scales / 2**exponent`` and that exponent, set by the largest magnitude."""
    top = float(scales.abs().amax()) if scales.numel() else 0.0
    exponent = math.frexp(top)[1] - 1 - SCALE_TOP if top > 0 else 0
    # ldexp in double: 2**-exponent alone may overflow float32 when the scales are near its subnormals
    stored = torch.ldexp(scales.double(), torch.tensor(-exponent, device=scales.device)).to(torch.float16)
    return stored.view(torch.int16), torch.tensor(exponent, dtype=torch.int32, device=scales.device)


def unpack_scales(
    scales: Int16[Tensor, "rows groups"], exponent: Int[Tensor, ""], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "rows groups"]:
    values: Tensor = torch.ldexp(scales.view(torch.float16).float(), exponent)
    return values.to(dtype)
