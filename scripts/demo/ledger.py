"""Steps that are kept: each records what it was asked, what it found and how long it took, and is run once.

A step's key is a hash of everything that its result follows from (settings, fingerprints of what it reads, bitloft's
version). Run again with the same key, and its outputs still there, the step is read instead of run.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import bitloft
from bitloft.report import write

Result = dict[str, Any]


class Ledger:
    """The record of a demo directory: ``steps/NAME.json`` each."""

    def __init__(self, directory: Path, say: Callable[[str], None] = print) -> None:
        self.directory, self.say = directory, say
        self.seconds: dict[str, float] = {}
        self.kept: list[str] = []

    def step(
        self,
        name: str,
        doing: str,
        depends: Mapping[str, Any],
        run: Callable[[], Result],
        tell: Callable[[Result], str],
        outputs: Sequence[Path] = (),
    ) -> Result:
        """The result of ``run()``, which must be plain JSON, or the recorded one; says what is done and found."""
        key = self._key(name, depends)
        self.say(f"\n{len(self.seconds) + 1}. {doing}")
        record = self._read(name)
        if record is None or record["key"] != key or not all(path.exists() for path in outputs):
            began = time.perf_counter()
            result = json.loads(json.dumps(run()))
            record = {"key": key, "seconds": round(time.perf_counter() - began, 1), "result": result}
            write(self._file(name), json.dumps(record, indent=1, sort_keys=True))
            note = f"{record['seconds']:.1f} s"
        else:
            self.kept.append(name)
            note = f"kept from an earlier run, where it took {record['seconds']:.1f} s"
        self.seconds[name] = float(record["seconds"])
        self.say(f"   {tell(record['result'])} ({note})")
        return dict(record["result"])

    def _key(self, name: str, depends: Mapping[str, Any]) -> str:
        what = {"step": name, "depends": depends, "bitloft": bitloft.__version__}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def _file(self, name: str) -> Path:
        return self.directory / "steps" / f"{name}.json"

    def _read(self, name: str) -> Result | None:
        try:
            record = json.loads(self._file(name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return record if {"key", "seconds", "result"} <= set(record) else None
