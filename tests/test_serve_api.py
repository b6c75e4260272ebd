"""Models, health, and the errors that all routes share."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from bitloft.serve.service import BODY_BYTES, Service
from tests.serving import NAMES, World, connect, error_of, raw


@pytest.fixture
def client(world: World) -> Iterator[openai.OpenAI]:
    with connect(world.url) as found:
        yield found


def test_models(client: openai.OpenAI) -> None:
    cards = {card.id: card for card in client.models.list()}
    assert list(cards) == ["base", *sorted(NAMES[1:])]
    assert cards["base"].parent is None  # type: ignore[attr-defined]
    assert all(cards[name].parent == "base" and cards[name].root == name for name in NAMES[1:])  # type: ignore[attr-defined]
    assert client.models.retrieve("alpha").id == "alpha"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_a_failure_outside_the_engine_has_the_same_shape(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Service, text: str) -> list[int]:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(Service, "_encode", fail)
    status, _, data = raw(world.url, "POST", "/v1/completions", {"model": "alpha", "prompt": "one"})
    assert (status, error_of(data)["code"]) == (500, "engine_error")
    assert b"secret" not in data


def test_health(world: World) -> None:
    assert raw(world.url, "GET", "/health/live")[0] == 200
    status, _, body = raw(world.url, "GET", "/health/ready")
    assert status == 200
    assert json.loads(body)["status"] == "ready"
    with world.server_with() as server:
        server.service.engine.drain()
        status, headers, body = raw(server.url, "GET", "/health/ready")
        assert (status, json.loads(body)["reason"], headers["connection"]) == (503, "shutting down", "close")
        assert raw(server.url, "GET", "/health/live")[0] == 200
        status, headers, body = raw(server.url, "POST", "/v1/completions", {"model": "base", "prompt": "one"})
        assert (status, error_of(body)["code"], headers["retry-after"]) == (503, "shutting_down", "5")


def test_odd_requests(world: World) -> None:
    path = "/v1/completions"
    cases: list[tuple[str, str, Any, dict[str, str], int, str]] = [
        ("GET", "/nothing", None, {}, 404, "not_found"),
        ("GET", path, None, {}, 405, "method_not_allowed"),
        ("DELETE", "/v1/models/alpha", None, {}, 405, "method_not_allowed"),
        ("POST", path, "{}", {"content_type": "text/plain"}, 415, "unsupported_media_type"),
        ("POST", path, "x" * (BODY_BYTES + 1), {}, 413, "body_too_large"),
        ("POST", path, "not json", {}, 400, "invalid_value"),
        ("POST", path, "[" * 50_000, {}, 400, "invalid_value"),
        ("POST", path, {"model": "base", "prompt": []}, {}, 400, "invalid_value"),
        ("POST", path, {"model": "base", "prompt": [10**9]}, {}, 400, "invalid_value"),
        ("GET", "/v1/models/..%2f..%2fetc", None, {}, 404, "not_found"),
    ]
    for method, where, body, headers, status, code in cases:
        found, answer, data = raw(world.url, method, where, body, **headers)
        assert (found, error_of(data)["code"]) == (status, code), (method, where)
        assert len(answer["x-request-id"]) == 32
    status, _, data = raw(world.url, "GET", "/v1/models", x_junk="x" * 20_000)
    assert (status, error_of(data)["code"]) == (431, "headers_too_large")
    assert raw(world.url, "GET", "/v1/models")[0] == 200
