"""Merging a pooled adapter into a layer: the same function, up to the rounding of the shifts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitloft.errors import OptionError
from bitloft.formats import Format
from bitloft.modules.linear import QuantLinear
from bitloft.modules.pooled import merge_qalora
from bitloft.packed import unpack_halves
from bitloft.solvers.qalora import pooled, qalora
from tests.test_qalora import FORMATS, factors


@settings(max_examples=25, deadline=None)
@given(spelling=st.sampled_from(FORMATS), columns=st.sampled_from([32, 64, 100, 192]), scale=st.floats(1e-3, 1e3))
def test_the_merged_layer_computes_the_same_function(spelling: str, columns: int, scale: float) -> None:
    """Outputs differ by the shifts' rounding alone: at most 2**-11 of each shift, times the sum of its group."""
    fmt = Format.parse(spelling)
    layer = QuantLinear(columns, 16, fmt, bias=torch.randn(16))
    layer.load_solution(qalora(torch.randn(16, columns), fmt))
    a, b = factors(16, columns, fmt, scale)
    x = torch.randn(5, columns)
    wanted = layer(x) + 0.5 * pooled(x, fmt) @ a.T @ b.T
    merge_qalora(layer, a, b, 0.5)
    packed = layer.packed_weight()
    assert packed.shifts is not None
    rounding = unpack_halves(packed.shifts, packed.exponent).abs() * 2**-11
    bound = pooled(x, fmt).abs() @ rounding.T + 1e-4 * (1 + wanted.abs())
    assert bool((layer(x) - wanted).abs().le(bound).all())


def test_a_layer_without_shifts_is_refused_and_keeps_its_bytes() -> None:
    layer = QuantLinear(64, 16, Format.parse("lm2:32"))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(OptionError, match="which lm2:32 does not store"):
        merge_qalora(layer, torch.ones(2, 2), torch.ones(16, 2), 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
