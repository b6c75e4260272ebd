"""The client of the load generator: one request on one connection, with the time of its first text.

It is small on purpose: a full HTTP client would share the machine's cores with the server that it measures. HTTP/1.1 is
h11's, as in the server. A stream counts as answered only with a reason of its end and [DONE], for a stream that breaks
off looks like a short answer otherwise.
"""

import asyncio
import json
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11

from bitloft.errors import OptionError

CHUNK = 1 << 16


@dataclass(frozen=True)
class Target:
    """A server: where it is and the key that it wants."""

    host: str
    port: int
    tls: bool = False
    prefix: str = ""
    key: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str, key: str | None = None) -> "Target":
        """From ``http://host:port``, with or without ``/v1``. Raises OptionError for what is no such address."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            parts, port = urlsplit(""), 0
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise OptionError(f"{url[:128]!r} is no server's address; give http://HOST:PORT.")
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port, parts.scheme == "https", prefix, key)


@dataclass
class Outcome:
    """What came of one request. ``error`` is None, the server's error code, or what kept it from answering."""

    text: str = ""
    finish: str | None = None
    error: str | None = None
    status: int = 0
    tokens: int = 0
    asked: float = 0.0  # time.perf_counter() when it was sent, at its first text, and at its end
    first: float | None = None
    ended: float = 0.0
    retry_after: str | None = None

    @property
    def token_seconds(self) -> float | None:
        """Seconds per token after the first, None where there was no second one or no stream."""
        if self.first is None or self.tokens < 2:
            return None
        return (self.ended - self.first) / (self.tokens - 1)


async def ask(target: Target, body: dict[str, Any], timeout: float, path: str = "/v1/completions") -> Outcome:
    """Send a completion and read its answer, streamed where the body says so. Never raises for what a server does."""
    found = Outcome(asked=time.perf_counter())
    try:
        pieces = _exchange(target, "POST", path, json.dumps(body).encode())
        async with asyncio.timeout(timeout), aclosing(pieces):
            await (_streamed if body.get("stream") else _whole)(found, pieces)
    except TimeoutError:
        found.error = "client_timeout"
    except (OSError, h11.ProtocolError, StopAsyncIteration):
        found.error = "connection_failed"
    except (ValueError, KeyError, IndexError, TypeError):
        found.error = "answer_unreadable"
    found.ended = time.perf_counter()
    return found


async def get(target: Target, path: str, timeout: float = 30.0) -> tuple[int, Any]:
    """Status and JSON of a GET. Raises OSError, TimeoutError, ValueError."""
    async with asyncio.timeout(timeout), aclosing(_exchange(target, "GET", path, b"")) as pieces:
        head = await anext(pieces)
        data = b"".join([bytes(piece) async for piece in pieces])
    return head.status_code, json.loads(data)


async def _exchange(target: Target, method: str, path: str, body: bytes) -> AsyncGenerator[Any, None]:
    """The response's head (h11.Response), then the pieces of its body as bytes."""
    context = ssl.create_default_context() if target.tls else None
    reader, writer = await asyncio.open_connection(target.host, target.port, ssl=context)
    try:
        connection = h11.Connection(h11.CLIENT)
        head = h11.Request(method=method, target=target.prefix + path, headers=_headers(target, body))
        parts = (head, h11.Data(data=body), h11.EndOfMessage()) if body else (head, h11.EndOfMessage())
        writer.write(b"".join(connection.send(part) or b"" for part in parts))
        await writer.drain()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(CHUNK))
            elif isinstance(event, h11.Response):
                yield event
            elif isinstance(event, h11.Data):
                yield event.data
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed) or event is h11.PAUSED:
                return
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _headers(target: Target, body: bytes) -> list[tuple[str, str]]:
    host = f"[{target.host}]" if ":" in target.host else target.host
    found = [("host", f"{host}:{target.port}"), ("connection", "close"), ("accept", "*/*")]
    if body:
        found += [("content-type", "application/json"), ("content-length", str(len(body)))]
    return found if target.key is None else [*found, ("authorization", f"Bearer {target.key}")]


async def _whole(found: Outcome, pieces: AsyncIterator[Any]) -> None:
    head = await anext(pieces)
    found.status = head.status_code
    data = json.loads(b"".join([bytes(piece) async for piece in pieces]))
    if found.status != 200:
        _refused(found, head, data)
        return
    choice = data["choices"][0]
    found.text, found.finish = choice["text"], choice["finish_reason"]
    found.tokens = data["usage"]["completion_tokens"]


async def _streamed(found: Outcome, pieces: AsyncIterator[Any]) -> None:
    head = await anext(pieces)
    found.status = head.status_code
    if found.status != 200:
        _refused(found, head, json.loads(b"".join([bytes(piece) async for piece in pieces])))
        return
    rest, done = b"", False
    async for piece in pieces:
        *frames, rest = (rest + bytes(piece)).split(b"\n\n")
        for data in _data(frames):
            if data == b"[DONE]":
                done = True
            else:
                _take(found, json.loads(data))
    if found.error is None and not (done and found.finish):
        found.error = "stream_cut_off"


def _data(frames: list[bytes]) -> Iterator[bytes]:
    for one in frames:
        yield from (line[5:].strip() for line in one.split(b"\n") if line.startswith(b"data:"))


def _take(found: Outcome, event: dict[str, Any]) -> None:
    if "error" in event:
        found.error = str(event["error"]["code"])
        return
    for choice in event["choices"]:
        if choice["text"] and found.first is None:
            found.first = time.perf_counter()
        found.text += choice["text"]
        found.finish = choice["finish_reason"] or found.finish
    if event.get("usage"):
        found.tokens = event["usage"]["completion_tokens"]


def _refused(found: Outcome, head: h11.Response, data: Any) -> None:
    found.error = str(data["error"]["code"])
    found.retry_after = next((value.decode() for name, value in head.headers if name == b"retry-after"), None)
