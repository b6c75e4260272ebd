"""The figures that the bench is judged by, from the cells that exist; a figure without its cells is None.

    retained gain = (base - packed) / (base - full), losses in nats per token, summed over adapters before dividing

An adapter whose gain is under five standard errors (of both losses, taken as independent) is left out by name.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import harness

from adapter_grid.plan import OURS, PLAIN, SAME, THEIRS, Setting

STEADY = 5.0  # standard errors
HALF = 0.5  # true bits of the figures that end in 050
WORST = {
    "error_vs_loraquant_same_bits": max,
    "bits_for_loraquant_gain": max,
    "retained_gain_050": min,
    "retained_gain_080": min,
    "added_nats_050": max,
}
Cell = dict[str, Any]


class Table:
    """The judged cells of some adapters by method and size."""

    def __init__(self, cells: harness.Cells, settings: Sequence[Setting]) -> None:
        self.cells = cells
        known = [s for s in settings if self.find(s, "full") and self.find(s.alone, "base")]
        self.settings = [s for s in known if self._steady(s)]
        self.left_out = [s.name for s in known if s not in self.settings]
        self.not_run = [s.name for s in settings if s not in known]

    def find(self, setting: Setting, method: str, asked: object = "", judged: bool = True) -> Cell | None:
        cell = self.cells.find(setting.key(method, asked) | {"judged": judged})
        return None if cell is None or "skipped" in cell else cell

    def losses(self, setting: Setting, method: str, asked: object = "") -> tuple[float, float, float] | None:
        """Losses of the base, the packed and the whole adapter."""
        found = [self.find(setting.alone, "base"), self.find(setting, method, asked), self.find(setting, "full")]
        if any(cell is None or "loss" not in cell for cell in found):
            return None
        base, packed, full = (float(cell["loss"]) for cell in found if cell is not None)
        return base, packed, full

    def gain(self, method: str, asked: object = "") -> float | None:
        """The share of all adapters' gain that a method keeps; None unless each has its cell."""
        known = [found for s in self.settings if (found := self.losses(s, method, asked)) is not None]
        if not known or len(known) < len(self.settings):
            return None
        return sum(base - packed for base, packed, _ in known) / sum(base - full for base, _, full in known)

    def mean(self, figure: str, method: str, asked: object = "", judged: bool = True) -> float | None:
        """The geometric mean of a figure over the adapters."""
        cells = [self.find(s, method, asked, judged) for s in self.settings]
        known = [float(cell[figure]) for cell in cells if cell is not None and cell[figure] > 0]
        return math.exp(sum(map(math.log, known)) / len(known)) if known and len(known) == len(cells) else None

    def asked(self) -> list[tuple[str, object]]:
        """Every method and size that has a judged cell."""
        mine = {s.name for s in self.settings}
        found = [c["key"] for c in self.cells if c["key"]["judged"] and c["key"]["method"] not in ("base", "full")]
        return list(dict.fromkeys((k["method"], k["asked"]) for k in found if mine and _same(k, self.settings)))

    def _steady(self, setting: Setting) -> bool:
        base, full = self.find(setting.alone, "base"), self.find(setting, "full")
        if base is None or full is None or base["stderr"] is None or full["stderr"] is None:
            return False
        return bool(base["loss"] - full["loss"] > STEADY * math.hypot(base["stderr"], full["stderr"]))


def _same(key: Mapping[str, Any], settings: Iterable[Setting]) -> bool:
    return any({**key} == {**s.key(key["method"], key["asked"]), "judged": True} for s in settings)


def summary(cells: harness.Cells, settings: Sequence[Setting]) -> dict[str, Any]:
    """The worst of the bases for each figure, and ``bases``: all figures of each (rank 16 in the full grid)."""
    bases = {
        base: _figures(Table(cells, [s for s in settings if s.base == base]))
        for base in dict.fromkeys(s.base for s in settings)
    }
    found: dict[str, Any] = {}
    for name, worst in WORST.items():
        known = [figures[name] for figures in bases.values() if figures[name] is not None]
        found[name] = worst(known) if known else None
    return found | {"bases": bases}


def _figures(table: Table) -> dict[str, Any]:
    curve, theirs = _curve(table), table.gain(THEIRS)
    added = [
        (packed - full, s.name) for s in table.settings if (f := table.losses(s, OURS, HALF)) for _, packed, full in [f]
    ]
    return {
        "adapters": [s.name for s in table.settings],
        "left_out": table.left_out,
        "not_run": table.not_run,
        "error_vs_loraquant_same_bits": _rounded(_error_ratio(table)),
        "loraquant_gain": _rounded(theirs),
        "loraquant_bits": _rounded(table.mean("true_bits", THEIRS)),
        "bits_for_loraquant_gain": _rounded(_bits_for(curve, theirs)),
        "retained_gain": {str(bits): _rounded(gain) for bits, gain in curve},
        "retained_gain_050": _rounded(dict(curve).get(HALF)),
        "retained_gain_080": _rounded(dict(curve).get(0.8)),
        "added_nats_050": _rounded(max((nats for nats, _ in added), default=None)),
        "worst_adapter_050": max(added)[1] if added else None,
        "better_than_truncation": _better(table, curve),
        "methods": [_row(table, method, asked) for method, asked in table.asked()],
    }


def _row(table: Table, method: str, asked: object) -> dict[str, Any]:
    figures = {name: _rounded(table.mean(name, method, asked)) for name in ("true_bits", "error")}
    return {"method": method, "asked": asked, **figures, "retained_gain": _rounded(table.gain(method, asked))}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _curve(table: Table) -> list[tuple[float, float]]:
    sizes = sorted(asked for method, asked in table.asked() if method == OURS and isinstance(asked, float))
    return [(size, gain) for size in sizes if (gain := table.gain(OURS, size)) is not None]


def _bits_for(curve: Sequence[tuple[float, float]], gain: float | None) -> float | None:
    """True bits where the curve reaches ``gain``, by lines between its points; its first point where that is enough."""
    if gain is None or not curve:
        return None
    previous: tuple[float, float] | None = None
    for bits, reached in curve:
        if reached >= gain:
            if previous is None:
                return bits
            share = (gain - previous[1]) / (reached - previous[1])
            return previous[0] + share * (bits - previous[0])
        previous = (bits, reached)
    return None


def _error_ratio(table: Table) -> float | None:
    """Plain product errors at the bits that LoRAQuant took, the geometric mean of ours over theirs."""
    ours, theirs = table.mean("error", PLAIN, SAME, judged=False), table.mean("error", THEIRS)
    return ours / theirs if ours is not None and theirs is not None else None


def _better(table: Table, curve: Sequence[tuple[float, float]]) -> dict[str, bool]:
    """For every rank truncation: whether our largest size that takes no more bits keeps more."""
    found = {}
    for method, asked in table.asked():
        bits, gain = table.mean("true_bits", method, asked), table.gain(method, asked)
        if method.startswith("truncate") and bits is not None and gain is not None:
            ours = [kept for size, kept in curve if size <= bits]
            found[f"{method} rank {asked}"] = bool(ours) and ours[-1] > gain
    return found


def starts(cells: harness.Cells, settings: Sequence[Setting]) -> dict[str, dict[str, dict[str, float]]]:
    """Losses of adapters over a frozen start and of trained starts: base -> start -> size -> nats."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    table = Table(cells, settings)
    for setting in settings:
        losses = {"whole": table.find(setting, "full")}
        losses |= {str(key["asked"]): table.find(setting, OURS, key["asked"]) for key in _sizes(cells)}
        known = {size: round(cell["loss"], 4) for size, cell in losses.items() if cell is not None}
        if known:
            found.setdefault(setting.base, {})[setting.start] = known
    return found


def _sizes(cells: harness.Cells) -> list[Mapping[str, Any]]:
    keys = [cell["key"] for cell in cells if cell["key"]["method"] == OURS and cell["key"]["judged"]]
    return sorted({key["asked"]: key for key in keys}.values(), key=lambda key: key["asked"])
