"""Scale searches against grids: what is kept comes within a few percent of the best scale there is."""

import pytest
import torch
from torch import Tensor

from bitloft.formats import Format
from bitloft.kernels import search


def grid_error(x: Tensor, fmt: Format) -> Tensor:
    """Least squared error of each group over 400 scales."""
    levels = torch.tensor(fmt.levels)
    best = torch.full((x.shape[0],), float("inf"))
    for factor in torch.linspace(0.01, 1.2, 400):
        scale = x.abs().amax(1, keepdim=True) * factor / levels[-1] * 2
        nearest = levels[(x.unsqueeze(-1) - scale.unsqueeze(-1) * levels).abs().argmin(-1)] * scale
        best = torch.minimum(best, (nearest - x).square().sum(1))
    return best


@pytest.mark.parametrize(("spelling", "slack"), [("lm2:64", 1.001), ("lm3:64", 1.02), ("lm4:64", 1.06)])
@pytest.mark.parametrize("heavy", [False, True])
def test_scale_is_near_the_best(spelling: str, slack: float, heavy: bool) -> None:
    fmt = Format.parse(spelling)
    x = torch.randn(200, 64)
    x = x / torch.rand(200, 64).clamp_min(0.05) if heavy else x
    found = search.codes_and_scales(x, None, fmt, fmt.levels)
    values = torch.tensor(fmt.levels)[found.codes.int()] * found.scales
    error = (values - x).square().sum(1)
    assert error.sum() <= grid_error(x, fmt).sum() * slack * (1.03 if heavy else 1)


def test_masked_columns_do_not_count() -> None:
    x = torch.randn(6, 64)
    mask = torch.ones(6, 64)
    mask[:, 40:] = 0
    for spelling in ("lm2:64", "lm3:64", "lm4:64", "sign:64"):
        fmt = Format.parse(spelling)
        padded = search.codes_and_scales(x * mask, mask, fmt, fmt.levels)
        alone = search.codes_and_scales(x[:, :40].contiguous(), None, Format(fmt.family, fmt.bits, 40), fmt.levels)
        torch.testing.assert_close(padded.scales, alone.scales)
        assert torch.equal(padded.codes[:, :40], alone.codes)
