"""Finished cells of the grid, one JSON object a line: a run that was killed goes on where it stopped."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Cell = dict[str, Any]
KEY = ("base", "task", "rank", "seed", "method", "asked")


class Cells:
    """Cells by key, appended to ``file`` as they come. A line that was cut by a kill is dropped."""

    def __init__(self, file: Path) -> None:
        self.file, self._found = file, {key_of(cell): cell for cell in read(file)}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(cell) + "\n" for cell in self._found.values()), encoding="utf-8")

    def __iter__(self) -> Iterator[Cell]:
        return iter(self._found.values())

    def __contains__(self, cell: Cell) -> bool:
        return key_of(cell) in self._found

    def add(self, cell: Cell) -> Cell:
        self._found[key_of(cell)] = cell
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(cell) + "\n")
        return cell

    def get(self, cell: Cell) -> Cell:
        return self._found[key_of(cell)]


def key_of(cell: Cell) -> tuple[str, ...]:
    return tuple(str(cell[name]) for name in KEY)


def read(file: Path) -> Iterator[Cell]:
    for line in file.read_text(encoding="utf-8").split("\n") if file.is_file() else ():
        try:
            cell = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(cell, dict) and set(KEY) <= set(cell):
            yield cell
