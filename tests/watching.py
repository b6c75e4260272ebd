"""Looking at a server again and again while something else goes on; bench/overload.py watches with it too."""

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from bitloft.serve.client import Target, get

Seen = TypeVar("Seen")


@contextmanager
def repeated(look: Callable[[], Seen], seconds: float) -> Iterator[list[Seen]]:
    """What ``look`` returned: at once, then so often from a thread until the block ends. What it raised is raised."""
    seen, failures, stop = [look()], list[Exception](), threading.Event()

    def watch() -> None:
        try:
            while not stop.wait(seconds):
                seen.append(look())
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join(60)
    if failures:
        raise failures[0]


def resident(pid: int | str = "self") -> int:
    """Bytes of a process that are in memory; Linux only."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def watched(pid: int, url: str) -> Iterator[list[tuple[int, int]]]:
    """(resident bytes, requests that wait) of a server, four times a second; the first at once."""

    def look() -> tuple[int, int]:
        _, ready = asyncio.run(get(Target.parse(url), "/health/ready"))
        return resident(pid), int(ready["waiting"])

    with repeated(look, 0.25) as seen:
        yield seen
