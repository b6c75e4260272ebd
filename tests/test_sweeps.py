"""Descent on codes and scales: neither step raises the error, a refit is the least-squares solution."""

import pytest
import torch
from torch import Tensor

from bitloft.formats import Format
from bitloft.kernels.ops import encode
from bitloft.packed import unpack_bits
from bitloft.solvers.grids import Grids
from bitloft.solvers.metric import Metric, metric_of
from bitloft.solvers.sweeps import refitted, swept


def start(spelling: str, columns: int = 150) -> tuple[Tensor, Tensor, Grids, Metric]:
    x = torch.randn(7, columns)
    inputs = torch.randn(400, 8) @ torch.randn(8, columns) + 0.4 * torch.randn(400, columns)
    packed = encode(x, spelling)
    codes = unpack_bits(packed.codes, packed.format.bits, packed.format.width(columns))[:, :columns]
    return x, codes, Grids.of(packed), metric_of(inputs.T @ inputs / 400, Format.parse(spelling))


@pytest.mark.parametrize("spelling", ["lm2:64", "lm3:row", "uniform3:32", "uniform2:64+shift", "sign:128", "book2:64"])
def test_neither_step_raises_the_error(spelling: str) -> None:
    x, codes, grids, metric = start(spelling)
    error = metric.error(x - grids.values(codes))
    for _ in range(3):
        grids = refitted(x, codes, grids, metric)
        after = metric.error(x - grids.values(codes))
        assert after <= error * (1 + 1e-5)
        codes = swept(x, codes, grids, metric)
        error = metric.error(x - grids.values(codes))
        assert error <= after * (1 + 1e-5)


def test_the_refit_is_the_least_squares_solution_of_a_row() -> None:
    x, codes, grids, metric = start("lm2:64")
    found = refitted(x, codes, grids, metric)
    units = grids.units(codes)[3]
    design = torch.stack([torch.where(torch.arange(150) // 64 == g, units, 0.0) for g in range(3)])
    expected = torch.linalg.lstsq(metric.seen(design).T.double(), metric.seen(x[3:4]).T.double()).solution[:, 0]
    assert torch.allclose(found.scales[3].double(), expected, rtol=1e-3)


def test_without_a_moment_the_sweep_rounds_to_the_nearest_level() -> None:
    x, codes, grids, _ = start("lm2:64")
    scrambled = codes.flip(0)
    again = swept(x, scrambled, grids, Metric(None, None, None))
    assert (again != codes).float().mean() < 0.01  # scales were rounded to fp16 between the two
