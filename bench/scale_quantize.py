"""Quantizing on Ray with one worker and with two, threads fixed: what a second worker is worth, and what a task costs.

A random Llama is quantized (lm2:64, LoftQ, rank 16, one thread) by a local run and through clusters of one and two
workers that are up and have prepared their plan; the bytes of all three are compared. efficiency_2 is the time of one
worker over twice that of two (best of the repeats each); overhead_per_task_ms is what one worker's run takes longer
than the local one, over the number of tasks. Starting a cluster is given apart. Goal: efficiency_2 of at least 0.85.
Runs take turns, so that a busy machine meets them alike; two workers need two idle cores.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

from bitloft.footprint import random_llama
from bitloft.integrations.ray import Cluster, connected
from bitloft.quantize import quantize

# hidden, intermediate, layers, vocabulary; repeats
SHAPES = {
    "full": ((2048, 5632, 10, 2048), 3),
    "quick": ((2048, 5632, 8, 2048), 2),
    "smoke": ((64, 128, 2, 256), 1),
}
LIMIT = 0.85
OPTIONS: dict[str, Any] = {"format": "lm2:64", "rank": 16}


def main() -> int:
    arguments = harness.parser(__doc__).parse_args()
    arguments.threads = arguments.threads or 1
    harness.begin(arguments)
    shape, repeats = SHAPES[arguments.mode]
    with tempfile.TemporaryDirectory() as place:
        model = random_llama(Path(place) / "model", *shape)
        began = time.perf_counter()
        with connected(Cluster(workers=2, threads=arguments.threads)):
            started = time.perf_counter() - began
            found = measured(model, Path(place), arguments.threads, repeats)
    seconds = {name: min(each) for name, each in found["seconds"].items()}
    efficiency = seconds["one"] / (2 * seconds["two"])
    overhead = 1000 * (seconds["one"] - seconds["local"]) / found["tasks"]
    harness.table(
        ("run", "best s", "all s"),
        [(n, seconds[n], " ".join(f"{s:.2f}" for s in each)) for n, each in found["seconds"].items()],
    )
    print(f"a second worker is worth {efficiency:.3f}, a task costs {overhead:.1f} ms more than here")
    figures = {
        "efficiency_2": round(efficiency, 4),
        "overhead_per_task_ms": round(overhead, 3),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "tasks": found["tasks"],
        "same_bytes": found["same"],
        "start_seconds": round(started, 2),
        "limit": LIMIT,
    }
    names = ("hidden", "intermediate", "layers", "vocabulary")
    harness.finish("scale_quantize", arguments, dict(zip(names, shape, strict=True)) | OPTIONS, figures)
    return 0 if found["same"] and (arguments.mode == "smoke" or efficiency >= LIMIT) else 1


def measured(model: Path, place: Path, threads: int, repeats: int) -> dict[str, Any]:
    """Seconds of each way, in turns; a small model before them warms workers up."""
    ways: dict[str, Cluster | None] = {
        "local": None, "one": Cluster(workers=1, threads=threads), "two": Cluster(workers=2, threads=threads),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    sums, tasks = set[str](), 0
    small = random_llama(place / "small", 256, 512, 2, 256)
    quantize(str(small), place / "warm", **OPTIONS, threads=threads, cluster=ways["two"])
    for turn in range(repeats):
        for name, cluster in ways.items():
            out = place / f"{turn}-{name}"
            report = quantize(str(model), out, **OPTIONS, threads=threads, cluster=cluster)
            sums.add(report.fingerprint)
            tasks = len(report.matrices)
            seconds[name].append(report.seconds)
    return {"seconds": seconds, "tasks": tasks, "same": len(sums) == 1}


if __name__ == "__main__":
    sys.exit(main())
