"""Descent on codes and scales of a whole matrix in the norm tr(E S E^T), after a walk that never came back to any.

``refitted``: for fixed codes the error is quadratic in a row's scales s_g, so all of them are solved for at once:
    sum_h <u_g, S_gh u_h> s_h = <u_g, (S (x - t))_g>      u: level minus zero point, t: shifts, g and h: groups
``swept``: each code takes the level nearest to x_j + sum_{i!=j} e_i S_ij / S_jj, the other errors e_i as they are.

Neither step can raise the error (up to the rounding of scales to fp16). Columns are swept in blocks, with one product
per block for what the others see of it.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bitloft.solvers.blocks import BLOCK
from bitloft.solvers.grids import Grids
from bitloft.solvers.metric import Metric

ROWS = 1 << 20  # numbers of the normal equations solved at once
LEAST = 0.25  # of a scale: a refit below it (or negative) is numerical noise of a group that matters little


def refitted(
    x: Float[Tensor, "rows columns"], codes: UInt8[Tensor, "rows columns"], grids: Grids, metric: Metric
) -> Grids:
    """The scales of least error for the codes, zero points and shifts as they are."""
    fixed = grids.map(torch.zeros_like(grids.scales), grids.zeros, grids.shifts).values(codes)
    scales = least_scales(x - fixed, grids.units(codes), grids.scales, grids.size, metric)
    return grids.map(scales, grids.zeros, grids.shifts)


def least_scales(
    x: Float[Tensor, "rows columns"],
    units: Float[Tensor, "rows columns"],
    scales: Float[Tensor, "rows groups"],
    size: int,
    metric: Metric,
) -> Float[Tensor, "rows groups"]:
    """The scales of least error for what they multiply, ``units``; the old one where noise would decide."""
    moment, found = moment_of(metric, x), []
    step = max(ROWS // scales.shape[1] ** 2, 1)
    for wanted, unit, old in zip(x.split(step), units.split(step), scales.split(step), strict=True):
        right = _by_group((wanted @ moment) * unit, size)
        left = [
            _by_group((unit[:, g : g + size] @ moment[g : g + size]) * unit, size) for g in range(0, x.shape[1], size)
        ]
        matrix = torch.stack(left, dim=2).double()
        ridge = 1e-9 * matrix.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        matrix += ridge[:, None, None] * torch.eye(matrix.shape[1], dtype=torch.float64)
        new = torch.linalg.solve(matrix, right.double().unsqueeze(2)).squeeze(2).float()
        found.append(torch.where(new > LEAST * old, new, old))
    return torch.cat(found)


def swept(
    x: Float[Tensor, "rows columns"], codes: UInt8[Tensor, "rows columns"], grids: Grids, metric: Metric
) -> UInt8[Tensor, "rows columns"]:
    """Codes after one visit to every column, in order."""
    moment, codes = moment_of(metric, x), codes.clone()
    errors = x - grids.values(codes)
    pulls = errors @ moment  # kept equal to errors @ S
    middles = (grids.levels[1:] + grids.levels[:-1]) / 2
    for begin in range(0, x.shape[1], BLOCK):
        block = torch.arange(begin, min(begin + BLOCK, x.shape[1]))
        part = grids.of_columns(block)
        scales, zeros, shifts = (t.T.contiguous() for t in (part.scales, part.zeros, part.shifts))
        own, wanted = moment[block][:, block], x[:, block].T.contiguous()
        pull, before = pulls[:, block].T.contiguous(), errors[:, block].T.contiguous()
        after, chosen = before.clone(), codes[:, block].T.contiguous()
        for j in range(len(block)):
            aim = wanted[j] + pull[j] / own[j, j] - after[j]
            code = torch.bucketize((aim - shifts[j]) / scales[j].clamp_min(1e-30) + zeros[j], middles)
            error = wanted[j] - ((grids.levels[code] - zeros[j]) * scales[j] + shifts[j])
            pull.addr_(own[:, j], error - after[j])
            after[j], chosen[j] = error, code
        codes[:, block] = chosen.T
        pulls.addmm_((after - before).T, moment[block])
    return codes


def moment_of(metric: Metric, x: Tensor) -> Float[Tensor, "columns columns"]:
    """S, or I where the metric is plain."""
    return torch.eye(x.shape[1]) if metric.moment is None else metric.moment


def _by_group(products: Float[Tensor, "rows columns"], size: int) -> Float[Tensor, "rows groups"]:
    """Sums over the groups of a row; the last one may be short."""
    pad = -products.shape[1] % size
    sums: Tensor = torch.nn.functional.pad(products, (0, pad)).unflatten(1, (-1, size)).sum(2)
    return sums
