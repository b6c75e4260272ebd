"""The load generator's client tells an answer from what only looks like one."""

import asyncio
from typing import Any

import pytest

from bitloft.errors import OptionError
from bitloft.serve.client import Outcome, Target, ask, get
from tests.serving import World

BODY: dict[str, Any] = {"model": "alpha", "prompt": "one two", "max_tokens": 6, "temperature": 0}
STREAM = BODY | {"stream": True, "stream_options": {"include_usage": True}}


def asked(url: str, body: dict[str, Any], timeout: float = 30.0, key: str | None = None) -> Outcome:
    return asyncio.run(ask(Target.parse(url, key), body, timeout))


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["whole", "stream"])
def test_an_answer(world: World, body: dict[str, Any]) -> None:
    found = asked(world.url, body)
    assert found.error is None
    assert (found.status, found.finish, found.tokens) == (200, "length", 6)
    assert found.text == world.alone(world.encode("one two"), "alpha", 6)
    assert (found.first is not None) == bool(body.get("stream") and found.text)
    assert found.asked < (found.first or found.ended) <= found.ended


def test_errors_have_the_servers_code(world: World) -> None:
    assert asked(world.url, BODY | {"model": "nobody"}).error == "model_not_found"
    assert asked(world.url, STREAM | {"model": "nobody"}).error == "model_not_found"
    with world.server_with(api_key="k") as server:
        assert asked(server.url, BODY).error == "invalid_api_key"
        assert asked(server.url, BODY, key="k").error is None
    status, data = asyncio.run(get(Target.parse(world.url), "/v1/models/nobody"))
    assert (status, data["error"]["code"]) == (404, "model_not_found")


def served(reply: bytes, pause: float = 0.0) -> Outcome:
    """The outcome of a stream at a server that answers with these bytes and closes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read(1 << 16)
            writer.write(reply)
            await writer.drain()
            await asyncio.sleep(pause)
        finally:
            writer.close()

    async def go() -> Outcome:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await ask(Target("127.0.0.1", port), STREAM, 0.5)

    return asyncio.run(go())


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
PIECE = b'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'
LAST = b'data: {"choices": [{"text": "b", "finish_reason": "stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error": {"message": "x", "type": "server_error", "param": null, "code": "engine_error"}}\n\n'


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (HEAD + PIECE + LAST + DONE, None),
        (HEAD + b": ping\n\n" + PIECE + LAST + DONE, None),
        (HEAD + PIECE + LAST, "stream_cut_off"),
        (HEAD + PIECE + DONE, "stream_cut_off"),
        (HEAD + PIECE, "stream_cut_off"),
        (HEAD + PIECE + ERROR + DONE, "engine_error"),
        (HEAD + b"data: {]\n\n" + DONE, "answer_unreadable"),
        (HEAD + b'data: {"surprise": 1}\n\n' + DONE, "answer_unreadable"),
        (b"HTTP/1.1 500 Oops\r\ncontent-length: 4\r\n\r\noops", "answer_unreadable"),
        (b"", "connection_failed"),
        (b"SSH-2.0\r\n\r\n", "connection_failed"),
    ],
)
def test_what_only_looks_like_an_answer(reply: bytes, error: str | None) -> None:
    found = served(reply)
    assert found.error == error
    if error is None:
        assert (found.text, found.finish) == ("ab", "stop")


def test_a_client_gives_up() -> None:
    assert served(HEAD + PIECE, pause=2.0).error == "client_timeout"


def test_nobody_there(world: World) -> None:
    assert asked("http://127.0.0.1:9", BODY).error == "connection_failed"


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://127.0.0.1:8000", Target("127.0.0.1", 8000)),
        ("127.0.0.1:8000/v1", Target("127.0.0.1", 8000)),
        ("http://[::1]:8000/v1/", Target("::1", 8000)),
        ("https://my.example/api/v1", Target("my.example", 443, True, "/api")),
    ],
)
def test_addresses(url: str, target: Target) -> None:
    assert Target.parse(url) == target
    assert "secret" not in repr(Target.parse(url, "secret"))


@pytest.mark.parametrize(
    "url", ["", "ftp://x", "http://", "http://x:99999", "http://x?y=1", "http://me@x", "http://[::1"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(OptionError, match="is no server's address"):
        Target.parse(url)
