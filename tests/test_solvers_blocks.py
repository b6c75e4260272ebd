"""Blocks of error feedback: whole groups in any order, and targets that make a block's error its own."""

import torch

from bitloft.solvers.blocks import BLOCK, blocks_of, pulled


def test_groups_stay_whole_where_that_is_asked() -> None:
    groups = torch.tensor([2] * 5 + [0] * 64 + [1] * 64)
    assert [(b.start, b.stop) for b in blocks_of(groups, whole=True)] == [(0, 5), (5, 69), (69, 133)]
    assert [(b.start, b.stop) for b in blocks_of(groups, whole=False)] == [(0, BLOCK), (BLOCK, 128), (128, 133)]


def test_the_error_of_a_block_is_that_against_what_it_is_pulled_to() -> None:
    """|E L|^2 of the columns of one block, with errors after it, is |(T - Q) L_bb|^2."""
    root = torch.linalg.cholesky(torch.cov(torch.randn(12, 60)) + 0.1 * torch.eye(12))
    x, errors = torch.randn(5, 12), torch.randn(5, 12)
    block = slice(3, 7)
    chosen = torch.randn(5, 4)
    errors[:, block] = x[:, block] - chosen
    whole = errors[:, 3:] @ root[3:, block]
    own = (pulled(x, errors, root, block) - chosen) @ root[block, block]
    assert torch.allclose(whole, own, atol=1e-4)
