"""Reverse water-filling: 0 to 4 bits for both sides of every singular component of every matrix, under one budget.

    s*B*A = sum_i s_i u_i v_i^T  ~  sum_i (s_i g_i) c_i^u (c_i^v)^T

c^u, c^v are trellis codes (scalar ones on short sides or if asked for: Lloyd-Max levels, signs at one bit). A rank-1
product needs one scale only, so A stores fp16 s_i*g_i per component and B stores none; g_i = (u.c^u)(v.c^v) /
(c^u.c^u c^v.c^v) is the least-squares choice, and the error it leaves, s_i^2 (1 - cos^2(u, c^u) cos^2(v, c^v)), is
known before anything is packed. Bits then go wherever they lower the error most per byte, jumps over widths included
(the lower convex hull of each component's error curve). Where the components carry a metric of inputs or outputs,
cosines and errors of that side are taken in it, and its walks weigh values by the metric's diagonal: a walk cannot
weigh pairs of them.

The alternative not taken, a share of the budget per matrix, ignores that the spectra of real adapters are steep and
differ tenfold between matrices: measured on trained adapters, one budget for all is where most of the gain comes from.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitloft.formats import ROW, UNIT, Format
from bitloft.kernels.ops import decode, encode, encode_trellis
from bitloft.packed import PackedTensor, pack_scales
from bitloft.solvers.adapter import Components, PackedBlock

WIDTHS = (1, 2, 3, 4)
# Choices of a stored component: bits of A and of B^T. The short side of a module may take one bit more than the long
# one, where a bit costs less: 3 to 4 % less error at equal bytes on a trained adapter (docs/decisions.md). Choice 0
# stores nothing, choice c > 0 is CHOICES[c - 1].
CHOICES = (*((w, w) for w in WIDTHS), (1, 2), (2, 1), (2, 3), (3, 2), (3, 4), (4, 3))
SHORT = 32  # values of a row below which a trellis, all ends, is worse than a scalar code
SCALE_BYTES = 2  # one fp16 scale per stored component


def code_format(bits: int, group: int, kind: str = "trellis") -> Format:
    """Trellis codes; ``scalar``: signs at one bit, Lloyd-Max levels above."""
    if kind == "trellis":
        return Format("trellis", bits, group)
    return Format("sign", 1, group) if bits == 1 else Format("lm", bits, group)


@dataclass(frozen=True)
class Coded:
    """One matrix with each side of each component coded at every width (``a``, ``bt`` by width), and what every choice
    gives: choice 0 first in ``errors`` and ``costs``, ``scales`` without it."""

    a: tuple[PackedTensor, ...]
    bt: tuple[PackedTensor, ...]
    scales: Float[Tensor, "stored rank"]
    errors: Float[Tensor, "choices rank"]
    costs: tuple[int, ...]


def code(exact: Components, kind: str = "trellis") -> Coded:
    """Codes of both sides at 1 to 4 bits, ``kind`` "trellis" or "scalar"; scales, squared errors and costs in bytes of
    every choice of two of them."""
    energy = exact.s.double().square()
    a = tuple(_unit_codes(exact.v, bits, kind, exact.powers) for bits in WIDTHS)
    bt = tuple(_unit_codes(exact.u, bits, kind, exact.out_powers) for bits in WIDTHS)
    fit_a = [_fit(exact.seen(exact.v), exact.seen(decode(codes))) for codes in a]
    fit_bt = [_fit(exact.out_seen(exact.u), exact.out_seen(decode(codes))) for codes in bt]
    scales, errors, costs = [], [energy], [0]
    # padded to whole bytes in every plane
    columns, rows = (Format("lm", 2, ROW).width(n) for n in (exact.v.shape[1], exact.u.shape[1]))
    for bits_a, bits_bt in CHOICES:
        (inner_v, norm_v), (inner_u, norm_u) = fit_a[bits_a - 1], fit_bt[bits_bt - 1]
        scales.append((exact.s * inner_v * inner_u / (norm_v * norm_u)).float())
        errors.append(energy * (1 - (inner_v * inner_u).square() / (norm_v * norm_u)).clamp_min(0))
        costs.append((columns * bits_a + rows * bits_bt) // 8 + SCALE_BYTES)
    return Coded(a, bt, torch.stack(scales), torch.stack(errors), tuple(costs))


def _unit_codes(
    x: Float[Tensor, "rank columns"], bits: int, kind: str, weights: Float[Tensor, " columns"] | None
) -> PackedTensor:
    """The codes that fit each row best at its best scale, kept without that scale; scalar ones for a SHORT side."""
    fmt = code_format(bits, ROW, kind if x.shape[1] >= SHORT else "scalar")
    best = encode_trellis(x, fmt, weights) if fmt.family == "trellis" else encode(x, fmt)
    bare = Format(fmt.family, fmt.bits, UNIT)
    return PackedTensor(bare, best.shape, best.codes, best.scales[:, :0], torch.zeros_like(best.exponent))


def _fit(
    x: Float[Tensor, "rank columns"], levels: Float[Tensor, "rank columns"]
) -> tuple[Float[Tensor, " rank"], Float[Tensor, " rank"]]:
    return (x * levels).sum(1), levels.square().sum(1)


def allocate(coded: Sequence[Coded], budget: int) -> tuple[list[Int[Tensor, " _"]], int]:
    """The choice for each component of each matrix, and all bytes (up to ``budget``): greatest fall of error first."""
    ranks = [c.errors.shape[1] for c in coded]
    widths, spent = torch.zeros(sum(ranks), dtype=torch.int64), 0
    refused: set[int] = set()
    for component, cost, bits in _steps(coded):
        if component in refused or spent + cost > budget:
            refused.add(component)  # what lies above a step that does not fit would need that step first
            continue
        widths[component], spent = bits, spent + cost
    return list(widths.split(ranks)), spent


def predicted(coded: Sequence[Coded], budget: int) -> float:
    """The squared error that ``allocate`` leaves under ``budget``, before joint refinement."""
    widths, _ = allocate(coded, budget)
    return sum(float(c.errors.gather(0, w[None]).sum()) for c, w in zip(coded, widths, strict=True))


def least(coded: Sequence[Coded]) -> list[Int[Tensor, " _"]] | None:
    """The cheapest allocation that stores anything: one component at its first step. None where all are zero."""
    first: dict[int, tuple[int, int]] = {}
    for component, cost, bits in _steps(coded):
        first.setdefault(component, (cost, bits))
    if not first:
        return None
    cheapest = min(first, key=lambda component: first[component][0])
    ranks = [c.errors.shape[1] for c in coded]
    widths = torch.zeros(sum(ranks), dtype=torch.int64)
    widths[cheapest] = first[cheapest][1]
    return list(widths.split(ranks))


def _steps(coded: Sequence[Coded]) -> list[tuple[int, int, int]]:
    """(component, extra bytes, choice reached): the edges of every error curve's lower hull, steepest first."""
    errors = torch.cat([c.errors.T for c in coded])
    costs = torch.cat([torch.tensor(c.costs).expand(c.errors.shape[1], -1) for c in coded])
    at = torch.zeros(errors.shape[0], 1, dtype=torch.int64)
    found = []
    while True:
        fall, extra = errors.gather(1, at) - errors, costs - costs.gather(1, at)
        slope, to = torch.where((extra > 0) & (fall > 0), fall / extra.clamp_min(1), -1.0).max(1, keepdim=True)
        live = (slope > 0).squeeze(1)
        if not bool(live.any()):
            break
        component = live.nonzero()
        found.append(torch.cat([slope[live], component, extra.gather(1, to)[live], to[live]], dim=1))
        at = torch.where(live.unsqueeze(1), to, at)
    if not found:
        return []
    edges = torch.cat(found)
    edges = edges[edges[:, 0].argsort(descending=True, stable=True)]
    return [(int(c), int(b), int(t)) for c, b, t in edges[:, 1:].tolist()]


def pack(coded: Sequence[Coded], widths: Sequence[Int[Tensor, " _"]]) -> list[tuple[PackedBlock, ...]]:
    """Blocks of each matrix, narrow components first: at most one block per choice, all scales in one unit."""
    order = sorted(range(1, len(CHOICES) + 1), key=lambda choice: CHOICES[choice - 1])
    rows = [
        [(choice, found) for choice in order if (found := (w == choice).nonzero().squeeze(1)).numel()] for w in widths
    ]
    scales = [c.scales[choice - 1, index] for c, parts in zip(coded, rows, strict=True) for choice, index in parts]
    if not scales:
        return [() for _ in coded]
    stored, exponent = pack_scales(torch.cat(scales).unsqueeze(1))
    remaining = iter(stored.split([s.numel() for s in scales]))
    return [
        tuple(_block(c, choice, index, next(remaining), exponent) for choice, index in parts)
        for c, parts in zip(coded, rows, strict=True)
    ]


def _block(coded: Coded, choice: int, index: Tensor, scales: Tensor, exponent: Tensor) -> PackedBlock:
    bits_a, bits_bt = CHOICES[choice - 1]
    a, bt, count = coded.a[bits_a - 1], coded.bt[bits_bt - 1], index.numel()
    return PackedBlock(
        PackedTensor(Format(a.format.family, bits_a, ROW), (count, a.shape[1]), a.codes[index], scales, exponent),
        PackedTensor(bt.format, (count, bt.shape[1]), bt.codes[index], bt.scales[index], bt.exponent),
    )
