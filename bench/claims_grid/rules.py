"""Holds, ties or fails: the rules of claims.toml on paired series of values."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

HOLDS, TIES, FAILS, MISSING = "holds", "ties", "fails", "not measured"
Pairs = dict[str, float]  # what pairs a value with another row's: a seed, a matrix, a sequence
Series = Callable[[str, str, str], Pairs | None]  # (model, row, metric) -> values; None where nothing was measured


@dataclass(frozen=True)
class Verdict:
    """What became of a part: its mean difference (or value) and standard error over ``pairs``."""

    part: Mapping[str, Any]
    outcome: str
    value: float | None = None
    stderr: float | None = None
    pairs: int = 0
    rows: Mapping[str, float] = field(default_factory=dict)


def decide(part: Mapping[str, Any], series: Series) -> Verdict:
    """One part. ``rows`` of the verdict are the means of the rows that it names."""
    kind, model, metric = part["kind"], part["model"], part["metric"]
    if kind == "within":
        found = series(model, part["row"], metric)
        if not found:
            return Verdict(part, MISSING)
        value, (low, high) = mean(list(found.values())), part["margin"]
        return Verdict(part, HOLDS if low <= value <= high else FAILS, value, None, 1, {part["row"]: value})
    sides = [_side(part[name], model, metric, series) for name in ("high", "low")]
    if sides[0] is None or sides[1] is None:
        return Verdict(part, MISSING)
    shared = [key for key in sides[0] if key in sides[1]]
    if not shared:
        return Verdict(part, MISSING)
    differences = [sides[0][key] - sides[1][key] for key in shared]
    rows = {row: mean(list(found.values())) for row in _names(part) if (found := series(model, row, metric))}
    if kind == "every":
        outcome = HOLDS if all(d > 0 for d in differences) else FAILS
        return Verdict(part, outcome, min(differences), None, len(shared), rows)
    value, stderr = mean(differences), stderr_of(differences)
    if stderr is None:  # one pair has no spread: nothing is decided
        return Verdict(part, MISSING, value, None, len(shared), rows)
    return Verdict(
        part, _outcome(kind, value, 2 * stderr, float(part.get("margin", 0.0))), value, stderr, len(shared), rows
    )


def _outcome(kind: str, value: float, twice: float, margin: float) -> str:
    if kind == "greater":
        if value - twice > 0 and value >= margin:
            return HOLDS
        return FAILS if value + twice < margin else TIES
    if kind == "not_worse":
        return HOLDS if value - twice > -margin else FAILS if value + twice < -margin else TIES
    if kind == "equal":
        return HOLDS if abs(value) + twice <= margin else FAILS if abs(value) - twice > margin else TIES
    raise ValueError(f"unknown kind {kind!r}")


def of_claim(verdicts: Sequence[Verdict]) -> str:
    """A claim fails where a part fails, holds where all hold; one that was not measured leaves it undecided."""
    outcomes = [verdict.outcome for verdict in verdicts]
    for outcome in (FAILS, MISSING, TIES):
        if outcome in outcomes:
            return outcome
    return HOLDS


def _names(part: Mapping[str, Any]) -> list[str]:
    sides = (part["high"], part["low"])
    return [name for side in sides for name in ([side] if isinstance(side, str) else side)]


def _side(side: str | list[str], model: str, metric: str, series: Series) -> Pairs | None:
    if isinstance(side, str):
        return series(model, side, metric)
    found = [series(model, name, metric) for name in side]
    if found[0] is None or found[1] is None:
        return None
    return {key: found[0][key] - found[1][key] for key in found[0] if key in found[1]}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def stderr_of(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for one value."""
    if len(values) < 2:
        return None
    middle = mean(values)
    return math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1) / len(values))
