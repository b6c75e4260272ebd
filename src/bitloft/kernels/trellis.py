"""Trellis codes: neighbouring values share their choices, which leaves a quarter to two fifths less squared error.

A row of n values in k bits is k planes of n bits (``packed.pack_planes``), read in a circle. With c the first plane,

    value[t] = scale / 64 * LEVELS[k][subset + 2**len(TAPS[k]) * p]
    bit j of the subset = parity of TAPS[k][j] & (c[t], c[t-1], ..., c[t-8]; the first lowest),   p = the other planes

A scalar code has 2**k levels for a value whatever its neighbours are. Here a value has four to sixteen times as many,
and nine neighbouring bits decide together which of them can be had (trellis coded quantization: Marcellin and Fischer
1990; taps on a sliding window as in QTIP, arXiv 2406.11235). Squared error on a standard normal, against Lloyd-Max:
0.271 and 0.363 at one bit, 0.071 and 0.118 at two, 0.0191 and 0.0345 at three, 0.0051 and 0.0095 at four
(``bench/trellis_code.py``, which also makes taps and levels). Only one bit a value enters the window, so 256 states
serve all widths and codes are found by one Viterbi walk; the alternative, all k bits in the window, forgets k times as
fast.

What is here is the definition, in plain torch; ``cpu_trellis`` gives the same bytes and values.
"""

from functools import cache
from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int8, UInt8
from torch import Tensor
from torch.nn.functional import pad

from bitloft.errors import KernelError
from bitloft.formats import UNIT, Format
from bitloft.packed import PackedTensor, pack_planes, pack_scales, unpack_planes

MEMORY = 8  # earlier bits that a value depends on
STATES = 1 << MEMORY
LEVEL_UNIT = 1 / 64
CLIMB, CLIMBS = 1.2, 4  # from a scale to the next larger one that is tried, and how often
HEAVY = 3.4  # the kurtosis above which they are; 3 is a normal distribution's
TAIL = 128  # values before and after a row's ends, read in a circle, that decide its first state
NORMALIZE = 64  # steps after which the least cost is taken off all, so that float32 keeps its digits
FAR = 1e30  # the cost of a state that no walk may begin in

# Which of the last nine bits (the newest lowest) each bit of the subset sums up.
TAPS = {
    1: (0x1A7, 0x086, 0x054, 0x1D7),
    2: (0x146, 0x0E4, 0x04A, 0x1DF),
    3: (0x0AC, 0x0D6, 0x157),
    4: (0x064, 0x1D6, 0x0ED),
}
# Levels by subset, 2**len(TAPS) of them, and then by p, in units of LEVEL_UNIT: the upper half, whose mirror image is
# the lower one.
_POSITIVE = {
    1: (19, 14, 35, 35, 57, 60, 87, 127),
    2: (4, 5, 13, 13, 22, 25, 32, 35, 43, 47, 55, 59, 72, 80, 93, 127),
    3: (2, 6, 10, 15, 19, 24, 28, 33, 38, 44, 51, 57, 66, 78, 96, 127),
    4: (1, 2, 5, 6, 8, 10, 12, 14, 15, 17, 20, 22, 23, 25, 28, 30, 32, 34, 37, 39, 42, 44, 47, 51, 54, 58, 63, 69,
        77, 87, 103, 127),
}  # fmt: skip
LEVELS: dict[int, tuple[float, ...]] = {
    bits: (*(-x for x in reversed(half)), *half) for bits, half in _POSITIVE.items()
}
# Standard deviation of the values for which those levels were made.
SPREAD = {1: 1.1419, 2: 0.8395, 3: 0.7431, 4: 0.6512}


class Found(NamedTuple):
    """Codes (bit 0 in the first plane) and the levels that they stand for."""

    codes: UInt8[Tensor, "rows width"]
    levels: Float[Tensor, "rows width"]


@cache
def table(bits: int) -> tuple[float, ...]:
    """The level of every window and p: entry w + 512 p, where bit i of w is c[t-8+i] (as the bytes have them)."""
    taps, levels = TAPS[bits], LEVELS[bits]
    found = []
    for entry in range(2 * STATES << (bits - 1)):
        window = int(f"{entry % (2 * STATES):09b}"[::-1], 2)  # the newest lowest
        subset = sum((window & mask).bit_count() % 2 << j for j, mask in enumerate(taps))
        found.append(levels[subset + (entry // (2 * STATES) << len(taps))] * LEVEL_UNIT)
    return tuple(found)


def levels_of(codes: Int8[Tensor, "rows bytes"], bits: int, dtype: torch.dtype) -> Float[Tensor, "rows width"]:
    """The level of every value of some rows, without scales."""
    return _levels(unpack_planes(codes, bits), bits, dtype)


def decode(packed: PackedTensor, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
    """The levels of a matrix in ``:unit``."""
    return levels_of(packed.codes, packed.format.bits, dtype)[:, : packed.shape[-1]]


def _levels(codes: UInt8[Tensor, "rows width"], bits: int, dtype: torch.dtype) -> Float[Tensor, "rows width"]:
    first = codes.int() & 1
    window = codes.int() >> 1 << (MEMORY + 1)
    for i in range(MEMORY + 1):
        window += first.roll(MEMORY - i, 1) << i
    values: Tensor = torch.tensor(table(bits), dtype=dtype, device=codes.device)[window]
    return values


def encode(
    x: Float[Tensor, "*shape"],
    fmt: Format,
    weights: Float[Tensor, " columns"] | None = None,
) -> PackedTensor:
    """The codes of least squared error that a walk finds, in ``row`` formats with the scale that fits them best.

    The walk is on x / start, start being what gives a row the size that the levels are made for. Rows with heavy tails
    would be clipped (a 4-bit code then loses half of its lead over a scalar one): larger starts are tried for them.
    ``weights`` are what an error of each column costs (None: all alike). Raises KernelError on NaN or infinity.
    """
    columns = x.shape[-1]
    rows = x.detach().reshape(prod(x.shape[:-1]), columns).float().contiguous()
    mass = rows.new_ones(columns) if weights is None else weights.to(rows)
    if not bool(torch.isfinite(rows).all() and torch.isfinite(mass).all()):
        raise KernelError(f"cannot encode a tensor of shape {tuple(x.shape)} to {fmt}: it holds NaN or infinity.")
    if fmt.group == UNIT or not rows.numel():
        found, scales = walked(rows, mass, fmt.bits), rows.new_ones(rows.shape[0], 1)
    else:
        found, scales = coded(rows, mass, fmt.bits)
    return assembled(tuple(x.shape), fmt, pack_planes(found.codes, fmt.bits), scales)


def assembled(
    shape: tuple[int, ...], fmt: Format, codes: Int8[Tensor, "rows bytes"], scales: Float[Tensor, "rows 1"]
) -> PackedTensor:
    """Codes and scales as they are stored; a format without scales leaves them out."""
    kept = scales[:, : fmt.groups(shape[-1])]
    stored, exponent = pack_scales(kept)
    return PackedTensor.from_tensors(fmt, shape, {"codes": codes, "scales": stored, "exponent": exponent})


def coded(
    x: Float[Tensor, "rows columns"], weights: Float[Tensor, " columns"], bits: int
) -> tuple[Found, Float[Tensor, "rows 1"]]:
    """Codes and the scale of each row. Sums run left to right in double (a running sum of torch does)."""
    wide, mass = x.double(), weights.double()
    square, fourth, total = _total(mass * wide * wide), _total(mass * wide * wide * wide * wide), mass.cumsum(0)[-1:]
    start = ((square / total).nan_to_num(0.0).sqrt() / SPREAD[bits]).float()
    found, scales, gain = _fit(x, weights, bits, start)
    climbing = fourth * total > HEAVY * square * square
    for _ in range(CLIMBS):
        start = start * CLIMB
        again, larger, more = _fit(x, weights, bits, start)
        climbing &= more > gain
        found = Found(*(torch.where(climbing, new, old) for new, old in zip(again, found, strict=True)))
        scales, gain = torch.where(climbing, larger, scales), torch.where(climbing, more, gain)
    return found, scales


def _fit(
    x: Float[Tensor, "rows columns"], weights: Float[Tensor, " columns"], bits: int, start: Float[Tensor, "rows 1"]
) -> tuple[Found, Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
    """Codes of x / start, the scale of least error for them, and what it takes off the square of each row."""
    found = walked(x * torch.where(start > 1e-30, 1 / start, torch.zeros_like(start)), weights, bits)
    level, wide, mass = found.levels[:, : x.shape[1]].double(), x.double(), weights.double()
    inner, norm = _total(mass * wide * level), _total(mass * level * level)
    fits = inner > 0
    return found, torch.where(fits, inner / norm, 0.0).float(), torch.where(fits, inner * inner / norm, 0.0)


def _total(terms: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows 1"]:
    return terms.cumsum(1)[:, -1:]


def walked(z: Float[Tensor, "rows columns"], weights: Float[Tensor, " columns"], bits: int) -> Found:
    """The codes whose levels are nearest to ``z``: a walk around the ends of each row decides the state that it begins
    and ends in, a second one the codes. Columns beyond the row count for nothing."""
    padding = -z.shape[1] % 8
    z, weights = pad(z, (0, padding)), pad(weights, (0, padding))
    width = z.shape[1]
    if not z.numel():
        return Found(torch.zeros(z.shape, dtype=torch.uint8, device=z.device), z)
    around = torch.arange(-TAIL, TAIL, device=z.device) % width
    states = _states(z[:, around], weights[around], bits, None)
    first = _states(z, weights, bits, states[:, TAIL])[:, 1:] & 1
    window = sum(first.roll(d, 1) << d for d in range(MEMORY + 1))
    subset = _subsets(bits, str(z.device))[window]
    count = 1 << len(TAPS[bits])
    levels = torch.tensor(LEVELS[bits], device=z.device, dtype=torch.float32) * LEVEL_UNIT
    choices = levels.view(-1, count).T[subset]
    p = (z.unsqueeze(-1) - choices).square().argmin(-1)
    return Found((first | p << 1).to(torch.uint8), choices.gather(-1, p.unsqueeze(-1)).squeeze(-1))


def _states(
    z: Float[Tensor, "rows steps"],
    weights: Float[Tensor, " steps"],
    bits: int,
    start: Int[Tensor, " rows"] | None,
) -> Int[Tensor, "rows states"]:
    """The states before, between and after the steps of the cheapest walk: from any state, or from ``start`` to it."""
    decisions: list[Bool[Tensor, "rows states"]] = []
    new = torch.arange(STATES, device=z.device)
    subsets, older = _subsets(bits, str(z.device)), new >> 1
    levels = torch.tensor(LEVELS[bits], device=z.device, dtype=torch.float32) * LEVEL_UNIT
    cost = z.new_zeros(z.shape[0], STATES)
    if start is not None:
        cost += FAR
        cost.scatter_(1, start.unsqueeze(1), 0.0)
    for t, column in enumerate(z.T):
        distance = (column.unsqueeze(1) - levels).square().view(len(column), -1, 1 << len(TAPS[bits])).amin(1)
        distance = distance * weights[t]
        kept = cost[:, older] + distance[:, subsets[:STATES]]
        other = cost[:, older | STATES // 2] + distance[:, subsets[STATES:]]
        decisions.append(other < kept)
        cost = torch.where(decisions[-1], other, kept)
        if t % NORMALIZE == NORMALIZE - 1:
            cost = cost - cost.amin(1, keepdim=True)
    state = cost.argmin(1) if start is None else start
    found = [state]
    for chosen in reversed(decisions):
        oldest = chosen.gather(1, state.unsqueeze(1)).squeeze(1).long()
        state = state >> 1 | oldest << (MEMORY - 1)
        found.append(state)
    return torch.stack(found[::-1], 1)


@cache
def _subsets(bits: int, device: str) -> Int[Tensor, " windows"]:
    """The subset of every window, the newest bit lowest."""
    every = (sum((w & mask).bit_count() % 2 << j for j, mask in enumerate(TAPS[bits])) for w in range(2 * STATES))
    return torch.tensor(list(every), device=device)
