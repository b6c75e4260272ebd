"""Trellis codes: what docs/format.md says a row stands for, what a walk finds, and where it is refused."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bitloft.errors import FormatError, KernelError
from bitloft.formats import Format, layout
from bitloft.kernels import plain, trellis
from bitloft.packed import PackedTensor, pack_planes, unpack_planes

WIDTHS = (1, 2, 3, 4)


def by_the_page(codes: bytes, bits: int, width: int) -> list[float]:
    """The levels of one row in sixty-fourths, bit by bit."""
    size = width // 8
    planes = [codes[p * size : (p + 1) * size] for p in range(bits)]

    def bit(plane: int, t: int) -> int:
        return planes[plane][t % width // 8] >> t % 8 & 1

    found = []
    for t in range(width):
        subset = 0
        for j, mask in enumerate(trellis.TAPS[bits]):
            summed = sum(bit(0, t - d) for d in range(9) if mask >> d & 1)
            subset += summed % 2 << j
        p = sum(bit(plane, t) << (plane - 1) for plane in range(1, bits))
        found.append(trellis.LEVELS[bits][subset + (p << len(trellis.TAPS[bits]))])
    return found


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("width", [8, 64, 104])
def test_values_are_those_of_the_page(bits: int, width: int) -> None:
    codes = torch.randint(-128, 128, (3, width // 8 * bits), dtype=torch.int8)
    values = trellis.levels_of(codes, bits, torch.float32) * 64
    for row, found in zip(codes, values, strict=True):
        assert by_the_page(row.numpy().tobytes(), bits, width) == found.tolist()


@pytest.mark.parametrize("bits", WIDTHS)
def test_planes_come_back(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 40), dtype=torch.uint8)
    packed = pack_planes(codes, bits)
    assert packed.shape == (3, 5 * bits)
    assert torch.equal(unpack_planes(packed, bits), codes)


def test_tables_are_their_own_mirror_image() -> None:
    for bits in WIDTHS:
        levels = trellis.LEVELS[bits]
        assert len(levels) == 2 ** (len(trellis.TAPS[bits]) + bits - 1)
        assert [-x for x in reversed(levels)] == list(levels)
        assert max(levels) == 127
        assert len(trellis.table(bits)) == 512 << (bits - 1)


# Squared error on a standard normal, a few thousandths above what long rows give; Lloyd-Max has the second number.
@pytest.mark.parametrize(
    ("bits", "most", "scalar"), [(1, 0.285, 0.363), (2, 0.0745, 0.1175), (3, 0.0202, 0.0345), (4, 0.0055, 0.0095)]
)
def test_a_walk_beats_a_scalar_code(bits: int, most: float, scalar: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 512)
    packed = plain.encode(x, f"trellis{bits}:row")
    error = float((x - plain.decode(packed)).square().mean())
    assert error < most < scalar
    assert packed.codes.shape == (8, 64 * bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_walk_is_cheaper(bits: int) -> None:
    """Of fourteen steps from a state and back to it the last eight are given: all 64 walks are tried."""
    torch.manual_seed(1)
    start, z, weights = torch.tensor([0b10110010, 0]), torch.randn(2, 14), torch.rand(14)
    levels = torch.tensor(trellis.LEVELS[bits]).view(-1, 2 ** len(trellis.TAPS[bits])) / 64

    def cost(row: int, states: list[int]) -> float:
        total = 0.0
        for t, (old, new) in enumerate(pairwise(states)):
            subset = sum(
                ((old << 1 | new & 1) & mask).bit_count() % 2 << j for j, mask in enumerate(trellis.TAPS[bits])
            )
            total += float(weights[t] * (z[row, t] - levels[:, subset]).square().min())
        return total

    found = trellis._states(z, weights, bits, start)
    for row, first in enumerate(start.tolist()):
        costs = []
        for free in range(64):
            states = [first]
            for bit in f"{free:06b}{first:08b}":
                states.append((states[-1] << 1 | int(bit)) & 255)
            assert states[-1] == first
            costs.append(cost(row, states))
        assert cost(row, found[row].tolist()) == pytest.approx(min(costs), rel=1e-5)


def test_levels_come_back_as_they_are() -> None:
    torch.manual_seed(2)
    for bits in WIDTHS:
        fmt = Format.parse(f"trellis{bits}:unit")
        values = trellis.levels_of(torch.randint(-128, 128, (4, 20 * bits), dtype=torch.int8), bits, torch.float32)
        assert torch.equal(plain.decode(trellis.encode(values, fmt)), values)
        # columns that are cut off leave the walk free
        assert torch.equal(plain.decode(trellis.encode(values[:, :155], fmt)), values[:, :155])


def test_weights_move_the_error_to_where_it_is_cheap() -> None:
    torch.manual_seed(3)
    x, weights = torch.randn(6, 256), torch.where(torch.arange(256) % 2 == 0, 10.0, 0.1)
    fmt = Format.parse("trellis2:row")

    def lost(packed: PackedTensor) -> Tensor:
        return (weights * (x - plain.decode(packed)).square()).sum(1)

    assert bool((lost(trellis.encode(x, fmt, weights)) < 0.8 * lost(trellis.encode(x, fmt))).all())


def test_heavy_tails_get_a_larger_scale() -> None:
    torch.manual_seed(4)
    x = torch.randn(4, 512)
    heavy = x * x.abs()
    start = heavy.square().mean(1, keepdim=True).sqrt() / trellis.SPREAD[4]
    alone = trellis._fit(heavy, torch.ones(512), 4, start)[2]
    found, scales = trellis.coded(heavy, torch.ones(512), 4)
    lost = (heavy - scales * found.levels).square().sum(1)
    assert bool((lost < 0.8 * (heavy.square().sum(1) - alone.squeeze(1))).all())


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 3, 12), (1,)])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    packed = plain.encode(torch.randn(shape), "trellis3:row")
    assert packed.shape == shape
    assert plain.decode(packed).shape == shape


def test_a_row_of_zeros_is_zero() -> None:
    assert torch.equal(plain.decode(plain.encode(torch.zeros(2, 40), "trellis2:row")), torch.zeros(2, 40))


def test_what_cannot_be_coded_is_refused() -> None:
    with pytest.raises(KernelError, match="it holds NaN or infinity"):
        plain.encode(torch.tensor([[1.0, float("nan")]]), "trellis2:row")
    for spelling in ("trellis2:64+dq", "trellis2:row+dq", "trellis2:row+shift", "trellis2:64+shift", "trellis2:tensor"):
        with pytest.raises(FormatError, match=r"trellis2:row"):
            Format.parse(spelling)
    assert "zeros" not in layout((2, 8), Format.parse("trellis4:unit"))
