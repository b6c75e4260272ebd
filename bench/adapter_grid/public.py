"""Adapters that others trained and published, of whose bases none is at hand: product error at equal true bits only."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import harness

from adapter_grid.loose import LOOSE, loose
from adapter_grid.plan import PLAIN, SAME, THEIRS, Way, code_key
from bitloft.adapters import WEIGHTS_FILE, read_adapter
from bitloft.compress import compress
from bitloft.errors import OptionError


def measure(cells: harness.Cells, folder: Path, ways: Iterable[Way]) -> None:
    """Every way that needs no base, for every adapter below ``folder``, and ours at the bits that LoRAQuant took."""
    chosen = [way for way in ways if not way.moments]
    for source in sorted(file.parent for file in folder.glob(f"*/{WEIGHTS_FILE}")):
        for way in chosen:
            cell = _cell(cells, source, way)
            if way.method == THEIRS:
                _cell(cells, source, Way(PLAIN, SAME, {"bits": round(cell["true_bits"], 4)}))


def public(cells: harness.Cells) -> dict[str, dict[str, Any]]:
    """By adapter: the ratio of errors at LoRAQuant's bits, and true bits and error of every way that has a cell."""
    rows: dict[str, dict[tuple[str, object], dict[str, Any]]] = {}
    for cell in cells:
        current = cell["key"].items() >= code_key(cell["key"]["method"]).items()
        if "public" in cell["key"] and "error" in cell and current:
            method = cell["key"]["method"], cell["key"]["asked"]
            rows.setdefault(cell["key"]["public"], {})[method] = cell
    return {
        name: {
            "error_vs_loraquant_same_bits": _ratio(found.get((PLAIN, SAME)), found.get((THEIRS, ""))),
            "methods": [
                {"method": method, "asked": asked, "true_bits": round(cell["true_bits"], 4), "error": cell["error"]}
                for (method, asked), cell in found.items()
            ],
        }
        for name, found in rows.items()
    }


def _ratio(ours: dict[str, Any] | None, theirs: dict[str, Any] | None) -> float | None:
    return None if ours is None or theirs is None else round(ours["error"] / theirs["error"], 4)


def _cell(cells: harness.Cells, source: Path, way: Way) -> dict[str, Any]:
    key = {"public": source.name, "method": way.method, "asked": way.asked, "judged": False} | code_key(way.method)
    return cells.get(key, lambda: _measured(source, way) | {"settings": way.settings, "commit": harness.commit()})


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
