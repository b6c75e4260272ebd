"""Who goes next: fair by tokens, bounded in age, never more than the queue holds."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitloft.serve.requests import Request, RequestError, Sampling
from bitloft.serve.scheduler import Scheduler
from bitloft.serve.store import Handle
from bitloft.serve.text import TextStream

LOOP = asyncio.new_event_loop()
LOOP.close()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Waiting(Handle):
    """An adapter that is not there yet."""

    def ready(self) -> bool:
        return False


def scheduler(clock: Clock | None = None, *, most: int = 1000, share: float = 1.0, max_wait: float = 10.0) -> Scheduler:
    return Scheduler(most=most, share=share, max_wait=max_wait, clock=clock or Clock())


def request(adapter: str | None, tokens: int = 10, *, accepted: float = 100.0, ready: bool = True) -> Request:
    handle = (Handle if ready else Waiting)(adapter or "base", adapter)
    return Request([1] * tokens, handle, Sampling(8), TextStream(None), LOOP, accepted=accepted)


def taken(found: Scheduler, count: int) -> list[str | None]:
    return [got.adapter for got in (found.take(lambda r: True) for _ in range(count)) if got is not None]


def test_a_busy_adapter_does_not_keep_others_waiting() -> None:
    found = scheduler()
    for _ in range(40):
        found.add(request("busy"))
    for _ in range(2):
        found.add(request("rare"))
    assert taken(found, 4).count("rare") == 2  # as soon as it is its turn, not behind forty


def test_shares_are_by_tokens_not_by_requests() -> None:
    found = scheduler()
    for _ in range(60):
        found.add(request("long", 30))
        found.add(request("short", 10))
    served = Counter(taken(found, 40))
    assert served["short"] == pytest.approx(3 * served["long"], abs=2)


def test_answers_count_double() -> None:
    found = scheduler()
    for _ in range(20):
        found.add(request("talks", 10))
        found.add(request("listens", 10))
    order = []
    for _ in range(20):
        got = found.take(lambda r: True)
        assert got is not None
        order.append(got.adapter)
        if got.adapter == "talks":
            for _ in range(10):
                found.wrote(got)
    served = Counter(order)
    assert served["listens"] == pytest.approx(3 * served["talks"], abs=2)


def test_who_was_away_has_saved_nothing() -> None:
    found = scheduler()
    for _ in range(30):
        found.add(request("steady"))
    running = [found.take(lambda r: True) for _ in range(20)]
    for _ in range(30):
        found.add(request("back"))
    order = taken(found, 20)
    assert 8 <= order.count("back") <= 12
    assert running[-1] is not None


def test_age_goes_first() -> None:
    clock = Clock()
    found = scheduler(clock, max_wait=5.0)
    found.add(request("heavy", 1000))
    assert taken(found, 1) == ["heavy"]
    found.add(request("heavy", 10, accepted=90.0))
    found.add(request("light", 1, accepted=99.0))
    assert taken(found, 2) == ["heavy", "light"]  # ten seconds are too long, whatever it was served


def test_an_adapter_that_is_not_there_blocks_nobody() -> None:
    found = scheduler()
    found.add(request("cold", ready=False, accepted=0.0))
    found.add(request("warm"))
    assert taken(found, 2) == ["warm"]
    assert len(found) == 1


def test_what_does_not_fit_is_not_overtaken() -> None:
    found = scheduler()
    found.add(request("large", 100))
    found.add(request("small", 1, accepted=101.0))
    assert found.take(lambda r: len(r.prompt) < 50) is None
    assert taken(found, 2) == ["large", "small"]


def test_a_full_queue_says_when_to_come_again() -> None:
    clock = Clock()
    found = scheduler(clock, most=3)
    for _ in range(3):
        found.check("a")
        found.add(request("a"))
    with pytest.raises(RequestError, match="3 requests are waiting already") as caught:
        found.check("a")
    assert caught.value.code == "queue_full"
    assert caught.value.retry_after == 1.0
    running = [found.take(lambda r: True) for _ in range(3)]
    for got in running:
        assert got is not None
        clock.now += 4.0
        found.ended(got)
    for _ in range(3):
        found.add(request("a"))
    assert found.retry_after() == pytest.approx(12.0)


def test_one_adapter_does_not_fill_the_queue() -> None:
    found = scheduler(most=20, share=0.25)
    for _ in range(10):
        found.check("greedy")  # nobody else wants the room
        found.add(request("greedy"))
    with pytest.raises(RequestError, match="the rest of the queue is for others"):
        found.check("greedy")
    found.check("other")
    with pytest.raises(RequestError):
        found.check("other", 11)


def test_dropped_requests_leave_nothing_behind() -> None:
    found = scheduler()
    gone, stays = request("a"), request("b")
    found.add(gone)
    found.add(stays)
    found.drop(lambda r: r is stays)
    assert list(found) == [stays]
    assert found.take(lambda r: True) is stays
    found.ended(stays)
    assert not found._queues
    assert not found._running
    assert not found._counters


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 50)), max_size=60), st.integers(0, 10**6))
def test_everyone_is_served_once(jobs: list[tuple[int, int]], seed: int) -> None:
    found = scheduler()
    made = [request(f"a{adapter}", tokens) for adapter, tokens in jobs]
    for one in made:
        found.add(one)
    served = [found.take(lambda r: True) for _ in made]
    assert {id(one) for one in served} == {id(one) for one in made}
    assert found.take(lambda r: True) is None
    for got in served:
        assert got is not None
        found.wrote(got)
        found.ended(got)
    assert not found._counters
