"""Error feedback: nearest codes under the identity, less weighed error under any other metric, scales untouched."""

import torch

from bitloft.kernels.ops import decode, encode
from bitloft.solvers.adapter import root_of
from bitloft.solvers.feedback import fed_forward


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
