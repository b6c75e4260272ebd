"""The 18 claims of LoftQ and LoRAQuant, and what MiniLM must show: numbers, and holds, ties or fails.

bench/claims.toml says of each claim which model, metric, margin and rule decide it; it was committed before the first
run. Cells are kept in bench/results/cells/claims-*.jsonl, one trained model or one probe each; a run goes on where the
last one stopped. ``--report`` only reads them, ``--verify N`` measures N of them anew, ``--write`` puts the tables
between the markers of docs/benchmarks.md (nobody edits them by hand). ``--quick`` is the claims that need no
training and two seeds of g2p; ``--smoke`` runs three claims on random models. ``decided`` counts claims that hold or
fail, never those that tie or whose cells are missing: ``not_measured`` names them.

Folders: --smollm2, --minilm, --shared, --work (or BITLOFT_SMOLLM2, BITLOFT_MINILM, BITLOFT_SHARED, BITLOFT_GRID).
"""

import argparse
import os
import random
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT)]

import harness  # noqa: E402
from claims_grid.page import explained, figures, page, put, show  # noqa: E402
from claims_grid.probes import PROBES  # noqa: E402
from claims_grid.work import Table, Work, about  # noqa: E402

from bitloft.options.recipe import recipe_of  # noqa: E402

CLAIMS, NOTES = ROOT / "bench" / "claims.toml", ROOT / "bench" / "claims_notes.toml"
PAGE = ROOT / "docs" / "benchmarks.md"
SAME = 2e-3  # by which a number measured anew may differ: threads and load leave the last digits to chance
Step = tuple[dict[str, Any], Callable[[], dict[str, Any]]]


def main() -> int:
    parser = harness.grid_parser(__doc__)
    parser.add_argument(
        "--only",
        default="",
        help="models and probes to measure, by commas, in stages by semicolons; NAME@N takes N seeds (default: all)",
    )
    parser.add_argument("--skip", default="", help="rows to leave out, by commas")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/benchmarks.md")
    given = harness.grid_arguments(parser)
    harness.begin(given)
    with tempfile.TemporaryDirectory() as place:
        if given.mode == "smoke":
            return run(given, *toy(Path(place)), harness.Cells(None), Path(place) / "work")
        for name in ("smollm2", "minilm", "shared"):
            folder = getattr(given, name)
            os.environ[f"BITLOFT_{name.upper()}"] = str(folder.resolve()) if folder else "absent"
        table = tomllib.loads(filled(CLAIMS.read_text(encoding="utf-8")))
        cells = harness.Cells(harness.RESULTS / "cells" / f"claims-{given.mode}.jsonl")
        return run(given, table, given.mode, cells, given.work or Path(place))


def filled(text: str) -> str:
    for name in ("SMOLLM2", "MINILM", "SHARED"):
        text = text.replace(f"${{BITLOFT_{name}}}", os.environ[f"BITLOFT_{name}"])
    return text


def run(given: argparse.Namespace, table: dict[str, Any], mode: str, cells: harness.Cells, place: Path) -> int:
    recipes = {name: recipe_of(entry, name) for name, entry in table["recipes"].items()}
    if mode == "quick":
        recipes = {"g2p": replace(recipes["g2p"], seeds=(0, 1))}
    work, differing = Work(place, cells, recipes), list[str]()
    stages = given.only.split(";") if given.only else [",".join([*recipes, *PROBES])]
    skipped = given.skip.split(",")
    found_steps = (step for stage in stages for step in planned(work, stage.split(",")))
    steps = [(key, make) for key, make in found_steps if key["row"] not in skipped]
    if not given.report:
        if given.verify:
            differing = verify(work, steps, given.verify)
        else:
            measure(work, steps, given.hours)
    found = figures(table, Table(cells).series)
    show(found)
    if given.write:
        notes = tomllib.loads(NOTES.read_text(encoding="utf-8"))["notes"]
        figure = Table(cells).figure
        put(PAGE, page(found, sum(1 for _ in cells), {n: explained(text, figure) for n, text in notes.items()}))
    shape = {
        "cells": sum(1 for _ in cells),
        "planned": len(steps),
        "seeds": {n: len(r.seeds) for n, r in recipes.items()},
    }
    keys = ("decided", "holds", "ties", "fails", "not_measured", "shows", "claims")
    result = {key: found[key] for key in keys}
    harness.finish("claims", given, shape, result | ({"differing": differing} if given.verify else {}))
    return 1 if differing else 0


def planned(work: Work, stage: list[str]) -> Iterator[Step]:
    """Every cell's key and how it is measured: all models seed by seed, then the probes, which use their adapters."""
    seeds = {name.partition("@")[0]: int(name.partition("@")[2] or 1000) for name in stage}
    names = list(seeds)
    trained: list[tuple[int, int, dict[str, Any], Callable[[], dict[str, Any]]]] = [
        (seed, order, key, partial(work.measure, name, row, seed))
        for order, name in enumerate(names)
        if name in work.recipes
        for key, row, seed in work.trained(name)
        if seed in work.recipes[name].seeds[: seeds[name]]
    ]
    for _, _, key, make in sorted(trained, key=lambda entry: entry[:2]):
        yield key, make
    for name in names:
        if name in PROBES:
            for row, seed, probe in PROBES[name](work):
                if seed >= seeds[name]:
                    continue
                yield {"model": name, "row": row, "seed": seed}, partial(_probed, probe)


def _probed(probe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return {"metrics": probe()} | about()


def measure(work: Work, steps: list[Step], hours: float) -> None:
    began = time.monotonic()
    for key, make in steps:
        if time.monotonic() - began > 3600 * hours:
            return
        if work.cells.find(key) is not None:
            continue
        started = time.perf_counter()
        cell = work.cells.get(key, make)
        shown = {name: value for name, value in cell["metrics"].items() if not isinstance(value, dict)}
        print(f"{key['model']} {key['row']} {key['seed']}: {shown} {time.perf_counter() - started:.0f} s", flush=True)


def verify(work: Work, steps: list[Step], count: int) -> list[str]:
    """Names of the cells, of ``count`` drawn ones, whose numbers are not what they were."""
    finished = [(key, make, cell) for key, make in steps if (cell := work.cells.find(key)) is not None]
    differing = []
    for key, make, cell in random.Random(0).sample(finished, min(count, len(finished))):
        again = make()["metrics"]
        apart = max(_apart(cell["metrics"][name], again[name]) for name in again)
        print(f"{key}: apart by {apart:.2g}", flush=True)
        if apart > SAME:
            differing.append(str(key))
    return differing


def _apart(one: Any, other: Any) -> float:
    if isinstance(one, dict):
        return max(_apart(one[key], other[key]) for key in one)
    return abs(float(one) - float(other)) / max(1.0, abs(float(one)))


def toy(place: Path) -> tuple[dict[str, Any], str]:
    """Three claims on a random encoder-decoder of two layers and a made-up dictionary."""
    from tests.task_models import tiny_words

    (place / "model").mkdir()
    model = tiny_words(place / "model", 80)
    table = tomllib.loads(CLAIMS.read_text(encoding="utf-8"))
    kept = ("float", "lora", "qlora nf2", "loftq nf2")
    recipe = table["recipes"]["g2p"] | {"model": str(model), "data": str(model), "seeds": [0, 1], "test_rows": 6}
    recipe |= {"train_rows": 40, "train": {"steps": 2, "batch": 4, "lr": 1e-3}}
    recipe["rows"] = [row | {"rank": 2} for row in recipe["rows"] if row["name"] in kept]
    claims = [claim for claim in table["claims"] if claim["number"] in (10, 12, 15)]
    return {"recipes": {"g2p": recipe}, "claims": claims, "shows": []}, "smoke"


if __name__ == "__main__":
    sys.exit(main())
