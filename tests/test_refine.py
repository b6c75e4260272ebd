"""Joint refinement: never up, at the coordinate optimum of what a brute force over one code finds, sizes untouched."""

import pytest
import torch
from torch import Tensor

from bitloft.kernels.ops import decode
from bitloft.solvers import waterfill
from bitloft.solvers.adapter import Components, PackedBlock, components, product_error, root_of
from bitloft.solvers.refine import refined


def packed(exact: Components, widths: list[int], kind: str = "trellis") -> tuple[PackedBlock, ...]:
    return waterfill.pack([waterfill.code(exact, kind)], [torch.tensor(widths)])[0]


def made(rank: int = 6, seed: int = 0, moment: Tensor | None = None, gradient: Tensor | None = None) -> Components:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, 60, generator=generator) * torch.logspace(0, -0.5, rank)[:, None]
    root, out_root = (None if found is None else root_of(found) for found in (moment, gradient))
    return components(a, torch.randn(44, rank, generator=generator), 1.0, root, out_root)


def correlated(size: int = 60) -> Tensor:
    x = torch.randn(400, 15) @ torch.randn(15, size) + 0.2 * torch.randn(400, size)
    return x.T @ x / 400


@pytest.mark.parametrize("widths", [[4, 3, 2, 1, 0, 0], [4, 4, 4, 4, 4, 4], [1, 1, 1, 1, 1, 1], [2, 0, 0, 0, 0, 0]])
@pytest.mark.parametrize("weighed", ["", "inputs", "outputs", "inputs+outputs"])
@pytest.mark.parametrize("kind", ["trellis", "scalar"])
def test_the_error_falls_and_the_layout_stays(widths: list[int], weighed: str, kind: str) -> None:
    exact = made(
        moment=correlated() if "inputs" in weighed else None, gradient=correlated(44) if "outputs" in weighed else None
    )
    before = packed(exact, widths, kind)
    after = refined(exact, before)
    # one component alone is walked already: nothing need be gained there
    most = 1.0 if kind == "scalar" or sum(map(bool, widths)) > 1 else 1 + 1e-6
    # codes that are good alone need not be so together under a metric: then every move may be refused
    limit = most if not weighed or kind == "scalar" else 1 + 1e-6
    assert product_error(exact, after) < limit * product_error(exact, before)
    for old, new in zip(before, after, strict=True):
        for x, y in ((old.a, new.a), (old.bt, new.bt)):
            assert (x.format, x.shape, x.codes.shape, x.exponent) == (y.format, y.shape, y.codes.shape, y.exponent)


def test_at_four_bits_everywhere_the_others_mend_what_one_leaves() -> None:
    exact = made()
    before = packed(exact, [4] * 6, "scalar")
    assert product_error(exact, refined(exact, before)) < 0.95 * product_error(exact, before)


def test_no_single_code_of_the_left_side_could_be_better() -> None:
    """After one more move of the left side alone, changing any one code of B^T raises the error."""
    from bitloft.solvers import refine

    exact = made()
    blocks = refined(exact, packed(exact, [3, 2, 2, 1, 1, 0], "scalar"), rounds=3)
    a = [row for block in blocks for row in refine._rows(block.a)]
    rows = [row for block in blocks for row in refine._rows(block.bt)]
    right, left = torch.cat([decode(b.a) for b in blocks]), torch.cat([decode(b.bt) for b in blocks])
    for _ in range(20):  # until no move is left
        refine._move_left(exact, right, left, a, rows)
    dense = (exact.u.T * exact.s) @ exact.v
    best = float((dense - left.T @ right).square().sum())
    for i, row in enumerate(rows):
        for column in range(0, 44, 5):
            kept = left[i, column].clone()
            for level in row.format.levels:
                left[i, column] = level
                assert float((dense - left.T @ right).square().sum()) >= best - 1e-4 * best
            left[i, column] = kept


def test_the_input_metric_pays_where_inputs_correlate() -> None:
    """Solving in the metric of S loses less there than solving in the plain norm, at the same widths."""
    weighed, plain = made(moment=correlated()), made()
    widths = [3, 2, 2, 1, 0, 0]
    blind = product_error(weighed, refined(plain, packed(plain, widths, "scalar")))
    aware = product_error(weighed, refined(weighed, packed(weighed, widths, "scalar")))
    assert aware < 0.8 * blind


def test_nothing_stays_nothing() -> None:
    assert refined(made(), ()) == ()


def test_so_does_a_metric_of_outputs() -> None:
    weighed, plain = made(gradient=correlated(44)), made()
    widths = [3, 2, 2, 1, 0, 0]
    blind = product_error(weighed, refined(plain, packed(plain, widths, "scalar")))
    aware = product_error(weighed, refined(weighed, packed(weighed, widths, "scalar")))
    assert aware < 0.95 * blind


def test_whitened_components_are_the_product_and_orthogonal_as_they_are_seen() -> None:
    exact, plain = made(moment=correlated(), gradient=correlated(44)), made()
    dense = ((x.u.T * x.s) @ x.v for x in (exact, plain))
    torch.testing.assert_close(next(dense), next(dense), rtol=1e-3, atol=1e-4)
    for rows in (exact.seen(exact.v), exact.out_seen(exact.u)):
        torch.testing.assert_close(rows @ rows.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-4)
    assert exact.root is not None
    assert exact.out_root is not None
    torch.testing.assert_close(exact.out_powers, (exact.out_root @ exact.out_root.T).diagonal())
    lost = exact.out_root.T @ ((exact.u.T * exact.s) @ exact.v) @ exact.root
    assert product_error(exact, ()) == pytest.approx(float(lost.square().sum()), rel=1e-4)
    half = packed(exact, [2, 2, 1, 0, 0, 0])
    left = lost - sum(exact.out_root.T @ decode(b.bt).T @ decode(b.a) @ exact.root for b in half)
    assert product_error(exact, half) == pytest.approx(float(left.square().sum()), rel=1e-4)
