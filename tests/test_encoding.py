"""Encoding's own corners; the values themselves are tested with the operators in test_ops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitloft.kernels.encoding import encode, pack_zeros, unpack_zeros
from bitloft.kernels.ops import decode
from bitloft.packed import double_quantize, scale_exponent, unpack_halves


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([2, 3, 4]), st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**31))
def test_zero_points_are_packed_invertibly(bits: int, rows: int, groups: int, seed: int) -> None:
    zeros = torch.randint(2**bits, (rows, groups), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    assert torch.equal(unpack_zeros(pack_zeros(zeros, bits), bits, groups), zeros)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 200), st.floats(1e-20, 1e20), st.integers(0, 2**31))
def test_double_quantized_scales_are_within_half_a_step(rows: int, groups: int, size: float, seed: int) -> None:
    scales = torch.rand(rows, groups, generator=torch.Generator().manual_seed(seed)) * size
    exponent = scale_exponent(scales)
    codes, low, step = double_quantize(scales, exponent)
    block = torch.arange(rows * groups) // 256
    found = (
        unpack_halves(low, exponent)[block] + unpack_halves(step, exponent)[block] * codes.view(torch.uint8).flatten()
    )
    slack = 0.5 * unpack_halves(step, exponent)[block] + 2e-3 * float(scales.max())
    assert bool(((found - scales.flatten()).abs() <= slack).all())


def test_learned_levels_are_stored_with_the_tensor() -> None:
    x = torch.distributions.StudentT(3.0).sample((64, 256))
    packed = encode(x, "book2:64")
    assert packed.levels is not None
    assert packed.levels.shape == (4,)
    few = encode(torch.tensor([[1.0, -1.0] * 32]), "book2:64")  # fewer values than levels
    torch.testing.assert_close(decode(few), torch.tensor([[1.0, -1.0] * 32]), rtol=2e-3, atol=0)


@pytest.mark.parametrize("spelling", ["book2:64", "uniform2:tensor", "lm2:64+dq+shift"])
def test_all_equal_and_zero_tensors(spelling: str) -> None:
    for value in (0.0, 2.5):
        x = torch.full((4, 130), value)
        torch.testing.assert_close(decode(encode(x, spelling)), x, rtol=2e-2, atol=1e-6)
