"""Joint diagonalization: exact where a set shares its bases, monotone in the rank, its bytes counted."""

import pytest
import torch

from bitloft.errors import OptionError
from bitloft.solvers.adapter import Components, components, product_error
from bitloft.solvers.joint import joint_diagonal


def family(shared: bool) -> list[Components]:
    """Four adapters of rank 3 on a 30 x 40 module; ``shared`` ones differ by weights alone."""
    a, b = torch.randn(3, 40), torch.randn(30, 3)
    found = []
    for _ in range(4):
        if not shared:
            a, b = torch.randn(3, 40), torch.randn(30, 3)
        found.append(components(torch.rand(3, 1).add(0.5) * a, b, 1.0))
    return found


def lost(adapters: list[Components], rank: int) -> float:
    found = joint_diagonal(adapters, rank)
    return sum(product_error(c, [f]) for c, f in zip(adapters, found, strict=True)) / sum(c.energy for c in adapters)


def test_shared_bases_are_found() -> None:
    assert lost(family(shared=True), 3) < 1e-3


def test_a_higher_rank_loses_less_and_all_components_lose_nothing() -> None:
    adapters = family(shared=False)
    errors = [lost(adapters, rank) for rank in (2, 6, 12)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6


def test_bytes_are_the_bases_shared_out_and_the_weights() -> None:
    for found in joint_diagonal(family(shared=False), 5):
        assert found.nbytes == 2 * (-(-5 * 70 // 4) + 5)
    with pytest.raises(OptionError, match="found 0 shapes and rank 2"):
        joint_diagonal([], 2)
