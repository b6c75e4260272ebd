"""Chat and completions as the official client sees them."""

import asyncio
import http.client
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from tests.serving import CHAT, NAMES, World, connect, error_of, failing, raw, slowed, until


@pytest.fixture
def client(world: World) -> Iterator[openai.OpenAI]:
    with connect(world.url) as found:
        yield found


def test_chat(world: World, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="alpha", messages=CHAT, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content == world.alone(world.chat_ids(), "alpha", 8)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == "alpha"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(world.chat_ids()), 8)
    assert answer.usage.total_tokens == len(world.chat_ids()) + 8


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
    assert text == world.alone(world.chat_ids(), "gamma", 8)
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
    whole = world.alone(world.chat_ids(), "alpha", 12)
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


def test_a_template_that_refuses_is_the_clients_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.service.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    status, _, data = raw(world.url, "POST", "/v1/chat/completions", {"model": "alpha", "messages": CHAT})
    assert (status, error_of(data)["code"]) == (400, "invalid_value")
    assert "roles must alternate" in error_of(data)["message"]


def test_several_answers_to_one_prompt(client: openai.OpenAI) -> None:
    options: Any = {"model": "alpha", "prompt": "one two", "max_tokens": 6, "temperature": 1.2}
    whole = client.completions.create(n=3, seed=5, **options)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.text for choice in whole.choices}) == 3
    alone = [client.completions.create(seed=5 + i, **options).choices[0].text for i in range(3)]
    assert [choice.text for choice in whole.choices] == alone  # the seed counts up
    assert whole.usage is not None
    assert whole.usage.completion_tokens == sum(min(6, 6) for _ in whole.choices)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    texts = ["", "", ""]
    ends = []
    for chunk in client.completions.create(n=3, seed=5, stream=True, **options):
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        ends += [choice.index] if choice.finish_reason else []
    assert texts == alone
    assert sorted(ends) == [0, 1, 2]
    chat: Any = {"model": "alpha", "messages": CHAT, "max_tokens": 3, "n": 2, "stream": True}
    roles = [c.choices[0].index for c in client.chat.completions.create(**chat) if c.choices[0].delta.role]
    assert roles == [0, 1]


def test_several_prompts_in_one_request(world: World, client: openai.OpenAI) -> None:
    prompts = ["one two", "the quick brown fox"]
    expected = [world.alone(world.encode(prompt), "beta", 5) for prompt in prompts]
    for given in (prompts, [world.encode(prompt) for prompt in prompts]):
        answer = client.completions.create(model="beta", prompt=given, max_tokens=5, temperature=0, n=2)
        assert [choice.text for choice in answer.choices] == [expected[0]] * 2 + [expected[1]] * 2
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(world.encode(prompt)) for prompt in prompts)


def test_usage_comes_last_and_is_null_before(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="base", prompt="one", max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk.to_dict() for chunk in stream]
    assert all("usage" in chunk for chunk in chunks)
    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1]["choices"] == []
    plain = client.completions.create(model="base", prompt="one", max_tokens=4, stream=True)
    assert all("usage" not in chunk.to_dict() for chunk in plain)


def test_logprobs_of_a_chat(world: World, client: openai.OpenAI) -> None:
    options: Any = {"model": "alpha", "messages": CHAT, "max_tokens": 5, "temperature": 0}
    answer = client.chat.completions.create(logprobs=True, top_logprobs=3, **options)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert len(found.content) == 5
    for entry in found.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)  # greedy: the chosen one is the likeliest
        values = [one.logprob for one in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert all(value <= 0 for value in values)
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    streamed = list(client.chat.completions.create(logprobs=True, top_logprobs=3, stream=True, **options))
    parts = [one for c in streamed for one in (c.choices[0].logprobs.content or [] if c.choices[0].logprobs else [])]
    assert [one.token for one in parts] == [one.token for one in found.content]
    assert client.chat.completions.create(**options).choices[0].logprobs is None


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="beta", prompt="one", max_tokens=4, temperature=0, logprobs=2)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset or []) == 4
    assert all(1 <= len(top) <= 2 for top in found.top_logprobs)  # two tokens of one spelling share an entry


def test_top_k_of_one_is_greedy(world: World, client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="alpha", prompt="one two", max_tokens=6, temperature=1.9, seed=3, extra_body={"top_k": 1}
    )
    assert answer.choices[0].text == world.alone(world.encode("one two"), "alpha", 6)


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
    ({"n": 5}, openai.BadRequestError, "invalid_value", "n"),
    ({"extra_body": {"min_p": 0.1}}, openai.BadRequestError, "unsupported_parameter", "min_p"),
]


@pytest.mark.parametrize(("fields", "kind", "code", "param"), REFUSED, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(client: openai.OpenAI, fields: Any, kind: Any, code: str, param: str, stream: bool) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(
            **({"model": "base", "messages": CHAT, "max_tokens": 4, "stream": stream} | fields)
        )
    assert (caught.value.code, caught.value.param) == (code, param)


def test_the_context_is_kept_to_the_token(world: World, client: openai.OpenAI) -> None:
    """R20: prompt and answer together fill the context and not a token more, which is said before the engine works."""
    context = world.engine.context
    for prompt in (context - 8, context - 1):
        fits = context - prompt
        options: Any = {"model": "alpha", "prompt": [5] * prompt, "temperature": 0}
        assert client.completions.create(max_tokens=fits, **options).usage is not None
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(max_tokens=fits + 1, **options)
        assert caught.value.code == "context_length_exceeded"
    for prompt in (context, context + 1):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="alpha", prompt=[5] * prompt)
        assert caught.value.code == "context_length_exceeded"


def test_a_full_queue_is_429_with_retry_after_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(monkeypatch, 0.02)
    body = {"model": "base", "prompt": "one", "max_tokens": 200, "temperature": 0}
    with world.server_with(max_queue=1, max_batch=1) as server, ThreadPoolExecutor(2) as pool:
        engine = server.service.engine
        running = pool.submit(raw, server.url, "POST", "/v1/completions", body)
        until(lambda: engine.running == 1)
        waiting = pool.submit(raw, server.url, "POST", "/v1/completions", body)
        until(lambda: engine.waiting == 1)
        times = []
        for _ in range(20):
            began = time.perf_counter()
            status, headers, data = raw(server.url, "POST", "/v1/completions", body)
            times.append(time.perf_counter() - began)
            assert (status, error_of(data)["code"]) == (429, "queue_full")
            assert int(headers["retry-after"]) >= 1
        assert sorted(times)[len(times) // 2] < 0.05
        with connect(server.url) as client, pytest.raises(openai.RateLimitError):
            client.completions.create(model="base", prompt="one", stream=True)
        assert running.result()[0] == 200
        assert waiting.result()[0] == 200


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
    failing(monkeypatch, "secret detail", after=2)
    body = {"model": "alpha", "prompt": "the quick brown fox", "max_tokens": 9, "stream": True, "temperature": 0}
    status, _, data = raw(world.url, "POST", "/v1/completions", body)
    frames = data.decode().split("\n\n")
    assert status == 200
    assert frames[-2:] == ["data: [DONE]", ""]
    assert error_of(frames[-3].removeprefix("data: ").encode())["code"] == "engine_error"
    assert b"secret" not in data
    status, _, data = raw(world.url, "POST", "/v1/completions", body | {"stream": False})
    assert (status, error_of(data)["code"]) == (500, "engine_error")


def test_an_error_before_the_first_token_has_its_status(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that waited too long is a 503 with Retry-After, not a 200 with an error in it."""
    slowed(monkeypatch, 0.02)
    body = {"model": "base", "prompt": "one", "max_tokens": 200, "temperature": 0}
    with world.server_with(max_batch=1, queue_seconds=0.2) as server, ThreadPoolExecutor(1) as pool:
        running = pool.submit(raw, server.url, "POST", "/v1/completions", body)
        until(lambda: server.service.engine.running == 1)
        status, headers, data = raw(server.url, "POST", "/v1/completions", body | {"stream": True})
        assert (status, error_of(data)["code"]) == (503, "queue_timeout")
        assert int(headers["retry-after"]) >= 1
        assert running.result()[0] == 200
