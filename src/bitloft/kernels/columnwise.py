"""Trellis codes that run down the columns of a matrix [rows, columns], with scales in groups along its rows.

    value[o, i] = scale[o, i // group] * level[i, o]       level[i]: one row of ``trellis?:unit``, of length ``rows``

Error feedback chooses the codes of one column after the other, each correcting the errors before it. Codes along a row
would have to be chosen together across the very columns between which errors are fed (a search that carries the errors
of every survivor, ``docs/decisions.md``); down a column they are one walk, whose steps weigh scale^2.

A matrix is a transposed one of bare levels (``bare``), which every kernel of trellis codes decodes, times scales
(``scaled``). Products go through it a tile of columns at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitloft.formats import UNIT, Format
from bitloft.kernels.trellis import SPREAD
from bitloft.packed import PackedTensor, pack_scales, scales_of

TILE = 1 << 20  # values of a tile

Columns = slice | Int[Tensor, " some"]
Tiles = Iterator[tuple[slice, Float[Tensor, "columns rows"]]]  # of the transposed matrix, in the dtype of a product
Decode = Callable[[PackedTensor, torch.dtype], Tensor]
Walk = Callable[[Tensor, Format, Tensor], PackedTensor]  # rows of values, a :unit format, weights -> their codes


def encode(x: Float[Tensor, "*shape"], fmt: Format, walk: Walk, levels_of: Decode) -> PackedTensor:
    """Codes of ``x`` under the scale that gives each group the size that levels are made for, then the scales of least
    squared error for them; ``x`` finite and not empty."""
    columns = x.shape[-1]
    rows = x.detach().reshape(prod(x.shape[:-1]), columns).float()
    scales, codes = rows.new_zeros(len(rows), fmt.groups(columns)), []
    for group, part in enumerate(rows.split(fmt.group, dim=1)):
        found = walked(part.T, natural_scales(part, fmt.bits), fmt, walk)
        level = levels_of(found, torch.float32).T
        norm = level.square().sum(1)
        scales[:, group] = ((part * level).sum(1) / norm.clamp_min(1e-30)).clamp_min(0)
        codes.append(found.codes)
    return assembled(tuple(x.shape), fmt, torch.cat(codes), scales)


def natural_scales(part: Float[Tensor, "rows size"], bits: int) -> Float[Tensor, " rows"]:
    """What gives each row the spread that the levels are made for."""
    return part.square().mean(1).sqrt() / SPREAD[bits]


def walked(
    aims: Float[Tensor, "columns rows"], scales: Float[Tensor, " rows"], fmt: Format, walk: Walk
) -> PackedTensor:
    """Codes of the columns ``aims`` under one scale for each row: [columns, rows] in ``:unit``."""
    weights = scales.square() / scales.square().mean().clamp_min(1e-30)
    units = aims * torch.where(scales > 1e-30, 1 / scales, torch.zeros_like(scales))
    return walk(units, replace(fmt, group=UNIT), weights)


def assembled(shape: tuple[int, ...], fmt: Format, codes: Tensor, scales: Float[Tensor, "rows groups"]) -> PackedTensor:
    """Codes [columns, bytes] and scales as they are stored."""
    stored, exponent = pack_scales(scales)
    return PackedTensor.from_tensors(fmt, shape, {"codes": codes, "scales": stored, "exponent": exponent})


def bare(packed: PackedTensor, columns: Columns = slice(None)) -> PackedTensor:
    """The levels of some columns as a packed tensor of their own, [columns, rows]; of a range it shares memory."""
    codes, rows = packed.codes[columns], packed.numel // max(packed.shape[-1], 1)
    none = packed.scales.new_zeros(len(codes), 0)
    return PackedTensor(replace(packed.format, group=UNIT), (len(codes), rows), codes, none, packed.exponent)


def scaled(
    levels: Float[Tensor, "columns rows"], packed: PackedTensor, columns: Columns = slice(None)
) -> Float[Tensor, "columns rows"]:
    """``levels`` of some columns times their scales, in place."""
    scales = scales_of(packed, slice(None), levels.dtype).T
    numbers = torch.arange(packed.shape[-1], device=levels.device)[columns]
    return levels.mul_(scales[numbers // packed.format.group])


def decode(packed: PackedTensor, dtype: torch.dtype, levels_of: Decode) -> Float[Tensor, "*shape"]:
    """The values of ``packed``; ``levels_of`` decodes ``bare``."""
    return scaled(levels_of(bare(packed), dtype), packed).T.reshape(packed.shape)


def some(
    packed: PackedTensor, columns: Int[Tensor, " some"], dtype: torch.dtype, levels_of: Decode
) -> Float[Tensor, "rows some"]:
    """The values of some columns, by number."""
    return scaled(levels_of(bare(packed, columns), dtype), packed, columns).T


def tiles(packed: PackedTensor, dtype: torch.dtype, levels_of: Decode) -> Tiles:
    """The transposed matrix, some columns of it at a time, of about TILE values."""
    rows, count = packed.shape
    step = max(TILE // max(rows, 1), 1)
    for begin in range(0, count, step):
        columns = slice(begin, min(begin + step, count))
        yield columns, scaled(levels_of(bare(packed, columns), dtype), packed, columns)


def linear(x: Float[Tensor, "*batch columns"], packed: PackedTensor, transposed: Tiles) -> Float[Tensor, "*batch rows"]:
    """x @ decode(packed).T in the dtype of ``x``; sums over more than one tile are float32."""
    y: Tensor | None = None
    for columns, tile in transposed:
        part = x[..., columns] @ tile
        y = part if y is None else y.float() + part
    return x.new_zeros(*x.shape[:-1], packed.shape[0]) if y is None else y.to(x.dtype)


def grad_input(
    grad: Float[Tensor, "*batch rows"], packed: PackedTensor, transposed: Tiles
) -> Float[Tensor, "*batch columns"]:
    """grad @ decode(packed) in the dtype of ``grad``."""
    out = grad.new_empty(*grad.shape[:-1], packed.shape[1])
    for columns, tile in transposed:
        out[..., columns] = grad @ tile.T
    return out
