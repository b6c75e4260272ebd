"""The byte budget: least recently used first out, never one in use, one load for all who wait, failures told to all."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitloft.errors import AdapterError
from bitloft.serve.requests import RequestError
from bitloft.serve.residency import MARGIN, Residency, Version

SIZE = 10_000


class Disk:
    """Versions that load when they are let."""

    def __init__(self, budget: int | None) -> None:
        self.loaded: list[str] = []
        self.unloaded: list[str] = []
        self.broken: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.residency = Residency(budget, self.load, self.unloaded.append)

    def load(self, version: Version) -> int:
        self.gate.wait(10)
        self.loaded.append(version.key)
        if version.key in self.broken:
            raise AdapterError(f"{version.key} is broken")
        return SIZE - MARGIN

    def version(self, key: str) -> Version:
        found = self.residency.version(key, Path(key), SIZE)
        if not found.names:
            self.residency.name(found, 1)
        return found

    def use(self, key: str) -> Version:
        """Hold, wait and let go."""
        version = self.version(key)
        self.residency.hold(version)
        self.residency.wait(version)
        self.residency.release(version)
        return version


@pytest.fixture
def disk() -> Iterator[Disk]:
    made = Disk(3 * SIZE)
    yield made
    made.gate.set()
    made.residency.close()


def until(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_the_least_recently_used_goes(disk: Disk) -> None:
    for key in ("a", "b", "c", "a", "d"):
        disk.use(key)
    assert disk.loaded == ["a", "b", "c", "d"]
    assert disk.unloaded == ["b"]
    assert disk.residency.bytes == 3 * SIZE
    assert (disk.residency.counts.hits, disk.residency.counts.loads, disk.residency.counts.evictions) == (1, 4, 1)


def test_what_is_held_is_never_evicted(disk: Disk) -> None:
    held = [disk.version(key) for key in ("a", "b", "c")]
    for version in held:
        disk.residency.hold(version)
        disk.residency.wait(version)
    assert disk.residency.pinned == 3 * SIZE
    late = disk.version("d")
    disk.residency.hold(late)
    time.sleep(0.1)
    assert not late.resident
    assert disk.unloaded == []
    disk.residency.release(held[1])
    disk.residency.wait(late)
    assert disk.unloaded == ["b"]
    assert disk.residency.counts.waits >= 1


def test_one_load_for_all_who_wait(disk: Disk) -> None:
    disk.gate.clear()
    version = disk.version("a")
    came: list[int] = []

    def wait() -> None:
        disk.residency.hold(version)
        disk.residency.wait(version)
        came.append(1)

    threads = [threading.Thread(target=wait) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: version.refs == 8)
    disk.gate.set()
    for thread in threads:
        thread.join(10)
    assert len(came) == 8
    assert disk.loaded == ["a"]


def test_a_failure_is_told_and_not_tried_at_once_again(disk: Disk) -> None:
    disk.broken.add("a")
    version = disk.version("a")
    disk.residency.hold(version)
    with pytest.raises(AdapterError, match="a is broken"):
        disk.residency.wait(version)
    disk.residency.release(version)
    with pytest.raises(RequestError, match="cannot be served") as caught:
        disk.residency.hold(version)
    assert caught.value.code == "adapter_invalid"
    assert version.refs == 0
    assert disk.loaded == ["a"]
    disk.broken.clear()
    version.failed_at -= 100
    assert disk.use("a").resident
    assert disk.residency.counts.failures == 1


def test_larger_than_the_whole_budget(disk: Disk) -> None:
    version = disk.residency.version("huge", Path("huge"), 4 * SIZE)
    with pytest.raises(RequestError, match="the budget is 30000 in all") as caught:
        disk.residency.hold(version)
    assert caught.value.code == "adapter_capacity"


def test_a_version_without_name_or_holder_is_gone(disk: Disk) -> None:
    version = disk.version("a")
    disk.residency.hold(version)
    disk.residency.wait(version)
    disk.residency.name(version, -1)
    assert version.resident  # held still
    disk.residency.release(version)
    assert not version.resident
    assert disk.unloaded == ["a"]
    assert disk.residency.bytes == 0
    assert disk.residency.version("a", Path("a"), SIZE) is not version


def test_nobody_waits_any_more(disk: Disk) -> None:
    disk.gate.clear()
    first, second = disk.version("a"), disk.version("b")
    disk.residency.hold(first)
    until(lambda: first.loading)
    disk.residency.hold(second)
    disk.residency.release(second)
    disk.gate.set()
    disk.residency.wait(first)
    disk.use("c")
    assert disk.loaded == ["a", "c"]


def test_listeners_and_the_end(disk: Disk) -> None:
    told: list[int] = []
    disk.residency.listeners.append(lambda: told.append(1))
    disk.use("a")
    until(lambda: told == [1])
    disk.gate.clear()
    version = disk.version("b")
    disk.residency.hold(version)
    until(lambda: version.loading)
    waiting = disk.version("c")
    disk.residency.hold(waiting)
    failures: list[Exception] = []

    def wait() -> None:
        try:
            disk.residency.wait(waiting)
        except RequestError as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    disk.gate.set()
    disk.residency.close()
    thread.join(10)
    assert waiting.resident or "shutting down" in str(failures[0])
    assert not any(t.name == "bitloft-adapters" and t.is_alive() for t in [disk.residency._thread] if t)


def test_no_budget_keeps_everything() -> None:
    disk = Disk(None)
    for i in range(20):
        disk.use(f"v{i}")
    assert disk.residency.resident == 20
    assert disk.unloaded == []
    assert not disk.residency.full_for(disk.version("another"))
    disk.residency.close()
