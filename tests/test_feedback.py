"""Error feedback: nearest codes under the identity, less weighed error under any other metric, scales untouched."""

import pytest
import torch

from bitloft.formats import Format
from bitloft.kernels.ops import decode, encode
from bitloft.solvers.adapter import root_of
from bitloft.solvers.feedback import fed_forward, quantized
from bitloft.solvers.metric import Metric, metric_of


def test_under_the_identity_the_codes_are_the_nearest() -> None:
    x = torch.randn(3, 200)
    for spelling in ("lm3:row", "uniform2:128", "uniform3:64", "sign:row"):
        packed = encode(x, spelling)
        again = fed_forward(x, packed, torch.eye(200))
        assert (decode(again) != decode(packed)).float().mean() < 0.01  # scales were rounded to fp16 between the two
        assert torch.equal(again.scales, packed.scales)


def test_the_weighed_error_falls_where_inputs_correlate() -> None:
    x = torch.randn(4, 96)
    inputs = torch.randn(500, 12) @ torch.randn(12, 96) + 0.3 * torch.randn(500, 96)
    root = root_of(inputs.T @ inputs / 500)
    for spelling in ("lm2:row", "uniform3:128", "sign:row"):
        packed = encode(x, spelling)
        before = ((x - decode(packed)) @ root).square().sum()
        after = ((x - decode(fed_forward(x, packed, root))) @ root).square().sum()
        assert after < 0.8 * before, spelling


FORMATS = (
    "lm2:64", "lm4:40", "book2:64", "nf2:64", "uniform3:64", "uniform2:64+shift", "lm2:64+dq", "lm2:64+shift",
    "lm2:row", "uniform2:tensor", "sign:128", "lm2:unit", "trellis2:64", "trellis3:40",
)  # fmt: skip


@pytest.mark.parametrize("spelling", FORMATS)
def test_every_format_gains_from_feedback_and_more_from_sweeps(spelling: str) -> None:
    x = torch.randn(24, 200)
    inputs = torch.randn(600, 12) @ torch.randn(12, 200) + 0.5 * torch.randn(600, 200)
    fmt = Format.parse(spelling)
    for order in ("forward", "activation"):
        metric = metric_of(inputs.T @ inputs / 600, fmt, order=order)
        plain, fed, swept = (
            metric.error(x - decode(packed))
            for packed in (encode(x, fmt), quantized(x, fmt, metric), quantized(x, fmt, metric, 2))
        )
        assert fed < 0.8 * plain
        assert swept < 0.99 * fed


def test_under_the_identity_quantized_is_encode() -> None:
    x = torch.randn(5, 128)
    packed = quantized(x, Format.parse("lm2:64"), Metric(None, None, None), 2)
    assert torch.equal(packed.codes, encode(x, "lm2:64").codes)


def test_the_scale_is_searched_under_the_metric() -> None:
    """Against the same walk on scales of least plain error."""
    x = torch.randn(30, 128)
    inputs = torch.randn(400, 5) @ torch.randn(5, 128) + 0.2 * torch.randn(400, 128)
    fmt = Format.parse("lm2:64")
    metric = metric_of(inputs.T @ inputs / 400, fmt, order="reverse")
    assert metric.root is not None
    fixed = fed_forward(x, encode(x, fmt), metric.root)
    assert metric.error(x - decode(quantized(x, fmt, metric))) < 0.95 * metric.error(x - decode(fixed))
