"""Bits squeezed into bytes and scales into integers: exact inverses, and bytes that no cast touches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitloft.errors import FormatError
from bitloft.formats import Format, layout
from bitloft.kernels.ops import decode, encode
from bitloft.packed import DTYPES, PackedTensor, pack_bits, pack_scales, unpack_bits, unpack_scales
from tests.test_formats import FORMATS


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 3, 4]), st.integers(0, 5), st.integers(0, 9), st.integers(0, 2**31))
def test_packing_is_invertible(bits: int, rows: int, eighths: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, 8 * eighths), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, bits * eighths)
    assert torch.equal(unpack_bits(packed, bits, 8 * eighths), codes)


def test_the_bytes_are_the_documented_ones() -> None:
    codes = torch.tensor([[0, 1, 2, 3, 3, 2, 1, 0]], dtype=torch.uint8)
    assert pack_bits(codes, 2).view(torch.uint8).tolist() == [[0b11100100, 0b00011011]]
    assert pack_bits(codes, 4).view(torch.uint8).tolist() == [[0x10, 0x32, 0x23, 0x01]]
    three = torch.tensor([[7, 0, 4, 3, 0, 0, 0, 5]], dtype=torch.uint8)
    assert pack_bits(three, 3).view(torch.uint8).tolist() == [[0b11000011, 0b01000000, 0b10000101]]
    assert pack_bits(three & 1, 1).view(torch.uint8).tolist() == [[0b10001001]]


def test_a_row_must_fill_bytes() -> None:
    with pytest.raises(FormatError, match="multiple of 8"):
        pack_bits(torch.zeros(1, 7, dtype=torch.uint8), 2)


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-30, 1e30), st.floats(1e-4, 1.0))
def test_scales_keep_half_precision_at_any_magnitude(top: float, small: float) -> None:
    scales = torch.tensor([[top, top * small, 0.0]])
    stored, exponent = pack_scales(scales)
    assert stored.dtype == torch.int16
    torch.testing.assert_close(unpack_scales(stored, exponent), scales, rtol=2**-11, atol=0)


@pytest.mark.parametrize("spelling", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (2, 3, 64), (576,), (0, 64), (4, 0)])
def test_layout_tells_the_stored_parts(spelling: str, shape: tuple[int, ...]) -> None:
    packed = encode(torch.randn(shape), spelling)
    parts = packed.tensors()
    expected = layout(shape, packed.format)
    assert {k: (tuple(t.shape), t.dtype) for k, t in parts.items()} == {
        k: (p.shape, DTYPES[p.dtype]) for k, p in expected.items()
    }
    assert packed.nbytes == sum(p.nbytes for p in expected.values())
    again = PackedTensor.from_tensors(packed.format, shape, parts)
    assert torch.equal(decode(again), decode(packed))


def test_parts_of_another_shape_or_dtype_are_refused_by_name() -> None:
    packed = encode(torch.randn(4, 64), "lm2:64")
    parts = packed.tensors()
    with pytest.raises(FormatError, match="part 'codes'"):
        PackedTensor.from_tensors(packed.format, (4, 128), parts)
    with pytest.raises(FormatError, match=r"part 'scales' .* must be int16"):
        PackedTensor.from_tensors(packed.format, (4, 64), parts | {"scales": parts["scales"].int()})
    with pytest.raises(FormatError, match="has parts"):
        PackedTensor.from_tensors(Format.parse("uniform2:64"), (4, 64), parts)


def test_true_bits_count_scales_and_padding() -> None:
    packed = encode(torch.randn(16, 128), "lm2:64")
    assert packed.payload_bits == 2
    assert packed.true_bits == pytest.approx(2 + 16 / 64 + 32 / (16 * 128))
    assert encode(torch.randn(16, 65), "lm2:64").true_bits > 3.9


def test_moving_keeps_the_bytes() -> None:
    packed = encode(torch.randn(4, 64), "uniform3:64")
    assert torch.equal(packed.to("cpu").codes, packed.codes)
