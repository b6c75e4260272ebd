"""Bodies: what is honoured is checked, what is not is refused by name, what asks for nothing is let through."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitloft.serve.bodies import HARMLESS, NEUTRAL, AdapterBody, ChatBody, CompletionBody, EmbeddingBody, parse
from bitloft.serve.requests import RequestError

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def chat(**fields: Any) -> ChatBody:
    return parse(ChatBody, json.dumps(CHAT | fields).encode())


def test_defaults_are_those_of_the_api() -> None:
    body = chat()
    assert (body.temperature, body.top_p, body.seed, body.stop, body.limit) == (1, 1, None, [], None)
    assert not body.stream
    assert not body.stream_options.include_usage


def test_what_is_honoured() -> None:
    body = chat(max_tokens=3, max_completion_tokens=5, temperature=0, top_p=0.5, seed=-1, stop="x", stream=True)
    assert (body.temperature, body.top_p, body.seed, body.stop, body.limit) == (0, 0.5, -1, ["x"], 5)
    assert body.stream
    assert chat(stop=["a", "b"]).stop == ["a", "b"]
    assert parse(CompletionBody, b'{"model": "m", "prompt": [1, 2]}').prompt == [1, 2]


def test_what_asks_for_nothing_is_let_through() -> None:
    chat(**NEUTRAL, **dict.fromkeys(HARMLESS, "anything"), temperature=None, stop=None, future_field=None)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = chat(messages=[{"role": "system", "content": parts}, {"role": "assistant", "content": "c", "refusal": None}])
    assert [m.plain for m in body.messages] == [
        {"role": "system", "content": "ab"},
        {"role": "assistant", "content": "c"},
    ]


BAD = [
    ({"logit_bias": {"1": 5}}, "logit_bias", "'logit_bias' is not supported; leave it out"),
    ({"n": 5}, "n", "less than or equal to 4"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 10**6}, "n", "less than or equal to 4"),
    ({"top_k": -2}, "top_k", "greater than or equal to -1"),
    ({"top_k": 1.5}, "top_k", "integer"),
    ({"logprobs": 3}, "logprobs", "boolean"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs to be true"),
    ({"min_p": 0.1}, "min_p", "'min_p' is not supported"),
    ({"tools": [{"type": "function"}]}, "tools", "'tools' is not supported"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
    ({"prompt": "x"}, "prompt", "not supported"),
    ({"temperature": -0.1}, "temperature", "temperature: .*greater than or equal to 0"),
    ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
    ({"temperature": "1"}, "temperature", "valid number"),
    ({"temperature": True}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
    ({"max_tokens": 0}, "max_tokens", "greater than 0"),
    ({"max_tokens": 1.5}, "max_tokens", "integer"),
    ({"max_tokens": 10**30}, "max_tokens", "max_tokens: "),
    ({"seed": 2**63}, "seed", "less than"),
    ({"stop": ""}, "stop", "at least 1"),
    ({"stop": ["a"] * 5}, "stop", "at most 4"),
    ({"stop": "x" * 65}, "stop", "at most 64"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"stream_options": {"surprise": 1}}, "stream_options", "not permitted"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": CHAT["messages"] * 129}, "messages", "at most 128"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages", "messages.0.content: Field required"),
    ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages", "messages.0.name"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "messages.0.content"),
    ({"messages": None}, "messages", "messages: Field required"),
    ({"model": 5}, "model", "model: .*string"),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD, ids=lambda value: str(value)[:40])
def test_refusals_name_the_field(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert caught.value.code in ("invalid_value", "unsupported_parameter")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"5", "must be a JSON object"),
        (b'{"model": "m", "temperature": NaN}', "not JSON"),
        (b'{"model": "m", "temperature": 1e999}', "temperature"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_refusals_of_whole_bodies(data: bytes, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        parse(ChatBody, data)


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("a", ["a"]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_one_prompt_or_several(given: Any, prompts: Any) -> None:
    assert parse(CompletionBody, json.dumps({"model": "m", "prompt": given}).encode()).prompts == prompts
    assert parse(EmbeddingBody, json.dumps({"model": "m", "input": given}).encode()).inputs == prompts


@pytest.mark.parametrize("given", [[["a"]], [1, "a"], [[1], "a"], [[]], ["a"] * 17, {"a": 1}, None, [1.5]])
def test_prompts_that_are_none(given: Any) -> None:
    with pytest.raises(RequestError, match="prompt"):
        parse(CompletionBody, json.dumps({"model": "m", "prompt": given}).encode())


def test_what_logprobs_ask_for() -> None:
    assert chat().likeliest is None
    assert chat(logprobs=True).likeliest == 0
    assert chat(logprobs=True, top_logprobs=4).likeliest == 4
    assert chat(logprobs=False, top_logprobs=0).likeliest is None
    assert parse(CompletionBody, b'{"model": "m", "prompt": "a", "logprobs": 2}').likeliest == 2
    assert parse(CompletionBody, b'{"model": "m", "prompt": "a"}').likeliest is None


def test_adapter_bodies() -> None:
    assert not parse(AdapterBody, b'{"name": "a"}').replace
    for wrong in (b'{"name": "a", "path": "/x"}', b'{"name": 5}', b"{}"):
        with pytest.raises(RequestError):
            parse(AdapterBody, wrong)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*ChatBody.model_fields, *NEUTRAL, "x"]), JSON, max_size=6), JSON)
@settings(max_examples=200, deadline=None)
def test_any_json_is_a_body_or_a_refusal(fields: dict[str, Any], content: Any) -> None:
    data = json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]} | fields).encode()
    found: ChatBody | RequestError
    try:
        found = parse(ChatBody, data)
    except RequestError as error:
        found = error
    if isinstance(found, RequestError):
        assert found.code in ("invalid_value", "unsupported_parameter")
        assert len(str(found)) < 600
    else:
        assert 1 <= found.n <= 4
        assert 0 <= found.temperature <= 2
