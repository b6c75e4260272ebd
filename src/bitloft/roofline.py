"""What this machine can do, and how far from it each operator is: ``bitloft info --bench``.

The floor of a call is the larger of its bytes over the read bandwidth and its operations over the rate of the vendor's
matrix product in the same dtype, both measured here and now. Weights are taken in turns from more memory than a cache
holds, as a model's are. Seconds in all; figures of a benchmark script, with peers beside them, are in bench/.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from bitloft.kernels import ops
from bitloft.packed import PackedTensor

SIDE = 4096  # of the matrices
APART = 1 << 27  # bytes of weights taken in turns: more than a last-level cache
READ = 1 << 28  # bytes of one read
SECONDS = 0.2  # spent on each figure


@dataclass(frozen=True)
class Roof:
    """Bytes per second read from memory; multiply-adds, counted twice, per second and dtype."""

    bandwidth: float
    rates: dict[torch.dtype, float]


@dataclass(frozen=True)
class Standing:
    """One operator: its median seconds, the floor, and what the floor is set by."""

    name: str
    seconds: float
    floor: float
    bound: str


def roof() -> Roof:
    """Measure the machine, with torch's threads."""
    return Roof(read_bandwidth(), {dtype: product_rate(dtype) for dtype in (torch.float32, torch.bfloat16)})


def read_bandwidth() -> float:
    """Bytes per second of summing more floats than a cache holds: the best of some runs."""
    x = torch.ones(READ // 4)
    return READ / min(_seconds(x.sum, 2 * SECONDS))


def product_rate(dtype: torch.dtype) -> float:
    """Operations per second of torch's own product of two square matrices; the best of some runs."""
    a, b = (torch.randn(SIDE // 4, SIDE // 4).to(dtype) for _ in range(2))
    return 2 * (SIDE // 4) ** 3 / min(_seconds(lambda: a @ b, SECONDS))


def standings(roof: Roof, side: int | None = None) -> Iterator[Standing]:
    """Where each operator stands, one after the other; ``side`` is that of its square matrix, SIDE by default."""
    side = side or SIDE
    weight = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    for fmt in ("lm2:64", "lm3:64", "nf4:64"):
        packed = ops.encode(weight, fmt)
        copies = [packed, *(_copied(packed) for _ in range(min(APART // packed.nbytes, 64)))]
        for rows, dtype in ((1, torch.float32), (4, torch.bfloat16), (32, torch.bfloat16), (256, torch.bfloat16)):
            turn, x = cycle(copies), torch.randn(rows, side).to(dtype)
            spent = _seconds(partial(_product, x, turn), SECONDS)
            work = 2 * rows * side * side
            name = f"packed_linear {fmt} {rows} x {str(dtype).removeprefix('torch.')}"
            yield _standing(name, spent, packed.nbytes, work, roof, dtype)
        moved = packed.nbytes + weight.nbytes
        yield _standing(f"decode {fmt}", _seconds(partial(ops.decode, packed), SECONDS), moved, 0, roof)
        yield _standing(f"encode {fmt}", _seconds(partial(ops.encode, weight, fmt), SECONDS), moved, 0, roof)


def _product(x: Tensor, turn: Iterator[PackedTensor]) -> Tensor:
    return ops.packed_linear(x, next(turn))


def _copied(packed: PackedTensor) -> PackedTensor:
    return PackedTensor.from_tensors(
        packed.format, packed.shape, {name: part.clone() for name, part in packed.tensors().items()}
    )


def _standing(
    name: str, spent: list[float], nbytes: int, work: int, roof: Roof, dtype: torch.dtype = torch.float32
) -> Standing:
    memory, compute = nbytes / roof.bandwidth, work / roof.rates[dtype]
    bound = "memory" if memory >= compute else "arithmetic"
    return Standing(name, statistics.median(spent), max(memory, compute), bound)


def _seconds(run: Callable[[], object], budget: float) -> list[float]:
    """Seconds of each of some runs, after one that warms up: three at least, or as many as the budget allows."""
    run()
    spent: list[float] = []
    while len(spent) < 3 or sum(spent) < budget:
        began = time.perf_counter()
        run()
        spent.append(time.perf_counter() - began)
    return spent
