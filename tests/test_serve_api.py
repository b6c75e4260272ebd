"""The API as the official client sees it, and as clients that mean no good see it."""

import asyncio
import http.client
import json
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from bitloft.serve.api import BODY_BYTES
from tests.serving import NAMES, World, failing, slowed

CHAT: list[Any] = [{"role": "user", "content": "what is the capital of france ?"}]


@pytest.fixture
def client(world: World) -> Iterator[openai.OpenAI]:
    with connect(world.url) as found:
        yield found


def connect(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)


def chat_ids(world: World) -> list[int]:
    ids: Any = world.service.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    return list(ids)


def raw(url: str, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """A request by hand: status, headers, body. A dict is sent as JSON."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=30)
    data = json.dumps(body) if isinstance(body, dict) else body
    try:
        given = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        connection.request(method, path, data, given)
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


def error_of(body: bytes) -> dict[str, Any]:
    """The error in a body, which has the OpenAI shape and nothing of this machine."""
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "pytest" not in error["message"]  # part of every path of a test
    assert "Traceback" not in error["message"]
    return dict(error)


def test_models(client: openai.OpenAI) -> None:
    cards = {card.id: card for card in client.models.list()}
    assert list(cards) == ["base", *sorted(NAMES[1:])]
    assert cards["base"].parent is None  # type: ignore[attr-defined]
    assert all(cards[name].parent == "base" and cards[name].root == name for name in NAMES[1:])  # type: ignore[attr-defined]
    assert client.models.retrieve("alpha").id == "alpha"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_chat(world: World, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="alpha", messages=CHAT, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content == world.alone(chat_ids(world), "alpha", 8)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == "alpha"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(chat_ids(world)), 8)
    assert answer.usage.total_tokens == len(chat_ids(world)) + 8


def test_completion(world: World, client: openai.OpenAI) -> None:
    ids = world.encode("the quick brown")
    expected = world.alone(ids, "beta", 8)
    for prompt in ("the quick brown", ids):
        answer = client.completions.create(model="beta", prompt=prompt, max_tokens=8, temperature=0)
        assert answer.choices[0].text == expected
    assert answer.object == "text_completion"


def test_streams(world: World, client: openai.OpenAI) -> None:
    options: Any = {"model": "gamma", "max_tokens": 8, "temperature": 0, "stream": True}
    chunks = list(client.chat.completions.create(messages=CHAT, stream_options={"include_usage": True}, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-2:] == [None, "length"]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == world.alone(chat_ids(world), "gamma", 8)
    assert len({chunk.id for chunk in chunks}) == 1
    pieces = list(client.completions.create(prompt="one two", **options))
    assert "".join(piece.choices[0].text for piece in pieces) == world.alone(world.encode("one two"), "gamma", 8)


def test_a_stream_ends_with_done(world: World) -> None:
    body = {"model": "base", "messages": CHAT, "max_tokens": 2, "stream": True}
    status, headers, data = raw(world.url, "POST", "/v1/chat/completions", body)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert data.endswith(b"\n\ndata: [DONE]\n\n")
    assert data.count(b"[DONE]") == 1


def test_many_clients_with_many_adapters(world: World) -> None:
    """Concurrent requests, streamed or whole, each as its adapter answers alone."""
    texts = ("one two", "a base is frozen and packed ; an adapter")
    jobs = [(text, name, i % 2 == 0) for i, (text, name) in enumerate((t, n) for t in texts for n in NAMES)]
    expected = [world.alone(world.encode(text), name, 6) for text, name, _ in jobs]
    assert len(set(expected)) == len(jobs) or len(set(expected)) >= len(NAMES)

    async def ask(client: openai.AsyncOpenAI, text: str, name: str, stream: bool) -> str:
        options: Any = {"model": name, "prompt": text, "max_tokens": 6, "temperature": 0}
        if stream:
            return "".join([c.choices[0].text async for c in await client.completions.create(stream=True, **options)])
        answer: openai.types.Completion = await client.completions.create(**options)
        return answer.choices[0].text

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=world.url, api_key="none", max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(ask(client, *job) for job in jobs))

    assert asyncio.run(all_of_them()) == expected


def test_stop_strings(world: World, client: openai.OpenAI) -> None:
    options: Any = {"model": "alpha", "messages": CHAT, "max_tokens": 12, "temperature": 0}
    whole = world.alone(chat_ids(world), "alpha", 12)
    stop = whole[3:5]
    answer = client.chat.completions.create(stop=[stop, "never"], **options)
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(stop=stop, stream=True, **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_seeds(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        return (
            client.completions.create(model="base", prompt="one", max_tokens=8, temperature=1.5, seed=seed)
            .choices[0]
            .text
        )

    assert ask(1) == ask(1) != ask(2)


def test_without_max_tokens_the_answer_ends_within_the_context(world: World) -> None:
    with world.server_with(context=24) as server, connect(server.url) as client:
        prompt = world.encode("a base is frozen")
        answer = client.completions.create(model="base", prompt=prompt, temperature=0)
        assert answer.usage is not None
        assert answer.usage.total_tokens <= 24


REFUSED: list[tuple[dict[str, Any], type[openai.APIStatusError], str, str | None]] = [
    ({"model": "nobody"}, openai.NotFoundError, "model_not_found", "model"),
    ({"model": "foreign"}, openai.NotFoundError, "model_not_found", "model"),
    ({"model": ""}, openai.NotFoundError, "model_not_found", "model"),
    ({"max_tokens": 250}, openai.BadRequestError, "context_length_exceeded", "max_tokens"),
    (
        {"messages": [{"role": "user", "content": "the " * 400}]},
        openai.BadRequestError,
        "context_length_exceeded",
        "prompt",
    ),
    ({"max_tokens": 5000}, openai.BadRequestError, "invalid_value", "max_tokens"),
    ({"temperature": 3}, openai.BadRequestError, "invalid_value", "temperature"),
    ({"n": 3}, openai.BadRequestError, "unsupported_parameter", "n"),
    ({"extra_body": {"top_k": 1}}, openai.BadRequestError, "unsupported_parameter", "top_k"),
]


@pytest.mark.parametrize(("fields", "kind", "code", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_refusals(client: openai.OpenAI, fields: Any, kind: Any, code: str, param: str) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**({"model": "base", "messages": CHAT, "max_tokens": 4} | fields))
    assert (caught.value.code, caught.value.param) == (code, param)


def test_a_full_queue_is_429_with_retry_after(world: World) -> None:
    with world.server_with(max_queue=1, max_batch=1) as server, pytest.MonkeyPatch.context() as patch:
        slowed(patch, 0.05)
        engine = server.service.engine
        options: Any = {"model": "base", "prompt": "one", "max_tokens": 100, "stream": True}
        with connect(server.url) as client:
            running = client.completions.create(**options)
            until(lambda: engine.running == 1)
            waiting = client.completions.create(**options)
            until(lambda: engine.waiting == 1)
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(**options)
            assert caught.value.code == "queue_full"
            assert caught.value.response.headers["retry-after"] == "1"
            running.close()
            waiting.close()
            until(lambda: engine.idle)  # both rows were freed long before their 100 tokens


def until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(world: World, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    steps = slowed(monkeypatch, 0.02)
    parts = urlsplit(world.url)
    body = {"model": "alpha", "prompt": "one", "max_tokens": 240, "stream": stream}
    with closing(http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=30)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        until(lambda: len(steps) > 3)
    until(lambda: world.engine.idle)
    assert len(steps) < 200


def test_an_engine_error_in_a_stream_is_a_frame(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "secret detail")
    body = {"model": "alpha", "prompt": "one", "max_tokens": 9, "stream": True}
    status, _, data = raw(world.url, "POST", "/v1/completions", body)
    frames = data.decode().split("\n\n")
    assert status == 200
    assert frames[-2:] == ["data: [DONE]", ""]
    assert error_of(frames[-3].removeprefix("data: ").encode())["code"] == "engine_error"
    assert b"secret" not in data
    status, _, data = raw(world.url, "POST", "/v1/completions", body | {"stream": False})
    assert (status, error_of(data)["code"]) == (500, "engine_error")


def test_a_failure_outside_the_engine_has_the_same_shape(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tokenizer: Any, prompt: Any) -> list[int]:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("bitloft.serve.api._encode", fail)
    status, _, data = raw(world.url, "POST", "/v1/completions", {"model": "alpha", "prompt": "one"})
    assert (status, error_of(data)["code"]) == (500, "engine_error")
    assert b"secret" not in data


def test_a_template_that_refuses_is_the_clients_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.service.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    status, _, data = raw(world.url, "POST", "/v1/chat/completions", {"model": "alpha", "messages": CHAT})
    assert (status, error_of(data)["code"]) == (400, "invalid_value")
    assert "roles must alternate" in error_of(data)["message"]


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


def test_the_key_guards_every_route_but_one(world: World) -> None:
    with world.server_with(api_key="sécret") as server:
        routes = (
            "/health/ready",
            "/v1/models",
            "/v1/models/base",
            "/v1/chat/completions",
            "/nothing",
            "/",
            "//health/live",
        )
        for path in routes:
            for method in ("GET", "POST"):
                status, headers, body = raw(server.url, method, path)
                assert (status, error_of(body)["code"]) == (401, "invalid_api_key")
                assert headers["www-authenticate"] == "Bearer"
        for key in ("Bearer wrong", "Basic c2VjcmV0", "Bearer", "sécret", "Bearer sécret2"):
            assert raw(server.url, "GET", "/v1/models", authorization=key)[0] == 401
        assert raw(server.url, "GET", "/health/live")[0] == 200
        with connect(server.url, "wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        good = "Bearer sécret".encode().decode("latin-1")
        assert raw(server.url, "GET", "/v1/models", authorization=good)[0] == 200


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
