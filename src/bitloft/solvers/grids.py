"""The grid of every group of a matrix: value = scale * (level - zero) + shift, as plain numbers.

One form for all formats: without zero points ``zeros`` is 0, without shifts ``shifts`` is 0, bare levels have scale 1,
a TENSOR format's one grid is repeated per row. Solvers that choose codes and scales in a norm of their own work on it.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from bitloft.formats import UNIT
from bitloft.kernels.encoding import unpack_zeros
from bitloft.kernels.plain import levels_of
from bitloft.packed import PackedTensor, scales_of, unpack_halves


@dataclass(frozen=True)
class Grids:
    """Scales, zero points and shifts [rows, groups] float32; ``size`` columns share one of each."""

    scales: Float[Tensor, "rows groups"]
    zeros: Float[Tensor, "rows groups"]
    shifts: Float[Tensor, "rows groups"]
    levels: Float[Tensor, " levels"]
    size: int

    @classmethod
    def of(cls, packed: PackedTensor) -> "Grids":
        """Those that a matrix is stored with."""
        fmt, (rows, columns) = packed.format, packed.shape
        groups = max(fmt.groups(columns), 1)
        scales = torch.ones(rows, 1) if fmt.group == UNIT else scales_of(packed, slice(None), torch.float32)
        scales = scales.expand(rows, groups).clone()
        zeros, shifts = torch.zeros_like(scales), torch.zeros_like(scales)
        if packed.zeros is not None:
            zeros = unpack_zeros(packed.zeros, fmt.bits, groups).float()
        if packed.shifts is not None:
            shifts = unpack_halves(packed.shifts, packed.exponent).expand(rows, groups).clone()
        return cls(scales, zeros, shifts, torch.tensor(levels_of(packed)), fmt.group_size(columns))

    def map(self, scales: Tensor, zeros: Tensor, shifts: Tensor) -> "Grids":
        """Other numbers for the same levels."""
        return replace(self, scales=scales, zeros=zeros, shifts=shifts)

    def of_rows(self, rows: Int[Tensor, " some"]) -> "Grids":
        """Some rows, by number."""
        return self.map(self.scales[rows], self.zeros[rows], self.shifts[rows])

    def of_columns(self, columns: Int[Tensor, " some"]) -> "Grids":
        """The grid of each of some columns, by number, repeated where they share one."""
        at = columns // self.size
        return self.map(self.scales[:, at], self.zeros[:, at], self.shifts[:, at])

    def where(self, better: Bool[Tensor, "rows 1"], other: "Grids") -> "Grids":
        """``other`` in the rows where it is better."""
        pairs = ((other.scales, self.scales), (other.zeros, self.zeros), (other.shifts, self.shifts))
        return self.map(*(torch.where(better, theirs, own) for theirs, own in pairs))

    def put(self, group: int, column: "Grids") -> None:
        """Take over one group's grid of every row."""
        for part, new in ((self.scales, column.scales), (self.zeros, column.zeros), (self.shifts, column.shifts)):
            part[:, group] = new[:, 0]

    def units(self, codes: UInt8[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """level - zero of every code: what its scale multiplies."""
        at = torch.arange(codes.shape[1]) // self.size
        return self.levels[codes.int()] - self.zeros[:, at]

    def values(self, codes: UInt8[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """What codes stand for."""
        at = torch.arange(codes.shape[1]) // self.size
        return self.units(codes) * self.scales[:, at] + self.shifts[:, at]
