"""Bodies are read within limits, and slow work does not hold up the event loop."""

import http.client
import socket
import threading
import time
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from bitloft.serve.service import BODY_BYTES, Service
from tests.serving import World, error_of, raw


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("text/plain", "{}", 415),
        ("application/x-www-form-urlencoded", "a=b", 415),
        ("", "{}", 415),
        ("application/json", "x" * (BODY_BYTES + 1), 413),
        ("application/json; charset=utf-8", "{", 400),
        ("APPLICATION/JSON", "{}", 400),
    ],
)
def test_bodies_that_are_refused(world: World, kind: str, body: str, status: int) -> None:
    assert raw(world.url, "POST", "/v1/completions", body, content_type=kind)[0] == status


def test_a_body_that_does_not_arrive(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitloft.serve.service.BODY_SECONDS", 0.2)
    parts = urlsplit(world.url)
    with closing(http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=30)) as connection:
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("content-type", "application/json")
        connection.putheader("content-length", "100")
        connection.endheaders()
        connection.send(b'{"model":')
        response = connection.getresponse()
        assert (response.status, error_of(response.read())["code"]) == (408, "body_timeout")


def test_a_client_that_leaves_in_its_body_does_no_harm(world: World) -> None:
    parts = urlsplit(world.url)
    with socket.create_connection((str(parts.hostname), int(parts.port or 0))) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 100\r\n\r\n{"
        )
    assert raw(world.url, "GET", "/health/live")[0] == 200


def test_tokenizing_does_not_hold_up_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, release = threading.Event(), threading.Event()
    encode = Service._encode

    def slow(self: Service, text: str) -> list[int]:
        entered.set()
        release.wait(30)
        return encode(self, text)

    monkeypatch.setattr(Service, "_encode", slow)
    body = {"model": "base", "prompt": "one", "max_tokens": 1}
    thread = threading.Thread(target=raw, args=(world.url, "POST", "/v1/completions", body))
    thread.start()
    try:
        assert entered.wait(30)
        began = time.perf_counter()
        assert raw(world.url, "GET", "/health/ready")[0] == 200
        assert time.perf_counter() - began < 5
    finally:
        release.set()
        thread.join(30)
