"""Codes and scales of groups: nearest levels, and for Lloyd-Max codes the scale of least squared error.

A group ``g`` and codes with levels ``l`` have squared error ``|g - s*l|^2``, least at ``s = <g, l> / <l, l>``. For two
bits the codes of a symmetric quantizer are a split of the sorted magnitudes into low and high, so all splits are tried
at once from cumulative sums: the optimum is exact, and one sort replaces a grid of passes. For three and four bits the
same two steps (nearest codes, least-squares scale) alternate from a few starting scales and the best one is kept.
"""

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bitloft.formats import UNIT, Format

# Starting scales of the alternation, as multiples of the group's root mean square, and rounds from each: against seven
# starts of four rounds they lose 3 % of the error at 4 bits and 0.4 % at 3, in a quarter of the time.
STARTS = (0.8, 0.95, 1.1, 1.25)
ROUNDS = 2
# Parts of the min-max range tried at each end by the range search of uniform codes.
SHRINKS = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)
COARSE = 1024  # bins of the level table that the search looks up


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
        count = x.shape[1] if mask is None else mask.sum(1, keepdim=True).clamp_min(1)
        return x.abs().sum(1, keepdim=True) / count
    if fmt.family in ("nf", "int"):
        return x.abs().amax(1, keepdim=True) / (127 if fmt.family == "int" else 1)
    if fmt.family == "lm" and fmt.bits == 2:
        return _two_level_scale(x, mask, levels)
    return _alternate(x, mask, levels)


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
    x: Float[Tensor, "groups size"], scales: Float[Tensor, "groups 1"], top: int
) -> UInt8[Tensor, "groups size"]:
    """round(x / scale) clipped to 0..top; 0 where the scale is 0."""
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    return torch.round(x / safe).clamp_(0, top).to(torch.uint8)


def _ends(x: Tensor, mask: Tensor | None) -> tuple[Float[Tensor, "groups 1"], Float[Tensor, "groups 1"]]:
    """Minimum and maximum of each row, padding left out."""
    if mask is None:
        return x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    hidden = mask == 0
    low = x.masked_fill(hidden, float("inf")).amin(1, keepdim=True)
    high = x.masked_fill(hidden, float("-inf")).amax(1, keepdim=True)
    empty = hidden.all(1, keepdim=True)
    return low.masked_fill(empty, 0), high.masked_fill(empty, 0)


def _centers(x: Tensor, mask: Tensor | None, fmt: Format) -> Float[Tensor, "groups 1"]:
    """The shift of each row: the middle of the range where the scale is its end (nf), the mean elsewhere."""
    if fmt.family == "nf":
        low, high = _ends(x, mask)
        return (low + high) / 2
    if mask is None:
        return x.mean(1, keepdim=True)
    return (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)


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
    low, high = x.amin(1, keepdim=True).clamp_max(0) * low_part, x.amax(1, keepdim=True).clamp_min(0) * high_part
    scales = (high - low) / top
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    zeros = torch.round(-low / safe).clamp_(0, top)
    codes = (torch.round(x / safe) + zeros).clamp_(0, top)
    return Found(codes.to(torch.uint8), scales, zeros.to(torch.uint8))


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
        inner, norm = (values * x).sum(1, keepdim=True).clamp_min(0), values.square().sum(1, keepdim=True).clamp_min(1)
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

    With the k largest at b: s = (a*low + b*high) / (n_low*a^2 + n_high*b^2), and the error falls by the square of the
    numerator over the denominator. Nearest rounding at that scale can only lower the error further.
    """
    a, b = levels[2], levels[3]
    size = x.shape[1]
    ordered = x.abs().sort(dim=1, descending=True).values  # padding holds zeros, so it sorts last
    high = torch.nn.functional.pad(ordered.cumsum(1), (1, 0))
    count = torch.full_like(x[:, :1], size) if mask is None else mask.sum(1, keepdim=True)
    k = torch.arange(size + 1, device=x.device, dtype=x.dtype)
    numerator = a * (high[:, -1:] - high) + b * high
    denominator = a * a * (count - k) + b * b * k
    gain = (numerator.square() / denominator.clamp_min(1e-30)).masked_fill(k > count, 0)
    best = gain.argmax(1, keepdim=True)
    return numerator.gather(1, best) / denominator.gather(1, best).clamp_min(1e-30)


def _alternate(x: Tensor, mask: Tensor | None, levels: tuple[float, ...]) -> Float[Tensor, "groups 1"]:
    """Alternate (coarsely) nearest codes and least-squares scales from each start; the scale of greatest gain."""
    table, bins = _coarse_levels(levels, str(x.device))
    count = x.shape[1] if mask is None else mask.sum(1, keepdim=True).clamp_min(1)
    rms = (x.square().sum(1, keepdim=True) / count).sqrt()
    middle = torch.tensor(COARSE / 2, device=x.device)
    best = best_gain = torch.zeros_like(rms)
    edge = x.abs().amax(1, keepdim=True) / levels[-1]  # heavy tails: no clipping at all may be best
    for scales in (*(rms * start for start in STARTS), edge):
        for _ in range(ROUNDS):
            index = torch.addcmul(middle, x, bins / scales.clamp_min(1e-30)).clamp_(0, COARSE - 1).int()
            values = table.index_select(0, index.view(-1)).view_as(x)
            if mask is not None:
                values = values * mask
            numerator = (values * x).sum(1, keepdim=True)
            denominator = values.square().sum(1, keepdim=True).clamp_min(1e-30)
            scales = numerator / denominator
        gain = numerator.square() / denominator
        better = gain > best_gain
        best, best_gain = torch.where(better, scales, best), torch.where(better, gain, best_gain)
    return best


@lru_cache(maxsize=16)
def _coarse_levels(spread: tuple[float, ...], device: str) -> tuple[Float[Tensor, " bins"], float]:
    """The level at the middle of each of COARSE bins over the levels' range, and bins per unit.

    A search needs no exact codes: only values within half a bin of a boundary may take the other side, at almost no
    error, and a table costs an eighth of a bucketize. The codes that are stored come from ``nearest``.
    """
    levels = torch.tensor(spread)
    top = float(levels.abs().amax())
    centers = (torch.arange(COARSE) + 0.5) * (2 * top / COARSE) - top
    return levels[torch.bucketize(centers, (levels[1:] + levels[:-1]) / 2)].to(device), COARSE / (2 * top)
