"""Codes and scales of groups: nearest levels, and for Lloyd-Max codes the scale of least squared error.

A group ``g`` and codes with levels ``l`` have squared error ``|g - s*l|^2``, least at ``s = <g, l> / <l, l>``. For two
bits the codes of a symmetric quantizer are a split of the sorted magnitudes into low and high, so all splits are tried
at once from running sums: the optimum is exact, and one sort replaces a grid of passes. For three and four bits a
dozen candidates each get their nearest codes and least-squares scale, and the best one is kept.

The native encoder (``native/encode_groups.cpp``) gives the same bytes, so every step here is one that each machine
rounds alike: no fused multiply-add, and sums in one order (``_sum``), which a library's own sum does not promise.
"""

from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bitloft.formats import UNIT, Format

# Candidate scales, as multiples of the group's root mean square, and of the scale at which the largest value is not
# clipped (heavy tails). One refit each: at 4 bits 0.8 % above the error that 45 starts of six refits reach, at 3 bits
# 0.1 %; the alternation used before (five starts, two refits) was 2 % and 0.4 % above it for as many passes.
PARTS = (0.82, 0.88, 0.94, 1.0, 1.06, 1.12, 1.18)
EDGES = (0.6, 0.7, 0.8, 0.9, 1.0)
# Parts of the min-max range tried at each end by the range search of uniform codes.
SHRINKS = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)
LANES = 8  # running sums that make one sum


class Found(NamedTuple):
    codes: UInt8[Tensor, "groups size"]
    scales: Float[Tensor, "groups 1"]
    zeros: UInt8[Tensor, "groups 1"] | None = None
    shifts: Float[Tensor, "groups 1"] | None = None


def codes_and_scales(
    x: Float[Tensor, "groups size"],
    mask: Float[Tensor, "groups size"] | None,
    fmt: Format,
    levels: tuple[float, ...],
    ranges: bool = False,
) -> Found:
    """The best codes and scales (and shifts) of each row of ``x``; ``mask`` is 0 on padding (None where there is none).

    ``levels`` are the format's, or those a book learned. ``ranges`` searches the range of ``uniform`` groups with a
    zero point instead of taking min and max.
    """
    if fmt.group == UNIT:
        ones = torch.ones_like(x[:, :1])
        return Found(nearest(x, ones, levels), ones)
    if fmt.family == "uniform":
        if fmt.shift:
            return _uniform_shifted(x, mask, fmt.bits)
        return _uniform_searched(x, fmt.bits) if ranges else _uniform(x, fmt.bits)
    shifts = None
    if fmt.shift:
        shifts = _centers(x, mask, fmt)
        x = x - shifts if mask is None else (x - shifts) * mask
    scales = _scales(x, mask, fmt, levels)
    return Found(nearest(x, scales, levels), scales, shifts=shifts)


def _scales(x: Tensor, mask: Tensor | None, fmt: Format, levels: tuple[float, ...]) -> Float[Tensor, "groups 1"]:
    if fmt.family == "sign":
        return _sum(x.abs()) / _count(x, mask)
    if fmt.family in ("nf", "int"):
        return x.abs().amax(1, keepdim=True) / (127 if fmt.family == "int" else 1)
    if fmt.family == "lm" and fmt.bits == 2:
        return _two_level_scale(x, mask, levels)
    return _searched_scale(x, mask, levels)


def nearest(
    x: Float[Tensor, "groups size"], scales: Float[Tensor, "groups 1"], levels: tuple[float, ...]
) -> UInt8[Tensor, "groups size"]:
    """Index of the level nearest to x / scale; a group whose scale is 0 (all zeros) takes the level nearest to 0."""
    table = torch.tensor(levels, dtype=torch.float32, device=x.device)
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    if len(levels) <= 4:  # counting the boundaries below x is a quarter of a search among them
        codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
        for middle in ((table[1:] + table[:-1]) / 2).tolist():
            codes += x > safe * middle
        return codes
    return torch.bucketize(x / safe, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)


def on_grid(
    x: Float[Tensor, "groups size"],
    scales: Float[Tensor, "groups 1"],
    top: int,
    zeros: Float[Tensor, "groups 1"] | float = 0.0,
) -> UInt8[Tensor, "groups size"]:
    """round(x / scale) + zero clipped to 0..top; a group whose scale is 0 (all zeros) takes its zero point."""
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (torch.round(x / safe) + zeros).clamp_(0, top).to(torch.uint8)


def _ends(x: Tensor, mask: Tensor | None) -> tuple[Float[Tensor, "groups 1"], Float[Tensor, "groups 1"]]:
    """Minimum and maximum of each row, padding left out; adding 0 turns -0 into 0, whichever of the two came first."""
    if mask is None:
        return x.amin(1, keepdim=True) + 0.0, x.amax(1, keepdim=True) + 0.0
    hidden = mask == 0
    low = x.masked_fill(hidden, float("inf")).amin(1, keepdim=True)
    high = x.masked_fill(hidden, float("-inf")).amax(1, keepdim=True)
    empty = hidden.all(1, keepdim=True)
    return low.masked_fill(empty, 0) + 0.0, high.masked_fill(empty, 0) + 0.0


def _centers(x: Tensor, mask: Tensor | None, fmt: Format) -> Float[Tensor, "groups 1"]:
    """The shift of each row: the middle of the range where the scale is its end (nf), the mean elsewhere."""
    if fmt.family == "nf":
        low, high = _ends(x, mask)
        return (low + high) / 2
    return _sum(x) / _count(x, mask)  # padding holds zeros


def _uniform_shifted(x: Tensor, mask: Tensor | None, bits: int) -> Found:
    """Min-max grid with its lower end as an fp16 shift (QA-LoRA, section 3.2; GPTQ-style groups with float zeros)."""
    low, high = _ends(x, mask)
    scales = (high - low) / (2**bits - 1)
    return Found(on_grid(x - low, scales, 2**bits - 1), scales, shifts=low)


def _uniform(x: Float[Tensor, "groups size"], bits: int, low_part: float = 1.0, high_part: float = 1.0) -> Found:
    """Min-max grid with an integer zero point; the range includes zero, so zero is a level (LoRAQuant's RTN).

    ``low_part`` and ``high_part`` shrink the two ends of the range; values outside are clipped.
    """
    top = 2**bits - 1
    low, high = _ends(x, None)
    low, high = low.clamp_max(0) * low_part, high.clamp_min(0) * high_part
    scales = (high - low) / top
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    zeros = torch.round(-low / safe).clamp_(0, top)
    return Found(on_grid(x, scales, top, zeros), scales, zeros.to(torch.uint8))


def _uniform_searched(x: Float[Tensor, "groups size"], bits: int) -> Found:
    """The range of least squared error per group, each end shrunk by its own factor, with the scale refitted.

    LoRAQuant moves min and max by gradient steps on the rank-1 product. That product's error is 1 - cos^2(b) cos^2(a)
    at the best scales, so the two vectors can be fitted one after the other, and a grid needs no gradient.
    """
    best, best_gain = _uniform(x, bits), x.new_full((x.shape[0], 1), -1.0)
    for low, high in product(SHRINKS, SHRINKS):
        found = _uniform(x, bits, low, high)
        zeros = found.zeros if found.zeros is not None else torch.zeros_like(found.codes[:, :1])
        values = found.codes.float() - zeros.float()
        inner, norm = _sum(values * x).clamp_min(0), _sum(values.square()).clamp_min(1)
        gain = inner.square() / norm
        better = gain > best_gain
        best = Found(
            torch.where(better, found.codes, best.codes),
            torch.where(better, inner / norm, best.scales),
            torch.where(better, zeros, best.zeros if best.zeros is not None else zeros),
        )
        best_gain = torch.where(better, gain, best_gain)
    return best


def _two_level_scale(x: Tensor, mask: Tensor | None, levels: tuple[float, ...]) -> Float[Tensor, "groups 1"]:
    """The best scale over every split of the magnitudes into the low level a and the high level b.

    With the k largest at b: s = (a*total + (b-a)*high) / (n_low*a^2 + n_high*b^2), where ``high`` is the sum of those
    k, and the error falls by the square of the numerator over the denominator. Nearest rounding at that scale can only
    lower the error further.
    """
    a, b = torch.tensor(levels[2:], device=x.device)
    ordered = x.abs().sort(dim=1, descending=True).values  # padding holds zeros, so it sorts last
    high = _running_sums(ordered)
    count = _count(x, mask)
    k = torch.arange(x.shape[1] + 1, device=x.device, dtype=x.dtype)
    numerator = a * high[:, -1:] + (b - a) * high
    denominator = a * a * (count - k) + b * b * k
    gain = (numerator.square() * (1 / denominator)).masked_fill(k > count, 0)
    best = gain.argmax(1, keepdim=True)
    scales: Tensor = numerator.gather(1, best) / denominator.expand_as(gain).gather(1, best)
    return scales


def _searched_scale(x: Tensor, mask: Tensor | None, levels: tuple[float, ...]) -> Float[Tensor, "groups 1"]:
    """The least-squares scale of the nearest codes at each candidate, and of those the one of greatest gain."""
    table = torch.tensor(levels, device=x.device)
    middles = (table[1:] + table[:-1]) / 2
    spread = (_sum(x.square()) / _count(x, mask)).sqrt()
    edge = x.abs().amax(1, keepdim=True) / table[-1]
    best = best_gain = torch.zeros_like(spread)
    for candidate in (*(spread * part for part in PARTS), *(edge * part for part in EDGES)):
        scale = candidate.clamp_min(1e-30)
        if len(levels) <= 4:
            codes = nearest(x, scale, levels).int()
        else:
            codes = torch.bucketize(x * (1 / scale), middles, out_int32=True)
        values = table.index_select(0, codes.view(-1)).view_as(x)
        if mask is not None:
            values = values * mask
        numerator, denominator = _sum(values * x), _sum(values.square()).clamp_min(1e-30)
        gain = numerator.square() / denominator
        better = gain > best_gain
        best = torch.where(better, numerator / denominator, best)
        best_gain = torch.where(better, gain, best_gain)
    return best


def _count(x: Tensor, mask: Tensor | None) -> Float[Tensor, "#groups 1"]:
    """How many values of each group are no padding, as a number to divide by."""
    if mask is None:
        return x.new_full((1, 1), x.shape[1])
    return mask.sum(1, keepdim=True).clamp_min(1)


def _sum(x: Float[Tensor, "groups size"]) -> Float[Tensor, "groups 1"]:
    """Sums in the one order that every implementation keeps: value j to running sum j % 8, then halves added."""
    pieces = x.view(x.shape[0], -1, LANES).unbind(1)
    sums: Tensor = torch.zeros_like(pieces[0])
    for piece in pieces:
        sums += piece
    while sums.shape[1] > 1:
        low, high = sums.chunk(2, dim=1)
        sums = low + high
    return sums


def _running_sums(x: Float[Tensor, "groups size"]) -> Float[Tensor, "groups sums"]:
    """0, then the sum of the first value, of the first two, ...: left to right in float32 (cumsum adds in double)."""
    sums = x.new_zeros(x.shape[1] + 1, x.shape[0])
    for k, values in enumerate(x.T.contiguous()):
        torch.add(sums[k], values, out=sums[k + 1])
    return sums.T
