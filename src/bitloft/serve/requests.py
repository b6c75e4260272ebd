"""What is asked of the engine and what it tells: sampling parameters, events, one request with its stream of events.

A request is made on an asyncio event loop and worked on by the engine's thread. The thread hands events over with
``call_soon_threadsafe``; a queue that the loop polls would add its period to every token.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable
from uuid import uuid4

import torch

from bitloft.errors import BitloftError
from bitloft.serve.text import TextStream


class RequestError(BitloftError):
    """A request that is not, or no longer, served: ``code`` says why in a word, ``param`` names the field at fault,
    ``retry_after`` the seconds after which it may be asked again, where that would help."""

    def __init__(self, code: str, message: str, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code, self.param, self.retry_after = code, param, retry_after


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: temperature 0 is greedy; a seed makes a request repeat itself whatever runs beside it.

    ``top_k`` 0 leaves all tokens; ``logprobs`` None tells none, k those of the chosen token and of the k likeliest.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_k: int = 0
    logprobs: int | None = None


class TokenLogprob(NamedTuple):
    """One token of an answer with the logarithm of its probability (before temperature), and the likeliest ones."""

    token: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True)
class Event:
    """New text (possibly empty); the last has ``finish`` ("stop", "length" or "cancelled") or ``error``."""

    text: str = ""
    finish: str | None = None
    error: RequestError | None = None
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def last(self) -> bool:
        return self.finish is not None or self.error is not None


@runtime_checkable
class Held(Protocol):
    """A version of an adapter that a request keeps in memory (``store.Handle``); the base needs none."""

    name: str
    key: str | None

    def ready(self) -> bool: ...

    def release(self) -> None: ...


@dataclass(eq=False)
class Request:
    """One prompt on its way. Iterate it for its events; ``cancel`` frees its row at the next step.

    Times are of ``time.monotonic``: accepted, out of the queue, first token, end.
    """

    prompt: list[int]
    handle: Held
    sampling: Sampling
    text: TextStream
    loop: asyncio.AbstractEventLoop
    id: str = field(default_factory=lambda: uuid4().hex)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    accepted: float = field(default_factory=time.monotonic)
    started: float | None = None
    first: float | None = None
    finished: float | None = None
    ended: bool = False  # set by the engine's thread after the last event
    cancelled: bool = False
    generator: torch.Generator | None = None
    row: Any = None  # the backend's, while it runs
    read: int = 0  # tokens of the prompt that have been read

    def __post_init__(self) -> None:
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        if self.sampling.temperature > 0:
            self.generator = torch.Generator()
            self.generator.manual_seed(torch.seed() if self.sampling.seed is None else self.sampling.seed)

    @property
    def name(self) -> str:
        """The adapter's name, or the base's."""
        return self.handle.name

    @property
    def adapter(self) -> str | None:
        """The version of the adapter: its key in the bank; None is the base."""
        return self.handle.key

    @property
    def total(self) -> int:
        """Tokens of prompt and answer at most."""
        return len(self.prompt) + self.sampling.max_tokens

    def cancel(self) -> None:
        """Stop caring; any thread, any time, also after the end."""
        self.cancelled = True

    def tell(self, event: Event) -> None:
        """Called by the engine's thread: hand an event to the loop. The last one lets the adapter go."""
        if event.last:
            self.ended, self.finished = True, time.monotonic()
            self.handle.release()
        try:
            self.loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop was closed: nobody listens
            self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events until the last one; leaving early cancels. Events that wait together come as one, an error alone."""
        try:
            while True:
                event = await self._events.get()
                while not (event.last or self._events.empty()):
                    later = self._events.get_nowait()
                    if later.error is not None:  # what came before an error is told all the same
                        yield event
                        event = later
                        continue
                    text, logprobs = event.text + later.text, event.logprobs + later.logprobs
                    event = Event(text, later.finish, None, logprobs)
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
