"""Answers in the OpenAI shape."""

import ast
import json
from pathlib import Path

import pytest

import bitloft.serve
from bitloft.serve.requests import RequestError
from bitloft.serve.shapes import STATUS, Shape, error_response, frame, model_card


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
    assert text.piece("a", None)["choices"][0]["text"] == "a"
    assert chat.usage({"total_tokens": 3})["choices"] == []
    assert chat.whole("a", "stop", {})["choices"][0]["message"]["content"] == "a"
    assert text.whole("a", "stop", {})["object"] == "text_completion"


def test_model_cards_have_parents_and_no_paths() -> None:
    assert model_card("base", "base", 5)["parent"] is None
    assert model_card("a", "base", 5) == {
        "id": "a", "object": "model", "created": 5, "owned_by": "bitloft", "root": "a", "parent": "base"
    }  # fmt: skip
