"""How much faster our LoftQ start is than PEFT's, on one 4096 x 4096 Gaussian matrix (nf2:64, rank 64, T = 5).

PEFT's loop (peft/utils/loftq_utils.py, loftq_init) takes torch.linalg.svd of the whole residual at each step and keeps
the first r triples:

    repeat T times:  Q = quantize(W - L R);   U S V^T = svd(W - Q);   L = U_r sqrt(S_r),  R = sqrt(S_r) V_r^T

It is restated here, since PEFT runs it for 4 and 8 bits on a GPU alone. Both sides quantize by our encoder, so that the
SVD is all that differs, and both run here and now, after a warm-up. Ours also rounds its factors to 4 bits (what the
base stores) and keeps the best iterate. --quick takes one full SVD and counts it T times.

Floor: the products that T truncated SVDs cannot do without, at the matrix-product rate measured here, and T encodings
at the memory rate measured here (read the matrix, write it back dequantized).
"""

import sys
from functools import partial

import harness
import torch
from torch import Tensor

from bitloft.formats import Format
from bitloft.kernels.ops import decode, encode
from bitloft.solvers.loftq import WARM_ITERATIONS, loftq
from bitloft.solvers.lowrank import ITERATIONS, OVERSAMPLE, generator_for, truncated_svd

FORMAT = Format.parse("nf2:64")
START = Format.parse("lm4:64")
SIZES = {"smoke": (256, 16, 2), "quick": (4096, 64, 5), "full": (4096, 64, 5)}  # width, rank, T


def main() -> int:
    arguments = harness.parser(__doc__).parse_args()
    harness.begin(arguments)
    width, rank, steps = SIZES[arguments.mode]
    weight = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    ours(weight[:128, :128].contiguous(), 8, 1)  # warm-up
    repeats = {"smoke": 1, "quick": 1, "full": 3}[arguments.mode]
    own, solution = harness.seconds_of(lambda: ours(weight, rank, steps), repeats)
    full_steps = 1 if arguments.mode == "quick" else steps
    theirs, (residual, svd) = harness.seconds_of(lambda: peft_loftq(weight, rank, full_steps))
    theirs, svd = theirs * steps / full_steps, svd / full_steps
    if full_steps != steps:  # the error of all T steps then comes from truncated SVDs with many more passes
        residual = nearly_exact(weight, rank, steps)
    own_svd = svd_step(weight, rank, repeats)
    floor = floor_seconds(weight, rank, steps)
    print(f"PEFT's loop {theirs:.2f} s (one SVD {svd:.2f} s), ours {own:.2f} s (one SVD {own_svd:.3f} s)")
    print(f"floor {floor:.2f} s: ours takes {own / floor:.1f} times as long")
    figures = {
        "speedup_vs_full_svd": round(theirs / own, 2),
        "svd_step_speedup": round(svd / own_svd, 2),
        "residual_vs_full_svd": round(solution.error_after / residual, 5),
        "seconds": round(own, 4),
        "seconds_full_svd": round(theirs, 4),
        "full_svds_run": full_steps,
        "residual_by": "the full SVDs" if full_steps == steps else "truncated SVDs of 12 passes",
        "svd_seconds": round(own_svd, 4),
        "full_svd_seconds": round(svd, 4),
        "residual": round(solution.error_after, 6),
        "floor_seconds": round(floor, 4),
        "floor_ratio": round(own / floor, 2),
    }
    harness.finish(
        "init_speed", arguments, {"width": width, "rank": rank, "steps": steps, "format": str(FORMAT)}, figures
    )
    return 0


def ours(weight: Tensor, rank: int, steps: int) -> object:
    generator = generator_for(0, "bench")
    return loftq(weight, FORMAT, rank=rank, scaling=1.0, start_format=START, steps=steps, generator=generator)


def peft_loftq(weight: Tensor, rank: int, steps: int) -> tuple[float, float]:
    """PEFT's loop: the relative residual after the last step, and the seconds spent in its SVDs."""
    repair, residual, spent = torch.zeros_like(weight), weight, 0.0
    for _ in range(steps):
        residual = weight - decode(encode(weight - repair, FORMAT))
        seconds, (u, s, vt) = harness.seconds_of(partial(torch.linalg.svd, residual, full_matrices=False))
        spent += seconds
        root = s[:rank].sqrt()
        repair = (u[:, :rank] * root) @ (root[:, None] * vt[:rank])
    return float((residual - repair).norm() / weight.norm()), spent


def nearly_exact(weight: Tensor, rank: int, steps: int) -> float:
    """The same loop with truncated SVDs run until they no longer differ from full ones by a part in a thousand."""
    repair, residual, warm = torch.zeros_like(weight), weight, None
    for _ in range(steps):
        residual = weight - decode(encode(weight - repair, FORMAT))
        u, s, vt = truncated_svd(residual, rank, generator_for(1, "bench"), start=warm, iterations=12)
        repair, warm = (u * s) @ vt, vt.T
    return float((residual - repair).norm() / weight.norm())


def svd_step(weight: Tensor, rank: int, repeats: int) -> float:
    """Seconds of one truncated SVD of the first residual, without a warm start."""
    residual = weight - decode(encode(weight, FORMAT))
    return harness.seconds_of(lambda: truncated_svd(residual, rank, generator_for(0, "bench")), repeats)[0]


def floor_seconds(weight: Tensor, rank: int, steps: int) -> float:
    """The products of the subspace iteration at the measured rate, and two passes over the matrix for each encoding."""
    thin = torch.randn(weight.shape[1], rank + OVERSAMPLE)
    product = harness.seconds_of(lambda: weight @ thin, 3)[0]
    copy = harness.seconds_of(lambda: weight.clone(), 3)[0]
    passes = (
        ITERATIONS + (steps - 1) * WARM_ITERATIONS
    )  # the first SVD starts from nothing, the others from the one before
    return (2 * passes + 2 * steps) * product + steps * copy


if __name__ == "__main__":
    sys.exit(main())
