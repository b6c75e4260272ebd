"""What a packed base is worth: every way to make one at 2.25 to 4.25 bits, before and after a LoRA is trained on it.

SmolLM2 on WikiText-2 (`valid` to train and calibrate, its last tenth held out of both to choose the learning rate,
`test` to judge) and on GSM8K's answers, MiniLM on SST-2 and MRPC (SmolLM2's own weights come from a 4-bit grid,
MiniLM's do not). ``base_grid.plan`` has the rows. The grid takes days: bases are kept below --work, cells in
bench/results/cells with commit and settings, a run goes on where the last one stopped, the 2-bit column first, and the
JSON says what has not been run, and which row it calls ours (widths of their own; one width with --quick). ``--row``,
``--bits``, ``--steps`` and ``--seed`` measure a part of it. ``--quick`` is three rows at 2 bits and one seed: 8 steps
after 8 of refining in place of 120 after 120, bases of one round and one sweep on 16 sequences in place of 128, one
learning rate, 8 judged sequences of 64, no row without granted steps; ``--smoke`` random models.
``--report`` only reads the cells, ``--verify N`` measures N of them anew.

Folders: --smollm2, --minilm, --shared, --work (or BITLOFT_SMOLLM2, BITLOFT_MINILM, BITLOFT_SHARED, BITLOFT_GRID).
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT)]

import harness  # noqa: E402
from base_grid.peers import available  # noqa: E402
from base_grid.plan import Effort, effort_of  # noqa: E402
from base_grid.summary import figures, show  # noqa: E402
from base_grid.tasks import Pairs, Task, Text, pairs_of, split_files, text_files  # noqa: E402
from base_grid.work import Work  # noqa: E402

from bitloft.integrations.record import load_tokenizer  # noqa: E402

LIMITS = {"nats_above_lora16": "<= 0.29", "loss_vs_autoround_2bit": "<= 0", "loss_225_vs_loftq_325": "<= 0"}
PAIRS = ("sst2", "mrpc", "pairs")
SAME = 1e-3  # nats by which a cell measured anew may differ: threads and load leave the last digits to chance


def main() -> int:
    given = harness.grid_arguments(parser())
    harness.begin(given)
    cells = harness.RESULTS / "cells" / f"quality_base-{given.mode}.jsonl"
    if given.mode == "smoke" or given.work is None:
        with tempfile.TemporaryDirectory() as place:
            return run(given, Path(place), harness.Cells(None if given.mode == "smoke" else cells))
    return run(given, given.work, harness.Cells(cells))


def parser() -> argparse.ArgumentParser:
    made = harness.grid_parser(__doc__)
    made.add_argument("--row", action="append", default=[], help="measure these rows only")
    made.add_argument("--bits", action="append", type=float, default=[], help="measure these columns only")
    made.add_argument("--steps", action="append", type=int, default=[], help="measure after so many steps only")
    made.add_argument("--seed", action="append", type=int, default=[], help="measure these seeds only")
    return made


def run(given: argparse.Namespace, place: Path, cells: harness.Cells) -> int:
    effort, differing, missing = effort_of(given.mode), list[str](), list[str]()
    if not given.report:
        work = opened(given, place, cells, effort)
        if given.verify:
            differing = verify(work, given.verify)
        else:
            try:
                part = effort.only(given.row, given.bits, given.steps, given.seed)
            except ValueError as error:
                print(error, file=sys.stderr)
                return 2
            measure(work, part, given.hours)
    planned = list(effort.cells())
    missing = sorted({f"{c.row.name} {c.bits} {c.task}" for c in planned if cells.find(c.key) is None})
    show(cells, effort)
    shape = {"cells": sum(1 for _ in cells), "planned": len(planned), "steps": effort.steps, "refine": effort.refine}
    found: dict[str, Any] = figures(cells, effort) | {"limits": LIMITS, "not_run": missing}
    harness.finish("quality_base", given, shape, found | ({"differing": differing} if given.verify else {}))
    return 1 if differing else 0


def measure(work: Work, part: Effort, hours: float) -> None:
    """Every cell of a part that is missing, in the order of the plan, until the hours are over."""
    began = time.monotonic()
    for cell in part.cells():
        if cell.row.maker not in ("none", "bitloft") and not available(cell.row.maker):
            continue
        if cell.task not in work.models or time.monotonic() - began > 3600 * hours:
            continue
        before, after = work.before(cell.row, cell.bits, cell.task), work.cell(cell)
        print(f"{cell.key}: {before['loss']:.4f} -> {after['loss']:.4f} nats, rate {after['rate']:g}", flush=True)


def verify(work: Work, count: int) -> list[str]:
    """Names of the trained cells, of ``count`` drawn ones, whose loss is not what it was."""
    kept, anew = work.cells, Work(**{**vars(work), "cells": harness.Cells(None)})
    finished = [cell for cell in work.effort.cells() if kept.find(cell.key) is not None]
    differing = []
    for cell in random.Random(0).sample(finished, min(count, len(finished))):
        was, now = (found.cell(cell)["loss"] for found in (work, anew))
        print(f"{cell.key}: {was:.4f}, now {now:.4f}", flush=True)
        if abs(was - now) > SAME:
            differing.append(str(cell.key))
    return differing


def opened(given: argparse.Namespace, place: Path, cells: harness.Cells, effort: Effort) -> Work:
    """The grid's workplace: models, calibration texts and tasks by name; toys for --smoke."""
    if given.mode == "smoke":
        from base_grid.toys import toys

        models, texts, files, pairs = toys(place)
    else:
        files = text_files(place, given.shared)
        pairs = {task: pairs_of(given.shared, task) for task in PAIRS[:2]} if given.minilm else {}
        models = dict.fromkeys(files, given.smollm2) | dict.fromkeys(pairs, given.minilm)
        texts = dict.fromkeys(files, files["wikitext2"]["train"])
        texts |= {task: sentences(place, task, rows["train"]) for task, rows in pairs.items()}

    def task(name: str) -> Task:
        tokenizer = load_tokenizer(models[name])
        if name in PAIRS:
            return Pairs(tokenizer, pairs[name], 8 * effort.batch)
        return Text(tokenizer, files[name], effort.batch, effort.length, effort.judged, effort.held)

    return Work(place, effort, cells, models, texts, task)


def sentences(place: Path, task: str, rows: Sequence[tuple[str, str | None, int]]) -> Path:
    """The calibration text of an encoder: its training sentences."""
    text = "\n".join(part for row in rows for part in row[:2] if part)
    return split_files(place / "data", task, ".txt", text, "", "")["train"]


if __name__ == "__main__":
    sys.exit(main())
