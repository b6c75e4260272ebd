"""LoRAQuant (arXiv 2510.26690) as its paper describes it: two widths over the singular components of each matrix.

    s*B*A = U S V^T;   B' = U sqrt(S),  A' = sqrt(S) V^T
    h = fewest leading components with sum_{i<=h} s_i^2 >= ratio * sum s_i^2

The first h components are rounded to a min-max grid of 2 or 3 bits with an integer zero point, their ranges refined;
the rest keeps one bit, sign times mean magnitude. Groups of 128 run along each component, so no group mixes two.

Three defects of the released code are not copied: its h is one less than the paper's, its groups run across components
where a width is not a multiple of 128 (here the last group is padded, and the padding counted), and its bits leave out
scales. Its refinement moves min and max by 300 gradient steps; ``encode(..., ranges=True)`` searches them directly.
"""

from jaxtyping import Float
from torch import Tensor

from bitloft.formats import Format
from bitloft.kernels.ops import encode
from bitloft.solvers.adapter import Components, PackedBlock

GROUP = 128


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
    h = split(exact.s, ratio)
    root = exact.s.sqrt().unsqueeze(1)
    a, bt = root * exact.v, root * exact.u
    parts = ((slice(0, h), Format("uniform", high, GROUP)), (slice(h, None), Format("sign", 1, GROUP)))
    return tuple(
        PackedBlock(encode(a[rows], fmt, ranges=refine), encode(bt[rows], fmt, ranges=refine))
        for rows, fmt in parts
        if a[rows].numel()
    )
