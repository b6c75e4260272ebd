"""QLoRA's start: round to nearest, and a LoRA whose output is zero (Dettmers et al. 2023). The baseline."""

from jaxtyping import Float
from torch import Tensor

from bitloft.formats import Format
from bitloft.kernels.ops import encode, residual
from bitloft.solvers.base import Solution, norm, ratio


def qlora(weight: Float[Tensor, "rows columns"], fmt: Format) -> Solution:
    """Q = round(W) in ``fmt``. B = 0 costs nothing to leave out, so no start is stored."""
    packed = encode(weight, fmt)
    error = ratio(residual(weight, packed), norm(weight))
    return Solution(packed, None, error, error)
