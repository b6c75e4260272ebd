"""Feedback and sweeps of codes that lie by column: less error than the scalar code, walks that never raise it."""

import pytest
import torch
from torch import Tensor

from bitloft.formats import Format
from bitloft.kernels.ops import decode, encode
from bitloft.packed import scales_of
from bitloft.solvers.columns import _Codes, _sweep, trellised
from bitloft.solvers.feedback import quantized
from bitloft.solvers.metric import Metric, metric_of


def problem(rows: int = 72, columns: int = 200) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(600, 12) @ torch.randn(12, columns) + 0.5 * torch.randn(600, columns)
    return torch.randn(rows, columns), inputs.T @ inputs / 600


@pytest.mark.parametrize("order", ["forward", "reverse", "activation"])
@pytest.mark.parametrize("group", [64, 128, 256])
def test_it_beats_the_scalar_code_of_the_same_bits(order: str, group: int) -> None:
    x, moment = problem()
    metrics = [metric_of(moment, Format.parse(f"{family}2:{group}"), order=order) for family in ("lm", "trellis")]
    scalar, walked = (
        quantized(x, Format.parse(f"{family}2:{group}"), metric, 2)
        for family, metric in zip(("lm", "trellis"), metrics, strict=True)
    )
    assert walked.true_bits <= scalar.true_bits
    assert metrics[1].error(x - decode(walked)) < 0.8 * metrics[0].error(x - decode(scalar))


def test_a_sweep_does_not_raise_the_error() -> None:
    """A walk is optimal but for its ends, which another walk decides."""
    x, moment = problem(columns=150)
    fmt = Format.parse("trellis2:64")
    metric = metric_of(moment, fmt)
    packed = trellised(x, encode(x, fmt), metric, 0)
    scales = scales_of(packed, slice(None), torch.float32)
    levels = decode(packed) / scales.repeat_interleave(64, 1)[:, :150]
    chosen = _Codes(fmt, packed.codes.clone(), levels, scales)
    error = metric.error(x - chosen.values())
    for _ in range(3):
        assert metric.moment is not None
        _sweep(x, chosen, metric.moment)
        after = metric.error(x - chosen.values())
        assert after <= error * 1.002
        error = after
    assert error < 0.97 * metric.error(x - decode(packed))


def test_what_is_stored_is_what_was_chosen() -> None:
    """Codes, levels and scales are kept side by side while they change."""
    x, moment = problem(rows=20, columns=100)
    fmt = Format.parse("trellis3:40")
    packed = quantized(x, fmt, metric_of(moment, fmt, order="activation"), 1)
    scales = scales_of(packed, slice(None), torch.float32)
    assert packed.scales.shape == (20, 3)
    assert packed.codes.shape == (100, 9)
    assert float((x - decode(packed)).square().mean()) < 0.2
    assert bool((scales > 0).all())


def test_without_a_moment_it_is_encode() -> None:
    x, _ = problem(rows=16)
    packed = quantized(x, Format.parse("trellis2:64"), Metric(None, None, None), 2)
    assert torch.equal(packed.codes, encode(x, "trellis2:64").codes)


def test_rows_of_zeros_stay_zero() -> None:
    x, moment = problem(rows=40, columns=64)
    x[5] = 0
    fmt = Format.parse("trellis2:64")
    found = decode(quantized(x, fmt, metric_of(moment, fmt), 2))
    assert float(found[5].abs().max()) == 0.0
    assert bool(torch.isfinite(found).all())
