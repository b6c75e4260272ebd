"""The one entrance to the base solvers: options in, Solution out, errors that name the tensor."""

import pytest
import torch
from torch import Tensor

from bitloft.errors import CheckpointError, OptionError
from bitloft.options import QuantizeOptions
from bitloft.rules import plan_of
from bitloft.solvers import Solution, solve


def solved(name: str, weight: Tensor, options: QuantizeOptions) -> Solution:
    return solve(name, weight, plan_of(options), options)


def test_options_choose_the_solver() -> None:
    weight = torch.randn(64, 64)
    assert solved("w", weight, QuantizeOptions(solver="qlora")).start is None
    assert solved("w", weight, QuantizeOptions(rank=0)).start is None
    found = solved("w", weight, QuantizeOptions(rank=4, alpha=1.0, rslora=True, start_format="nf4:row"))
    assert found.start is not None
    assert found.start.scaling == 0.5
    assert str(found.start.a.format) == "nf4:row"


def test_half_precision_weights_are_solved_in_float32() -> None:
    weight = torch.randn(64, 64).bfloat16()
    assert (
        solved("w", weight, QuantizeOptions(rank=4)).error_after
        == solved("w", weight.float(), QuantizeOptions(rank=4)).error_after
    )


def test_bad_tensors_are_named() -> None:
    weight = torch.randn(64, 64)
    weight[3, 4] = float("nan")
    with pytest.raises(CheckpointError, match=r"tensor layers\.0\.q holds NaN"):
        solved("layers.0.q", weight, QuantizeOptions())
    with pytest.raises(OptionError, match=r"rank 16 exceeds min\(m, n\) = 8 of layers\.0\.q"):
        solved("layers.0.q", torch.randn(8, 64), QuantizeOptions())
