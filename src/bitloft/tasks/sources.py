"""Rows of a task's data set: from local files, or from the hub through ``datasets`` (extra ``eval``).

A task is asked for its ``train`` or its ``test`` rows; which published split that is, ``Source`` says (GLUE's test
labels are secret, so its validation rows judge). A local folder holds one file a split, ``train.jsonl``, ``.tsv``,
``.csv`` or ``.json`` (a list); a single file stands for the split that was asked for. Columns are the hub's; where a
published file names one otherwise (MRPC's ``#1 String``), ``aliases`` has it. Lines end at "\\n" only.
"""

import ast
import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bitloft.errors import DataError, OptionError

SPLITS = ("train", "test")
ENDINGS = (".jsonl", ".tsv", ".csv", ".json")
Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where a data set lies. ``splits`` names the hub's split for ours, ``files`` the stems that a local file may have.

    ``lists`` are columns that hold a list or an object; in a file it may be written as text. ``columns`` of a train
    split may be fewer in the test split's files and the other way round: both must have all of them.
    """

    columns: tuple[str, ...]
    hub: str
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    files: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"train": ("train",), "test": ("test",)})
    aliases: Mapping[str, str] = field(default_factory=dict)
    lists: tuple[str, ...] = ()


def read_source(
    source: Source, where: str | Path | None, split: str, *, limit: int | None = None, name: str = "task"
) -> list[Row]:
    """The first ``limit`` rows of a split, in order, each with ``source.columns``.

    ``where`` is a folder or a file; None loads from the hub. Raises DataError in one sentence that says which file is
    wanted and with which columns; OptionError where the hub is asked and ``datasets`` is not installed.
    """
    if split not in SPLITS:
        raise OptionError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}.")
    if where is None:
        return _hub_rows(source, split, limit, name)
    file = _file(source, Path(where), split, name)
    rows = list(_named(_parsed(file), source))[:limit]
    if not rows:
        raise DataError(f"{file} holds no rows; {_wanted(source, name)}.")
    missing = [column for column in source.columns if column not in rows[0]]
    if missing:
        raise DataError(f"{file} has no column {', '.join(map(repr, missing))}; {_wanted(source, name)}.")
    return [_typed(row, source, file) for row in rows]


def _wanted(source: Source, name: str) -> str:
    return f"{name} wants the columns {', '.join(source.columns)}"


def _file(source: Source, where: Path, split: str, name: str) -> Path:
    if where.is_file():
        return where
    stems = source.files[split]
    found = [where / f"{stem}{ending}" for stem in stems for ending in ENDINGS if (where / f"{stem}{ending}").is_file()]
    if not found:
        first = " or ".join(f"{stem}.jsonl" for stem in stems)
        raise DataError(
            f"there is no {split} data of {name} at {where}: put {first} there (or .tsv, .csv, .json) with the columns "
            f"{', '.join(source.columns)}, or leave the path out to load {source.hub} from the hub."
        )
    return found[0]


def _parsed(file: Path) -> list[Row]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        elif file.suffix == ".json":
            rows = json.loads(text)
        else:
            mark = "\t" if file.suffix == ".tsv" else ","
            rows = list(csv.DictReader(text.split("\n"), delimiter=mark, quoting=_quoting(file)))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read as {file.suffix[1:]} ({error}); save it anew.") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file} does not hold a list of objects, one a row.")
    return rows


def _quoting(file: Path) -> Literal[0, 3]:
    """GLUE's tsv files hold quotation marks that quote nothing."""
    return csv.QUOTE_NONE if file.suffix == ".tsv" else csv.QUOTE_MINIMAL


def _named(rows: Iterable[Row], source: Source) -> Iterable[Row]:
    for row in rows:
        yield {source.aliases.get(key, key): value for key, value in row.items()}


def _typed(row: Row, source: Source, file: Path) -> Row:
    for column in source.columns:
        if row.get(column) is None:
            raise DataError(f"{file} has a row without {column!r}; fill it or drop the row.")
    for column in source.lists:
        value = row.get(column)
        if isinstance(value, str):
            try:
                row[column] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                raise DataError(f"{file} has a {column!r} that is no list: {value[:60]!r}.") from None
    return row


def _hub_rows(source: Source, split: str, limit: int | None, name: str) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise OptionError(
            f"loading {source.hub} from the hub needs the package datasets (bitloft[eval]); install it, or give a "
            f"local folder: {_wanted(source, name)}."
        ) from None
    try:
        found = datasets.load_dataset(source.hub, source.config, split=source.splits[split])
    except Exception as error:  # datasets raises whatever the network, the hub or a parser raised
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source.hub} cannot be loaded from the hub ({first}); give a local folder with {source.files[split][0]}"
            f".jsonl: {_wanted(source, name)}."
        ) from error
    rows = found if limit is None else found.select(range(min(limit, len(found))))
    return [_typed(row, source, Path(source.hub)) for row in _named((dict(row) for row in rows), source)]


def held_out(rows: Sequence[Row], share: float = 0.1) -> tuple[list[Row], list[Row]]:
    """(to train on, to choose settings by): the last ``share`` of the rows. Raises DataError for under two."""
    if len(rows) < 2:
        raise DataError("the training data is one row; give two or more, since some are held out.")
    cut = len(rows) - max(int(share * len(rows)), 1)
    return list(rows[:cut]), list(rows[cut:])
