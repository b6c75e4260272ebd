"""The calibrated solver: every ingredient lowers the error that counts, and what is reported is what is stored."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bitloft.errors import OptionError
from bitloft.formats import Format
from bitloft.kernels.ops import decode
from bitloft.options import QuantizeOptions
from bitloft.rules import plan_of
from bitloft.solvers import Solution, Statistics, solve
from bitloft.solvers.metric import metric_of

DAMPING = 0.03


def problem() -> tuple[Tensor, Statistics]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(48, 96, generator=generator)
    inputs = torch.randn(800, 20, generator=generator) @ torch.randn(20, 96, generator=generator)
    inputs += 0.5 * torch.randn(800, 96, generator=generator)
    return weight, Statistics(inputs.T @ inputs / 800, 800)


def solved(**settings: Any) -> tuple[Solution, float]:
    """A solution, and its relative error where the inputs are, measured from what is stored."""
    weight, statistics = problem()
    options = QuantizeOptions(**{"solver": "calibrated", "format": "lm2:32", "rank": 8, "alpha": 16.0, **settings})
    found = solve("w", weight, plan_of(options), options, statistics)
    dense = decode(found.weight) + (0 if found.start is None else found.start.product())
    metric = metric_of(statistics.moment, Format.parse("lm2:32"), damping=DAMPING)
    return found, (metric.error(weight - dense) / metric.error(weight)) ** 0.5


def test_the_report_is_what_is_stored() -> None:
    found, error = solved()
    weight, _ = problem()
    assert found.calibrated is not None
    assert found.calibrated.after == pytest.approx(error, rel=1e-3)
    assert found.calibrated.after < found.calibrated.before
    assert (found.calibrated.damping, found.calibrated.tokens) == (DAMPING, 800)
    assert found.start is not None
    assert found.start.scaling == 2.0
    dense = decode(found.weight) + found.start.product()
    assert found.error_after == pytest.approx(float((weight - dense).norm() / weight.norm()), rel=1e-4)


def test_each_ingredient_lowers_the_error() -> None:
    whole = solved()[1]
    assert whole <= solved(rounds=1)[1] < solved(rounds=1, sweeps=0)[1] < solved(rounds=1, feedback="none")[1]
    assert whole < 0.8 * solved(metric="diagonal")[1]
    assert whole < 0.8 * solved(metric="none")[1]
    assert whole < solved(rank=0)[1]


@pytest.mark.parametrize(
    "settings", [{"variant": "projection"}, {"split": "auto"}, {"split": "4"}, {"feedback": "reverse"}]
)
def test_variants_are_within_reach_of_the_default(settings: dict[str, Any]) -> None:
    assert solved(**settings)[1] < 1.1 * solved()[1]


def test_the_best_round_is_kept() -> None:
    for variant in ("residual", "projection"):
        errors = [solved(rounds=rounds, variant=variant)[1] for rounds in (1, 2, 3)]
        assert errors == sorted(errors, reverse=True)


def test_row_weights_repair_the_rows_that_count() -> None:
    weight, statistics = problem()
    options = QuantizeOptions(solver="calibrated", format="lm2:32", rank=4, rounds=1)
    rows = torch.ones(48)
    rows[:4] = 1000.0
    lost = []
    for given in (None, rows):
        found = solve("w", weight, plan_of(options), options, Statistics(statistics.moment, 800, given))
        assert found.start is not None
        lost.append((weight - decode(found.weight) - found.start.product())[:4].norm())
    assert lost[1] < 0.9 * lost[0]


def test_statistics_are_asked_for_unless_the_metric_needs_none() -> None:
    weight, _ = problem()
    options = QuantizeOptions(solver="calibrated", format="lm2:32", rank=4)
    with pytest.raises(OptionError, match="no statistics of the inputs of w; quantize with calibrate=FILE"):
        solve("w", weight, plan_of(options), options)
    options = QuantizeOptions(solver="calibrated", format="lm2:32", rank=4, metric="none")
    assert solve("w", weight, plan_of(options), options).error_after < 0.4


def test_a_zero_matrix_is_reproduced() -> None:
    options = QuantizeOptions(solver="calibrated", format="lm2:32", rank=2)
    found = solve("w", torch.zeros(8, 96), plan_of(options), options, problem()[1])
    assert found.error_after == 0
    assert found.start is not None
    assert not bool(found.start.product().any())


@pytest.mark.parametrize("fmt", ["lm2:64", "lm2:48", "trellis2:64"])
def test_the_start_is_ordered_by_its_own_groups(fmt: str) -> None:
    """Groups of 32 in the start, of another size in the codes: act-order once tore the smaller ones apart."""
    found, error = solved(format=fmt, start_format="lm4:32", feedback="activation")
    assert found.start is not None
    assert error < solved(format=fmt, start_format="lm4:32", feedback="none")[1]
