"""Merging a group-pooled adapter (``solvers.qalora``) into a packed layer: it stays low-bit, its outputs agree."""

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.modules.linear import QuantLinear
from bitloft.solvers.base import Solution
from bitloft.solvers.qalora import merge_pooled


def merge_qalora(
    layer: QuantLinear, a: Float[Tensor, "rank groups"], b: Float[Tensor, "rows rank"], scaling: float
) -> None:
    """Make ``layer(x)`` equal ``layer(x) + scaling * B A p(x)``, p(x) the sums of x over the format's groups.

    Only the shifts change (and, where they outgrow fp16, the exponent of all scales). Raises OptionError for a format
    without shifts, or factors that do not fit the layer.
    """
    with torch.no_grad():
        merged = merge_pooled(layer.packed_weight(), a, b, scaling)
        layer.load_solution(Solution(merged, None, 0.0, 0.0))
