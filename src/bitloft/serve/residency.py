"""Which versions are in memory: a byte budget, one loading thread, least recently used first out, and never one in use.

Loads are off the event loop and off the engine's thread, one at a time, and one for all who wait for a version. Where
no room can be made the load waits until a version is let go: evicting what runs, or is about to, would have two
requests throw each other's adapter out for ever (another server went from 40 ms to 6 s at the first adapter beyond its
slots). Those that wait with their adapter in memory always run, so room does come.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bitloft.errors import BitloftError
from bitloft.serve.requests import RequestError

FAILED_SECONDS = 5.0  # so long a version whose files are bad is not tried again
MARGIN = 4096  # bytes of Python's own for each version in memory

log = logging.getLogger("bitloft.serve")


@dataclass(eq=False)
class Version:
    """One set of files. ``nbytes`` is what it takes in memory (until it was there once: an estimate), ``refs`` the
    requests that hold it, ``names`` the names that lead to it."""

    key: str
    path: Path
    nbytes: int
    refs: int = 0
    names: int = 0
    resident: bool = False
    loading: bool = False
    quarantined: bool = False
    note: str | None = None
    failure: RequestError | None = None
    cause: Exception | None = None
    failed_at: float = 0.0


@dataclass
class Counts:
    hits: int = 0
    loads: int = 0
    failures: int = 0
    seconds: float = 0.0
    evictions: int = 0
    waits: int = 0


@dataclass
class Residency:
    """Versions in memory under ``budget`` bytes (None: no limit). ``load`` reads one and returns its bytes, ``unload``
    takes its key. Any thread."""

    budget: int | None
    load: Callable[[Version], int]
    unload: Callable[[str], None]
    counts: Counts = field(default_factory=Counts)
    listeners: list[Callable[[], None]] = field(default_factory=list)
    bytes: int = 0

    def __post_init__(self) -> None:
        self._versions: dict[str, Version] = {}
        self._recent: OrderedDict[str, Version] = OrderedDict()  # in memory, the latest used last
        self._wanted: OrderedDict[str, Version] = OrderedDict()  # to be loaded, in order of asking
        self._change = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def resident(self) -> int:
        return len(self._recent)

    @property
    def pinned(self) -> int:
        """Bytes in memory that cannot be evicted now."""
        with self._change:
            return sum(version.nbytes for version in self._recent.values() if version.refs)

    def version(self, key: str, path: Path, nbytes: int) -> Version:
        """The version with this key; made if it is new."""
        with self._change:
            return self._versions.setdefault(key, Version(key, path, nbytes))

    def full_for(self, version: Version) -> bool:
        """Whether it is not in memory and something else would have to go for it."""
        with self._change:
            return not version.resident and self.budget is not None and self.bytes + version.nbytes > self.budget

    def hold(self, version: Version, *, again: bool = False) -> None:
        """Keep a version until ``release``, and load it if need be. ``again``: whatever failed a moment ago.

        Raises RequestError for what can never be loaded, or failed to a moment ago; then nothing is held.
        """
        with self._change:
            if version.resident:
                self.counts.hits += 1
                self._recent.move_to_end(version.key)
            else:
                self._require_possible(version, again)
                self._want(version)
            version.refs += 1

    def _require_possible(self, version: Version, again: bool) -> None:
        if self.budget is not None and version.nbytes > self.budget:
            raise RequestError(
                "adapter_capacity", f"the adapter takes {version.nbytes} bytes, the budget is {self.budget} in all."
            )
        if version.failure is not None and not again and time.monotonic() - version.failed_at < FAILED_SECONDS:
            raise version.failure

    def _want(self, version: Version) -> None:
        if version.key in self._wanted or version.loading:
            return
        version.failure = version.cause = None
        self._wanted[version.key] = version
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="bitloft-adapters", daemon=True)
            self._thread.start()
        self._change.notify_all()

    def release(self, version: Version) -> None:
        with self._change:
            version.refs -= 1
            if not version.refs:
                self._wanted.pop(version.key, None)  # nobody waits for it any more
                self._discard(version)
            self._change.notify_all()

    def wait(self, version: Version) -> None:
        """Return when a version that is held is in memory. Raises what its load raised."""
        with self._change:
            self._change.wait_for(lambda: version.resident or version.failure is not None or self._closed)
            if version.cause is not None:
                raise version.cause
            if not version.resident:
                raise RequestError("shutting_down", "the server is shutting down.")

    def name(self, version: Version, change: int) -> None:
        """A name more (1) or less (-1) leads to it."""
        with self._change:
            version.names += change
            self._discard(version)

    def quarantine(self, key: str) -> None:
        with self._change:
            if key in self._versions:
                self._versions[key].quarantined = True

    def _discard(self, version: Version) -> None:
        """Drop a version that no name leads to and no request holds."""
        if version.names <= 0 and version.refs <= 0 and not version.loading:
            if version.resident:
                self._evict(version)
            self._versions.pop(version.key, None)

    def _evict(self, version: Version) -> None:
        version.resident = False
        self._recent.pop(version.key)
        self.bytes -= version.nbytes
        self.unload(version.key)

    # ---- the loading thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._change:
                version = self._next()
                while version is None and not self._closed:
                    self._change.wait()
                    version = self._next()
                if version is None:
                    return
                version.loading = True
            began, size, cause = time.perf_counter(), 0, None
            try:
                size = self.load(version) + MARGIN
            except Exception as error:
                cause = error
            self._done(version, size, cause, time.perf_counter() - began)

    def _next(self) -> Version | None:
        """The first version that is wanted, if there is room for it or room can be made."""
        if not self._wanted or self._closed:
            return None
        version = next(iter(self._wanted.values()))
        if not self._make_room(version.nbytes):
            if not version.failure:
                self.counts.waits += 1
            return None
        self._wanted.pop(version.key)
        return version

    def _make_room(self, nbytes: int) -> bool:
        if self.budget is None:
            return True
        free = [version for version in self._recent.values() if not version.refs]
        if self.bytes - sum(version.nbytes for version in free) + nbytes > self.budget:
            return False
        for version in free:
            if self.bytes + nbytes <= self.budget:
                break
            self._evict(version)
            self.counts.evictions += 1
        return True

    def _done(self, version: Version, size: int, cause: Exception | None, seconds: float) -> None:
        with self._change:
            version.loading = False
            self.counts.seconds += seconds
            if cause is None:
                version.nbytes, version.resident = size, True
                self._recent[version.key] = version
                self.bytes += size
                self.counts.loads += 1
                self._make_room(0)  # a plain adapter may be larger than its file
            else:
                self._failed(version, cause)
            self._discard(version)
            self._change.notify_all()
        for call in self.listeners:
            call()

    def _failed(self, version: Version, cause: Exception) -> None:
        self.counts.failures += 1
        known = isinstance(cause, BitloftError | OSError)
        log.warning("an adapter cannot be loaded: %s", cause, exc_info=None if known else cause)
        version.failed_at, version.cause = time.monotonic(), cause
        version.failure = RequestError(
            "adapter_invalid", "the adapter's files cannot be served; the server's log says why."
        )

    def close(self) -> None:
        """End the loading thread; those who wait are told."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
