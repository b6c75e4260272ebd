"""Grids as plain numbers: the same values as decode gives, for every format."""

import pytest
import torch

from bitloft.kernels.ops import decode, encode
from bitloft.packed import unpack_bits
from bitloft.solvers.grids import Grids

FORMATS = (
    "lm2:64", "book3:64", "nf4:64+dq", "uniform3:64", "uniform2:64+shift", "uniform2:tensor", "sign:128", "lm2:row",
    "lm2:unit", "int8:row",
)  # fmt: skip


@pytest.mark.parametrize("spelling", FORMATS)
def test_values_are_those_of_decode(spelling: str) -> None:
    packed = encode(torch.randn(5, 200), spelling)
    width = packed.format.width(200)
    bits = packed.format.bits
    codes = packed.codes.view(torch.uint8) if bits == 8 else unpack_bits(packed.codes, bits, width)
    grids = Grids.of(packed)
    assert torch.allclose(grids.values(codes[:, :200]), decode(packed), atol=1e-6)


def test_rows_and_columns_are_chosen_by_number() -> None:
    grids = Grids.of(encode(torch.randn(6, 128), "lm2:64"))
    assert torch.equal(grids.of_rows(torch.tensor([4, 1])).scales, grids.scales[[4, 1]])
    assert torch.equal(grids.of_columns(torch.tensor([0, 63, 64])).scales, grids.scales[:, [0, 0, 1]])
    better = torch.tensor([True, False, True, False, True, False]).unsqueeze(1)
    other = grids.map(grids.scales * 2, grids.zeros, grids.shifts)
    mixed = grids.where(better, other).scales
    assert torch.equal(mixed[::2], other.scales[::2])
    assert torch.equal(mixed[1::2], grids.scales[1::2])
    grids.put(1, grids.of_columns(torch.tensor([0])))
    assert torch.equal(grids.scales[:, 0], grids.scales[:, 1])
