"""Rows of a data file: JSON lines of three kinds, or plain text.

A ``.jsonl`` file holds one JSON object a line, each of one kind (kinds may be mixed):

* ``{"text": ...}``: a document, every token is a target;
* ``{"prompt": ..., "completion": ...}``: the completion is the target;
* ``{"messages": [{"role": ..., "content": ...}, ...]}``: the assistant's turns are the target.

A ``.txt`` file is one document. Lines end at "\\n" only: ``str.splitlines`` would also break at U+2028, which real
texts hold. A bad row raises DataError with file and line; skipping it, as loaders often do, would train on other data
than was asked for. Keys beside the kind's own are not used: they are counted, and the caller prints them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitloft.errors import DataError

KINDS = {"text": ("text",), "prompt": ("prompt", "completion"), "messages": ("messages",)}
ROLES = ("system", "developer", "user", "assistant")
EXPECTED = (
    'expected a JSON object with "text", with "prompt" and "completion", or with "messages" '
    '(a list of {"role", "content"})'
)


@dataclass(frozen=True)
class Row:
    """One row and where it stands; ``kind`` is text, prompt or messages and says which fields are filled."""

    file: str
    line: int
    kind: str
    text: str = ""
    prompt: str = ""
    completion: str = ""
    messages: tuple[dict[str, str], ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        return f"{self.file}, line {self.line}"


def read_rows(file: str | Path) -> list[Row]:
    """Every row of a ``.jsonl`` or ``.txt`` file, in order.

    Raises DataError for a file that is absent, empty, of another kind or not UTF-8, and for the first empty or
    malformed row, naming its line and what was expected.
    """
    path = Path(file)
    if path.suffix not in (".jsonl", ".txt"):
        raise DataError(f"{path} is not a data file that bitloft reads: use .jsonl (rows) or .txt (plain text).")
    if not path.is_file():
        raise DataError(f"there is no data file {path}.")
    rows = [_document(path)] if path.suffix == ".txt" else list(_json_rows(path))
    if not rows:
        raise DataError(f"{path} holds no rows; {EXPECTED} on each line.")
    return rows


def _document(path: Path) -> Row:
    text = _decoded(path.read_bytes(), str(path), 1)
    if not text.strip():
        raise DataError(f"{path} holds no text.")
    return Row(str(path), 1, "text", text=text)


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:  # bytes: a binary file is split at b"\n" and nowhere else
        for number, line in enumerate(lines, start=1):
            yield _row(_decoded(line, str(path), number), str(path), number)


def _decoded(data: bytes, file: str, line: int) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += data[: error.start].count(b"\n")
        raise DataError(f"{file}, line {line}: not UTF-8 (byte {error.start}); save the file as UTF-8.") from None


def _row(line: str, file: str, number: int) -> Row:
    where = f"{file}, line {number}"
    if not line.strip():
        raise DataError(f"{where}: empty row; {EXPECTED}.")
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); {EXPECTED}.") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: found a JSON {type(value).__name__}; {EXPECTED}.")
    kind = _kind(value, where)
    unused = tuple(sorted(set(value) - set(KINDS[kind])))
    if kind == "messages":
        return Row(file, number, kind, messages=_messages(value["messages"], where), unused=unused)
    fields: dict[str, Any] = {key: _string(value[key], f'"{key}"', where) for key in KINDS[kind]}
    return replace(Row(file, number, kind, unused=unused), **fields)


def _kind(value: dict[str, Any], where: str) -> str:
    """The one kind whose keys are there; DataError for none, half of one, or two."""
    started = [kind for kind, keys in KINDS.items() if any(key in value for key in keys)]
    if len(started) > 1:
        raise DataError(f"{where}: keys of more than one kind of row ({', '.join(sorted(value))}); {EXPECTED}.")
    if not started:
        raise DataError(f"{where}: found keys {', '.join(sorted(value)) or '(none)'}; {EXPECTED}.")
    missing = [key for key in KINDS[started[0]] if key not in value]
    if missing:
        raise DataError(f'{where}: "{missing[0]}" is missing; {EXPECTED}.')
    return started[0]


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is a {type(value).__name__}; expected a string.")
    if not value.strip():
        raise DataError(f"{where}: {name} is empty; expected text.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: {name} holds half of a surrogate pair, which is not text; mend the row.") from None
    return value


def _messages(value: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f'{where}: "messages" must be a list of at least one {{"role", "content"}}.')
    found = tuple(_message(message, f"message {i}", where) for i, message in enumerate(value, start=1))
    if found[0]["role"] == "assistant":
        raise DataError(f"{where}: the first message is the assistant's; begin with the user's (or a system message).")
    if not any(message["role"] == "assistant" for message in found):
        raise DataError(f'{where}: no message has the role "assistant", so there is nothing to learn from.')
    return found


def _message(value: Any, name: str, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or set(value) != {"role", "content"}:
        found = ", ".join(sorted(map(str, value))) if isinstance(value, dict) else type(value).__name__
        raise DataError(f'{where}: {name} must hold exactly "role" and "content", found {found or "nothing"}.')
    if value["role"] not in ROLES:
        raise DataError(f"{where}: {name} has the role {value['role']!r}; use one of {', '.join(ROLES)}.")
    if value["role"] == "system" and value["content"] == "":  # means: without the template's own system prompt
        return {"role": "system", "content": ""}
    return {"role": value["role"], "content": _string(value["content"], f"the content of {name}", where)}
