"""The one entrance to the base solvers: options in, Solution out, errors that name the tensor."""

import pytest
import torch
from torch import Tensor

from bitloft.errors import CheckpointError, OptionError
from bitloft.formats import Format
from bitloft.kernels.ops import decode
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


FORMATS = (
    *(f"{family}{bits}:64" for family in ("nf", "lm", "uniform") for bits in (2, 3, 4)),
    *("book2:64", "book3:64", "sign:128", "lm2:row", "uniform2:tensor", "uniform4:tensor", "trellis2:64"),
    *("nf4:64+dq", "lm2:64+dq", "uniform4:32+shift", "lm2:64+shift", "nf3:64+dq+shift", "book2:64+dq"),
)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", [(48, 128), (96, 100)])
def test_every_solver_reports_the_error_of_what_it_stores_and_loftq_is_below_qlora(
    fmt: str, shape: tuple[int, int]
) -> None:
    """Gaussian and heavy-tailed weights; widths that the group does not divide."""
    for weight in (torch.randn(shape), torch.distributions.StudentT(3.0).sample(shape)):
        errors: dict[str, float] = {}
        for solver in ("qlora", "loftq", "qalora"):
            if solver == "qalora" and not Format.parse(fmt).shift:
                continue
            for alpha in (None, 2.0):
                options = QuantizeOptions(format=fmt, solver=solver, rank=8, alpha=alpha)
                found = solved("w", weight, options)
                stored = decode(found.weight) + (0 if found.start is None else found.start.product())
                measured = torch.linalg.vector_norm(weight - stored) / torch.linalg.vector_norm(weight)
                assert found.error_after == pytest.approx(float(measured), rel=1e-5)
                errors[solver] = max(errors.get(solver, 0.0), found.error_after)
        assert errors["loftq"] < errors["qlora"]


def test_auto_steps_stop_and_end_no_worse_than_one() -> None:
    weight = torch.randn(96, 128)
    auto = solved("w", weight, QuantizeOptions(format="nf2:64", rank=8, steps="auto"))
    one = solved("w", weight, QuantizeOptions(format="nf2:64", rank=8, steps=1))
    many = solved("w", weight, QuantizeOptions(format="nf2:64", rank=8, steps=20))
    assert auto.error_after < one.error_after
    assert auto.error_after <= many.error_after * 1.02


def test_bad_tensors_are_named() -> None:
    weight = torch.randn(64, 64)
    weight[3, 4] = float("nan")
    with pytest.raises(CheckpointError, match=r"tensor layers\.0\.q holds NaN"):
        solved("layers.0.q", weight, QuantizeOptions())
    with pytest.raises(OptionError, match=r"rank 16 exceeds min\(m, n\) = 8 of layers\.0\.q"):
        solved("layers.0.q", torch.randn(8, 64), QuantizeOptions())
