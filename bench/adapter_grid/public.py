"""Adapters that others trained and published, of whose bases none is at hand: product error at equal true bits only."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import harness

from adapter_grid.loose import LOOSE, loose
from adapter_grid.plan import PLAIN, SAME, THEIRS, Way
from bitloft.adapters import WEIGHTS_FILE, read_adapter
from bitloft.compress import compress
from bitloft.errors import OptionError


def public(cells: harness.Cells, folder: Path, ways: Iterable[Way]) -> dict[str, dict[str, Any]]:
    """By adapter: the ratio of errors at LoRAQuant's bits, and true bits and error of every way that needs no base."""
    chosen = [way for way in ways if not way.moments]
    found = {}
    for source in sorted(file.parent for file in folder.glob(f"*/{WEIGHTS_FILE}")):
        rows = [_cell(cells, source, way) for way in chosen]
        theirs = next(row for way, row in zip(chosen, rows, strict=True) if way.method == THEIRS)
        same = _cell(cells, source, Way(PLAIN, SAME, {"bits": round(theirs["true_bits"], 4)}))
        found[source.name] = {
            "error_vs_loraquant_same_bits": round(same["error"] / theirs["error"], 4),
            "methods": [
                {k: row[k] for k in ("method", "asked", "true_bits", "error")} for row in rows if "error" in row
            ],
        }
    return found


def _cell(cells: harness.Cells, source: Path, way: Way) -> dict[str, Any]:
    key = {"public": source.name, "method": way.method, "asked": way.asked, "judged": False}
    cell = cells.get(key, lambda: _measured(source, way) | {"settings": way.settings, "commit": harness.commit()})
    return {**cell, **cell["key"]}


def _measured(source: Path, way: Way) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "packed"
        if way.method in LOOSE:
            return loose(source, out, way, read_adapter(source).values)
        try:
            report = compress(source, out, **way.settings)
        except OptionError as error:
            return {"skipped": str(error)}
        return {"true_bits": report.true_bits, "payload_bits": report.payload_bits, "error": report.error}
