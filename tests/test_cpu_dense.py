"""Native products with a plain float32 matrix: right, and the same bits for a row whatever lies beside it."""

import pytest
import torch

from bitloft.errors import KernelError
from bitloft.kernels import cpu
from bitloft.kernels.cpu_dense import LANES, dense_linear, takes

pytestmark = pytest.mark.skipif(cpu.library() is None, reason=f"needs the native library: {cpu.explain()}")


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 7, 32])
@pytest.mark.parametrize(("outs", "columns"), [(1, 16), (5, 16), (6, 48), (13, 576), (700, 96), (0, 32)])
def test_products_are_those_of_double_precision(rows: int, outs: int, columns: int) -> None:
    x, weight = torch.randn(rows, columns), torch.randn(outs, columns)
    exact = x.double() @ weight.double().T
    bound = columns * 2.0**-24 * (x.double().abs() @ weight.double().abs().T)  # of a float32 sum in any order
    assert bool(((dense_linear(x, weight).double() - exact).abs() <= bound).all())


def test_a_row_has_the_same_bits_in_every_company_and_on_every_number_of_threads() -> None:
    weight, x = torch.randn(1234, 320), torch.randn(32, 320)
    whole = dense_linear(x, weight)
    for rows in range(1, 32):
        assert torch.equal(dense_linear(x[:rows], weight), whole[:rows])
        assert torch.equal(dense_linear(x[32 - rows :], weight), whole[32 - rows :])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(dense_linear(x, weight), whole)
    finally:
        torch.set_num_threads(before)


def test_rows_that_do_not_lie_side_by_side() -> None:
    x, weight = torch.randn(8, 64)[::2, ::2], torch.randn(9, 32)
    torch.testing.assert_close(dense_linear(x, weight), x @ weight.T)


def test_nan_stays_in_its_row() -> None:
    x = torch.randn(5, 48)
    x[2, 3] = torch.nan
    found = dense_linear(x, torch.randn(20, 48))
    assert found.isnan().any(1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(4, LANES + 1),
        torch.zeros(4, LANES, dtype=torch.bfloat16),
        torch.zeros(LANES),
        torch.zeros(LANES, 32).T,
    ],
)
def test_what_it_does_not_take_is_a_sentence(weight: torch.Tensor) -> None:
    assert not takes(weight)
    with pytest.raises(KernelError, match="a plain product takes contiguous float32 rows"):
        dense_linear(torch.zeros(1, LANES), weight)


def test_widths_have_to_agree() -> None:
    with pytest.raises(KernelError, match=r"it got \(1, 32\) and \(4, 16\)"):
        dense_linear(torch.zeros(1, 32), torch.zeros(4, LANES))
