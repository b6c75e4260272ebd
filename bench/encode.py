"""How fast tensors become codes: every format on one matrix, and nf4 beside bitsandbytes' own CPU quantizer.

A 4096 x 4096 float32 Gaussian matrix, scale search included. The pair with bitsandbytes (``quantize_4bit``, nf4, block
64, the same tensor) is interleaved and the median of the ratios counts; where bitsandbytes is not installed that figure
is null. Every format also stands beside the definition in plain torch, whose bytes the native encoder must give: the
bench compares them on a slice, names formats that differ, and then fails.

Floor: the matrix read once and its codes written once, at the bandwidth of a copy measured here.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import harness
import torch
from torch import Tensor

from bitloft.formats import Format
from bitloft.kernels import encoding
from bitloft.kernels.ops import decode, encode, explain

FORMATS = ("nf4:64", "nf3:64", "nf2:64", "lm4:64", "lm3:64", "lm2:64", "lm2:row", "lm2:unit",
           "uniform4:64", "uniform2:64", "uniform2:tensor", "book2:64", "book3:64", "sign:128", "int8:row",
           "half:row", "nf4:64+dq", "lm2:64+dq", "uniform2:64+shift", "nf3:64+dq+shift")  # fmt: skip
SIZES = {"smoke": (256, 2), "quick": (4096, 5), "full": (4096, 15)}  # width, repeats
SLICE = 32  # rows on which the definition is compared and timed


def main() -> int:
    arguments = harness.parser(__doc__).parse_args()
    harness.begin(arguments)
    width, repeats = SIZES[arguments.mode]
    weight = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    buffer = torch.empty_like(weight)
    copy = harness.seconds_of(partial(buffer.copy_, weight), 5)[0]
    bandwidth = 2 * weight.nbytes / copy
    rows, rates, differing = [], {}, []
    for spelling in FORMATS:
        fmt = Format.parse(spelling)
        seconds, packed = harness.seconds_of(partial(encode, weight, fmt), repeats)
        plain, slow = harness.seconds_of(partial(encoding.encode, weight[:SLICE], fmt))
        same = encode(weight[:SLICE], fmt)
        if any(not torch.equal(part, same.tensors()[name]) for name, part in slow.tensors().items()):
            differing.append(spelling)
        floor = (weight.nbytes + packed.nbytes) / bandwidth
        error = float((weight[:SLICE] - decode(same)).square().mean())
        rates[spelling] = round(weight.numel() / seconds)
        rows.append([spelling, rates[spelling], seconds * 1e3, seconds / floor, plain / seconds * width / SLICE, error])
    harness.table(["format", "weights/s", "ms", "of floor", "faster than torch", "error^2"], rows)
    ratio, theirs = against_bitsandbytes(weight, repeats)
    figures = {
        "nf4_vs_bnb_quantize": ratio,
        "lm2_weights_per_second": rates["lm2:64"],
        "weights_per_second": rates,
        "bnb_weights_per_second": theirs,
        "differs_from_definition": differing,
        "copy_gb_per_second": round(bandwidth / 1e9, 1),
        "kernels": explain(),
    }
    harness.finish("encode", arguments, {"rows": width, "columns": width}, figures)
    return 1 if differing else 0


def against_bitsandbytes(weight: Tensor, repeats: int) -> tuple[float | None, int | None]:
    """Median ratio of interleaved pairs, ours over theirs, and their weights a second; None without bitsandbytes."""
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError:
        return None, None

    def timed(run: Callable[[], object]) -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    ours, theirs = [], []
    for _ in range(repeats + 1):
        theirs.append(timed(lambda: quantize_4bit(weight, blocksize=64, quant_type="nf4")))
        ours.append(timed(lambda: encode(weight, "nf4:64")))
    ratios = [a / b for a, b in zip(ours[1:], theirs[1:], strict=True)]  # the first of each warms up
    return round(statistics.median(ratios), 4), round(weight.numel() / statistics.median(theirs[1:]))


if __name__ == "__main__":
    sys.exit(main())
