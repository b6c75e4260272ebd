"""Singular components of a product that is never formed, and the error of a packed product."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitloft.errors import AdapterError
from bitloft.kernels.ops import decode, encode
from bitloft.solvers.adapter import Components, PackedBlock, components, product_error

SIZES = st.tuples(st.integers(1, 6), st.integers(6, 40), st.integers(6, 40), st.integers(0, 99))


def factors(rank: int, columns: int, rows: int, seed: int, true_rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Random A [rank, columns], B [rows, rank] whose product has ``true_rank`` (default: rank)."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    if true_rank is not None:
        b[:, true_rank:] = 0
    return a, b


def dense(found: Components) -> Tensor:
    return found.u.double().T @ (found.s.double()[:, None] * found.v.double())


@settings(max_examples=30, deadline=None)
@given(SIZES)
def test_components_rebuild_the_product(sizes: tuple[int, int, int, int]) -> None:
    a, b = factors(*sizes)
    found = components(a, b, 2.5)
    torch.testing.assert_close(dense(found), 2.5 * b.double() @ a.double(), rtol=1e-5, atol=1e-5)
    eye = torch.eye(sizes[0])
    torch.testing.assert_close(found.u @ found.u.T, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.v @ found.v.T, eye, rtol=0, atol=1e-5)
    assert bool((found.s[1:] <= found.s[:-1]).all())
    assert bool((found.u.gather(1, found.u.abs().argmax(1, keepdim=True)) > 0).all())


def test_noise_of_a_deficient_product_is_zero() -> None:
    a, b = factors(6, 30, 20, 0, true_rank=2)
    found = components(a, b + 1e-9 * torch.randn(20, 6), 1.0)
    assert bool((found.s[:2] > 0).all())
    assert not bool(found.s[2:].any())


def test_zero_factors_have_zero_energy() -> None:
    found = components(torch.randn(3, 9), torch.zeros(8, 3), 4.0)
    assert found.energy == 0
    assert product_error(found, ()) == 0


def test_a_product_beyond_float32_is_refused() -> None:
    big = torch.full((4, 4), 1e30)
    with pytest.raises(AdapterError, match="beyond float32"):
        components(big, big, 1.0)


@settings(max_examples=30, deadline=None)
@given(SIZES, st.sampled_from(["lm2:row", "uniform3:128", "sign:128"]))
def test_product_error_is_that_of_the_dense_difference(sizes: tuple[int, int, int, int], spelling: str) -> None:
    exact = components(*factors(*sizes), 0.5)
    root = exact.s.sqrt()[:, None]
    cut = sizes[0] // 2
    blocks = [
        PackedBlock(encode(root[rows] * exact.v[rows], spelling), encode(root[rows] * exact.u[rows], spelling))
        for rows in (slice(0, cut), slice(cut, None))
        if exact.s[rows].numel()
    ]
    stored = sum((decode(b.bt).double().T @ decode(b.a).double() for b in blocks), torch.zeros(()))
    expected = float((dense(exact) - stored).square().sum())
    assert product_error(exact, blocks) == pytest.approx(expected, rel=1e-6, abs=1e-6 * exact.energy)


def test_storing_nothing_loses_the_energy() -> None:
    exact = components(*factors(3, 10, 12, 1), 1.0)
    assert product_error(exact, ()) == exact.energy > 0
