"""Water-filling: predicted errors and costs are the stored ones, the budget holds, greedy is optimal on the hull."""

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitloft.solvers import waterfill
from bitloft.solvers.adapter import Components, PackedBlock, components, product_error
from bitloft.solvers.waterfill import Coded, allocate, code, least, pack

SHAPES = st.lists(st.tuples(st.integers(1, 5), st.integers(5, 50), st.integers(5, 50)), min_size=1, max_size=4)


def matrices(shapes: list[tuple[int, int, int]], decay: float = 0.5) -> list[Components]:
    generator = torch.Generator().manual_seed(len(shapes))
    found = []
    for rank, columns, rows in shapes:
        spectrum = decay ** torch.arange(rank)
        a = torch.randn(rank, columns, generator=generator) * spectrum[:, None]
        found.append(components(a, torch.randn(rows, rank, generator=generator), 1.0))
    return found


def stored(blocks: tuple[PackedBlock, ...]) -> int:
    """Bytes of codes and scales."""
    return sum(p.codes.numel() + 2 * p.scales.numel() for block in blocks for p in (block.a, block.bt))


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.integers(0, 2000))
def test_the_budget_holds_and_bytes_are_what_was_counted(shapes: list[tuple[int, int, int]], budget: int) -> None:
    coded = [code(c) for c in matrices(shapes)]
    widths, spent = allocate(coded, budget)
    blocks = pack(coded, widths)
    assert sum(map(stored, blocks)) == spent <= budget
    for parts, chosen in zip(blocks, widths, strict=True):
        bits = [(block.a.format.bits, block.bt.format.bits) for block in parts]
        assert bits == sorted(set(bits))  # one block per pair of widths, narrow first
        assert sum(block.a.shape[0] for block in parts) == int((chosen > 0).sum())
        assert all(block.bt.scales.numel() == 0 and block.a.scales.shape[1] == 1 for block in parts)


@settings(max_examples=20, deadline=None)
@given(SHAPES)
def test_more_bytes_never_hurt(shapes: list[tuple[int, int, int]]) -> None:
    coded = [code(c) for c in matrices(shapes)]
    errors = []
    for budget in (0, 30, 100, 300, 1000, 10**9):
        widths, _ = allocate(coded, budget)
        errors.append(sum(predicted(c, w) for c, w in zip(coded, widths, strict=True)))
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(errors))
    assert errors[0] == pytest.approx(sum(c.energy for c in matrices(shapes)))


def predicted(coded: Coded, widths: Tensor) -> float:
    return float(coded.errors.gather(0, widths[None]).sum())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_predicted_error_of_a_component_is_the_stored_one(bits: int) -> None:
    (exact,) = matrices([(1, 300, 200)])
    coded = code(exact)
    (blocks,) = pack([coded], [torch.tensor([bits])])
    assert product_error(exact, blocks) == pytest.approx(float(coded.errors[bits, 0]), rel=2e-3)
    assert (str(blocks[0].a.format), str(blocks[0].bt.format)) == (f"trellis{bits}:row", f"trellis{bits}:unit")
    (scalar,) = pack([code(exact, "scalar")], [torch.tensor([bits])])
    assert str(scalar[0].a.format) == ("sign:row" if bits == 1 else f"lm{bits}:row")
    assert str(scalar[0].bt.format) == ("sign:unit" if bits == 1 else f"lm{bits}:unit")
    assert product_error(exact, blocks) < 0.85 * product_error(exact, scalar)


def test_gaussian_components_lose_what_theory_says() -> None:
    """1 - cos^2 cos^2 with cos^2 = 2/pi at one bit and 1 - 0.1175 at two (Max 1960); trellis codes leave less."""
    (exact,) = matrices([(1, 4000, 4000)])
    lost = code(exact, "scalar").errors[:, 0] / exact.energy
    assert float(lost[1]) == pytest.approx(1 - (2 / torch.pi) ** 2, abs=0.01)
    assert float(lost[2]) == pytest.approx(1 - 0.8825**2, abs=0.01)
    lost = code(exact).errors[:, 0] / exact.energy
    assert float(lost[1]) == pytest.approx(1 - 0.728**2, abs=0.012)
    assert float(lost[2]) == pytest.approx(1 - 0.929**2, abs=0.006)


def test_short_sides_stay_scalar_and_weights_are_the_metrics() -> None:
    (short,) = matrices([(2, 24, 64)])
    coded = code(short)
    assert {str(part.format) for part in coded.a} == {"sign:unit", "lm2:unit", "lm3:unit", "lm4:unit"}
    assert {part.format.family for part in coded.bt} == {"trellis"}
    torch.manual_seed(0)
    a, b, scale = torch.randn(2, 96), torch.randn(40, 2), torch.logspace(-1, 1, 96)
    weighed = components(a, b, 1.0, torch.diag(scale))
    found = code(weighed)
    blind = code(components(a, b, 1.0))
    assert weighed.powers is not None
    torch.testing.assert_close(weighed.powers, scale.square())
    assert not torch.equal(found.a[1].codes, blind.a[1].codes)


def test_greedy_is_optimal_where_the_budget_meets_its_steps() -> None:
    """At every total that greedy reaches, no other choice of widths of that cost loses less."""
    coded = [code(c) for c in matrices([(2, 24, 16), (1, 40, 32)], decay=0.7)]
    errors = torch.cat([c.errors.T for c in coded])
    costs = [c.costs for c, rank in zip(coded, (2, 1), strict=True) for _ in range(rank)]
    choices = [
        (
            sum(cost[w] for cost, w in zip(costs, widths, strict=True)),
            sum(float(e[w]) for e, w in zip(errors, widths, strict=True)),
        )
        for widths in product(range(len(waterfill.CHOICES) + 1), repeat=3)
    ]
    full = allocate(coded, 10**9)[1]
    spent, budget = -1, 0
    for _, cost, _ in waterfill._steps(coded):
        budget += cost
        widths, spent = allocate(coded, budget)
        assert spent == budget
        lost = sum(predicted(c, w) for c, w in zip(coded, widths, strict=True))
        assert lost <= min(error for size, error in choices if size <= budget) + 1e-9
    assert spent == full


def test_energy_decides_between_matrices() -> None:
    """One budget for all: the strong matrix gets its bits before the weak one gets any."""
    strong, weak = matrices([(2, 32, 32), (2, 32, 32)])
    weak = Components(weak.u, weak.s * 0.01, weak.v)
    coded = [code(strong), code(weak)]
    widths, _ = allocate(coded, sum(coded[0].costs[w] for w in (3, 3)))
    assert int(widths[0].sum()) >= 4
    assert not bool(widths[1].any())


def test_zero_components_are_never_stored() -> None:
    zero = components(torch.randn(3, 16), torch.zeros(16, 3), 1.0)
    coded = [code(zero)]
    assert least(coded) is None
    assert allocate(coded, 10**6)[1] == 0
    assert pack(coded, [torch.zeros(3, dtype=torch.int64)]) == [()]


def test_the_least_allocation_is_one_component() -> None:
    coded = [code(c) for c in matrices([(3, 64, 64), (2, 16, 24)])]
    widths = least(coded)
    assert widths is not None
    assert [int((w > 0).sum()) for w in widths] == [0, 1]
