"""What compressed adapters keep of their gain: real adapters, every method, many sizes; error, loss, retained gain.

Adapters are trained on packed bases (NF4 and 2 bits) of SmolLM2 and of MiniLM, packed by every method and judged by the
loss on held-out rows. The grid takes hours: bases and adapters are kept below --work, cells in bench/results/cells, and
a run goes on where the last one stopped, the figures' own cells first; the JSON says what has not been run. ``--quick``
is one adapter (NF4, GSM8K, r16, 40 steps); ``--smoke`` a random two-layer model. ``--report`` only reads the cells,
``--verify N`` measures N of them anew. A base that exists goes in as NAME=DIR.

Folders: --smollm2, --minilm, --shared, --work (or BITLOFT_SMOLLM2, BITLOFT_MINILM, BITLOFT_SHARED, BITLOFT_GRID).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT)]

import harness  # noqa: E402
from adapter_grid import public  # noqa: E402
from adapter_grid.decoder import Decoder  # noqa: E402
from adapter_grid.encoder import Encoder  # noqa: E402
from adapter_grid.plan import (  # noqa: E402
    BASES,
    ENCODER_TASKS,
    OURS,
    PLAIN,
    RANK,
    SAME,
    THEIRS,
    Setting,
    Way,
    settings,
    steps,
    ways,
)
from adapter_grid.summary import starts, summary  # noqa: E402
from adapter_grid.tasks import SPLITS  # noqa: E402
from adapter_grid.work import Family, Work  # noqa: E402

LIMITS = {
    "error_vs_loraquant_same_bits": "<= 0.25",
    "bits_for_loraquant_gain": "<= 0.25",
    "retained_gain_050": ">= 0.97",
    "retained_gain_080": ">= 0.985",
    "added_nats_050": "<= 0.03",
}
JOINT_RANKS = (4, 16)


def main() -> int:
    given = arguments()
    harness.begin(given)
    cells_file = harness.RESULTS / "cells" / f"quality_adapter-{given.mode}.jsonl"
    if given.mode == "smoke" or given.work is None:
        with tempfile.TemporaryDirectory() as place:
            kept = None if given.mode == "smoke" else cells_file
            return run(given, opened(given, Path(place), harness.Cells(kept)))
    return run(given, opened(given, given.work, harness.Cells(cells_file)))


def arguments() -> argparse.Namespace:
    parser = harness.grid_parser(__doc__)
    parser.add_argument("--bases", default=",".join(BASES), help="formats to quantize to, or NAME=DIR, by commas")
    return harness.grid_arguments(parser)


def opened(given: argparse.Namespace, place: Path, cells: harness.Cells) -> Work:
    """The grid's workplace; models are opened when their first cell is measured."""
    families: dict[str, Family] = {}

    def family(task: str) -> Family:
        kind = "encoder" if task in ENCODER_TASKS else "decoder"
        if kind not in families:
            families[kind] = (
                Encoder(place, given.shared, given.minilm)
                if kind == "encoder"
                else Decoder(place, given.shared, toy(place) if given.mode == "smoke" else given.smollm2)
            )
        return families[kind]

    named = dict(text.split("=", 1) for text in given.bases.split(",") if "=" in text)
    return Work(place, cells, family, {name: Path(path) for name, path in named.items()}, toy_rank(given.mode))


def toy(place: Path) -> Path:
    from tests.helpers import tiny_llama

    (place / "model").mkdir()
    return tiny_llama(place / "model")


def toy_rank(mode: str) -> int:
    return 4 if mode == "smoke" else 16


def run(given: argparse.Namespace, work: Work) -> int:
    bases = tuple(text.split("=", 1)[0] for text in given.bases.split(","))
    planned = settings(given.mode, bases)
    if given.minilm is None and not given.report:
        planned = [setting for setting in planned if setting.task not in ENCODER_TASKS]
    if not given.report:
        if given.mode != "smoke":
            public.measure(work.cells, given.shared / "adapters", ways(given.mode))
        measure(work, planned, given.mode, time.monotonic() + 3600 * given.hours)
    judged = [s for s in planned if s.start == "frozen" and s.base in bases and s.task not in ENCODER_TASKS]
    frame = summary(work.cells, [s for s in judged if s.rank == RANK or given.mode == "smoke"])
    result: dict[str, Any] = {
        **frame,
        "limits": LIMITS,
        "encoders": summary(work.cells, [s for s in planned if s.task in ENCODER_TASKS])["bases"],
        "other_ranks": {
            str(rank): summary(work.cells, [s for s in judged if s.rank == rank])["bases"]
            for rank in sorted({s.rank for s in judged} - {RANK})
        },
        "starts": starts(work.cells, compared(planned)),
        "public": public.public(work.cells),
        "splits": {task: SPLITS[task] for task in dict.fromkeys(s.task for s in planned)},
        "verified": verify(work, planned, given) if given.verify else None,
    }
    show(frame["bases"])
    shape = {
        "adapters": len(planned),
        "rank": RANK,
        "steps": planned[0].effort.steps,
        "judged_rows": planned[0].effort.rows,
        "cells": sum(1 for _ in work.cells),
    }
    harness.finish("quality_adapter", given, shape, result)
    return 0


def compared(planned: Sequence[Setting]) -> list[Setting]:
    """Adapters over frozen and trained starts of the same bases."""
    trained = [s for s in planned if s.start == "trainable"]
    return [s for s in planned if replace(s, start="trainable") in trained]


def measure(work: Work, planned: Sequence[Setting], mode: str, deadline: float) -> None:
    """Every cell that is missing, until the time is over."""
    for setting, way in steps(mode, planned):
        if time.monotonic() > deadline:
            return
        if way.method == THEIRS:
            say(setting, work.alone(setting))
            say(setting, work.full(setting))
        say(setting, work.packed(setting, way))
        if way.method == THEIRS:
            same_bits(work, setting, way)
    for setting in planned:
        control(work, setting, mode)
    for seeds in groupby(planned, key=lambda s: replace(s, seed=0)):
        together = list(seeds[1])
        for rank in JOINT_RANKS if len(together) > 1 else ():
            for one, cell in zip(together, work.joint(together, rank), strict=True):
                say(one, cell)


def same_bits(work: Work, setting: Setting, theirs: Way) -> None:
    """The product error at the bits that LoRAQuant took, in the plain norm and solved for it."""
    bits = round(work.packed(setting, theirs)["true_bits"], 4)
    say(setting, work.packed(setting, Way(PLAIN, SAME, {"bits": bits}), judged=False))


def control(work: Work, setting: Setting, mode: str) -> None:
    """How much of a gain is a smaller norm: the whole adapter shrunk until its error is that of half a bit."""
    size = 4.0 if mode == "smoke" else 0.5
    cell = work.cells.find(work.key(setting, Way(OURS, size)))
    if cell is not None and 0 < cell.get("error", 0) < 1:
        settings = {"method": "shrink", "quality": cell["error"]}
        say(setting, work.packed(setting, Way("shrink", f"as far off as {size}", settings)))


def verify(work: Work, planned: Sequence[Setting], given: argparse.Namespace) -> dict[str, Any]:
    """Cells spread over the finished ones, measured anew: how far they are from what was kept."""
    found = [(s, w, c) for s in planned for w in ways(given.mode) if (c := work.cells.find(work.key(s, w)))]
    found = [entry for entry in found if "loss" in entry[2]]
    chosen = found[:: max(len(found) // given.verify, 1)][: given.verify]
    apart = {"loss": 0.0, "error": 0.0, "true_bits": 0.0}
    for setting, way, cell in chosen:
        again = work.measured(setting, way, judged=True)
        apart = {name: max(most, abs(again[name] - cell[name])) for name, most in apart.items()}
    return {"cells": len(chosen), "largest_difference": apart}


def say(setting: Setting, cell: dict[str, Any]) -> None:
    name = f"{setting.name}: {cell['key']['method']} {cell['key']['asked']}"
    if "skipped" in cell:
        print(f"{name}: skipped, {cell['skipped']}", flush=True)
        return
    loss = f", loss {cell['loss']:.4f}" if "loss" in cell else ""
    print(f"{name}: {cell['true_bits']:.3f} true bits, error {cell['error']:.4f}{loss}", flush=True)


def show(bases: dict[str, Any]) -> None:
    for base, figures in bases.items():
        print(f"\n{base}: {len(figures['adapters'])} adapters")
        names = ("method", "asked", "true_bits", "error", "retained_gain")
        rows = sorted(figures["methods"], key=lambda row: (row["true_bits"] is None, row["true_bits"]))
        harness.table(names, [[row[name] for name in names] for row in rows])


if __name__ == "__main__":
    sys.exit(main())
