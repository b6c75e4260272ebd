"""The outermost ASGI layer: keys, limits of headers, host names, request ids, and a count of every answer.

It stands around the router, so that no later route can forget the key; starlette's BaseHTTPMiddleware would hide a
client that left. Only OPEN paths are answered without a key: the liveness probe and the page, a constant file that
holds no data and in which the key is typed.
"""

import hmac
import ipaddress
import re
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitloft.options import LOOPBACK
from bitloft.serve.requests import RequestError
from bitloft.serve.service import Service
from bitloft.serve.shapes import error_response

HEADER_BYTES = 16 << 10  # checked here too: h11 looks at its limit only when a read ends inside the headers
OPEN = frozenset({"/health/live", "/"})
ADMIN = "/admin/"
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Guard:
    """Lets a request through to ``app``, or answers it itself."""

    def __init__(self, app: ASGIApp, service: Service, endpoints: frozenset[str]) -> None:
        """``endpoints`` are the paths that have a figure of their own in the metrics."""
        self.app, self.service, self.endpoints = app, service, endpoints
        self.key, self.admin_key = service.options.key, service.options.admin_secret
        self._local = self.key is None and service.options.host in LOOPBACK

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        label = given if REQUEST_ID.fullmatch(given) else uuid4().hex

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                found = MutableHeaders(scope=message)
                found["x-request-id"] = label
                found["x-content-type-options"] = "nosniff"
                if self.service.engine.draining:
                    found["connection"] = "close"
                self.service.metrics.answered(self._endpoint(scope["path"]), message["status"])
            await send(message)

        refusal = self._refusal(scope, headers)
        return await (self.app if refusal is None else error_response(refusal))(scope, receive, labelled)

    def _refusal(self, scope: Scope, headers: Headers) -> RequestError | None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES:
            return RequestError("headers_too_large", f"the headers exceed {HEADER_BYTES} bytes.")
        if self._local and not is_local(headers.get("host", "")):
            return RequestError(
                "host_not_served", "this server has no key and answers only to names of this machine; set a key."
            )
        admin = self.admin_key is not None and scope["path"].startswith(ADMIN)
        if scope["path"] in OPEN or self._allowed(headers, self.admin_key if admin else self.key):
            return None
        return RequestError("invalid_api_key", "the API key is missing or wrong.")

    def _allowed(self, headers: Headers, key: str | None) -> bool:
        if key is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), key.encode())

    def _endpoint(self, path: str) -> str:
        """The path as a label: what clients make up shares one."""
        if path.startswith("/v1/models/"):
            return "/v1/models"
        if path.startswith(ADMIN):
            return "/admin"
        return path if path in self.endpoints else "other"


def is_local(host: str) -> bool:
    """Whether a Host header names this machine; a page elsewhere whose name was pointed here (DNS rebinding) shows its
    own. A client without the header is no browser."""
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    if name in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
