"""The front of replicas: an ASGI application that reads which model is asked for and passes the request on.

It is not Ray Serve's own proxy: that closes neither slowly nor in the order that a drain needs, and here SIGTERM means
what it means elsewhere. A client that leaves ends its call, which reaches the replica's application as a disconnect. A
replica that dies before it has answered costs a second attempt on another; one that dies in a stream ends it with an
error. Nothing here knows Ray: ``handle`` is anything that makes calls which give ASGI messages.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from types import FrameType
from typing import Any

import uvicorn

from bitloft.options import ServeOptions
from bitloft.serve.requests import RequestError
from bitloft.serve.shapes import DONE, error_body, error_response, frame

BODY_BYTES = 1 << 20
ATTEMPTS = 2  # replicas that a request is given to, where the first died before it answered

Message = dict[str, Any]
Tell = Callable[[str], None]
log = logging.getLogger("bitloft")


class Front:
    """The ASGI application that passes requests on to replicas."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle.options(method_name="ask", stream=True)
        self.running = 0
        self.draining = False

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if self.draining and scope["path"] != "/health/live":
            refusal = RequestError("shutting_down", "the server is shutting down; ask another one.")
            response = error_response(refusal)
            response.headers["connection"] = "close"
            await response(scope, receive, send)
            return
        self.running += 1
        try:
            body = await _body(receive)
            if body is None:
                refusal = RequestError("body_too_large", f"the body is larger than {BODY_BYTES} bytes.")
                await error_response(refusal)(scope, receive, send)
                return
            await self._pass_on(scope, body, receive, send)
        finally:
            self.running -= 1

    async def _pass_on(self, scope: Message, body: bytes, receive: Any, send: Any) -> None:
        """Give the request to a replica, to another where that died in silence, and its answer to the client."""
        plain = {key: scope[key] for key in PLAIN if key in scope}
        gone = asyncio.create_task(_until_gone(receive))
        begun = False
        try:
            for attempt in range(ATTEMPTS):
                call = self.handle.options(multiplexed_model_id=model_of(body)).remote(plain, body)
                try:
                    async for message in _until(call, gone):
                        begun = True
                        await send(message)
                    return
                except Exception as error:  # Ray's own, whatever became of the replica
                    if not begun and attempt + 1 < ATTEMPTS:
                        continue
                    log.warning("a replica did not answer: %s", str(error).strip().splitlines()[:1])
                    await _broken(scope, begun, receive, send)
                    return
        finally:
            gone.cancel()


# what an application may ask of an ASGI scope, without what cannot travel
PLAIN = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
         "client", "server")  # fmt: skip


def model_of(body: bytes) -> str:
    """The model that a request names, which decides its replica; empty where it names none."""
    try:
        found = json.loads(body) if body else {}
    except (ValueError, RecursionError):
        return ""
    name = found.get("model") if isinstance(found, dict) else None
    return name[:128] if isinstance(name, str) else ""


async def _body(receive: Any) -> bytes | None:
    """The request's body, None where it is too large."""
    data = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return bytes(data)
        data += message.get("body", b"")
        if len(data) > BODY_BYTES:
            return None
        if not message.get("more_body"):
            return bytes(data)


async def _until_gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _until(call: Any, gone: "asyncio.Task[None]") -> AsyncIterator[Message]:
    """Messages of a call, until they end or the client has gone; then the call is cancelled."""
    messages = aiter(call)
    try:
        while True:
            coming: asyncio.Future[Message] = asyncio.ensure_future(anext(messages))
            both: set[asyncio.Future[Any]] = {coming, gone}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                return
            try:
                yield coming.result()
            except StopAsyncIteration:
                return
    finally:
        call.cancel()


async def _broken(scope: Message, begun: bool, receive: Any, send: Any) -> None:
    """End an answer whose replica died: as an error where nothing was sent, else as the stream's last frame."""
    error = RequestError("engine_error", "the replica that worked on this request was lost; ask again.")
    if not begun:
        await error_response(error)(scope, receive, send)
        return
    last = (frame(error_body(error)) + DONE).encode()
    await send({"type": "http.response.body", "body": last, "more_body": False})


class FrontServer(uvicorn.Server):
    """uvicorn that, told to stop, refuses new requests and lets the running ones end within ``drain_seconds``."""

    def __init__(self, front: Front, options: ServeOptions, tell: Tell) -> None:
        config = uvicorn.Config(
            front, host=options.host, port=options.port, http="h11", ws="none", lifespan="off",
            h11_max_incomplete_event_size=16 << 10, timeout_graceful_shutdown=5, log_level="warning",
            access_log=False, server_header=False,
        )  # fmt: skip
        super().__init__(config)
        self.front, self.options, self.tell = front, options, tell
        self._deadline: float | None = None

    @property
    def url(self) -> str:
        """Where clients reach it, once it has started."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"

    async def main_loop(self) -> None:
        self.tell(f"serving by replicas on Ray at {self.url} (Ctrl-C stops)")
        await super().main_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._deadline is None:
            self.drain()
        else:
            self.should_exit = self.force_exit = True

    def drain(self) -> None:
        """Refuse new requests, finish what runs, then stop."""
        self.front.draining = True
        self._deadline = time.monotonic() + self.options.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None and (not self.front.running or time.monotonic() > self._deadline):
            self.should_exit = True
        return await super().on_tick(counter)
