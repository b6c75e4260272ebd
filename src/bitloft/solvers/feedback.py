"""Codes chosen one after the other, each correcting the errors made so far: GPTQ's error feedback (arXiv 2210.17323).

With S = L L^T (L lower) the weighed square of an error e is |e L|^2 = sum_j (sum_{i>=j} e_i L_ij)^2. From the last
entry to the first, the term of j is least for the level nearest to x_j + sum_{i>j} e_i L_ij / L_jj. GPTQ walks
the other way with the Cholesky factor of S^-1; the two are the same up to the order, and this one inverts nothing.

Columns are walked in blocks. With the errors e_d of the blocks done, the values that block b would take if it were
continuous are T = X_b + e_d L_db L_bb^-1, and its part of the error is |(T - Q) L_bb|^2: the block is a small problem
of its own. So the scale of a group is searched there, in the metric that counts and on the values that will be coded:
a few scales around the one of least plain error are walked side by side, then the least-squares scale of the best
codes. (GPTQ takes the range of the group instead; a grid that ends at the extremes wastes half of four levels.)

A walk never comes back to a code; ``sweeps`` do.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from bitloft.formats import Format
from bitloft.kernels.encoding import pack_zeros
from bitloft.kernels.ops import encode
from bitloft.kernels.search import codes_and_scales
from bitloft.packed import (
    PackedTensor,
    double_quantize,
    pack_bits,
    pack_halves,
    scale_exponent,
)
from bitloft.solvers.blocks import SEARCHED, blocks_of, pulled
from bitloft.solvers.columns import trellised
from bitloft.solvers.grids import Grids
from bitloft.solvers.metric import Metric
from bitloft.solvers.sweeps import refitted, swept

TRIED = (0.75, 0.87, 1.0, 1.15)  # multiples of the scale of least plain error
REFITS = 2


class Fed(NamedTuple):
    codes: UInt8[Tensor, "rows size"]
    values: Float[Tensor, "rows size"]


def fed_forward(
    x: Float[Tensor, "rows columns"], packed: PackedTensor, root: Float[Tensor, "columns columns"]
) -> PackedTensor:
    """``packed`` with codes chosen anew for ``x`` under the metric of ``root`` = L; scales, zeros and shifts stay."""
    return _with_codes(packed, _walk(x, packed.format, Grids.of(packed), root, None, search=False))


def quantized(x: Float[Tensor, "rows columns"], fmt: Format, metric: Metric, sweeps: int = 0) -> PackedTensor:
    """``x`` in ``fmt`` by error feedback under ``metric``, scales searched in it; nearest codes where it is I.

    Scales of groups over SEARCHED values (or of rows, tensors and none) are those of least plain error; ``sweeps``
    refit scales of groups and rows, but not those that are coded themselves (+dq). Codes that lie by column are walked
    (``columns``).
    """
    plain = encode(x, fmt, ranges=fmt.family == "uniform" and not fmt.has_shifts)
    root, order = metric.root, metric.order
    if root is None or fmt.family == "half":  # nothing correlates; or nothing is coded
        return plain
    if fmt.by_column:
        return trellised(x, plain, metric, sweeps)
    grids = Grids.of(plain)
    search = fmt.group > 0 and min(fmt.group, x.shape[1]) <= SEARCHED
    codes = _walk(x, fmt, grids, root, order, search=search)
    packed = _assembled(plain, codes, grids) if search else _with_codes(plain, codes)
    if fmt.dq:  # rounds scales by more than codes can be left as they are for
        grids = Grids.of(packed)
        codes = _walk(x, fmt, grids, root, order, search=False)
    for _ in range(sweeps):
        grids = refitted(x, codes, grids, metric) if fmt.group >= 0 and not fmt.dq else grids
        codes = swept(x, codes, grids, metric)
    return _with_codes(packed, codes) if fmt.dq or fmt.group < 0 else _assembled(plain, codes, grids)


def _walk(
    x: Float[Tensor, "rows columns"],
    fmt: Format,
    grids: Grids,
    root: Float[Tensor, "columns columns"],
    order: Int[Tensor, " columns"] | None,
    *,
    search: bool,
) -> UInt8[Tensor, "rows columns"]:
    """Codes of all columns, block by block; with ``search`` the grids are replaced by better ones on the way."""
    size = grids.size
    order = torch.arange(x.shape[1]) if order is None else order
    codes = torch.zeros(x.shape, dtype=torch.uint8)
    errors = torch.zeros_like(x)  # in the order of the walk
    permuted = x[:, order]
    for block in reversed(blocks_of(order // size, whole=search)):
        own, target = root[block, block], pulled(permuted, errors, root, block)
        if search:
            found = _searched(target, own, fmt, grids, int(order[block.start]) // size)
        else:
            found = _feed(target, own, grids.of_columns(order[block]))
        chosen, values = found
        codes[:, order[block]] = chosen
        errors[:, block] = permuted[:, block] - values
    return codes


def _feed(target: Float[Tensor, "rows size"], root: Float[Tensor, "size size"], grid: Grids) -> Fed:
    """Codes and values of one block, from its last column to its first; ``grid`` of each entry, or one per row."""
    levels = grid.levels
    middles = (levels[1:] + levels[:-1]) / 2
    weights = (root / root.diagonal()).T.contiguous()  # row j: L_ij / L_jj
    size = target.shape[1]
    rows = target.T.contiguous()  # a column of the matrix is contiguous
    scales, zeros, shifts = (part.T.expand(size, -1) for part in (grid.scales, grid.zeros, grid.shifts))
    inverse = 1 / scales.clamp_min(1e-30)
    errors, codes = torch.zeros_like(rows), torch.zeros(rows.shape, dtype=torch.uint8)
    for j in reversed(range(size)):
        aim = rows[j] + weights[j, j + 1 :] @ errors[j + 1 :]
        code = torch.bucketize((aim - shifts[j]) * inverse[j] + zeros[j], middles)
        errors[j] = rows[j] - ((levels[code] - zeros[j]) * scales[j] + shifts[j])
        codes[j] = code
    return Fed(codes.T, (rows - errors).T)


def _searched(
    target: Float[Tensor, "rows size"],
    root: Float[Tensor, "size size"],
    fmt: Format,
    grids: Grids,
    group: int,
) -> Fed:
    """Codes and values of one group under the best grid of each row, which is put into ``grids``.

    The best of a few scales, then its least-squares refit while that helps.
    """
    levels = grids.levels
    plain = codes_and_scales(target.contiguous(), None, fmt, tuple(levels.tolist()), fmt.has_zeros)
    count, tries = target.shape[0], len(TRIED)
    zeros = torch.zeros_like(plain.scales) if plain.zeros is None else plain.zeros.float()
    shifts = torch.zeros_like(plain.scales) if plain.shifts is None else plain.shifts
    center = plain.scales * (levels[0] + levels[-1]) / 2 if fmt.has_shifts else torch.zeros_like(shifts)
    grid = grids.map(
        torch.cat([plain.scales * m for m in TRIED]),
        zeros.repeat(tries, 1),
        torch.cat([shifts + center * (1 - m) for m in TRIED]),
    )
    fed, loss = _tried(target.repeat(tries, 1), root, grid)
    best = loss.view(tries, count).argmin(0) * count + torch.arange(count)
    grid, fed, loss = grid.of_rows(best), Fed(fed.codes[best], fed.values[best]), loss[best]
    for _ in range(REFITS):
        fitted = _refit(target, fed.values, root, grid, shifted=fmt.has_shifts)
        moved, again = _tried(target, root, fitted)
        better = (again < loss).unsqueeze(1)
        grid = grid.where(better, fitted)
        fed = Fed(torch.where(better, moved.codes, fed.codes), torch.where(better, moved.values, fed.values))
        loss = torch.minimum(loss, again)
    grids.put(group, grid)
    return fed


def _tried(
    target: Float[Tensor, "rows size"], root: Float[Tensor, "size size"], grid: Grids
) -> tuple[Fed, Float[Tensor, " rows"]]:
    """What a grid gives, and |(T - Q) L|^2 of each row."""
    fed = _feed(target, root, grid)
    return fed, ((target - fed.values) @ root).square().sum(1)


def _refit(
    target: Float[Tensor, "rows size"],
    values: Float[Tensor, "rows size"],
    root: Float[Tensor, "size size"],
    grid: Grids,
    *,
    shifted: bool,
) -> Grids:
    """The scale (and shift) of least |(T - s*V - t) L|^2 for the codes as they are."""
    units = (values - grid.shifts) / grid.scales.clamp_min(1e-30) @ root
    wanted = (target if shifted else target - grid.shifts) @ root
    norm = units.square().sum(1, keepdim=True).clamp_min(1e-30)
    if not shifted:
        return grid.map((wanted * units).sum(1, keepdim=True).div(norm).clamp_min(1e-30), grid.zeros, grid.shifts)
    ones = root.sum(0, keepdim=True)  # a row of ones, as the metric sees it
    cross, own = units @ ones.T, ones.square().sum()
    a, b = (wanted * units).sum(1, keepdim=True), wanted @ ones.T
    determinant = (norm * own - cross.square()).clamp_min(1e-30)
    scales = ((a * own - b * cross) / determinant).clamp_min(1e-30)
    return grid.map(scales, grid.zeros, (b - scales * cross) / own)


def _with_codes(packed: PackedTensor, codes: UInt8[Tensor, "rows columns"]) -> PackedTensor:
    fmt, columns = packed.format, packed.shape[1]
    padded = torch.nn.functional.pad(codes, (0, fmt.width(columns) - columns))
    return PackedTensor.from_tensors(fmt, packed.shape, packed.tensors() | {"codes": pack_bits(padded, fmt.bits)})


def _assembled(plain: PackedTensor, codes: UInt8[Tensor, "rows columns"], grids: Grids) -> PackedTensor:
    """``plain`` with other codes and grids."""
    fmt = plain.format
    exponent = scale_exponent(grids.scales, grids.shifts) if fmt.has_shifts else scale_exponent(grids.scales)
    parts = plain.tensors() | {"exponent": exponent}
    if fmt.dq:
        stored = double_quantize(grids.scales, exponent)
        parts |= {"scales": stored.codes, "scale_low": stored.low, "scale_step": stored.step}
    else:
        parts["scales"] = pack_halves(grids.scales, exponent)
    if fmt.has_shifts:
        parts["shifts"] = pack_halves(grids.shifts, exponent)
    if fmt.has_zeros:
        parts["zeros"] = pack_zeros(grids.zeros.to(torch.uint8), fmt.bits)
    return _with_codes(PackedTensor.from_tensors(fmt, plain.shape, parts), codes)
