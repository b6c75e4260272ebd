"""The figures that the bench is judged by, from the cells that exist; a figure without its cells is None.

    retained gain = (base - packed) / (base - full), losses in nats per token, summed over adapters before dividing

An adapter whose gain is under five standard errors (of both losses, taken as independent) is left out by name.
"""

import math
from collections.abc import Sequence

from adapter_grid.cells import Cell, Cells
from adapter_grid.work import Setting

OURS, THEIRS = "waterfill", "loraquant 2@0.8"
STEADY = 5.0  # standard errors


def summary(cells: Cells, settings: Sequence[Setting]) -> dict[str, object]:
    """Figures per base over the adapters of ``settings`` (rank 16 in the full grid)."""
    found: dict[str, object] = {}
    for base in sorted({s.base for s in settings}):
        chosen: list[Setting] = []
        weak: list[Setting] = []
        for setting in (s for s in settings if s.base == base):
            (chosen if _steady(cells, setting) else weak).append(setting)
        found[base] = _figures(cells, chosen) | {"left_out": [s.name for s in weak]}
    return found


def _figures(cells: Cells, settings: Sequence[Setting]) -> dict[str, object]:
    ratios = [ratio for s in settings if (ratio := _error_ratio(cells, s)) is not None]
    curve = _curve(cells, settings)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
    theirs = _gain(cells, settings, THEIRS, "")
    worst = _worst(cells, settings)
    return {
        "adapters": [s.name for s in settings],
        "error_vs_loraquant_same_bits": _rounded(mean),
        "loraquant_gain": _rounded(theirs),
        "bits_for_loraquant_gain": _rounded(_bits_for(curve, theirs)),
        "retained_gain": {str(bits): _rounded(gain) for bits, gain in curve},
        "retained_gain_050": _rounded(dict(curve).get(0.5)),
        "retained_gain_080": _rounded(dict(curve).get(0.8)),
        "added_nats_050": _rounded(max((nats for nats, _ in worst), default=None)),
        "worst_adapter_050": max(worst)[1] if worst else None,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _steady(cells: Cells, setting: Setting) -> bool:
    base, full = _reference(cells, setting)
    if base is None or full is None or base["stderr"] is None or full["stderr"] is None:
        return False
    return bool(base["loss"] - full["loss"] > STEADY * math.hypot(base["stderr"], full["stderr"]))


def _reference(cells: Cells, setting: Setting) -> tuple[Cell | None, Cell | None]:
    keys = (Setting(setting.base, setting.task, 0, 0).cell("base", ""), setting.cell("full", ""))
    first, second = (cells.get(key) if key in cells else None for key in keys)
    return first, second


def _losses(cells: Cells, setting: Setting, method: str, asked: object) -> tuple[float, float, float] | None:
    """Losses of the base, the packed and the whole adapter."""
    cell, (base, full) = setting.cell(method, asked), _reference(cells, setting)
    if cell not in cells or base is None or full is None or "loss" not in cells.get(cell):
        return None
    return base["loss"], cells.get(cell)["loss"], full["loss"]


def _gain(cells: Cells, settings: Sequence[Setting], method: str, asked: object) -> float | None:
    losses = [_losses(cells, setting, method, asked) for setting in settings]
    known = [found for found in losses if found is not None]
    if not known or len(known) < len(losses):
        return None
    return sum(base - packed for base, packed, _ in known) / sum(base - full for base, _, full in known)


def _curve(cells: Cells, settings: Sequence[Setting]) -> list[tuple[float, float]]:
    sizes = sorted({c["asked"] for c in cells if c["method"] == OURS and isinstance(c["asked"], float)})
    return [(size, gain) for size in sizes if (gain := _gain(cells, settings, OURS, size)) is not None]


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


def _error_ratio(cells: Cells, setting: Setting) -> float | None:
    ours, theirs = setting.cell(OURS, "loraquant's bits"), setting.cell(THEIRS, "")
    if ours not in cells or theirs not in cells or "error" not in cells.get(ours):
        return None
    return float(cells.get(ours)["error"] / cells.get(theirs)["error"])


def _worst(cells: Cells, settings: Sequence[Setting]) -> list[tuple[float, str]]:
    losses = [(_losses(cells, setting, OURS, 0.5), setting.name) for setting in settings]
    return [(packed - full, name) for found, name in losses if found is not None for _, packed, full in [found]]
