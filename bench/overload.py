"""Overload: `bitloft serve` in a process of its own under ten times what it can do.

What it can do is measured first, warm, by as many clients as it has rows. Then requests arrive at random times at ten
times that rate, whatever becomes of them. Adapters are copies of packed ones (bench/served/adapters.py), by Zipf's law.

refused_ms_p50, _p95, _p99  from sending a request to reading the whole 429, the client's own work included
refused_without_retry_after refusals that do not say when to come again
memory_growth               largest resident memory of the server in the flood / the one at its start, less 1
goodput_share               requests answered a second in the flood / without it
most_waiting                in the queue, at most (its cap is ``queue``)
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT)]

import harness  # noqa: E402
from served import adapters as made  # noqa: E402
from served import arguments  # noqa: E402
from tests.watching import watched  # noqa: E402

from bitloft.options import LoadOptions  # noqa: E402
from bitloft.quantize import quantize  # noqa: E402
from bitloft.serve.load import load  # noqa: E402

GOALS = {"refused_ms_p99": 50.0, "memory_growth": 0.05, "goodput_share": 0.8}
TIMES = 10


@dataclass(frozen=True)
class Size:
    adapters: int
    calm: int  # requests without a crowd
    seconds: float  # of the flood
    answer: int
    queue: int = 24
    rows: int = 8


MODES = {
    "full": Size(200, 80, 60.0, 32),
    "quick": Size(100, 40, 30.0, 32),
    "smoke": Size(4, 8, 1.0, 60, queue=8, rows=2),
}


def main() -> int:
    given = arguments(__doc__)
    size = MODES[given.mode]
    with tempfile.TemporaryDirectory() as temporary:
        figures = measured(given, size, given.work or Path(temporary), Path(temporary))
    shape = {"adapters": size.adapters, "queue": size.queue, "rows": size.rows, "answer": size.answer,
             "times": TIMES, "seconds": size.seconds}  # fmt: skip
    harness.finish("overload", given, shape, figures)
    short = figures["goodput_share"] < GOALS["goodput_share"] or figures["refused_without_retry_after"]
    short = short or any(figures[name] > GOALS[name] for name in ("refused_ms_p99", "memory_growth"))
    return int(given.mode != "smoke" and bool(short or figures["failed"]))


def measured(given: argparse.Namespace, size: Size, place: Path, temporary: Path) -> dict[str, Any]:
    source = made.toy(place / "toy") if given.mode == "smoke" else given.smollm2
    base = place / "base"
    if not base.exists():
        quantize(source, base, format="lm2:64", rank=16)
    pool, _ = made.pool(place, base, size.adapters, (0.5, 1.8))
    served = temporary / "served"  # of a larger pool only these
    served.mkdir()
    for path in pool:
        (served / path.name).mkdir()
        for file in path.iterdir():
            os.link(file, served / path.name / file.name)
    with server(base, served, size) as (pid, url):
        harness.say(f"{size.calm} requests of {size.rows} clients")
        alone = LoadOptions(clients=size.rows, max_tokens=size.answer, check=False)
        # What is done once is done here: a calm run that begins cold flatters the flood.
        load(url, replace(alone, requests=2 * size.rows))
        calm = load(url, replace(alone, requests=size.calm))
        rate = TIMES * calm.requests_per_second
        crowd_of = LoadOptions(rate=rate, max_tokens=size.answer, check=False)
        load(url, replace(crowd_of, requests=max(int(rate), 8)))  # the queue's memory is there now
        harness.say(f"{rate:.1f} requests a second for {size.seconds:g} s")
        with watched(pid, url) as seen:
            crowd = load(url, replace(crowd_of, requests=max(int(rate * size.seconds), 8)))
    return {
        **{f"refused_ms_{name}": round(value, 1) for name, value in crowd.refused_ms.items()},
        "refused": crowd.refused,
        "refused_without_retry_after": crowd.refused_without_retry_after,
        "answered": crowd.answered,
        "failed": crowd.requests - crowd.refused - crowd.answered,
        "memory_growth": round(max(used for used, _ in seen) / seen[0][0] - 1, 4),
        "memory_bytes": seen[0][0],
        "most_waiting": max(waiting for _, waiting in seen),
        "goodput_share": round(crowd.requests_per_second / calm.requests_per_second, 3),
        "calm_requests_per_second": round(calm.requests_per_second, 2),
        "rate": round(rate, 1),
        "generator_lag_ms_p99": round(crowd.generator_lag_ms["p99"], 1),
        "goals": GOALS,
    }


@contextmanager
def server(base: Path, adapters: Path, size: Size) -> Iterator[tuple[int, str]]:
    """The server's process id and address."""
    flags = {"--adapter-dir": adapters, "--port": 0, "--max-queue": size.queue, "--max-batch": size.rows,
             "--adapter-share": 1.0}  # fmt: skip
    words = [str(word) for pair in flags.items() for word in pair]
    command = [sys.executable, "-m", "bitloft.cli", "serve", str(base), *words]
    found = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    said = []
    try:
        for line in found.stderr or ():
            said.append(line)
            address = re.search(r"^serving .* at (http://\S+)", line)
            if address:
                yield found.pid, address[1]
                return
        raise SystemExit(f"the server did not start: {''.join(said)[-2000:]}")
    finally:
        found.kill()
        found.communicate()


if __name__ == "__main__":
    sys.exit(main())
