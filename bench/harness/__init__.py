"""What the benchmarks share: --smoke and --quick, the machine beside the figures, cells that survive an interruption.

Every benchmark prints its tables first and one JSON object as its last line: ``bench``, ``mode``, ``shape``,
``threads``, ``machine`` and the claim's own keys. ``--save`` writes the same object to bench/results.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
MODES = ("smoke", "quick", "full")


def parser(about: str | None) -> argparse.ArgumentParser:
    """--smoke (seconds, toy sizes), --quick (minutes), neither (the claim itself), --threads, --save."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.set_defaults(mode="full")
    made.add_argument("--smoke", dest="mode", action="store_const", const="smoke", help="toy sizes, seconds")
    made.add_argument("--quick", dest="mode", action="store_const", const="quick", help="fewer cells or repeats")
    made.add_argument("--threads", type=int, default=None, help="threads of torch (default: all cores; smoke: one)")
    made.add_argument("--save", action="store_true", help="write the JSON object to bench/results too")
    return made


def begin(arguments: argparse.Namespace) -> None:
    """Set torch's threads."""
    import torch

    torch.set_num_threads(arguments.threads or (1 if arguments.mode == "smoke" else os.cpu_count() or 1))


def finish(name: str, arguments: argparse.Namespace, shape: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Print the last line, and keep it where that was asked for."""
    import torch

    from bitloft.inspection import machine

    record = {
        "bench": name,
        "mode": arguments.mode,
        "shape": dict(shape),
        "threads": torch.get_num_threads(),
        **figures,
        "machine": machine(),
    }
    if arguments.save:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}-{arguments.mode}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record))


_BEGAN = time.monotonic()


def say(what: str) -> None:
    """A line of progress on stderr, with the seconds since the start: a run that is cut off tells how far it came."""
    print(f"[{time.monotonic() - _BEGAN:6.0f} s] {what}", file=sys.stderr, flush=True)


def seconds_of(run: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """The best of some runs (what the machine can do, other load aside), and the last result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        began = time.perf_counter()
        result = run()
        best = min(best, time.perf_counter() - began)
    return best, result


def commit() -> str:
    """The checked-out commit, with a + where files differ from it; empty outside of a clone."""
    place = Path(__file__).resolve().parent
    try:
        said = [
            subprocess.run(["git", *words], cwd=place, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said[0] + "+" * bool(said[1])


class Peak:
    """How far this process's resident memory has risen since the object was made, at its highest; Linux only."""

    def __init__(self) -> None:
        self._before: int | None = None
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts anew
            self._before = _status("VmRSS")
        except OSError:
            return

    def mib(self) -> float | None:
        return None if self._before is None else round((_status("VmHWM") - self._before) / 1024, 1)


def _status(name: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under their columns, aligned."""
    cells = [[_cell(value) for value in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print("  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip())


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Cells:
    """Measured cells of a grid, one JSON line each in bench/results/cells: a second run measures only what is missing.

    A cell is known by its key; ``path`` None keeps nothing. A line that an interruption cut off is measured again.
    Processes may share a file: each looks before it measures at what the others have finished, a line is one write
    behind whatever is there, and of two lines for one cell the first counts for all.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, dict[str, Any]] = {}
        self._seen = 0  # bytes of whole lines that were taken in
        self._look()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._look()
        return iter(list(self._known.values()))

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The cell as kept, None where it has not been measured."""
        self._look()
        return self._known.get(_name(key))

    def get(self, key: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The figures of a cell: as kept, or measured and kept."""
        if self.find(key) is None:
            cell = {"key": dict(key), **measure()}
            if self.find(key) is None:  # nor was it finished elsewhere meanwhile
                self._keep(cell)
        return self._known[_name(key)]

    def _look(self) -> None:
        """Take in the lines that are new since the last look."""
        size = self.path.stat().st_size if self.path is not None and self.path.exists() else 0
        if self.path is None or size == self._seen:
            return
        with self.path.open("rb") as stream:
            stream.seek(self._seen if size > self._seen else 0)  # a file that shrank was written anew
            begin, lines = stream.tell(), stream.read()
        self._seen = begin + lines.rfind(b"\n") + 1
        for line in lines.splitlines():
            try:
                cell = json.loads(line)
            except ValueError:  # cut off, or still being written
                continue
            self._known.setdefault(_name(cell["key"]), cell)

    def _keep(self, cell: dict[str, Any]) -> None:
        if self.path is None:
            self._known[_name(cell["key"])] = cell
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(handle).st_size
            cut = size > 0 and os.pread(handle, 1, size - 1) != b"\n"  # by an interruption
            line = b"\n" * cut + json.dumps(cell).encode() + b"\n"
            if os.write(handle, line) < len(line):
                raise OSError(
                    f"{self.path} took a part of a cell only; free some space, the next run measures it again"
                )
        finally:
            os.close(handle)
        self._look()


def _name(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def grid_parser(text: str | None) -> argparse.ArgumentParser:
    """The flags of a bench that takes hours: folders (or their variables), a deadline, --report and --verify."""
    made = parser(text)
    folders = {
        "smollm2": "folder of the model",
        "minilm": "folder of the model",
        "shared": "folder of data and public adapters",
        "work": "where bases and adapters are kept",
    }
    for name, meaning in folders.items():
        variable = f"BITLOFT_{'GRID' if name == 'work' else name.upper()}"
        value = os.environ.get(variable)
        said = f"{meaning} (default: {variable})"
        made.add_argument(f"--{name}", type=Path, default=value and Path(value), help=said)
    made.add_argument("--hours", type=float, default=1e6, help="begin no cell after so many hours")
    made.add_argument("--report", action="store_true", help="measure nothing: figures from the cells that exist")
    made.add_argument("--verify", type=int, default=0, help="measure so many finished cells anew and compare")
    return made


def grid_arguments(made: argparse.ArgumentParser) -> argparse.Namespace:
    """What was given to a ``grid_parser``; ends with exit code 2 where a run would lack a folder."""
    given = made.parse_args()
    if given.mode != "smoke" and not given.report and None in (given.smollm2, given.shared):
        made.error("--smollm2 and --shared are needed (or BITLOFT_SMOLLM2, BITLOFT_SHARED)")
    return given
