"""How long `import bitloft` and `bitloft --help` take in a fresh process, and whether they stay below their limits.

The Python interpreter's own start is measured beside them, as the floor. The last line of stdout is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python": ["-c", "pass"],
    "import": ["-c", "import bitloft"],
    "help": ["-m", "bitloft.cli", "--help"],
}
LIMITS = {"import": 0.3, "help": 0.5}  # seconds
RUNS = {"smoke": 2, "quick": 5, "full": 20}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", dest="mode", action="store_const", const="smoke", help="twice each, no limits")
    parser.add_argument("--quick", dest="mode", action="store_const", const="quick", help="five times each")
    mode = parser.parse_args().mode or "full"
    seconds = {name: measure(command, RUNS[mode]) for name, command in COMMANDS.items()}
    over = [name for name, limit in LIMITS.items() if seconds[name]["median"] > limit]
    for name, numbers in seconds.items():
        limit = f", limit {LIMITS[name]} s" if name in LIMITS else ""
        print(f"{name:>7}: median {numbers['median']:.3f} s, best {numbers['best']:.3f} s{limit}")
    print(
        json.dumps(
            {
                "bench": "startup",
                "mode": mode,
                "shape": {"runs": RUNS[mode]},
                "threads": 1,
                "cpus": os.cpu_count(),
                "seconds": seconds,
                "limits": LIMITS,
                "over": over,
            }
        )
    )
    return 1 if over and mode != "smoke" else 0


def measure(command: list[str], runs: int) -> dict[str, float]:
    """Seconds of ``runs`` fresh processes after one that warms the file cache."""
    times = []
    for _ in range(runs + 1):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - begin)
    return {"median": round(statistics.median(times[1:]), 4), "best": round(min(times[1:]), 4)}


if __name__ == "__main__":
    sys.exit(main())
