"""The page at /, the figures that it shows and those that Prometheus reads.

The page is one constant file without data and without names from elsewhere, so it needs no key; what it shows comes
from /status, which does. Its policy names its own script and style by their hashes: nothing else runs or loads.
"""

import re
import time
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from heapq import nlargest, nsmallest
from importlib.resources import files
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bitloft.serve.admin import state_of
from bitloft.serve.requests import RequestError
from bitloft.serve.service import Service
from bitloft.serve.store import Card

ROWS = 100  # adapters that /status lists at most
REFUSED = "refused; the server's log says why"  # the reason may hold paths


def source() -> str:
    """The page's HTML."""
    return (files("bitloft.serve") / "page.html").read_text(encoding="utf-8")


def policy(html: str) -> str:
    """The Content-Security-Policy under which the page may do what it does and nothing else."""
    hashes = {
        tag: " ".join(f"'sha256-{_hash(text)}'" for text in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL))
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(text: str) -> str:
    return b64encode(sha256(text.encode()).digest()).decode()


class Panel:
    """The page and the figures of the server."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._page = source()
        self._headers = {"content-security-policy": policy(self._page), "referrer-policy": "no-referrer"}

    def routes(self) -> list[Route]:
        """Without the page where the server was started so."""
        found = [Route("/status", self.status), Route("/metrics", self.metrics)]
        return [Route("/", self.page), *found] if self.service.options.page else found

    async def page(self, request: HttpRequest) -> Response:
        return Response(self._page, media_type="text/html", headers=self._headers)

    async def metrics(self, request: HttpRequest) -> Response:
        return Response(self.service.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def status(self, request: HttpRequest) -> Response:
        """Load, memory and traffic, and the adapters that match ``search``, in the order of ``sort``."""
        sort, limit = request.query_params.get("sort", "traffic"), request.query_params.get("limit", str(ROWS))
        if sort not in ORDERS:
            raise RequestError("invalid_value", f"sort is {sort[:64]!r}; use {', '.join(ORDERS)}.", "sort")
        if not re.fullmatch(r"\d{1,4}", limit) or int(limit) > ROWS:
            raise RequestError("invalid_value", f"limit is {limit[:64]!r}; use 0 to {ROWS}.", "limit")
        return JSONResponse(self.figures() | self._rows(request.query_params.get("search", ""), sort, int(limit)))

    def figures(self) -> dict[str, Any]:
        """What runs, what waits, what was done, and the memory of adapters."""
        engine, stats, store = self.service.engine, self.service.engine.stats(), self.service.store.stats()
        found = {name: getattr(stats, name, 0) for name in ("running", "waiting", "failed", "cancelled")}
        return found | {
            "base": self.service.store.base_name,
            "reason": engine.unready(),
            "uptime_seconds": int(time.time()) - self.service.started,
            "max_batch": engine.options.max_batch,
            "max_queue": engine.options.max_queue,
            "context": engine.context,
            "max_tokens": self.service.options.max_tokens,
            "completes": not hasattr(engine, "kind"),
            "requests": self.service.metrics.admitted,
            "completion_tokens": getattr(stats, "answer_tokens", None) or getattr(stats, "tokens", 0),
            "store": {
                "adapters": store.adapters,
                "resident": store.resident,
                "resident_bytes": store.bytes,
                "budget_bytes": store.budget,
                "hits": store.hits,
                "misses": store.loads,
                "evictions": store.evictions,
            },
        }

    def _rows(self, search: str, sort: str, limit: int) -> dict[str, Any]:
        store, metrics, wanted = self.service.store, self.service.metrics, search.casefold()
        base = replace(
            store.find(None),
            refs=metrics.base_running,
            requests=metrics.base_requests,
            answer_tokens=metrics.base_tokens,
        )
        cards = [card for card in (base, *store.cards()) if wanted in card.name.casefold()]
        choose, key = ORDERS[sort]
        rows = [row(card) for card in choose(limit, cards, key=key)]
        refused = sorted(name for name in store.refused if wanted in name.casefold())
        rows += [refusal(name) for name in refused[: limit - len(rows)]]
        return {"rows": rows, "matched": len(cards) + len(refused)}


ORDERS: dict[str, tuple[Any, Any]] = {
    "traffic": (nlargest, lambda card: (card.key is None, card.answer_tokens, card.requests)),
    "name": (nsmallest, lambda card: (card.key is not None, card.name)),
    "bytes": (nlargest, lambda card: (card.key is None, card.nbytes)),
}


def row(card: Card) -> dict[str, Any]:
    """One line of the page's table; the base comes first and has no size here."""
    return {
        "name": card.name,
        "state": "base" if card.key is None else state_of(card),
        "bytes": None if card.key is None else card.nbytes,
        "running": card.refs,
        "requests": card.requests,
        "completion_tokens": card.answer_tokens,
        "note": card.note,
    }


def refusal(name: str) -> dict[str, Any]:
    counts = {"running": 0, "requests": 0, "completion_tokens": 0}
    return {"name": name[:256], "state": "refused", "bytes": None, "note": REFUSED, **counts}
