"""A vector code at 2.0 bits against lm2 at 2.25: squared error on Gaussian weights, and what encoding costs.

    lm2        scalar Lloyd-Max levels, one searched scale per 64 weights (2.25 bits)
    E8P        65,536 points of the 8-dimensional lattice E8 + 1/4 (QuIP#, arXiv 2402.04396), nearest point
    trellis    16 bits a state would be QTIP (arXiv 2406.11235); L bits here, Viterbi over 256 weights, levels from a
               table of random normal quantiles, or computed from the state (1MAD: the sum of four bytes of a product)

Scales are one per matrix, as the rotation that a vector code needs makes all groups alike; a trellis that is not bitten
at its tail spends (L - 2) / 256 bits more on its first state. The rate-distortion bound is 2^-4 = 0.0625 at 2 bits.
Decoding is timed by ``vector_decode.c`` in processor time, where a C compiler and AVX-512 are at hand.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import harness  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bitloft.kernels.ops import decode, encode  # noqa: E402

SCALES = (0.9, 0.95, 1.0, 1.05, 1.1)
LENGTH = 256  # weights of a trellis


def main() -> int:
    arguments = harness.parser(__doc__).parse_args()
    harness.begin(arguments)
    torch.manual_seed(0)
    count, states = {"smoke": (2, (4,)), "quick": (32, (8, 10)), "full": (64, (8, 10, 12))}[arguments.mode]
    x = torch.randn(count, LENGTH)
    points = e8p() if arguments.mode != "smoke" else e8p()[::64]
    ways: dict[str, Callable[[Tensor], Tensor]] = {"E8P": partial(nearest, points=points)}
    for bits in states:
        ways[f"trellis, table, L={bits}"] = partial(viterbi, levels=table(bits))
        if bits >= 8:
            ways[f"trellis, 1MAD, L={bits}"] = partial(viterbi, levels=one_mad(bits))
    began = time.process_time()
    error = float((x - decode(encode(x, "lm2:64"))).square().mean())
    figures = {"lm2:64": _figures(2.25, error, began, x.numel())}
    for name, way in ways.items():
        began = time.process_time()
        error = float((x - scaled(x, way)).square().mean())
        figures[name] = _figures(2.0, error, began, len(SCALES) * x.numel())
    rows = [[name, *found.values()] for name, found in figures.items()]
    harness.table(("code", "bits", "squared error", "us per weight"), rows)
    speed = decode_speed()
    harness.table(("decode and multiply", "ns per weight"), list(speed.items()))
    harness.finish(
        "vector_code", arguments, {"weights": x.numel()}, {"codes": figures, "bound": 0.0625, "decode_ns": speed}
    )
    return 0


def decode_speed() -> dict[str, float]:
    """Nanoseconds per weight of each loop; empty where they cannot be compiled or run."""
    source = Path(__file__).resolve().parent / "vector_decode.c"
    with tempfile.TemporaryDirectory() as place:
        program = Path(place) / "decode"
        built = ["cc", "-O3", "-march=native", str(source), "-o", str(program)]
        try:
            subprocess.run(built, check=True, capture_output=True)
            said = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return {}
    return {name: float(value) for name, value in (line.split() for line in said.splitlines())}


def _figures(bits: float, error: float, began: float, weights: int) -> dict[str, float]:
    spent = time.process_time() - began
    return {"bits": bits, "error": round(error, 4), "encode_us": round(1e6 * spent / weights, 3)}


def scaled(x: Tensor, code: Callable[[Tensor], Tensor]) -> Tensor:
    """The best of a few scales of the whole matrix."""
    tries = [code(x / s) * s for s in SCALES]
    return min(tries, key=lambda found: float((x - found).square().sum()))


def e8p() -> Tensor:
    """QuIP#'s points [65536, 8]: 256 half-integer absolute patterns of least norm, all sign patterns of even parity (of
    the parity that puts them into D8 + 1/2), shifted by 1/4 either way."""
    rows = torch.tensor(list(product((0.5, 1.5, 2.5), repeat=8)))
    norms = rows.square().sum(1)
    order = torch.argsort(norms, stable=True)
    patterns = rows[order[:256]]  # 227 up to norm 10, the rest from norm 12
    signs = torch.tensor(list(product((1.0, -1.0), repeat=8)))
    points = (patterns[:, None] * signs[None]).reshape(-1, 8)
    even = points[(points.sum(1) % 2) == 0]
    return torch.cat([even + 0.25, even - 0.25])


def nearest(x: Tensor, points: Tensor) -> Tensor:
    rows, norms = x.reshape(-1, 8), points.square().sum(1)
    chosen = torch.cat([(norms - 2 * part @ points.T).argmin(1) for part in rows.split(256)])
    return points[chosen].reshape(x.shape)


def table(bits: int) -> Tensor:
    """Normal quantiles in random order: the level of every state."""
    order = torch.randperm(1 << bits, generator=torch.Generator().manual_seed(1))
    levels: Tensor = torch.special.ndtri((order + 0.5) / (1 << bits))
    return levels


def one_mad(bits: int) -> Tensor:
    """QTIP's 1MAD levels of every state: four bytes of 34038481 s + 76625530 summed, standardized."""
    state = (torch.arange(1 << bits) * 34038481 + 76625530) % (1 << 32)
    summed = torch.stack([state >> shift & 255 for shift in (0, 8, 16, 24)]).sum(0).float()
    return (summed - summed.mean()) / summed.std()


def viterbi(x: Tensor, levels: Tensor) -> Tensor:
    """The values of the cheapest walk s -> (4 s + b) mod states through a trellis, per row."""
    rows, states = x.shape[0], len(levels)
    cost, back = torch.zeros(rows, states), []
    for column in x.T:
        least, chosen = cost.view(rows, 4, states // 4).min(1)  # over what falls out of the window
        back.append(chosen)
        cost = least.repeat_interleave(4, 1) + (column[:, None] - levels).square()
    state, values = cost.argmin(1), []
    for chosen in reversed(back):
        values.append(levels[state])
        before = state >> 2
        state = before + chosen.gather(1, before[:, None]).squeeze(1) * (states // 4)
    return torch.stack(values[::-1], 1)


if __name__ == "__main__":
    sys.exit(main())
