"""Trellis codes under an input metric."""

import torch

from bitloft.formats import Format
from bitloft.kernels import ops
from bitloft.packed import PackedTensor
from bitloft.solvers.walks import fitted

ROW = Format.parse("trellis2:row")


def lost(x: torch.Tensor, packed: PackedTensor, root: torch.Tensor) -> torch.Tensor:
    """|(x - s y) L|^2 of each row at its best s."""
    y, target = ops.decode(packed) @ root, x @ root
    share = (target * y).sum(1) / y.square().sum(1)
    return (target - share[:, None] * y).square().sum(1)


def test_without_a_metric_it_is_the_plain_code() -> None:
    x = torch.randn(3, 64)
    assert torch.equal(fitted(x, ROW, None).codes, ops.encode(x, ROW).codes)


def test_a_metric_is_heeded() -> None:
    torch.manual_seed(0)
    x, samples = torch.randn(6, 96), torch.randn(300, 96) * torch.logspace(-1, 1, 96)
    mixed = samples @ (torch.eye(96) + 0.1 * torch.randn(96, 96))
    root = torch.linalg.cholesky(mixed.T @ mixed / 300)
    plain, seen = fitted(x, ROW, None), fitted(x, ROW, root)
    assert float(lost(x, seen, root).sum()) < 0.9 * float(lost(x, plain, root).sum())
    unpulled = fitted(x, ROW, root, pulls=())
    assert bool((lost(x, seen, root) <= lost(x, unpulled, root) * (1 + 1e-5)).all())
    assert float(lost(x, seen, root).sum()) < float(lost(x, unpulled, root).sum())
    # the stored scale is the best one
    y = ops.decode(seen)
    torch.testing.assert_close(((x - y) @ root).square().sum(1), lost(x, seen, root), rtol=1e-3, atol=1e-5)
