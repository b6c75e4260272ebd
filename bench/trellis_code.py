"""Trellis codes on normal values: squared error against Lloyd-Max codes of the same size, and what encoding costs.

The levels of ``kernels.trellis`` are constants of the file format. ``--train BITS`` makes some anew: quantiles to begin
with, then rounds of a walk for every row and the mean of the values that took each level (Lloyd's iteration), at the
taps that the format has. ``--search N`` tries N sets of taps first, every other one a change of the best so far.
"""

import random
import sys
import time
from collections.abc import Sequence
from statistics import NormalDist

import harness
import torch
from torch import Tensor

from bitloft.kernels import trellis
from bitloft.kernels.ops import decode, encode

ROWS = {"smoke": (2, 64), "quick": (128, 1024), "full": (1024, 1024)}
ROUNDS = {"smoke": 1, "quick": 6, "full": 12}


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--train", type=int, choices=(1, 2, 3, 4), help="make levels of this width")
    parser.add_argument("--search", type=int, default=0, help="sets of taps to try before that")
    given = parser.parse_args()
    harness.begin(given)
    torch.manual_seed(0)
    x = torch.randn(ROWS[given.mode])
    rows = [measured(bits, x) for bits in trellis.TAPS]
    harness.table(list(rows[0]), [list(row.values()) for row in rows])
    trained = None
    if given.train or given.mode == "smoke":
        bits = given.train or 1
        taps = searched(bits, given.search, x[:32]) if given.search else trellis.TAPS[bits]
        trained = trained_levels(bits, taps, x, ROUNDS[given.mode])
        print(f"taps {[hex(tap) for tap in taps]}, error {trained['error']:.5f}, levels {trained['levels']}")
    harness.finish("trellis_code", given, {"values": x.numel()}, {"codes": rows, "trained": trained})
    return 0


def measured(bits: int, x: Tensor) -> dict[str, float]:
    scalar = "sign:row" if bits == 1 else f"lm{bits}:row"
    began = time.process_time()
    packed = encode(x, f"trellis{bits}:row")
    spent = time.process_time() - began
    return {
        "bits": bits,
        "scalar": round(float((x - decode(encode(x, scalar))).square().mean()), 5),
        "trellis": round(float((x - decode(packed)).square().mean()), 5),
        "bound": round(4.0**-bits, 5),
        "encode_ns_per_value": round(1e9 * spent / x.numel(), 1),
    }


def trained_levels(bits: int, taps: Sequence[int], x: Tensor, rounds: int) -> dict[str, object]:
    """Levels in units of the format, how far values spread in those units, and the error on ``x``."""
    count = 2 ** (len(taps) + bits - 1)
    levels = torch.tensor([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])
    for _ in range(rounds):
        levels, error = iterated(bits, taps, levels, x)
    unit = float(levels.max()) / 127
    whole = [round(float(level) / unit) for level in levels]
    _, error = iterated(bits, taps, torch.tensor(whole) * unit, x)
    return {"levels": whole, "spread": round(trellis.LEVEL_UNIT / unit, 4), "error": round(error, 5)}


def iterated(bits: int, taps: Sequence[int], levels: Tensor, x: Tensor) -> tuple[Tensor, float]:
    """Levels as the means of what they were chosen for, mirror images made one; the error before."""
    kept = trellis.TAPS[bits], trellis.LEVELS[bits]
    trellis.TAPS[bits], trellis.LEVELS[bits] = tuple(taps), tuple(float(v) / trellis.LEVEL_UNIT for v in levels)
    trellis._subsets.cache_clear()
    try:
        found = trellis.walked(x, torch.ones(x.shape[1]), bits).levels
    finally:
        trellis.TAPS[bits], trellis.LEVELS[bits] = kept
        trellis._subsets.cache_clear()
    chosen = (found.unsqueeze(-1) - levels).abs().argmin(-1).flatten()
    sums = torch.zeros(len(levels)).index_add_(0, chosen, x.flatten())
    counts = torch.bincount(chosen, minlength=len(levels)).float()
    sums, counts = sums - sums.flip(0), counts + counts.flip(0)
    means = torch.where(counts > 0, sums / counts.clamp_min(1), levels)
    return means, float((x - found).square().mean())


def searched(bits: int, tries: int, x: Tensor) -> tuple[int, ...]:
    """The taps of least error after three rounds, beginning with the format's."""
    draw, best = random.Random(0), trellis.TAPS[bits]
    least = float(trained_levels(bits, best, x, 3)["error"])  # type: ignore[arg-type]
    for i in range(tries):
        taps = [draw.randrange(512) for _ in best] if i % 2 else list(best)
        for _ in range(draw.randint(1, 3)):
            taps[draw.randrange(len(taps))] ^= 1 << draw.randrange(9)
        error = float(trained_levels(bits, taps, x, 3)["error"])  # type: ignore[arg-type]
        if error < least:
            best, least = tuple(taps), error
    return best


if __name__ == "__main__":
    sys.exit(main())
