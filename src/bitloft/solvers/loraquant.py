"""LoRAQuant (arXiv 2510.26690) as its paper describes it: two widths over the singular components of each matrix.

    s*B*A = U S V^T;   B' = U sqrt(S),  A' = sqrt(S) V^T
    h = fewest leading components with sum_{i<=h} s_i^2 >= ratio * sum s_i^2

The first h components are rounded to a min-max grid of 2 or 3 bits with an integer zero point, their ranges refined;
the rest keeps one bit, sign times mean magnitude. Groups of 128 run along each component, so no group mixes two.

The ablations of the paper are arguments: ``by`` takes the h high components among the trained pairs (b_i, a_i) by norm
or at random instead, ``refine=False`` leaves the ranges at min and max, and ``across`` groups over components.

Three defects of the released code are not copied: its h is one less than the paper's, its groups run across components
where a width is not a multiple of 128 (here the last group is padded, and the padding counted), and its bits leave out
scales. Its refinement moves min and max by 300 gradient steps; ``encode(..., ranges=True)`` searches them directly.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitloft.errors import OptionError
from bitloft.formats import ROW, Format
from bitloft.kernels.ops import decode, encode
from bitloft.solvers.adapter import Components, Loose, PackedBlock, Trained

GROUP = 128
SPLITS = ("svd", "norm", "random")


def split(s: Float[Tensor, " rank"], ratio: float) -> int:
    """h: the fewest leading components that hold ``ratio`` of the energy (0 where there is none)."""
    energy = s.double().square()
    total = float(energy.sum())
    if total == 0:
        return 0
    short = int((energy.cumsum(0) < ratio * total).sum())
    return min(short + 1, s.numel())


def loraquant(exact: Components, *, high: int, ratio: float, refine: bool = True) -> tuple[PackedBlock, ...]:
    """Up to two blocks: h components in ``uniform{high}:128``, the others in ``sign:128``."""
    root = exact.s.sqrt().unsqueeze(1)
    order = torch.arange(exact.s.numel())
    return _two_blocks(root * exact.v, root * exact.u, order, split(exact.s, ratio), high, refine)


def loraquant_unsplit(
    exact: Components, trained: Trained, *, high: int, ratio: float, by: str, seed: int = 0, refine: bool = True
) -> tuple[PackedBlock, ...]:
    """The ablation without the SVD: trained pairs (b_i, a_i), the h of the SVD of them high by ``norm`` or ``random``.

    h is the SVD's, so the bits are equal. Raises OptionError for another ``by``.
    """
    if by not in SPLITS[1:]:
        raise OptionError(f"unknown split {by!r}; use one of {', '.join(SPLITS)}.")
    norms = trained.a.norm(dim=1) * trained.bt.norm(dim=1)
    generator = torch.Generator().manual_seed(seed)
    order = norms.argsort(descending=True) if by == "norm" else torch.randperm(norms.numel(), generator=generator)
    return _two_blocks(trained.a, trained.bt, order, split(exact.s, ratio), high, refine)


def _two_blocks(
    a: Float[Tensor, "rank columns"],
    bt: Float[Tensor, "rank out"],
    order: Int[Tensor, " rank"],
    h: int,
    high: int,
    refine: bool,
) -> tuple[PackedBlock, ...]:
    parts = ((order[:h], Format("uniform", high, GROUP)), (order[h:], Format("sign", 1, GROUP)))
    return tuple(
        PackedBlock(encode(a[rows], fmt, ranges=refine), encode(bt[rows], fmt, ranges=refine))
        for rows, fmt in parts
        if rows.numel()
    )


def loraquant_across(exact: Components, *, high: int, ratio: float, refine: bool = True) -> Loose:
    """The ablation of the axis: one group per output row of B' and input column of A', over the components.

    At most 128 components, so a group is a whole row of its part. The file stores rows along components only: these
    factors are for comparison, their bytes counted without padding.
    """
    h = split(exact.s, ratio)
    root = exact.s.sqrt().unsqueeze(1)
    a, bt, size = torch.zeros_like(exact.v), torch.zeros_like(exact.u), 0
    for rows, fmt in ((slice(0, h), Format("uniform", high, ROW)), (slice(h, None), Format("sign", 1, ROW))):
        for made, factor in ((a, exact.v), (bt, exact.u)):
            part = (root * factor)[rows]
            if part.numel():
                made[rows] = decode(encode(part.T.contiguous(), fmt, ranges=refine)).T
                bits = part.numel() * fmt.bits + part.shape[1] * (16 + fmt.bits * fmt.has_zeros)
                size += -(-bits // 8)
    return Loose(a, bt, size)
