"""LoRAQuant against its description: which components are high, what their codes are, what padding does."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitloft.kernels.ops import decode
from bitloft.solvers.adapter import Components, components, product_error
from bitloft.solvers.loraquant import loraquant, split


def made(singular: list[float], columns: int, rows: int, seed: int = 0) -> Components:
    """A matrix with these singular values and random vectors."""
    generator = torch.Generator().manual_seed(seed)
    rank = len(singular)
    u = torch.linalg.qr(torch.randn(rows, rank, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(columns, rank, generator=generator)).Q
    return components(v.T.contiguous(), u * torch.tensor(singular), 1.0)


@pytest.mark.parametrize(
    ("singular", "ratio", "h"),
    [
        ([2.0, 1.0, 1.0, 1.0], 4 / 7, 1),  # exactly reached counts as held
        ([2.0, 1.0, 1.0, 1.0], 0.6, 2),
        ([1.0, 1.0, 1.0, 1.0], 0.8, 4),  # 3 of 4 hold 0.75: the released code's h would be 3
        ([3.0, 0.1, 0.1], 0.8, 1),
        ([1.0, 1.0], 1.0, 2),
        ([0.0, 0.0], 0.8, 0),
    ],
)
def test_h_is_the_fewest_components_that_hold_the_ratio(singular: list[float], ratio: float, h: int) -> None:
    assert split(torch.tensor(singular), ratio) == h


def rtn(row: Tensor, bits: int) -> Tensor:
    """One component by the paper's words, in Python: groups of 128, min-max scale, integer zero point."""
    out, top = [], 2**bits - 1
    for start in range(0, len(row), 128):
        group = [float(x) for x in row[start : start + 128]]
        low, high = min(*group, 0.0), max(*group, 0.0)
        scale = (high - low) / top
        zero = min(max(round(-low / scale), 0), top)
        out += [(min(max(round(x / scale) + zero, 0), top) - zero) * scale for x in group]
    return torch.tensor(out)


def signs(row: Tensor) -> Tensor:
    """One component as sign times mean magnitude per group of 128, padding not counted."""
    out = []
    for start in range(0, len(row), 128):
        group = [float(x) for x in row[start : start + 128]]
        scale = math.fsum(map(abs, group)) / len(group)
        out += [scale if x >= 0 else -scale for x in group]
    return torch.tensor(out)


@pytest.mark.parametrize("bits", [2, 3])
def test_codes_agree_with_the_description(bits: int) -> None:
    exact = made([4.0, 3.0, 0.5, 0.4], columns=200, rows=130)
    high, low = loraquant(exact, high=bits, ratio=0.8, refine=False)
    assert (str(high.a.format), str(low.a.format)) == (f"uniform{bits}:128", "sign:128")
    assert high.a.shape == (2, 200)
    assert low.bt.shape == (2, 130)
    root = exact.s.sqrt()[:, None]
    for packed, exactly in ((high.a, root * exact.v), (high.bt, root * exact.u)):
        torch.testing.assert_close(decode(packed)[0], rtn(exactly[0], bits), rtol=1e-3, atol=1e-4)
    for packed, exactly in ((low.a, root * exact.v), (low.bt, root * exact.u)):
        torch.testing.assert_close(decode(packed)[1], signs(exactly[3]), rtol=1e-3, atol=1e-5)


def test_the_range_search_halves_the_error_at_two_bits() -> None:
    """papers.md 2.2: one rank-1 pair falls from 0.50-0.74 to 0.24-0.28 of its energy."""
    exact = made([1.0], columns=512, rows=512)
    plain = product_error(exact, loraquant(exact, high=2, ratio=0.8, refine=False)) / exact.energy
    refined = product_error(exact, loraquant(exact, high=2, ratio=0.8)) / exact.energy
    assert 0.4 < plain < 0.8
    assert 0.2 < refined < 0.29


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(5, 150), st.integers(5, 150), st.sampled_from([2, 3]), st.floats(0.05, 1.0))
def test_every_shape_keeps_all_components(rank: int, columns: int, rows: int, bits: int, ratio: float) -> None:
    generator = torch.Generator().manual_seed(rank)
    exact = components(
        torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator), 1.0
    )
    blocks = loraquant(exact, high=bits, ratio=ratio)
    assert sum(block.a.shape[0] for block in blocks) == rank
    assert product_error(exact, blocks) < exact.energy


def test_a_zero_matrix_is_stored_as_zero() -> None:
    exact = components(torch.randn(2, 16), torch.zeros(24, 2), 1.0)
    (block,) = loraquant(exact, high=2, ratio=0.8)
    assert not bool((decode(block.bt).T @ decode(block.a)).any())
