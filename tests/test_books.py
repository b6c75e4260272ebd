"""Learned levels: near Lloyd-Max on Gaussian data, wider where tails are heavy, exact in fp16."""

import pytest
import torch

from bitloft.formats import Format
from bitloft.kernels.books import learn_levels


def test_gaussian_data_gives_lloyd_max_levels() -> None:
    levels = learn_levels(torch.randn(1024, 256), Format.parse("book2:64"))
    ratio = levels[3] / levels[2]
    assert ratio == pytest.approx(1.510418 / 0.452780, rel=0.08)
    assert levels[0] == pytest.approx(-levels[3], rel=0.05)


def test_heavy_tails_spread_the_levels() -> None:
    fmt = Format.parse("book2:64")
    gauss = learn_levels(torch.randn(512, 256), fmt)
    heavy = learn_levels(torch.distributions.StudentT(3.0).sample((512, 256)), fmt)
    assert heavy[3] / heavy[2] > gauss[3] / gauss[2]


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_degenerate_matrices_still_have_ascending_levels(fill: float) -> None:
    levels = learn_levels(torch.full((4, 64), fill), Format.parse("book3:64"))
    assert len(levels) == 8
    assert list(levels) == sorted(levels)
    assert torch.tensor(levels).half().float().tolist() == list(levels)
