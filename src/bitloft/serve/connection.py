"""Connections that cannot be held for nothing: uvicorn's HTTP/1.1 protocol with a deadline for headers and a cap.

uvicorn waits for ever for the headers of a request, so a client that sends a byte now and then (or none) keeps a file
descriptor as long as it likes. Data that a client does not take is the kernel's to give up on: ``listen`` sets its
time-out on the socket, from which accepted connections inherit it.
"""

import asyncio
import errno
import resource
import socket
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from bitloft.errors import BitloftError

HEADER_SECONDS = 15.0
STALLED_SECONDS = 30  # a client that takes no data, or that is gone without a word
CONNECTIONS = 4096
SPARE_FILES = 128  # descriptors kept for adapters, logs and the listener
BUSY = (
    b'{"error": {"message": "the server has as many connections as it may; try again shortly.", '
    b'"type": "rate_limit_error", "param": null, "code": "queue_full"}}'
)
REFUSAL = (
    b"HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: " + str(len(BUSY)).encode() + b"\r\n\r\n" + BUSY
)


class PatientProtocol(H11Protocol):
    """Closes a connection whose request headers take longer than HEADER_SECONDS, and refuses those beyond the cap."""

    cap = CONNECTIONS
    deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.cap:
            transport.write(REFUSAL)
            transport.close()
            return
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._relax()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        """Start the clock where headers are due, stop it where they are complete."""
        if self.conn.their_state is not h11.IDLE:
            self._relax()
        elif self.deadline is None:
            self.deadline = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _relax(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    def _give_up(self) -> None:
        self.deadline = None
        if self.conn.their_state is h11.IDLE:
            self.transport.close()


def listen(host: str, port: int, backlog: int = 2048) -> list[socket.socket]:
    """Listening sockets, one for each address of ``host``, whose connections end when their client takes no data or is
    gone. Port 0 takes a free one, the same for all.

    Raises BitloftError for an address that cannot be used.
    """
    found: list[socket.socket] = []
    problem: OSError | UnicodeError | None = None
    try:
        kinds = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        addresses = [(family, address) for family, _, _, _, address in kinds]
    except (OSError, UnicodeError) as error:
        addresses, problem = [], error
    for family, address in dict.fromkeys(addresses):
        try:
            found.append(_listener(family, (address[0], port or _port(found), *address[2:]), backlog))
        except OSError as error:
            problem = error
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # localhost is often ::1 too, without IPv6
                break
    if not found or (problem is not None and getattr(problem, "errno", 0) == errno.EADDRINUSE):
        for one in found:
            one.close()
        why = getattr(problem, "strerror", None) or problem
        raise BitloftError(f"cannot listen on {host}:{port} ({why}); use another port or host.")
    return found


def _port(found: list[socket.socket]) -> int:
    return int(found[0].getsockname()[1]) if found else 0


def _listener(family: int, address: tuple[Any, ...], backlog: int) -> socket.socket:
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if sys.platform == "linux":
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, STALLED_SECONDS)
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, STALLED_SECONDS)
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_SECONDS * 1000)
        found.bind(address)
        found.listen(backlog)
    except OSError:
        found.close()
        raise
    return found


def allow_files() -> int:
    """Raise this process's limit of open files as far as it may go; returns the connections that leaves room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return CONNECTIONS if soft == resource.RLIM_INFINITY else max(16, min(CONNECTIONS, soft - SPARE_FILES))
