"""LoftQ (Li et al. 2023, arXiv 2310.08659, Algorithm 1): alternate quantization and a low-rank fit of its residual.

    for t = 1..T:   Q_t = q(W - s*B_{t-1}*A_{t-1});   s*B_t*A_t = SVD_r(W - Q_t)

Three things differ from the released code, none from the algorithm: the factors are divided by s = alpha / r, so that
the model as loaded computes Q + s*B*A (peft#1982 leaves s out); the factors are rounded to the format they are stored
in before the next step sees them; and the best iterate is kept, since the error may rise with T.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.errors import OptionError
from bitloft.formats import Format
from bitloft.kernels.ops import decode, encode, residual
from bitloft.solvers.base import Solution, norm, pack_start, ratio
from bitloft.solvers.lowrank import ITERATIONS, balanced_factors, truncated_svd

# `auto` steps: the error falls by about 2 % a step at first; below a thousandth a step costs more than it repairs.
SETTLED = 1e-3
# Passes of the SVD that starts from the step before it: what is new in the residual is spread over all directions.
WARM_ITERATIONS = 1
MOST = 20


def loftq(
    weight: Float[Tensor, "rows columns"],
    fmt: Format,
    *,
    rank: int,
    scaling: float,
    start_format: Format,
    steps: int | None,
    generator: torch.Generator,
) -> Solution:
    """Q, A, B of least ``|W - Q - s*B*A|`` over ``steps`` alternations. ``weight`` is float32.

    ``steps`` None goes on while a step lowers the best error by more than SETTLED of it, MOST steps at most.
    Raises OptionError where the rank exceeds min(rows, columns).
    """
    if rank > min(weight.shape):
        raise OptionError(f"rank {rank} exceeds min(m, n) = {min(weight.shape)} of a {tuple(weight.shape)} matrix.")
    best: Solution | None = None
    size = norm(weight)
    before, warm, target = 0.0, None, weight
    # two buffers for all steps: to fault in a fresh one costs as much as the passes over it
    rest, lowered = torch.empty_like(weight), torch.empty_like(weight)
    for step in range(MOST if steps is None else steps):
        packed = encode(target, fmt)
        error = residual(weight, packed, out=rest)
        if step == 0:
            before = ratio(error, size)
        passes = ITERATIONS if warm is None else WARM_ITERATIONS
        u, s, vt = truncated_svd(rest, rank, generator, start=warm, iterations=passes)
        start = pack_start(*balanced_factors(u, s, vt, scaling), scaling, start_format)
        a, b, warm = decode(start.a), decode(start.bt).T, vt.T
        target = torch.addmm(weight, b, a, alpha=-scaling, out=lowered)
        found = Solution(packed, start, before, ratio(residual(target, packed), size))
        settled = best is not None and found.error_after >= best.error_after * (1 - SETTLED)
        best = _better(best, found)
        if steps is None and settled:
            break
    if best is None:
        raise OptionError(f"LoftQ needs at least one step; steps is {steps}.")
    return best


def _better(best: Solution | None, found: Solution) -> Solution:
    return found if best is None or found.error_after < best.error_after else best
