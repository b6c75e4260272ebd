"""Free memory of this machine, or of the limit that this process lives under."""

import os
from pathlib import Path

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
USES = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


def free_memory() -> int:
    """Bytes that could be allocated now: what the system has free, or what its control group leaves if that is less."""
    free = _available()
    for limit, use in zip(LIMITS, USES, strict=True):
        most, used = _number(limit), _number(use)
        if most is not None and used is not None:
            free = min(free, max(most - used, 0))
    return free


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such limit, or "max"
        return None
