"""Chat and completions: a body becomes requests to the engine, their events become one answer or a stream.

A stream's status is sent with its first token: what goes wrong before it (a queue that took too long, an adapter whose
numbers overflow) then still has a status of its own, which clients tell apart better than an error inside a stream.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from bitloft.serve.bodies import Body, ChatBody, CompletionBody
from bitloft.serve.encoder import Encoder
from bitloft.serve.engine import Engine
from bitloft.serve.metrics import Metrics
from bitloft.serve.requests import Event, Request, RequestError, Sampling
from bitloft.serve.service import Service, read
from bitloft.serve.shapes import DONE, Shape, error_body, frame

CLIENT_LEFT = 499  # nobody reads it; it is for the metrics


class Job:
    """The requests that answer one body, ``n`` for each of its prompts in order."""

    def __init__(self, works: list[Request], n: int, metrics: Metrics) -> None:
        self.works, self.n, self.metrics = works, n, metrics
        self._counted = False

    def close(self) -> None:
        """Free what still runs and take the times over into the metrics."""
        for work in self.works:
            work.cancel()
        if not self._counted:
            self._counted = True
            for work in self.works:
                self.metrics.ended(work)

    def usage(self) -> dict[str, Any]:
        """Tokens as the OpenAI API counts them: a prompt once, however many answers it has."""
        prompts = sum(len(work.prompt) for work in self.works[:: self.n])
        answers = sum(len(work.tokens) for work in self.works)
        return {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers}

    async def collect(self) -> list[tuple[str, str]]:
        """Text and reason of the end of each. Raises the first RequestError."""
        return await asyncio.gather(*(work.collect() for work in self.works))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Events with the index of their choice, in the order in which they come."""
        if len(self.works) == 1:
            async for event in self.works[0]:
                yield 0, event
            return
        found: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        tasks = [asyncio.create_task(_pour(i, work, found)) for i, work in enumerate(self.works)]
        try:
            left = len(tasks)
            while left:
                index, event = await found.get()
                left -= event.last
                yield index, event
        finally:
            for task in tasks:
                task.cancel()


async def _pour(index: int, work: Request, out: "asyncio.Queue[tuple[int, Event]]") -> None:
    async for event in work:
        out.put_nowait((index, event))


class Answers:
    """The two routes that continue text."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def routes(self) -> list[Route]:
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
        ]

    async def chat(self, request: HttpRequest) -> Response:
        body = await read(request, ChatBody)
        engine, name = self._model(body)  # unknown models and a full queue are refused before any work
        engine.require_room(name, body.n)
        prompt = await self.service.chat_tokens([message.plain for message in body.messages])
        return await self._answer(request, body, self._submit(engine, body, name, [prompt]), name)

    async def complete(self, request: HttpRequest) -> Response:
        body = await read(request, CompletionBody)
        engine, name = self._model(body)
        engine.require_room(name, len(body.prompts) * body.n)
        prompts = [await self.service.tokens(prompt) for prompt in body.prompts]
        return await self._answer(request, body, self._submit(engine, body, name, prompts), name)

    def _model(self, body: Body) -> tuple[Engine, str]:
        engine, name = self.service.engine, self.service.store.find(body.model).name
        if isinstance(engine, Encoder):
            route = "/v1/embeddings" if engine.kind == "embed" else "/v1/classify"
            raise RequestError("unsupported_model", f"the base does not continue text; ask {route}.", "model")
        return engine, name

    def _submit(self, engine: Engine, body: Body, name: str, prompts: list[list[int]]) -> Job:
        """All of a body's requests are admitted, or none."""
        samplings = [self._sampling(engine, body, len(prompt)) for prompt in prompts]
        job = Job([], body.n, self.service.metrics)
        try:
            for prompt, sampling in zip(prompts, samplings, strict=True):
                for work in engine.submit_many(prompt, name, sampling, body.n):
                    self.service.metrics.began(work)
                    job.works.append(work)
        except RequestError:
            job.close()
            raise
        for _ in job.works:
            self.service.metrics.asked(name)
        return job

    def _sampling(self, engine: Engine, body: Body, prompt: int) -> Sampling:
        limit = self.service.options.max_tokens
        if body.limit is not None and body.limit > limit:
            raise RequestError(
                "invalid_value", f"max_tokens is {body.limit}; this server allows {limit}.", "max_tokens"
            )
        return Sampling(
            max_tokens=body.limit or max(min(limit, engine.context - prompt), 1),  # without a wish: what fits
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=max(body.top_k, 0),
            seed=body.seed,
            stop=tuple(body.stop),
            logprobs=body.likeliest,
        )

    async def _answer(self, http: HttpRequest, body: Body, job: Job, name: str) -> Response:
        shape = Shape(job.works[0].id, name, chat=isinstance(body, ChatBody))
        try:
            if not body.stream:
                return await _whole(http, body, job, shape)
            events = job.events()
            first = await unless_left(http, anext(events))
            if first is None:
                job.close()
                return Response(status_code=CLIENT_LEFT)
            if first[1].error is not None:
                raise first[1].error
            return _Stream(job, _frames(body, job, shape, first, events))
        except BaseException:
            job.close()
            raise


async def _whole(http: HttpRequest, body: Body, job: Job, shape: Shape) -> Response:
    try:
        found = await unless_left(http, job.collect())
    finally:
        job.close()
    if found is None:
        return Response(status_code=CLIENT_LEFT)
    told = [None if body.likeliest is None else work.logprobs for work in job.works]
    choices = [
        shape.choice(i, text, finish, logprobs)
        for i, ((text, finish), logprobs) in enumerate(zip(found, told, strict=True))
    ]
    return JSONResponse(shape.whole(choices, job.usage()))


async def unless_left(http: HttpRequest, work: Any) -> Any:
    """The result of the awaitable ``work``, or None where the client left before; ``work`` is cancelled then."""
    answer, gone = asyncio.ensure_future(work), asyncio.create_task(_gone(http))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        for task in (answer, gone):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _frames(
    body: Body, job: Job, shape: Shape, first: tuple[int, Event], events: AsyncIterator[tuple[int, Event]]
) -> AsyncIterator[str]:
    """The events of a stream; an error is a frame of its own and ends it. The end is always [DONE]."""
    usage = body.stream_options.include_usage
    for index in range(len(job.works)) if shape.chat else ():
        yield frame(shape.piece("", None, index=index, first=True, usage=usage))
    found: tuple[int, Event] | None = first
    while found is not None:
        index, event = found
        if event.error is not None:
            yield frame(error_body(event.error))
            break
        if event.text or event.finish or event.logprobs:
            logprobs = None if body.likeliest is None else event.logprobs
            yield frame(shape.piece(event.text, event.finish, index=index, logprobs=logprobs, usage=usage))
        found = await anext(events, None)
    else:
        if usage:
            yield frame(shape.usage(job.usage()))
    yield DONE


class _Stream(StreamingResponse):
    """Server-sent events; however the response ends, even before its first event, the rows are freed."""

    def __init__(self, job: Job, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.close()
