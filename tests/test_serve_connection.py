"""Connections that cannot be held for nothing."""

import resource
import socket
import sys
import time
from urllib.parse import urlsplit

import h11
import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from bitloft.errors import BitloftError
from bitloft.serve import connection
from bitloft.serve.connection import PatientProtocol, allow_files, listen
from tests.serving import World, raw


def dial(url: str) -> socket.socket:
    parts = urlsplit(url)
    found = socket.create_connection((str(parts.hostname), int(parts.port or 0)))
    found.settimeout(30)
    return found


@pytest.mark.parametrize("sent", [b"", b"GET /health/live HTTP/1.1\r\nhost: loc", b"G"])
def test_headers_have_a_deadline(world: World, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.3)
    with dial(world.url) as client:
        client.sendall(sent)
        began = time.monotonic()
        assert client.recv(1000) == b""  # closed by the server
        assert time.monotonic() - began < 10


def drip(client: socket.socket, data: bytes) -> None:
    for byte in data:
        client.sendall(bytes([byte]))
        time.sleep(0.05)


def test_a_byte_now_and_then_does_not_help(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow loris: the deadline is for all headers together."""
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.4)
    with dial(world.url) as client:
        began = time.monotonic()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            drip(client, b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"x: y\r\n" * 100)
        assert time.monotonic() - began < 10


def test_a_second_request_has_a_deadline_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.5)
    with dial(world.url) as client:
        client.sendall(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += client.recv(1000)
        assert answer.startswith(b"HTTP/1.1 200")
        client.sendall(b"GET /hea")
        assert client.recv(1000) == b""


def test_an_answer_that_takes_longer_than_the_deadline_is_finished(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.2)
    monkeypatch.setattr("bitloft.serve.service.BODY_SECONDS", 1.0)
    status = raw(world.url, "POST", "/v1/completions", {"model": "base", "prompt": "one", "max_tokens": 200})[0]
    assert status == 200


def test_connections_beyond_the_cap_are_told_so(world: World) -> None:
    with world.server_with() as server:
        protocol = server.config.http_protocol_class
        assert issubclass(protocol, PatientProtocol)
        protocol.cap = 3
        clients = [dial(server.url) for _ in range(3)]
        try:
            time.sleep(0.2)
            with dial(server.url) as more:
                found = more.recv(1000)
            assert found.startswith(b"HTTP/1.1 429")
            assert b"retry-after: 1" in found
            assert b'"code": "queue_full"' in found
        finally:
            for client in clients:
                client.close()
        deadline = time.monotonic() + 10
        while raw(server.url, "GET", "/health/live")[0] != 200:
            assert time.monotonic() < deadline


def test_what_uvicorn_has_that_we_use() -> None:
    """A contract: names of uvicorn's protocol on which ours is built."""
    assert issubclass(PatientProtocol, H11Protocol)
    for name in ("connection_made", "data_received", "connection_lost"):
        assert callable(getattr(H11Protocol, name))
    assert h11.Connection(h11.SERVER).their_state is h11.IDLE


def test_listening_on_a_name_and_on_a_free_port() -> None:
    found = listen("localhost", 0)
    try:
        ports = {one.getsockname()[1] for one in found}
        assert len(ports) == 1
        assert 0 not in ports
        if sys.platform == "linux":
            limit = connection.STALLED_SECONDS * 1000
            assert all(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == limit for one in found)
        assert all(one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for one in found)
    finally:
        for one in found:
            one.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the option is Linux's")
def test_accepted_connections_inherit_the_time_out() -> None:
    (listener,) = listen("127.0.0.1", 0)
    with listener, socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
        limit = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert limit == connection.STALLED_SECONDS * 1000


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-name.invalid", "a" * 300])
def test_addresses_that_cannot_be_listened_on(host: str) -> None:
    with pytest.raises(BitloftError, match=rf"cannot listen on {host}:0 \(.*\); use another port or host"):
        listen(host, 0)


def test_open_files_bound_the_connections() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
        found = allow_files()
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert soft > 300 or before[1] <= 300
        assert 16 <= found <= soft
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
