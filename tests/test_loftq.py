"""LoftQ: the theorem (below QLoRA on every matrix), the scaling, the best iterate, the seed."""

import sys

import pytest
import torch
from torch import Tensor

from bitloft.errors import OptionError
from bitloft.formats import Format
from bitloft.kernels.ops import decode, encode
from bitloft.packed import PackedTensor
from bitloft.solvers.base import Solution, relative
from bitloft.solvers.loftq import MOST, SETTLED, loftq
from bitloft.solvers.lowrank import generator_for
from bitloft.solvers.qlora import qlora


def solved(weight: Tensor, fmt: str, **settings: object) -> Solution:
    defaults = {"rank": 8, "scaling": 1.0, "start_format": Format.parse("lm4:64"), "steps": 5}
    return loftq(weight, Format.parse(fmt), **defaults | settings, generator=generator_for(0, "w"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fmt", ["nf2:64", "nf3:64", "nf4:64", "lm2:64", "lm4:64", "uniform2:64", "sign:64", "trellis2:64"]
)
@pytest.mark.parametrize("steps", [1, 5])
def test_error_is_below_qloras_and_is_that_of_the_stored_parts(fmt: str, steps: int) -> None:
    weight = torch.randn(96, 200)
    found = solved(weight, fmt, steps=steps)
    assert found.start is not None
    assert (
        found.error_after < found.error_before == pytest.approx(qlora(weight, Format.parse(fmt)).error_after, rel=1e-5)
    )
    stored = decode(found.weight) + found.start.product()
    assert relative(weight - stored, weight) == pytest.approx(found.error_after, rel=1e-5)


@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.25, 8**-0.5])
def test_scaling_is_folded_in(scaling: float) -> None:
    """s * B @ A is the same product whatever alpha / r is; a solver that forgot s would be off by s - 1 times."""
    weight = torch.randn(64, 64)
    one, other = solved(weight, "nf2:64"), solved(weight, "nf2:64", scaling=scaling)
    assert other.error_after == pytest.approx(one.error_after, rel=0.02)


def test_one_step_is_quantize_first() -> None:
    """T = 1 keeps QLoRA's codes and adds the SVD of their residual (LoftQ, table 6)."""
    weight = torch.randn(64, 128)
    assert torch.equal(
        solved(weight, "nf2:64", steps=1).weight.codes, qlora(weight, Format.parse("nf2:64")).weight.codes
    )


def test_more_steps_never_end_worse() -> None:
    weight = torch.randn(64, 128)
    errors = [solved(weight, "uniform2:64", steps=t).error_after for t in (1, 2, 5, 10)]
    assert errors == sorted(errors, reverse=True)


def test_without_steps_it_stops_where_a_step_repairs_less_than_a_thousandth(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 128)
    best = [solved(weight, "nf2:64", steps=t).error_after for t in range(1, MOST + 1)]
    settled = (t + 1 for t in range(1, MOST) if best[t] >= best[t - 1] * (1 - SETTLED))
    taken = next(settled, MOST)
    calls: list[Tensor] = []

    def counted(x: Tensor, fmt: Format) -> PackedTensor:
        calls.append(x)
        return encode(x, fmt)

    monkeypatch.setattr(sys.modules["bitloft.solvers.loftq"], "encode", counted)
    assert solved(weight, "nf2:64", steps=None).error_after == best[taken - 1]
    assert len(calls) == taken


def test_close_to_the_plain_algorithm_with_full_svds() -> None:
    """Algorithm 1 word for word (full SVDs, float factors) on the same matrix."""
    weight, fmt = torch.randn(128, 128), Format.parse("nf2:64")
    repair, errors = torch.zeros(128, 128), []
    for _ in range(5):
        q = decode(qlora(weight - repair, fmt).weight)
        u, s, vt = torch.linalg.svd(weight - q)
        repair = (u[:, :8] * s[:8]) @ vt[:8]
        errors.append(relative(weight - q - repair, weight))
    assert solved(weight, "nf2:64").error_after == pytest.approx(min(errors), rel=0.02)


def test_the_result_does_not_depend_on_what_ran_before() -> None:
    weight = torch.randn(64, 64)
    first = solved(weight, "lm2:64")
    torch.manual_seed(123)
    again = solved(weight, "lm2:64")
    assert first.start is not None
    assert again.start is not None
    assert torch.equal(first.weight.codes, again.weight.codes)
    assert torch.equal(first.start.a.codes, again.start.a.codes)


def test_a_zero_matrix_is_reproduced() -> None:
    found = solved(torch.zeros(64, 64), "lm2:64")
    assert found.error_after == 0


def test_rank_over_the_matrix_is_refused() -> None:
    with pytest.raises(OptionError, match=r"rank 65 exceeds min\(m, n\) = 64"):
        solved(torch.randn(64, 128), "nf2:64", rank=65)
