"""The operators of torch: schema, fake shapes, gradients (opcheck), and descriptions that are kept by address."""

from typing import Any

import pytest
import torch

from bitloft.kernels import operators, ops
from bitloft.kernels.ops import decode, encode


def arguments(
    x: torch.Tensor, packed: Any, addend: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> Any:
    parts = list(packed.tensors().values())
    return x, parts, str(packed.format), list(packed.shape), packed.arranged, bias, addend, False


@pytest.mark.parametrize("spelling", ["lm2:64", "nf4:64+dq", "uniform3:64", "book2:64", "int8:64"])
@pytest.mark.parametrize("grad", [False, True])
def test_the_operator_passes_opcheck(spelling: str, grad: bool) -> None:
    packed = encode(torch.randn(70, 192), spelling)
    x = torch.randn(3, 192, requires_grad=grad)
    for given in (arguments(x, packed), arguments(x, packed, torch.randn(3, 70, requires_grad=grad), torch.randn(70))):
        torch.library.opcheck(torch.ops.bitloft.packed_linear.default, given)
        torch.testing.assert_close(
            torch.ops.bitloft.packed_linear(*given), ops.packed_linear(x, packed, bias=given[5], addend=given[6])
        )
    plain = (torch.randn(3, 70, requires_grad=grad), given[1], spelling, [70, 192], False)
    torch.library.opcheck(torch.ops.bitloft.packed_linear_grad_input.default, plain)


def test_descriptions_are_found_again_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_MOST", 2)
    operators._KEPT.clear()
    x = torch.randn(1, 64)
    for _ in range(5):
        packed = encode(torch.randn(8, 64), "lm2:64")
        for _ in range(2):
            found = torch.ops.bitloft.packed_linear(*arguments(x, packed))
            torch.testing.assert_close(found, x @ decode(packed).T)
        assert len(operators._KEPT) <= 2
