"""Who is computed next: one queue for each adapter, shares by tokens, and an age beyond which waiting ends.

The virtual token counter of S-LoRA's authors (Sheng et al., Fairness in Serving Large Language Models, 2024): every
adapter's counter goes up by the tokens that it is served, one for a token that is read and two for one that is written,
and the queue with the lowest counter goes first. A queue that was idle begins at the lowest counter of those that are
not, so that nobody saves up. First come, first served over all queues would let one busy adapter decide how long
everybody waits.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator

from bitloft.serve.requests import Request, RequestError

READ, WRITTEN = 1.0, 2.0  # what a token costs that is read, and one that is written
SHARED_FROM = 0.5  # of the queue: below, an adapter may hold as much of it as there is
RATE_KEPT = 0.9  # of the estimate of seconds between two ends, when a new one is seen
LEAST_RETRY, MOST_RETRY = 1.0, 60.0


class Scheduler:
    """Waiting requests by adapter. Not safe for threads: the engine holds a lock."""

    def __init__(
        self, *, most: int, share: float, max_wait: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """At most ``most`` requests wait; one adapter's at most ``share`` of that once half of it is taken."""
        self.most, self.share, self.max_wait, self.clock = most, share, max_wait, clock
        self._queues: dict[str | None, deque[Request]] = {}
        self._counters: dict[str | None, float] = {}
        self._running: dict[str | None, int] = {}
        self._count = 0
        self._between: float | None = None  # seconds between two ends
        self._last_end: float | None = None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        for queue in self._queues.values():
            yield from queue

    def check(self, adapter: str | None, count: int = 1) -> None:
        """Raise RequestError where ``count`` more requests of ``adapter`` may not wait."""
        own = len(self._queues.get(adapter, ()))
        if self._count + count > self.most:
            raise RequestError(
                "queue_full",
                f"{self._count} requests are waiting already; try again shortly.",
                None,
                self.retry_after(),
            )
        limit = max(int(self.share * self.most), 1)
        if own + count > limit and self._count + count > SHARED_FROM * self.most:
            raise RequestError(
                "queue_full",
                f"{own} requests of this adapter are waiting already; the rest of the queue is for others.",
                None,
                self.retry_after(),
            )

    def retry_after(self) -> float:
        """Seconds until what waits now has probably been taken in."""
        return min(max(self._count * (self._between or 0.0), LEAST_RETRY), MOST_RETRY)

    def add(self, request: Request) -> None:
        """Let a request wait."""
        key = request.adapter
        if not self._queues.get(key) and not self._running.get(key):
            active = [self._counters[other] for other in self._active()]
            self._counters[key] = max(self._counters.get(key, 0.0), min(active, default=0.0))
        self._queues.setdefault(key, deque()).append(request)
        self._count += 1

    def _active(self) -> set[str | None]:
        return {key for key, queue in self._queues.items() if queue} | {k for k, n in self._running.items() if n}

    def take(self, fits: Callable[[Request], bool]) -> Request | None:
        """The request that goes next among those whose adapter is there and that ``fits``; None where there is none."""
        heads = [queue[0] for queue in self._queues.values() if queue and queue[0].handle.ready()]
        if not heads:
            return None
        oldest = min(heads, key=lambda request: request.accepted)
        aged = self.clock() - oldest.accepted > self.max_wait
        first = oldest if aged else min(heads, key=lambda r: (self._counters[r.adapter], r.accepted))
        if not fits(first):
            return None  # smaller ones that overtake would keep it waiting for ever
        key = first.adapter
        self._running[key] = self._running.get(key, 0) + 1
        self._remove(first)
        self._counters[key] += READ * len(first.prompt)
        return first

    def wrote(self, request: Request) -> None:
        """Count a token of the answer of a request that runs."""
        self._counters[request.adapter] += WRITTEN

    def ended(self, request: Request) -> None:
        """A request that was taken has ended."""
        key, now = request.adapter, self.clock()
        self._running[key] -= 1
        if self._last_end is not None:
            seen = now - self._last_end
            self._between = seen if self._between is None else RATE_KEPT * self._between + (1 - RATE_KEPT) * seen
        self._last_end = now
        self._forget(key)

    def drop(self, wanted: Callable[[Request], bool]) -> None:
        """Let those go that are not wanted any more; the caller has told them."""
        for request in [request for request in self if not wanted(request)]:
            self._remove(request)

    def _remove(self, request: Request) -> None:
        self._queues[request.adapter].remove(request)
        self._count -= 1
        self._forget(request.adapter)

    def _forget(self, key: str | None) -> None:
        """Versions come and go for months: one that is idle keeps only a counter that is ahead of the others'."""
        if not self._queues.get(key):
            self._queues.pop(key, None)
        if not self._running.get(key):
            self._running.pop(key, None)
        if key not in self._queues and key not in self._running:
            least = min((self._counters[other] for other in self._active()), default=None)
            if least is None:
                self._counters.clear()
            elif self._counters.get(key, 0.0) <= least:
                self._counters.pop(key, None)
