"""Errors as they are reported, and starts as they are stored."""

import pytest
import torch

from bitloft.formats import Format
from bitloft.solvers.base import pack_start, relative


def test_errors_are_relative_frobenius_norms() -> None:
    assert relative(torch.full((2, 2), 1.0), torch.full((2, 2), 2.0)) == pytest.approx(0.5)
    assert relative(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    assert relative(torch.ones(2, 2), torch.zeros(2, 2)) == pytest.approx(2)  # nothing to divide by: the error itself


def test_a_start_multiplies_out_with_its_scaling() -> None:
    a, bt = torch.randn(4, 64), torch.randn(4, 96)
    start = pack_start(a, bt, 0.5, Format.parse("lm4:64"))
    product = start.product()
    assert product.shape == (96, 64)
    assert float((product - 0.5 * bt.T @ a).norm() / (0.5 * bt.T @ a).norm()) < 0.15
