"""The norm of the inputs: closed forms against the textbook, damping where S is singular, orders kept whole."""

import pytest
import torch
from torch import Tensor

from bitloft.errors import OptionError
from bitloft.formats import Format
from bitloft.solvers.metric import Metric, best_product, metric_of

FMT = Format.parse("lm2:16")


def moment(columns: int = 40, inputs: int = 500) -> Tensor:
    x = torch.randn(inputs, 6) @ torch.randn(6, columns) + 0.3 * torch.randn(inputs, columns)
    return x.T @ x / inputs


@pytest.mark.parametrize("order", ["forward", "reverse", "activation"])
def test_the_norm_is_the_second_moment_whatever_the_order(order: str) -> None:
    s, e = moment(), torch.randn(5, 40)
    metric = metric_of(s, FMT, order=order, damping=0.02)
    damped = s + 0.02 * s.diagonal().mean() * torch.eye(40)
    assert metric.error(e) == pytest.approx(float(torch.trace(e @ damped @ e.T)), rel=1e-4)
    assert torch.allclose(metric.within(e), e @ damped @ e.T, rtol=1e-3, atol=1e-3)
    assert metric.root is not None
    assert torch.equal(metric.root, metric.root.tril())


def test_groups_stay_together_and_the_strongest_is_chosen_first() -> None:
    s = torch.diag(torch.tensor([1.0] * 16 + [9.0] * 16 + [4.0] * 8))
    order = metric_of(s, FMT, order="activation").order
    assert order is not None
    groups = (order // 16).tolist()
    assert groups == [0] * 16 + [2] * 8 + [1] * 16 or groups == [2] * 8 + [0] * 16 + [1] * 16
    assert sorted(order.tolist()) == list(range(40))


def test_diagonal_and_none_are_what_they_say() -> None:
    s, e = moment(), torch.randn(5, 40)
    diagonal = metric_of(s, FMT, kind="diagonal", damping=1e-9)
    assert diagonal.error(e) == pytest.approx(float((e.square() * s.diagonal()).sum()), rel=1e-4)
    for plain in (metric_of(s, FMT, kind="none"), metric_of(None, FMT)):
        assert plain.error(e) == pytest.approx(float(e.square().sum()), rel=1e-5)


@pytest.mark.parametrize("rows", [12, 60])
def test_the_inverse_free_product_is_the_whitened_svd(rows: int) -> None:
    """QERA's SVD_r(E L) L^-1 (Cholesky form) against U U^T E, by full decompositions in double precision."""
    s, e = moment(), torch.randn(rows, 8) @ torch.randn(8, 40) + 0.1 * torch.randn(rows, 40)
    metric = metric_of(s, FMT)
    b, a, values = best_product(e, metric, 5, torch.Generator().manual_seed(0))
    assert metric.moment is not None
    root = torch.linalg.cholesky(metric.moment.double())
    u, d, vt = torch.linalg.svd(e.double() @ root, full_matrices=False)
    expected = torch.linalg.solve_triangular(root, (u[:, :5] * d[:5]) @ vt[:5], upper=False, left=False)
    assert torch.allclose((b @ a).double(), expected, atol=1e-3 * float(expected.abs().max()))
    assert torch.allclose(values.double(), d[:5], rtol=1e-3)


def test_no_other_product_is_better_and_row_weights_move_it() -> None:
    metric, e = metric_of(moment(), FMT), torch.randn(20, 40)
    weights = torch.rand(20) * 10
    b, a, _ = best_product(e, metric, 4, torch.Generator().manual_seed(0))
    best = metric.error(e - b @ a)
    for _ in range(20):
        other = b @ a + 0.05 * torch.randn(20, 4) @ torch.randn(4, 40)
        assert metric.error(e - other) > best
    bw, aw, _ = best_product(e, metric, 4, torch.Generator().manual_seed(0), weights)
    root = weights.sqrt().unsqueeze(1)
    assert metric.error(root * (e - bw @ aw)) < metric.error(root * (e - b @ a))


def test_the_projected_norm_is_what_a_product_on_that_side_cannot_repair() -> None:
    metric, e, a = metric_of(moment(), FMT), torch.randn(10, 40), torch.randn(3, 40)
    seen, target = metric.seen(a), metric.seen(e)
    b = torch.linalg.lstsq(seen.T, target.T).solution.T
    left = metric.error(e - b @ a)
    assert metric.without(a).error(e) == pytest.approx(left, rel=0.1)  # damped anew
    assert metric.without(a).error(b @ a) < 0.1 * metric.error(b @ a)
    plain = Metric(None, None, None).without(a)
    assert plain.error(a) < 0.1 * float(a.square().sum())


def test_the_damping_grows_until_a_singular_moment_has_a_factor() -> None:
    direction = torch.randn(1, 40)
    metric = metric_of(direction.T @ direction - 1e-3 * torch.eye(40), FMT, damping=1e-7)
    assert metric.damping > 1e-7
    assert metric.root is not None
    assert bool(torch.isfinite(metric.root).all())


@pytest.mark.parametrize("bad", [torch.zeros(8, 8), torch.full((8, 8), torch.nan)])
def test_no_moment_is_refused(bad: Tensor) -> None:
    with pytest.raises(OptionError, match="must be square, finite and not zero"):
        metric_of(bad, FMT)
    with pytest.raises(OptionError, match="is not positive"):
        metric_of(torch.diag(torch.tensor([1000.0, -999.0])), FMT)
