"""The OpenAI-shaped HTTP API over an engine: all routes, and one guard around them.

    GET /v1/models, /v1/models/NAME    POST /v1/chat/completions, /v1/completions    POST /v1/embeddings, /v1/classify
    GET /health/live, /health/ready, /status, /metrics, /    and, where it is asked for, /admin/adapters

Chat goes through the base tokenizer's template, the one that training used; a template in an adapter is ignored.
"""

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bitloft.errors import BitloftError
from bitloft.serve.admin import Admin
from bitloft.serve.answers import Answers
from bitloft.serve.guard import Guard
from bitloft.serve.page import Panel
from bitloft.serve.requests import RequestError
from bitloft.serve.service import Service
from bitloft.serve.shapes import error_response, model_card
from bitloft.serve.store import Card
from bitloft.serve.vectors import Vectors


class Models:
    """What is served, and whether it is answered."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def routes(self) -> list[Route]:
        return [
            Route("/health/live", self.live),
            Route("/health/ready", self.ready),
            Route("/v1/models", self.models),
            Route("/v1/models/{name}", self.model),
        ]

    async def live(self, request: HttpRequest) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(self, request: HttpRequest) -> Response:
        engine = self.service.engine
        reason = engine.unready()
        load = {"running": engine.running, "waiting": engine.waiting}
        if reason is None:
            return JSONResponse({"status": "ready", **load})
        return JSONResponse({"status": "unready", "reason": reason, **load}, 503)

    async def models(self, request: HttpRequest) -> Response:
        store = self.service.store
        return JSONResponse(
            {"object": "list", "data": [self._card(card) for card in (store.find(None), *store.cards())]}
        )

    async def model(self, request: HttpRequest) -> Response:
        return JSONResponse(self._card(self.service.store.find(request.path_params["name"])))

    def _card(self, card: Card) -> dict[str, Any]:
        return model_card(card.name, self.service.store.base_name, self.service.started, card.note)


async def _refused(request: HttpRequest, error: Exception) -> Response:
    return error_response(error if isinstance(error, RequestError) else RequestError("invalid_value", str(error)))


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    known = {404: "not_found", 405: "method_not_allowed"}
    code = known.get(error.status_code, "invalid_value") if isinstance(error, HTTPException) else "invalid_value"
    return error_response(RequestError(code, f"{request.method} {request.url.path[:128]} is not served here."))


async def _crashed(request: HttpRequest, error: Exception) -> Response:
    return error_response(RequestError("engine_error", "the server failed on this request."))


def router(service: Service) -> Starlette:
    """All routes, without the guard."""
    groups = (Models(service), Answers(service), Vectors(service), Panel(service), Admin(service))
    handlers: Any = {BitloftError: _refused, HTTPException: _http_error, Exception: _crashed}
    return Starlette(routes=[route for group in groups for route in group.routes()], exception_handlers=handlers)


def app(service: Service) -> Guard:
    """The ASGI application."""
    inner = router(service)
    paths = frozenset(route.path for route in inner.routes if isinstance(route, Route) and "{" not in route.path)
    return Guard(inner, service, paths)
