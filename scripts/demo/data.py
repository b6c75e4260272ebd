"""Two skills' training and held-out text, from what every Python installation carries; nothing is downloaded.

* reference: the language reference as `pydoc` ships it (`pydoc_data.topics`), one document per topic; whole topics are
  held out. Topics repeat each other's paragraphs, so a paragraph of a held-out topic is cut from the training text.
* docstrings: functions of the standard library with their docstring's first paragraph, as chat rows (the function in,
  the paragraph out); whole top-level packages are held out, and what a held-out row repeats is cut from training.

What is held out follows from a hash of its name, so it is the same everywhere; the texts follow the Python version.
"""

import ast
import hashlib
import json
import pydoc_data.topics
import re
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bitloft.report import write

HELD_OUT = 5  # one name in so many is held out
SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "site-packages",
    "dist-packages",
    "pydoc_data",
    "ensurepip",
}
PROMPT = "Write the docstring of this Python function.\n\n```python\n{source}\n```"
SOURCE_CHARACTERS = (60, 500)  # of a function, its docstring left out
DOCSTRING_CHARACTERS = (25, 250)
HELD_CHARACTERS = 2500  # of a held-out topic: its beginning, so that one long topic does not decide the mean

Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """Rows of one skill, and how many were cut from training since a held-out row repeats them."""

    train: list[Row]
    held: list[Row]
    cut: int


def reference() -> Split:
    """Rows {"text": topic}: of held-out topics the beginning. All their paragraphs are cut from the others."""
    topics = {name: text.strip() for name, text in sorted(pydoc_data.topics.topics.items())}
    held = {name: text for name, text in topics.items() if is_held_out(name)}
    known = {fold(paragraph) for text in held.values() for paragraph in paragraphs(text)}
    train, cut = {}, 0
    for name in topics.keys() - held.keys():
        kept = [paragraph for paragraph in paragraphs(topics[name]) if fold(paragraph) not in known]
        cut += len(paragraphs(topics[name])) - len(kept)
        if kept:
            train[name] = "\n\n".join(kept)
    return Split(
        [{"text": text} for _, text in by_digest(train)],
        [{"text": beginning(text)} for _, text in by_digest(held)],
        cut,
    )


def docstrings() -> Split:
    """Rows {"messages": [user: function, assistant: its docstring's first paragraph]}."""
    found: dict[bool, dict[str, Row]] = {True: {}, False: {}}
    for package, source, text in functions():
        row = {
            "messages": [
                {"role": "user", "content": PROMPT.format(source=source)},
                {"role": "assistant", "content": text},
            ]
        }
        found[is_held_out(package)].setdefault(fold(text), row)
    train = {text: row for text, row in found[False].items() if text not in found[True]}
    rows, held = ([row for _, row in by_digest(side)] for side in (train, found[True]))
    return Split(rows, held, len(found[False]) - len(train))


SKILLS = {"reference": reference, "docstrings": docstrings}


def prepare(skill: str, directory: Path) -> dict[str, Any]:
    """Write train.jsonl and held.jsonl of one skill; counts and sha256 sums."""
    split = SKILLS[skill]()
    found: dict[str, Any] = {"cut": split.cut}
    for name, rows in (("train", split.train), ("held", split.held)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write(directory / f"{name}.jsonl", text)
        found[name] = {"rows": len(rows), "characters": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return found


def functions() -> Iterator[tuple[str, str, str]]:
    """(top-level package, source without docstring, first paragraph of the docstring) over the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if SKIPPED.intersection(parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):
            continue  # lib2to3's and test files' broken examples, where a distribution keeps them elsewhere
        lines = text.split("\n")
        for node in defined(tree.body):
            if pair := without_docstring(node, lines):
                yield parts[0], *pair


def defined(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Functions and methods, not those inside functions: a tenth of the time of a walk over every node."""
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from defined(node.body)


def without_docstring(node: ast.FunctionDef, lines: list[str]) -> tuple[str, str] | None:
    """(source, first paragraph) of a function whose docstring stands on lines of its own, else None."""
    docstring = ast.get_docstring(node)
    if docstring is None or len(node.body) < 2:
        return None
    first = node.body[0]
    paragraph = " ".join(paragraphs(docstring)[0].split()) if docstring.strip() else ""
    if first.lineno == node.lineno or ">>>" in paragraph or not within(paragraph, DOCSTRING_CHARACTERS):
        return None
    body = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno or first.lineno : node.end_lineno]
    source = "\n".join(line[node.col_offset :].rstrip() for line in body if line.strip())
    return (source, paragraph) if within(source, SOURCE_CHARACTERS) else None


def within(text: str, span: tuple[int, int]) -> bool:
    return span[0] <= len(text) <= span[1]


def beginning(text: str) -> str:
    """The paragraphs that fit into HELD_CHARACTERS, the first in any case."""
    kept: list[str] = []
    used = 0
    for paragraph in paragraphs(text):
        if kept and used + len(paragraph) > HELD_CHARACTERS:
            break
        kept.append(paragraph)
        used += len(paragraph)
    return "\n\n".join(kept)


def by_digest(rows: Mapping[str, T]) -> list[tuple[str, T]]:
    """In an order that mixes the names and is the same everywhere."""
    return sorted(rows.items(), key=lambda item: digest(item[0]))


def paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def fold(text: str) -> str:
    """Words alone, in lower case: what two copies of a paragraph share."""
    return " ".join(re.findall(r"\w+", text.lower()))


def is_held_out(name: str) -> bool:
    return int(digest(name), 16) % HELD_OUT == 0


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
