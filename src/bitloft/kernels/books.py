"""Levels learned per matrix (``book2``, ``book3``): Lloyd's algorithm on values divided by their group's scale.

The error that counts is |x - s*l|^2, so a value's weight is s^2; scales and levels are refitted in turn (the weighted
Lloyd-Max of LowRA, arXiv 2502.08141, section 4.2, per matrix instead of per output channel). A sample of groups is
enough for a handful of levels. Levels are rounded to fp16 as they are stored before any code is chosen.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.formats import Format

SAMPLE = 1 << 17  # values: 2 bits learn 4 numbers from them
ROUNDS = 12


def learn_levels(rows: Float[Tensor, "rows columns"], fmt: Format) -> tuple[float, ...]:
    """2**bits ascending levels for the groups of ``rows``, exact in fp16; the starting ones for an all-zero matrix."""
    x = _sample(rows, fmt)
    if fmt.shift:
        x = x - x.mean(1, keepdim=True)
    scales = x.square().mean(1, keepdim=True).sqrt()
    keep = scales.squeeze(1) > 0
    x, scales = x[keep], scales[keep]
    levels = torch.tensor(fmt.levels, device=rows.device)
    for _ in range(ROUNDS if x.numel() else 0):
        codes = torch.bucketize(x / scales, (levels[1:] + levels[:-1]) / 2)
        weight = scales.square().expand_as(x)
        total = torch.zeros_like(levels).scatter_add_(0, codes.view(-1), (weight * x / scales).view(-1))
        count = torch.zeros_like(levels).scatter_add_(0, codes.view(-1), weight.reshape(-1))
        levels = torch.where(count > 0, total / count.clamp_min(1e-30), levels).sort().values
        values = levels[codes]
        scales = (values * x).sum(1, keepdim=True) / values.square().sum(1, keepdim=True).clamp_min(1e-30)
        scales = scales.clamp_min(float(x.abs().amax()) * 1e-6)
    return _distinct(levels.half().float(), fmt)


def _sample(rows: Tensor, fmt: Format) -> Float[Tensor, "groups size"]:
    """Whole groups spread evenly over the matrix; a ragged last group is left out unless there is no other."""
    columns = rows.shape[1]
    size = min(fmt.group_size(columns), columns)
    whole = rows[:, : columns // size * size].reshape(-1, size)
    step = max(whole.numel() // SAMPLE, 1)
    return whole[::step]


def _distinct(levels: Tensor, fmt: Format) -> tuple[float, ...]:
    """Ascending levels; where a matrix has fewer values than levels, codes need not differ, but an order must exist."""
    if bool(torch.isfinite(levels).all()) and float(levels.abs().amax()) > 0:
        return tuple(levels.tolist())
    return tuple(torch.tensor(fmt.levels).half().float().tolist())
