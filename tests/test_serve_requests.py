"""A request's events on their way from the engine's thread to the loop."""

import asyncio
import threading
from collections import deque

import pytest

from bitloft.serve.requests import Event, Request, RequestError, Sampling
from bitloft.serve.store import Handle
from bitloft.serve.text import TextStream


def request() -> Request:
    return Request([1, 2], Handle("base", None), Sampling(8), TextStream(None), asyncio.get_running_loop())


def test_events_come_from_another_thread() -> None:
    async def run() -> tuple[str, str]:
        asked = request()
        events = [Event("a"), Event("b"), Event("c", "stop")]
        threading.Thread(target=lambda: deque(map(asked.tell, events), maxlen=0)).start()
        return await asked.collect()

    assert asyncio.run(run()) == ("abc", "stop")


def test_events_that_wait_come_as_one() -> None:
    async def run() -> list[Event]:
        asked = request()
        for event in (Event("a"), Event("b"), Event("c", "length")):
            asked.tell(event)
        await asyncio.sleep(0)
        return [event async for event in asked]

    assert asyncio.run(run()) == [Event("abc", "length")]


def test_text_before_an_error_is_told() -> None:
    async def run() -> list[Event]:
        asked, error = request(), Event(error=RequestError("engine_error", "broken"))
        for event in (Event("a"), Event("b"), error):
            asked.tell(event)
        await asyncio.sleep(0)
        found = [event async for event in asked]
        assert found[-1] is error
        return found

    assert asyncio.run(run())[:-1] == [Event("ab")]


def test_an_error_is_raised_by_collect() -> None:
    async def run() -> None:
        asked = request()
        asked.tell(Event("a"))
        asked.tell(Event(error=RequestError("engine_error", "broken")))
        await asked.collect()

    with pytest.raises(RequestError, match="broken"):
        asyncio.run(run())


def test_leaving_early_cancels() -> None:
    async def run() -> Request:
        asked = request()
        task = asyncio.create_task(asked.collect())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return asked

    assert asyncio.run(run()).cancelled


def test_a_closed_loop_cancels() -> None:
    async def run() -> Request:
        return request()

    asked = asyncio.run(run())
    asked.tell(Event("a"))
    assert asked.cancelled


def test_usage_counts_tokens() -> None:
    async def run() -> Request:
        return request()

    asked = asyncio.run(run())
    asked.tokens.extend([5, 6, 7])
    assert asked.usage() == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
