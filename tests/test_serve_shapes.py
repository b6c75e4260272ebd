"""Answers in the OpenAI shape."""

import ast
import base64
import json
import math
import struct
from pathlib import Path

import pytest

import bitloft.serve
from bitloft.serve.requests import RequestError, TokenLogprob
from bitloft.serve.shapes import (
    NEVER,
    STATUS,
    Shape,
    classes,
    embeddings,
    error_response,
    frame,
    model_card,
)


def test_every_code_that_is_raised_has_a_status() -> None:
    raised = set()
    for file in Path(bitloft.serve.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("RequestError", "self._fail"):
                raised |= {a.value for a in node.args[:2] if isinstance(a, ast.Constant) and " " not in str(a.value)}
    assert len(raised) > 8
    assert raised <= set(STATUS)


@pytest.mark.parametrize("code", STATUS)
def test_error_bodies(code: str) -> None:
    response = error_response(RequestError(code, "words", "field"))
    error = json.loads(bytes(response.body))["error"]
    assert error == {"message": "words", "type": STATUS[code][1], "param": "field", "code": code}
    assert response.status_code == STATUS[code][0]
    assert ("retry-after" in response.headers) == (response.status_code in (429, 503))
    assert ("www-authenticate" in response.headers) == (response.status_code == 401)


def test_a_frame_is_one_line() -> None:
    text = frame(Shape("1", "m", chat=True).piece("two\nlines\r\u2028é", None))
    assert text.endswith("\n\n")
    assert text.startswith("data: {")
    assert "\n" not in text[:-2]
    assert "\r" not in text
    assert json.loads(text[6:])["choices"][0]["delta"] == {"content": "two\nlines\r\u2028é"}


def test_pieces_of_a_chat_and_of_a_text() -> None:
    chat, text = Shape("1", "m", chat=True), Shape("1", "m", chat=False)
    assert chat.piece("", None, first=True)["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chat.piece("", "stop")["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert text.piece("a", None, index=2)["choices"][0] == {
        "index": 2, "text": "a", "logprobs": None, "finish_reason": None
    }  # fmt: skip
    assert "usage" not in text.piece("a", None)
    assert text.piece("a", None, usage=True)["usage"] is None
    assert chat.usage({"total_tokens": 3})["choices"] == []
    whole = chat.whole([chat.choice(0, "a", "stop")], {})
    assert whole["choices"][0]["message"]["content"] == "a"
    assert text.whole([text.choice(0, "a", "stop")], {})["object"] == "text_completion"


LOGPROBS = (
    TokenLogprob(5, "a", -0.5, ((5, "a", -0.5), (6, "b", -1.5))),
    TokenLogprob(7, "\ufffd", -math.inf, ()),
)


def test_logprobs_are_json_and_tell_bytes_only_where_they_are_known() -> None:
    told = Shape("1", "m", chat=True).choice(0, "a", "stop", LOGPROBS)["logprobs"]
    first, second = told["content"]
    assert (first["token"], first["logprob"], first["bytes"]) == ("a", -0.5, [97])
    assert [one["token"] for one in first["top_logprobs"]] == ["a", "b"]
    assert (second["logprob"], second["bytes"]) == (NEVER, None)
    frame(told)  # no infinity, which JSON has not
    text = Shape("1", "m", chat=False).choice(0, "a", "stop", LOGPROBS)["logprobs"]
    assert text["tokens"] == ["a", "\ufffd"]
    assert text["token_logprobs"] == [-0.5, NEVER]
    assert text["top_logprobs"] == [{"a": -0.5, "b": -1.5}, {}]
    assert text["text_offset"] == [0, 1]


def test_a_time_to_wait_is_whole_seconds_and_at_least_one() -> None:
    for given, told in ((0.01, "1"), (1.2, "2"), (None, "1"), (30.0, "30")):
        assert error_response(RequestError("queue_full", "full", retry_after=given)).headers["retry-after"] == told


def test_vectors() -> None:
    found = embeddings("m", [[0.5, -1.0]], 3, packed=False)
    assert found["data"] == [{"object": "embedding", "index": 0, "embedding": [0.5, -1.0]}]
    assert found["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    packed = embeddings("m", [[0.5, -1.0]], 3, packed=True)["data"][0]["embedding"]
    assert struct.unpack("<2f", base64.b64decode(packed)) == (0.5, -1.0)


def test_classes() -> None:
    found = classes("7", "m", ("no", "yes"), [[0.2, 0.8], [0.9, 0.1]], 6)
    assert [one["label"] for one in found["data"]] == ["yes", "no"]
    assert found["data"][0]["probs"] == [0.2, 0.8]
    assert found["usage"]["total_tokens"] == 6


def test_model_cards_have_parents_and_no_paths() -> None:
    assert model_card("base", "base", 5)["parent"] is None
    assert model_card("a", "base", 5) == {
        "id": "a", "object": "model", "created": 5, "owned_by": "bitloft", "root": "a", "parent": "base"
    }  # fmt: skip
