"""Products with packed 4096 x 4096 weights against bitsandbytes, torch's int4pack and dense bfloat16, in one process.

Weights lie in turns in more memory than the last-level cache holds, as a model's do; ours are arranged (what
``bitloft.load`` does) and called through the torch operator. Pairs are interleaved, one call of ours and one of
theirs, and the median of the ratios counts. One row: float32 and bfloat16 input, the worse counts, against
bitsandbytes' path for inference (bfloat16, weights repacked for AVX-512); more rows: bfloat16 for all. The error is
that of the output against the float32 definition, relative to its norm.

How fast memory is read depends on where it lies (pages that the host has in one piece are read at 60 GB/s, others at
35) and, on a shared machine, on the moment. So lm2_m1_of_bandwidth compares with a sum, by torch, over the very bytes
that hold the weights, taken between every few calls; the ratio is one of medians, of float32 and bfloat16 the worse.

trellis2:64 is compared with lm2:64, which has as many true bits: interleaved likewise, float32 and bfloat16 input, the
worse counts (and bfloat16 alone).

Floor of a call: bytes of the weight over the read bandwidth of this run, or operations over the rate of torch's
bfloat16 product, whichever is longer.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import NamedTuple

import harness
import torch
from torch import Tensor

from bitloft import roofline
from bitloft.kernels import cpu, cpu_linear, operators, ops
from bitloft.packed import PackedTensor

Call = Callable[[Tensor], Tensor]

SIDE = {"smoke": 256, "quick": 4096, "full": 4096}
APART = {"smoke": 1 << 18, "quick": 1 << 27, "full": 1 << 27}  # bytes of weights that are taken in turns
SECONDS = {"smoke": 0.02, "quick": 1.0, "full": 3.0}  # for each pair
FORMATS = ("nf4:64", "lm2:64", "lm3:64", "lm4:64", "trellis2:64")


class Pair(NamedTuple):
    """One call of ours beside one of theirs: medians in seconds, and of the ratios."""

    ours: float
    theirs: float
    ratio: float


class Bench:
    """The weights of one run, ready to be multiplied."""

    def __init__(self, mode: str) -> None:
        self.side, self.apart, self.budget = SIDE[mode], APART[mode], SECONDS[mode]
        self.weight = torch.randn(self.side, self.side, generator=torch.Generator().manual_seed(0))
        self.packed = {fmt: ops.encode(self.weight, fmt) for fmt in FORMATS}
        self.rows: list[tuple[object, ...]] = []
        self.bandwidth = roofline.read_bandwidth()
        self.rate = roofline.product_rate(torch.bfloat16)

    def input(self, rows: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, self.side, generator=torch.Generator().manual_seed(rows)).to(dtype)

    def ours(self, fmt: str, *, invariant: bool = False) -> Call:
        """Our operator on one copy of the weight after the other."""
        packed = self.packed[fmt]
        copies, _ = arranged_copies(packed, self.copies(packed.nbytes))
        turn = cycle([operators.flat(copy) for copy in copies])
        return lambda x: multiply(x, next(turn), invariant=invariant)

    def by_ops(self, fmt: str, activations: str | None = None) -> Call:
        """``ops.packed_linear`` on one copy of the weight after the other: the operator takes no ``activations``."""
        turn = cycle(arranged_copies(self.packed[fmt], self.copies(self.packed[fmt].nbytes))[0])
        return lambda x: ops.packed_linear(x, next(turn), activations=activations)

    def copies(self, nbytes: int) -> int:
        return max(self.apart // nbytes, 2)

    def dense(self) -> Call:
        turn = cycle([self.weight.bfloat16() for _ in range(self.copies(2 * self.weight.numel()))])
        return lambda x: torch.nn.functional.linear(x, next(turn))

    def int4pack(self) -> Call:
        """torch's 4-bit product: uniform codes in groups of 64, the layout that its CPU kernel wants."""
        codes = torch.randint(0, 16, (self.side, self.side), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.ones(self.side // 64, self.side, 2, dtype=torch.bfloat16)
        turn = cycle([(packed.clone(), scales.clone()) for _ in range(self.copies(packed.nbytes + scales.nbytes))])

        def call(x: Tensor) -> Tensor:
            weight, scaled = next(turn)
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, 64, scaled)  # type: ignore[no-any-return]

        return call

    def bitsandbytes(self) -> Call | None:
        """bitsandbytes' NF4 layer in eval mode, its weight repacked for inference at the first call."""
        try:
            import bitsandbytes as bnb
        except ImportError:
            return None
        layers = []
        for _ in range(self.copies(self.packed["nf4:64"].nbytes)):
            layer = bnb.nn.Linear4bit(self.side, self.side, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(
                self.weight.bfloat16(), requires_grad=False, quant_type="nf4", blocksize=64
            )
            layers.append(layer.to("cpu").eval())
        with torch.no_grad():
            for layer in layers:
                layer(self.input(1, torch.bfloat16))
        turn = cycle([(layer.weight.data, layer.weight.quant_state) for layer in layers])

        def call(x: Tensor) -> Tensor:
            weight, state = next(turn)
            return bnb.matmul_4bit(x, weight, quant_state=state)  # type: ignore[no-any-return]

        return call

    def pair(self, name: str, ours: Call, theirs: Call, x: Tensor, other: Tensor | None = None) -> Pair:
        """Interleaved calls until the budget is spent; ``other`` is their input where it differs."""
        other = x if other is None else other
        spent: list[tuple[float, float]] = []
        for _ in range(3):
            ours(x), theirs(other)
        end = time.perf_counter() + self.budget
        while time.perf_counter() < end or len(spent) < 5:
            spent.append((seconds(partial(ours, x)), seconds(partial(theirs, other))))
        found = Pair(
            statistics.median(a for a, _ in spent),
            statistics.median(b for _, b in spent),
            statistics.median(a / b for a, b in spent),
        )
        self.rows.append((name, 1e3 * found.ours, 1e3 * found.theirs, found.ratio))
        return found

    def of_bandwidth(self, fmt: str, dtype: torch.dtype) -> float:
        """Bytes a second that one row of input takes in, over those of a plain read of the same memory in between."""
        copies, memory = arranged_copies(self.packed[fmt], self.copies(self.packed[fmt].nbytes))
        turn, x = cycle([operators.flat(copy) for copy in copies]), self.input(1, dtype)
        plain = memory.view(torch.float32)
        calls: list[float] = []
        reads: list[float] = []
        end = time.perf_counter() + self.budget
        while time.perf_counter() < end or len(reads) < 5:
            reads.append(seconds(plain.sum))
            multiply(x, next(turn))  # the first after other work
            calls += [seconds(partial(multiply, x, next(turn))) for _ in range(10)]
        return self.packed[fmt].nbytes / statistics.median(calls) * statistics.median(reads) / memory.nbytes

    def floor(self, fmt: str, rows: int) -> float:
        return max(self.packed[fmt].nbytes / self.bandwidth, 2 * rows * self.side**2 / self.rate)

    def error(self, fmt: str, x: Tensor) -> float:
        """Of our output against the float32 definition."""
        packed = self.packed[fmt]
        exact = x.float() @ ops.decode(packed).T
        found = ops.packed_linear(x, packed).float()
        return float((found - exact).norm() / exact.norm())


def arranged_copies(packed: PackedTensor, count: int) -> tuple[list[PackedTensor], Tensor]:
    """Copies, one behind the other in one piece of memory as the weights of a file are, and all of its bytes."""
    parts = packed.tensors()
    places = {name: -(-part.nbytes // 64) * 64 for name, part in parts.items()}
    memory = torch.zeros(count * sum(places.values()), dtype=torch.uint8)
    copies, at = [], 0
    for _ in range(count):
        held = {}
        for name, part in parts.items():
            held[name] = memory[at : at + part.nbytes].view(part.dtype).view(part.shape).copy_(part)
            at += places[name]
        copy = PackedTensor.from_tensors(packed.format, packed.shape, held)
        possible = cpu.library() is not None and cpu_linear.can_arrange(copy.format, copy.shape[-1])
        copies.append(cpu_linear.arrange(copy) if possible else copy)
    return copies, memory


def multiply(x: Tensor, weight: tuple[object, ...], *, invariant: bool = False) -> Tensor:
    return torch.ops.bitloft.packed_linear(x, *weight, invariant=invariant)  # type: ignore[no-any-return]


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def few_rows(bench: Bench) -> dict[str, float | None]:
    """One and four rows against bitsandbytes, and one row of 2 bits against the bandwidth."""
    figures: dict[str, float | None] = {}
    theirs = bench.bitsandbytes()
    brain = bench.input(1, torch.bfloat16)
    for fmt, key in (("nf4:64", "nf4_m1_vs_bnb"), ("lm2:64", "lm2_m1_vs_bnb_nf4"), ("lm3:64", "lm3_m1_vs_bnb_nf4")):
        ours, found = bench.ours(fmt), []
        for dtype in (torch.float32, torch.bfloat16):
            x = bench.input(1, dtype)
            name = f"{fmt} 1 row {str(dtype).removeprefix('torch.')} : bitsandbytes"
            pair = bench.pair(name, ours, theirs or ours, x, brain if theirs else x)
            found.append(pair)
        figures[key] = round(max(pair.ratio for pair in found), 3) if theirs else None
    shares = [bench.of_bandwidth("lm2:64", dtype) for dtype in (torch.float32, torch.bfloat16)]
    figures["lm2_m1_of_bandwidth"] = round(min(shares), 3)
    figures |= {
        f"lm2_m1_of_bandwidth_{name}": round(s, 3) for name, s in zip(("float32", "bfloat16"), shares, strict=True)
    }
    if theirs:
        pair = bench.pair("lm2:64 4 rows : bitsandbytes", bench.ours("lm2:64"), theirs, bench.input(4, torch.bfloat16))
        figures["lm2_m4_vs_bnb_nf4"] = round(pair.ratio, 3)
    return figures


def trellis_rows(bench: Bench) -> dict[str, float | None]:
    """Trellis codes by column against scalar ones of as many true bits, and against the bandwidth."""
    figures: dict[str, float | None] = {}
    ours, scalar = bench.ours("trellis2:64"), bench.ours("lm2:64")
    for rows in (1, 4, 32):
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            name = f"trellis2:64 {rows} rows {str(dtype).removeprefix('torch.')} : lm2:64"
            found.append(bench.pair(name, ours, scalar, bench.input(rows, dtype)).ratio)
        figures[f"trellis2_m{rows}_vs_lm2"] = round(max(found), 3)
        figures[f"trellis2_m{rows}_vs_lm2_bfloat16"] = round(found[1], 3)
    shares = [bench.of_bandwidth("trellis2:64", dtype) for dtype in (torch.float32, torch.bfloat16)]
    figures |= {
        f"trellis2_m1_of_bandwidth_{name}": round(s, 3) for name, s in zip(("float32", "bfloat16"), shares, strict=True)
    }
    theirs = bench.bitsandbytes()
    if theirs:
        pair = bench.pair("trellis2:64 1 row : bitsandbytes", ours, theirs, bench.input(1, torch.bfloat16))
        figures["trellis2_m1_vs_bnb_nf4"] = round(pair.ratio, 3)
    return figures


def many_rows(bench: Bench) -> dict[str, float | None]:
    """Thirty-two rows against the best of three, 256 against dense, and what batch invariance costs."""
    x = bench.input(32, torch.bfloat16)
    ours, peers = bench.ours("nf4:64"), {"dense bfloat16": bench.dense(), "int4pack": bench.int4pack()}
    theirs = bench.bitsandbytes()
    peers |= {"bitsandbytes": theirs} if theirs else {}
    ratios = [bench.pair(f"nf4:64 32 rows : {name}", ours, peer, x).ratio for name, peer in peers.items()]
    wide = bench.input(256, torch.bfloat16)
    dense = bench.pair("lm2:64 256 rows : dense bfloat16", bench.ours("lm2:64"), peers["dense bfloat16"], wide)
    costs = {}
    for rows in (1, 32):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"lm2:64 {rows} rows {str(dtype).removeprefix('torch.')}, invariant : not"
            given = bench.input(rows, dtype)
            costs[rows, dtype] = bench.pair(
                name, bench.ours("lm2:64", invariant=True), bench.ours("lm2:64"), given
            ).ratio
    return {
        "nf4_m32_vs_best": round(max(ratios), 3),
        "lm2_m256_vs_dense_bf16": round(dense.ratio, 3),
        "invariant_cost_m32": round(max(costs[32, torch.float32], costs[32, torch.bfloat16]), 3),
        "invariant_cost_m1": round(max(costs[1, torch.float32], costs[1, torch.bfloat16]), 3),
    }


def rounded_rows(bench: Bench) -> dict[str, float | None]:
    """``--activations int8`` against the default, bfloat16 input."""
    figures: dict[str, float | None] = {}
    for fmt, short in (("nf4:64", "nf4"), ("lm2:64", "lm2"), ("lm3:64", "lm3")):
        default = bench.by_ops(fmt)
        for rows in (1, 4, 32):
            key = f"{short}_int8_m{rows}_vs_default"
            if not cpu_linear.takes_int8():
                figures[key] = None
                continue
            x, name = bench.input(rows, torch.bfloat16), f"{fmt} {rows} rows int8 : default"
            figures[key] = round(bench.pair(name, bench.by_ops(fmt, "int8"), default, x).ratio, 3)
    return figures


def main() -> int:
    arguments = harness.parser(__doc__).parse_args()
    harness.begin(arguments)
    bench = Bench(arguments.mode)
    with torch.no_grad():
        figures = few_rows(bench) | trellis_rows(bench) | many_rows(bench) | rounded_rows(bench)
    harness.table(("ours : theirs", "ours ms", "theirs ms", "ratio"), bench.rows)
    floors = [(fmt, rows, 1e3 * bench.floor(fmt, rows)) for fmt in FORMATS for rows in (1, 4, 32, 256)]
    harness.table(("format", "rows", "floor ms"), floors)
    errors = {
        f"{fmt} {str(dtype).removeprefix('torch.')}": float(f"{bench.error(fmt, bench.input(4, dtype)):.2e}")
        for fmt in FORMATS
        for dtype in (torch.float32, torch.bfloat16)
    }
    figures |= {"read_gb_per_second": round(bench.bandwidth / 1e9, 1), "gflops_bf16": round(bench.rate / 1e9)}
    milliseconds = {str(name): round(float(str(ours)), 4) for name, ours, *_ in bench.rows}
    shape = {"side": bench.side, "group": 64, "apart_bytes": bench.apart}
    harness.finish("packed_linear", arguments, shape, {**figures, "errors": errors, "milliseconds": milliseconds})
    return 0


if __name__ == "__main__":
    sys.exit(main())
