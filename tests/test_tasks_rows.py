"""tasks/rows.py: every kind of row is read, and every bad one is refused with its line."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitloft.errors import DataError
from bitloft.tasks.rows import Row, read_rows
from tests.helpers import write_rows

TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]


def write(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_three_kinds_may_be_mixed(tmp_path: Path) -> None:
    file = write_rows(
        tmp_path / "rows.jsonl",
        [{"text": "one"}, {"prompt": "two ?", "completion": "three", "id": 7}, {"messages": TURNS}],
    )
    text, prompt, messages = read_rows(file)
    assert (text.kind, text.text, text.line, text.unused) == ("text", "one", 1, ())
    assert (prompt.kind, prompt.prompt, prompt.completion, prompt.unused) == ("prompt", "two ?", "three", ("id",))
    assert (messages.kind, list(messages.messages)) == ("messages", TURNS)
    assert messages.where == f"{file}, line 3"


@given(texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_any_text_survives_and_lines_end_at_newline_only(
    texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    file.write_bytes("\n".join(lines).encode("utf-8"))
    assert [row.text for row in read_rows(file)] == texts


def test_line_separator_inside_a_row_is_text(tmp_path: Path) -> None:
    file = write(tmp_path, '{"text": "before\u2028after\u0085end"}', '{"text": "next"}')
    assert [row.text for row in read_rows(file)] == ["before\u2028after\u0085end", "next"]


def test_byte_order_mark_and_carriage_returns_are_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert [row.text for row in read_rows(file)] == ["one", "two"]


def test_plain_text_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("first\n\nsecond\n", encoding="utf-8")
    assert read_rows(file) == [Row(str(file), 1, "text", text="first\n\nsecond\n")]


BAD = {
    "": "line 2: empty row; expected a JSON object",
    "   ": "line 2: empty row",
    "{": "line 2: not JSON",
    "[" * 100000: "line 2: not JSON",
    "[1]": "line 2: found a JSON list; expected a JSON object",
    "null": "line 2: found a JSON NoneType",
    "{}": r"line 2: found keys \(none\)",
    '{"question": "x", "answer": "y"}': "line 2: found keys answer, question; expected",
    '{"prompt": "x"}': 'line 2: "completion" is missing',
    '{"completion": "x"}': 'line 2: "prompt" is missing',
    '{"text": "x", "prompt": "y", "completion": "z"}': "line 2: keys of more than one kind",
    '{"text": 3}': 'line 2: "text" is a int; expected a string',
    '{"text": " "}': 'line 2: "text" is empty',
    '{"prompt": "x", "completion": ""}': 'line 2: "completion" is empty',
    r'{"text": "half \ud800 pair"}': "line 2: .*surrogate pair",
    '{"messages": []}': 'line 2: "messages" must be a list of at least one',
    '{"messages": "hello"}': 'line 2: "messages" must be a list',
    '{"messages": ["hello"]}': 'line 2: message 1 must hold exactly "role" and "content", found str',
    '{"messages": [{"role": "user"}]}': "line 2: message 1 must hold exactly",
    '{"messages": [{"role": "user", "content": "x", "name": "y"}]}': "found content, name, role",
    '{"messages": [{"role": "human", "content": "x"}]}': "message 1 has the role 'human'; use one of system",
    '{"messages": [{"role": "user", "content": null}]}': "content of message 1 is a NoneType",
    '{"messages": [{"role": "user", "content": "x"}]}': 'no message has the role "assistant"',
    '{"messages": [{"role": "assistant", "content": "x"}]}': "the first message is the assistant's",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_row_is_refused_with_its_line(line: str, tmp_path: Path) -> None:
    file = write(tmp_path, '{"text": "fine"}', line, '{"text": "fine"}')
    with pytest.raises(DataError, match=BAD[line]) as caught:
        read_rows(file)
    assert "\n" not in str(caught.value)


def test_an_empty_system_message_means_no_system_prompt(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "system", "content": ""}, *TURNS]}])
    assert read_rows(file)[0].messages[0] == {"role": "system", "content": ""}


def test_not_utf8_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_rows(file)
    book = tmp_path / "book.txt"
    book.write_bytes(b"one\ntwo\n\xff")
    with pytest.raises(DataError, match="line 3: not UTF-8"):
        read_rows(book)


def test_files_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data file"):
        read_rows(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=r"use \.jsonl \(rows\) or \.txt"):
        read_rows(tmp_path / "rows.csv")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(tmp_path / "empty.jsonl")
    (tmp_path / "empty.txt").write_bytes(b" \n")
    with pytest.raises(DataError, match="holds no text"):
        read_rows(tmp_path / "empty.txt")
