"""The OpenAI-shaped HTTP API over an engine: starlette routes and one guard around them all.

    GET /v1/models, /v1/models/NAME    POST /v1/chat/completions, /v1/completions    GET /health/live, /health/ready

The guard is the outermost ASGI layer, so that no later route can forget the key; starlette's BaseHTTPMiddleware would
hide a client that left. Chat goes through the base tokenizer's template, the one that training used.
"""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitloft.errors import BitloftError
from bitloft.options import ServeOptions
from bitloft.serve.bodies import Body, ChatBody, CompletionBody, Kind, parse
from bitloft.serve.engine import Engine
from bitloft.serve.requests import Request, RequestError, Sampling
from bitloft.serve.shapes import DONE, Shape, error_body, error_response, frame, model_card
from bitloft.serve.store import AdapterStore
from bitloft.tasks.chat import encode_chat

BODY_BYTES = 1 << 20
BODY_SECONDS = 15.0
HEADER_BYTES = 16 << 10  # checked by the guard too: h11 looks at its limit only when a read ends inside the headers
OPEN = "/health/live"  # the only path that needs no key


@dataclass
class Service:
    """What the routes work with. Prompts are tokenized one after the other in a thread of their own."""

    engine: Engine
    store: AdapterStore
    tokenizer: Any
    options: ServeOptions
    started: int = field(default_factory=lambda: int(time.time()))
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "bitloft-tokenize"))

    async def live(self, request: HttpRequest) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(self, request: HttpRequest) -> Response:
        reason = self.engine.unready()
        load = {"running": self.engine.running, "waiting": self.engine.waiting}
        if reason is None:
            return JSONResponse({"status": "ready", **load})
        return JSONResponse({"status": "unready", "reason": reason, **load}, 503)

    async def models(self, request: HttpRequest) -> Response:
        names = (self.store.base_name, *self.store.names)
        return JSONResponse({"object": "list", "data": [self._card(name) for name in names]})

    async def model(self, request: HttpRequest) -> Response:
        return JSONResponse(self._card(self.store.find(request.path_params["name"]).name))

    def _card(self, name: str) -> dict[str, Any]:
        return model_card(name, self.store.base_name, self.started, self.store.find(name).note)

    async def chat(self, request: HttpRequest) -> Response:
        body = await _read(request, ChatBody)
        messages = [message.plain for message in body.messages]
        return await self._answer(request, body, encode_chat, self.tokenizer, messages, True)

    async def complete(self, request: HttpRequest) -> Response:
        body = await _read(request, CompletionBody)
        return await self._answer(request, body, _encode, self.tokenizer, body.prompt)

    async def _answer(self, http: HttpRequest, body: Body, encode: Any, *args: Any) -> Response:
        """Tokenize with ``encode(*args)``, submit, and answer whole or as a stream."""
        name = self.store.find(body.model).name  # unknown models are refused before any work
        prompt: list[int] = await asyncio.get_running_loop().run_in_executor(self.pool, encode, *args)
        work = self.engine.submit(prompt, name, self._sampling(body, len(prompt)))
        shape = Shape(work.id, name, chat=isinstance(body, ChatBody))
        if body.stream:
            return _Stream(work, _frames(work, shape, body.stream_options.include_usage))
        return await _whole(http, work, shape)

    def _sampling(self, body: Body, prompt: int) -> Sampling:
        limit = self.options.max_tokens
        if body.limit is not None and body.limit > limit:
            raise RequestError(
                "invalid_value", f"max_tokens is {body.limit}; this server allows {limit}.", "max_tokens"
            )
        room = max(min(limit, self.engine.context - prompt), 1)  # without a wish: what fits
        return Sampling(body.limit or room, body.temperature, body.top_p, body.seed, tuple(body.stop))


def _encode(tokenizer: Any, prompt: str | list[int]) -> list[int]:
    return prompt if isinstance(prompt, list) else list(tokenizer(prompt)["input_ids"])


async def _read(request: HttpRequest, kind: type[Kind]) -> Kind:
    """The body, within limits of size and time. A JSON content type keeps web pages from posting here unasked."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise RequestError("unsupported_media_type", "send the body as application/json.")
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > BODY_BYTES:
                    raise RequestError("body_too_large", f"the body is larger than {BODY_BYTES} bytes.")
    except TimeoutError:
        raise RequestError("body_timeout", f"the body did not arrive within {BODY_SECONDS:g} s.") from None
    return parse(kind, bytes(data))


async def _whole(http: HttpRequest, work: Request, shape: Shape) -> Response:
    """Wait for the answer, or for the client to leave."""
    answer, gone = asyncio.create_task(work.collect()), asyncio.create_task(_gone(http))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return Response(status_code=499)  # nobody reads it
        text, finish = answer.result()
        return JSONResponse(shape.whole(text, finish, work.usage()))
    finally:
        work.cancel()
        answer.cancel()
        gone.cancel()


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _frames(work: Request, shape: Shape, usage: bool) -> AsyncIterator[str]:
    """The events of a stream; an error is a frame of its own. The end is always [DONE]."""
    if shape.chat:
        yield frame(shape.piece("", None, first=True))
    async for event in work:
        if event.error is not None:
            yield frame(error_body(event.error))
        elif event.text or event.finish:
            yield frame(shape.piece(event.text, event.finish))
            if event.finish and usage:
                yield frame(shape.usage(work.usage()))
    yield DONE


class _Stream(StreamingResponse):
    """Server-sent events; however the response ends, even before its first event, the row is freed."""

    def __init__(self, work: Request, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.work.cancel()


class Guard:
    """The key, a request id of ours, and the word to close connections while the server drains."""

    def __init__(self, app: ASGIApp, engine: Engine, key: str | None) -> None:
        self.app, self.engine, self.key = app, engine, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = uuid4().hex
                if self.engine.draining:
                    headers["connection"] = "close"
            await send(message)

        answer = self.app
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES:
            answer = error_response(RequestError("headers_too_large", f"the headers exceed {HEADER_BYTES} bytes."))
        elif scope["path"] != OPEN and not self._allowed(Headers(scope=scope)):
            answer = error_response(RequestError("invalid_api_key", "the API key is missing or wrong."))
        return await answer(scope, receive, labelled)

    def _allowed(self, headers: Headers) -> bool:
        if self.key is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self.key.encode())


async def _refused(request: HttpRequest, error: Exception) -> Response:
    return error_response(error if isinstance(error, RequestError) else RequestError("invalid_value", str(error)))


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    known = {404: "not_found", 405: "method_not_allowed"}
    code = known.get(error.status_code, "invalid_value") if isinstance(error, HTTPException) else "invalid_value"
    return error_response(RequestError(code, f"{request.method} {request.url.path[:128]} is not served here."))


async def _crashed(request: HttpRequest, error: Exception) -> Response:
    return error_response(RequestError("engine_error", "the server failed on this request."))


def app(service: Service) -> ASGIApp:
    """The ASGI application."""
    routes = [
        Route("/health/live", service.live),
        Route("/health/ready", service.ready),
        Route("/v1/models", service.models),
        Route("/v1/models/{name}", service.model),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.complete, methods=["POST"]),
    ]
    handlers: Any = {BitloftError: _refused, HTTPException: _http_error, Exception: _crashed}
    inner = Starlette(routes=routes, exception_handlers=handlers)
    return Guard(inner, service.engine, service.options.key)
