"""Embeddings and classification by encoder bases: texts in a batch, each by the adapter that the request names."""

import asyncio
from typing import Any
from uuid import uuid4

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bitloft.serve.answers import CLIENT_LEFT, unless_left
from bitloft.serve.bodies import ClassifyBody, EmbeddingBody, InputBody
from bitloft.serve.encoder import Encoded, Encoder
from bitloft.serve.requests import RequestError
from bitloft.serve.service import Service, read
from bitloft.serve.shapes import classes, embeddings

AT_ONCE = 32  # texts of one request in the queue at a time, so that a large batch does not fill it

ROUTES = {"embed": "/v1/embeddings", "classify": "/v1/classify"}


class Vectors:
    """The two routes that read text and write none."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def routes(self) -> list[Route]:
        return [
            Route(ROUTES["embed"], self.embed, methods=["POST"]),
            Route(ROUTES["classify"], self.classify, methods=["POST"]),
        ]

    async def embed(self, request: HttpRequest) -> Response:
        body = await read(request, EmbeddingBody)
        name, found = await self._run(request, body, "embed")
        if found is None:
            return Response(status_code=CLIENT_LEFT)
        vectors = [one.embedding for one in found]
        return JSONResponse(embeddings(name, vectors, _tokens(found), body.encoding_format == "base64"))

    async def classify(self, request: HttpRequest) -> Response:
        body = await read(request, ClassifyBody)
        name, found = await self._run(request, body, "classify")
        if found is None:
            return Response(status_code=CLIENT_LEFT)
        labels: Any = self.service.engine.labels  # type: ignore[union-attr]
        return JSONResponse(classes(uuid4().hex, name, labels, [one.probabilities for one in found], _tokens(found)))

    async def _run(self, http: HttpRequest, body: InputBody, kind: str) -> tuple[str, list[Encoded] | None]:
        """The served name and every text's result, None where the client left."""
        name = self.service.store.find(body.model).name
        engine = self.service.engine
        if not isinstance(engine, Encoder) or engine.kind != kind:
            fitting = ROUTES[engine.kind] if isinstance(engine, Encoder) else "/v1/completions"
            raise RequestError("unsupported_model", f"the base cannot do this; ask {fitting}.", "model")
        prompts = [await self.service.tokens(text) for text in body.inputs]
        self.service.metrics.asked(name)
        return name, await unless_left(http, _all(engine, prompts, name))


async def _all(engine: Encoder, prompts: list[list[int]], name: str) -> list[Encoded]:
    found: list[Encoded] = []
    for first in range(0, len(prompts), AT_ONCE):
        tasks = [asyncio.create_task(engine.run(prompt, name)) for prompt in prompts[first : first + AT_ONCE]]
        try:
            found += await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # one that fails takes the others with it
                task.cancel()
    return found


def _tokens(found: list[Encoded]) -> int:
    return sum(one.tokens for one in found)
