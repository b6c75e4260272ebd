"""`make bench-smoke`: every benchmark at toy size, so that none can rot.

Each bench/*.py must take --smoke, end with 0 and print one JSON object as its last line, with at least
mode, shape and threads.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEYS = {"mode", "shape", "threads"}
LIMIT = 300  # seconds for one benchmark at toy size


def main() -> int:
    scripts = sorted((ROOT / "bench").glob("*.py"))
    failures = [f"{script.name}: {problem}" for script in scripts if (problem := run(script))]
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{len(scripts) - len(failures)} of {len(scripts)} benchmarks ran")
    return 1 if failures or not scripts else 0


def run(script: Path) -> str | None:
    """Run one benchmark; what is wrong with it, or None."""
    done = subprocess.run([sys.executable, str(script), "--smoke"], capture_output=True, text=True, timeout=LIMIT)
    if done.returncode:
        return f"ended with {done.returncode}: {done.stderr.strip()[-500:]}"
    problem = problem_of(done.stdout)
    if problem is None:
        print(f"{script.name}: {done.stdout.strip().splitlines()[-1]}", flush=True)
    return problem


def problem_of(stdout: str) -> str | None:
    """Why the last line of ``stdout`` is not the JSON object of a benchmark, or None."""
    lines = stdout.strip().splitlines()
    try:
        last = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        last = None
    if not isinstance(last, dict):
        return "the last line of stdout is not a JSON object"
    missing = KEYS - set(last)
    return f"the last line lacks {', '.join(sorted(missing))}" if missing else None


if __name__ == "__main__":
    sys.exit(main())
