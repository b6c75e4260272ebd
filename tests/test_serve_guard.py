"""R21 and what else stands before every route: keys, host names, sizes of headers, request ids."""

import logging
import re
from typing import Any

import openai
import pytest
from starlette.routing import Route

from bitloft.serve.api import router
from bitloft.serve.guard import OPEN, is_local
from tests.serving import World, connect, error_of, raw

KEY = "sécret"
SENT = f"Bearer {KEY}".encode().decode("latin-1")


def paths(world: World, **settings: Any) -> list[tuple[str, str]]:
    """Every route as (method, path): a route that is added later is in it."""
    with world.server_with(**settings) as server:
        routes = [route for route in router(server.service).routes if isinstance(route, Route)]
        return [(m, r.path.replace("{name}", "alpha")) for r in routes for m in sorted(r.methods or ()) if m != "HEAD"]


def test_every_route_needs_the_key_but_those_without_data(world: World) -> None:
    settings: dict[str, Any] = {"api_key": KEY, "admin": True, "admin_key": "other"}
    found = paths(world, **settings)
    assert len(found) >= 14
    assert {path for _, path in found} >= {"/v1/models", "/metrics", "/status", "/admin/adapters", "/v1/embeddings"}
    with world.server_with(**settings) as server:
        for method, path in [*found, ("GET", "/nothing"), ("GET", "//health/live"), ("POST", "/v1/models/../../")]:
            status, headers, body = raw(server.url, method, path)
            if path in OPEN:
                assert status == 200
                continue
            assert (status, error_of(body)["code"]) == (401, "invalid_api_key"), path
            assert headers["www-authenticate"] == "Bearer"
    assert sorted(OPEN) == ["/", "/health/live"]


def test_keys_that_are_wrong_and_the_one_that_is_right(world: World) -> None:
    with world.server_with(api_key=KEY) as server:
        for key in ("Bearer wrong", "Basic c2VjcmV0", "Bearer", KEY, f"{SENT}2", SENT[:-1], "Bearer  "):
            assert raw(server.url, "GET", "/v1/models", authorization=key)[0] == 401
        assert raw(server.url, "GET", "/v1/models", authorization=SENT)[0] == 200
        with connect(server.url, "wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_the_admin_key_opens_admin_routes_only_and_the_other_the_rest(world: World) -> None:
    with world.server_with(api_key="a", admin=True, admin_key="b") as server:
        for key, path, status in (
            ("a", "/v1/models", 200),
            ("b", "/v1/models", 401),
            ("a", "/admin/adapters", 401),
            ("b", "/admin/adapters", 200),
        ):
            assert raw(server.url, "GET", path, authorization=f"Bearer {key}")[0] == status
    with world.server_with(admin=True, admin_key="b") as server:  # no key for clients: admin still has its own
        assert raw(server.url, "GET", "/v1/models")[0] == 200
        assert raw(server.url, "GET", "/admin/adapters")[0] == 401
    with world.server_with(api_key="a") as server:  # off: nothing is there, and nobody learns so without the key
        assert raw(server.url, "GET", "/admin/adapters")[0] == 401
        assert raw(server.url, "GET", "/admin/adapters", authorization="Bearer a")[0] == 404


def test_keys_are_compared_in_constant_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compare(given: bytes, key: bytes) -> bool:
        seen.append((given, key))
        return given == key

    monkeypatch.setattr("hmac.compare_digest", compare)
    with world.server_with(api_key="right") as server:
        assert raw(server.url, "GET", "/v1/models", authorization="Bearer wrong")[0] == 401
        assert raw(server.url, "GET", "/v1/models", authorization="Bearer right")[0] == 200
    assert seen == [(b"wrong", b"right"), (b"right", b"right")]


def test_no_key_is_ever_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with world.server_with(api_key="k-sent-1", admin=True, admin_key="k-sent-2") as server:
        for key in ("k-sent-1", "k-sent-2", "k-sent-3"):
            for path in ("/v1/models", "/admin/adapters", "/metrics"):
                _, headers, body = raw(server.url, "GET", path, authorization=f"Bearer {key}")
                assert b"k-sent" not in body
                assert not any("k-sent" in value for value in headers.values())
        assert "k-sent" not in repr(server.service.options)
    assert "k-sent" not in caplog.text


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1:8000", True),
        ("localhost", True),
        ("localhost:80", True),
        ("[::1]:8000", True),
        ("127.8.8.8", True),
        ("", True),
        ("evil.example", False),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("10.0.0.1:8000", False),
        ("[2001:db8::1]", False),
        ("127.0.0.1:x", False),
    ],
)
def test_names_of_this_machine(host: str, local: bool) -> None:
    assert is_local(host) == local


def test_a_page_elsewhere_cannot_point_its_name_here(world: World) -> None:
    """DNS rebinding: without a key a foreign Host header is refused; with one the key decides."""
    status, _, body = raw(world.url, "GET", "/v1/models", host="evil.example:8000")
    assert (status, error_of(body)["code"]) == (421, "host_not_served")
    assert raw(world.url, "GET", "/", host="evil.example")[0] == 421
    with world.server_with(api_key=KEY) as server:
        assert raw(server.url, "GET", "/v1/models", host="my.example", authorization=SENT)[0] == 200


def test_request_ids_are_ours_unless_they_are_harmless(world: World) -> None:
    for given, kept in (("abc-1_2.3", True), ("x" * 64, True), ("x" * 65, False), ("a b", False), ("a/../b", False)):
        found = raw(world.url, "GET", "/v1/models", x_request_id=given)[1]["x-request-id"]
        assert (found == given) == kept
        assert kept or re.fullmatch("[0-9a-f]{32}", found)
    ids = {raw(world.url, "GET", "/v1/models")[1]["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


def test_large_headers(world: World) -> None:
    status, _, data = raw(world.url, "GET", "/v1/models", x_junk="x" * 20_000)
    assert (status, error_of(data)["code"]) == (431, "headers_too_large")
    assert raw(world.url, "GET", "/v1/models", x_junk="x" * 8_000)[0] == 200
