"""The verdicts as JSON, as a terminal's table and as the tables of docs/benchmarks.md."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import harness

from claims_grid.rules import FAILS, HOLDS, MISSING, TIES, Series, decide, of_claim

BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"


def figures(table: Mapping[str, Any], series: Series) -> dict[str, Any]:
    """Every claim's outcome with its parts, and how many hold, tie, fail and were not measured."""
    claims = [_judged(claim, series) for claim in table["claims"]]
    outcome = {name: [c["number"] for c in claims if c["outcome"] == name] for name in (HOLDS, TIES, FAILS, MISSING)}
    return {
        "decided": len(outcome[HOLDS]) + len(outcome[FAILS]),
        "holds": len(outcome[HOLDS]),
        "ties": len(outcome[TIES]),
        "fails": len(outcome[FAILS]),
        "not_measured": outcome[MISSING],
        "claims": claims,
        "shows": [_judged(claim, series) for claim in table["shows"]],
    }


def _judged(claim: Mapping[str, Any], series: Series) -> dict[str, Any]:
    verdicts = [decide(part, series) for part in claim["parts"]]
    parts = [
        {
            "asks": asked(verdict.part),
            "outcome": verdict.outcome,
            "value": _rounded(verdict.value),
            "stderr": _rounded(verdict.stderr),
            "pairs": verdict.pairs,
            "rows": {name: _rounded(value) for name, value in verdict.rows.items()},
        }
        for verdict in verdicts
    ]
    return {"number": claim["number"], "says": claim["says"], "outcome": of_claim(verdicts), "parts": parts}


def asked(part: Mapping[str, Any]) -> str:
    """A part in words."""
    where = f"{part['model']}, {part['metric']}"
    if part["kind"] == "within":
        low, high = part["margin"]
        return f"{where}: {part['row']} in [{low:g}, {high:g}]"
    sides = [side if isinstance(side, str) else f"({side[0]}) - ({side[1]})" for side in (part["high"], part["low"])]
    margin = part.get("margin", 0.0)
    signs = {"greater": ">", "every": "> on every one:", "not_worse": ">=", "equal": "="}
    return f"{where}: {sides[0]} {signs[part['kind']]} {sides[1]}" + (f", margin {margin:g}" if margin else "")


def show(found: Mapping[str, Any]) -> None:
    columns = ("claim", "outcome", "part", "d", "se", "pairs", "part's outcome")
    harness.table(columns, [row for claim in [*found["claims"], *found["shows"]] for row in _rows(claim)])


def _rows(claim: Mapping[str, Any]) -> list[list[object]]:
    return [
        [
            claim["number"] if i == 0 else "",
            claim["outcome"] if i == 0 else "",
            part["asks"],
            "-" if part["value"] is None else part["value"],
            "-" if part["stderr"] is None else part["stderr"],
            part["pairs"],
            part["outcome"],
        ]
        for i, part in enumerate(claim["parts"])
    ]


def explained(note: str, figure: Callable[[str, str, str], float | None]) -> str:
    """A note with {model: row|figure} filled in from the cells; "?" where there is no such figure."""

    def value(match: re.Match[str]) -> str:
        known = figure(match[1], match[2], match[3])
        return "?" if known is None else f"{known:.4g}"

    return re.sub(r"\{(\w+): ([^|}]+)\|(\w+)\}", value, note)


def page(found: Mapping[str, Any], cells: int, notes: Mapping[str, str]) -> str:
    """Markdown between the markers; ``notes`` are said of claims that do not hold."""
    counts = ", ".join(
        f"{found[name]} {word}" for name, word in (("holds", "hold"), ("ties", "tie"), ("fails", "fail"))
    )
    missing = found["not_measured"]
    counts += f"; not measured: {', '.join(map(str, missing))}" if missing else ""
    lines = [f"{found['decided']} of {len(found['claims'])} claims decided: {counts} ({cells} cells).", ""]
    lines += ["| claim | | part | difference | pairs | |", "|---|---|---|---:|---:|---|"]
    for claim in [*found["claims"], *found["shows"]]:
        lines.append(f"| {claim['number']} | **{claim['outcome']}** | {claim['says']} | | | |")
        lines += [
            f"| | | {part['asks']} | {_value(part)} | {part['pairs']} | {part['outcome']} |" for part in claim["parts"]
        ]
    said = [c for c in found["claims"] if c["outcome"] in (FAILS, TIES) and str(c["number"]) in notes]
    lines += ["", *(f"- **{claim['number']}** {notes[str(claim['number'])]}" for claim in said)] if said else []
    return "\n".join(lines)


def _value(part: Mapping[str, Any]) -> str:
    if part["value"] is None:
        return ""
    return f"{part['value']:.4g}" + (f" ± {part['stderr']:.2g}" if part["stderr"] is not None else "")


def put(file: Path, text: str) -> None:
    """Replace what stands between the markers. Raises ValueError where they are missing."""
    whole = file.read_text(encoding="utf-8")
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{file} has no {BEGIN} and {END}")
    file.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
