"""Adding, replacing and removing adapters while the server runs: off by default, behind a key of its own.

    GET /admin/adapters    POST /admin/adapters {"name": ..., "replace": false}    DELETE /admin/adapters/NAME

A name is that of a subdirectory of the adapter directory. Neither paths nor files are taken over HTTP: what is not on
this machine's disk already cannot be served. Nothing on disk is changed, so a restart serves what the directory holds.
"""

import logging
from os.path import realpath
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bitloft.errors import BitloftError
from bitloft.serve.bodies import AdapterBody
from bitloft.serve.requests import RequestError
from bitloft.serve.service import Service, read
from bitloft.serve.store import NAME, Card

log = logging.getLogger("bitloft.serve")


class Admin:
    """The routes that change what is served. Work that reads files runs off the event loop, one at a time."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def routes(self) -> list[Route]:
        """None at all unless the server was started with ``admin``."""
        if not self.service.options.admin:
            return []
        return [
            Route("/admin/adapters", self.list, methods=["GET"]),
            Route("/admin/adapters", self.add, methods=["POST"]),
            Route("/admin/adapters/{name}", self.remove, methods=["DELETE"]),
        ]

    async def list(self, request: HttpRequest) -> Response:
        """Every adapter with its version and state, and the reasons of those that are refused."""
        store = self.service.store
        adapters = [described(card) for card in store.cards()]
        return JSONResponse({"object": "list", "data": adapters, "refused": dict(store.refused)})

    async def add(self, request: HttpRequest) -> Response:
        """201 for a new adapter, 200 for a replaced one; requests under way keep the version they began with."""
        body = await read(request, AdapterBody)
        path = self._path(body.name)
        known = body.name in self.service.store.names
        card = await self.service.administer(self._add, body.name, path, body.replace)
        log.warning("adapter %s was %s over HTTP", body.name, "replaced" if known else "added")
        return JSONResponse(described(card), 200 if known else 201)

    async def remove(self, request: HttpRequest) -> Response:
        """The name is gone for new requests; those under way finish."""
        name = request.path_params["name"]
        await self.service.administer(self.service.store.remove, name)
        log.warning("adapter %s was removed over HTTP", name)
        return JSONResponse({"id": name, "object": "adapter", "deleted": True})

    def _path(self, name: str) -> Path:
        if self.service.adapter_dir is None:
            raise RequestError("invalid_value", "this server has no adapter directory; start it with one.", "name")
        if not NAME.fullmatch(name):
            raise RequestError("invalid_value", "name: use letters, digits, '.', '_' and '-'.", "name")
        path = self.service.adapter_dir.resolve() / name
        if realpath(path) != str(path) or not path.is_dir():  # a link, even inside the directory, is not followed
            raise RequestError("model_not_found", f"the adapter directory holds no {name!r}.", "name")
        return path

    def _add(self, name: str, path: Path, replace: bool) -> Card:
        try:
            return self.service.store.add(name, path, replace=replace)
        except RequestError:
            raise
        except (BitloftError, OSError) as error:
            log.warning("adapter %s is refused: %s", name, error)
            raise RequestError("adapter_invalid", _without(str(error), path.parent), "name") from None


def _without(text: str, directory: Path) -> str:
    """A sentence with the paths below ``directory`` shortened to names."""
    return text.replace(f"{directory}/", "")


def described(card: Card) -> dict[str, Any]:
    """One adapter for those who run the server."""
    return {
        "id": card.name,
        "object": "adapter",
        "sha256": card.key,
        "bytes": card.nbytes,
        "state": state_of(card),
        "requests_holding_it": card.refs,
        "requests": card.requests,
        "prompt_tokens": card.prompt_tokens,
        "completion_tokens": card.answer_tokens,
        "last_used": card.last_used,
        "note": card.note,
    }


def state_of(card: Card) -> str:
    """Where an adapter is: quarantined, loading, resident or disk."""
    if card.quarantined:
        return "quarantined"
    return "loading" if card.loading else "resident" if card.resident else "disk"
