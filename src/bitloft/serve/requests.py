"""What is asked of the engine and what it tells: sampling parameters, events, one request with its stream of events.

A request is made on an asyncio event loop and worked on by the engine's thread. The thread hands events over with
``call_soon_threadsafe``; a queue that the loop polls would add its period to every token.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import torch

from bitloft.errors import BitloftError
from bitloft.serve.text import TextStream


class RequestError(BitloftError):
    """A request that is not, or no longer, served: ``code`` says why in a word, ``param`` names the field at fault."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: temperature 0 is greedy; a seed makes a request repeat itself whatever runs beside it."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Event:
    """New text (possibly empty); the last has ``finish`` ("stop", "length" or "cancelled") or ``error``."""

    text: str = ""
    finish: str | None = None
    error: RequestError | None = None

    @property
    def last(self) -> bool:
        return self.finish is not None or self.error is not None


@dataclass(eq=False)
class Request:
    """One prompt on its way. Iterate it for its events; ``cancel`` frees its row at the next step."""

    prompt: list[int]
    adapter: str | None  # key in the bank; None is the base
    sampling: Sampling
    text: TextStream
    loop: asyncio.AbstractEventLoop
    id: str = field(default_factory=lambda: uuid4().hex)
    tokens: list[int] = field(default_factory=list)
    accepted: float = field(default_factory=time.monotonic)
    ended: bool = False  # set by the engine's thread after the last event
    cancelled: bool = False
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        if self.sampling.temperature > 0:
            self.generator = torch.Generator()
            self.generator.manual_seed(torch.seed() if self.sampling.seed is None else self.sampling.seed)

    def cancel(self) -> None:
        """Stop caring; any thread, any time, also after the end."""
        self.cancelled = True

    def tell(self, event: Event) -> None:
        """Called by the engine's thread: hand an event to the loop."""
        self.ended = event.last
        try:
            self.loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop was closed: nobody listens
            self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events until the last one; leaving early cancels. Events that wait together come as one."""
        try:
            while True:
                event = await self._events.get()
                while not (event.last or self._events.empty()):
                    later = self._events.get_nowait()
                    event = Event(event.text + later.text, later.finish, later.error)
                yield event
                if event.last:
                    return
        finally:
            self.cancel()

    async def collect(self) -> tuple[str, str]:
        """The whole text and why it ended. Raises RequestError where the engine gave up."""
        text = ""
        async for event in self:
            text += event.text
            if event.error is not None:
                raise event.error
            if event.finish is not None:
                return text, event.finish
        raise RequestError("engine_error", "the request ended without an answer.")

    def usage(self) -> dict[str, Any]:
        """Tokens as the OpenAI API counts them."""
        return {
            "prompt_tokens": len(self.prompt),
            "completion_tokens": len(self.tokens),
            "total_tokens": len(self.prompt) + len(self.tokens),
        }
