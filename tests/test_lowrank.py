"""The truncated SVD against the full one, its seed and its warm start."""

import pytest
import torch

from bitloft.solvers.lowrank import balanced_factors, generator_for, truncated_svd


@pytest.mark.parametrize(("rows", "columns"), [(200, 300), (300, 200), (40, 10), (1, 50)])
def test_residual_is_close_to_the_full_svd(rows: int, columns: int) -> None:
    matrix = torch.randn(rows, columns)  # a flat spectrum is the hard case
    rank = min(16, rows, columns)
    u, s, vt = truncated_svd(matrix, rank, generator_for(0, "w"))
    full = torch.linalg.svdvals(matrix)
    residual = torch.linalg.vector_norm(matrix - (u * s) @ vt)
    best = full[rank:].square().sum().sqrt()
    assert residual <= best * 1.008 + 1e-4
    torch.testing.assert_close(u.T @ u, torch.eye(rank), atol=1e-5, rtol=0)


def test_a_low_rank_matrix_is_recovered() -> None:
    matrix = torch.randn(100, 4) @ torch.randn(4, 80)
    u, s, vt = truncated_svd(matrix, 4, generator_for(0, "w"))
    torch.testing.assert_close((u * s) @ vt, matrix, atol=1e-3, rtol=1e-3)


def test_the_seed_is_the_name() -> None:
    matrix = torch.randn(60, 60)
    first = truncated_svd(matrix, 8, generator_for(0, "a"))
    torch.manual_seed(99)
    again = truncated_svd(matrix, 8, generator_for(0, "a"))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[0], truncated_svd(matrix, 8, generator_for(0, "b"))[0])


def test_a_warm_start_needs_fewer_iterations() -> None:
    matrix = torch.randn(300, 300)
    warm = truncated_svd(matrix, 16, generator_for(0, "w"), iterations=20)[2].T
    nearby = matrix + 0.05 * torch.randn(300, 300)

    def captured(**kwargs: torch.Tensor | None) -> float:
        return float(truncated_svd(nearby, 16, generator_for(1, "w"), iterations=1, **kwargs)[1].square().sum())

    assert captured(start=warm) > captured(start=None)


def test_factors_carry_the_scaling() -> None:
    u, s, vt = torch.linalg.svd(torch.randn(20, 30), full_matrices=False)
    a, bt = balanced_factors(u, s, vt, 0.25)
    torch.testing.assert_close(0.25 * bt.T @ a, (u * s) @ vt)
    torch.testing.assert_close(a.norm(dim=1), bt.norm(dim=1))
