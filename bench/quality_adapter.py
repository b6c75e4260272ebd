"""What compressed adapters keep of their gain: real adapters, every method, many sizes; error, loss, retained gain.

Adapters are trained on packed bases (NF4 and 2 bits) of SmolLM2, then packed by every method and judged by the loss on
held-out rows. The grid takes hours: bases, adapters and finished cells are kept below --work and a run goes on where
the last one stopped. One task and three seeds come first; the JSON says what has not been run. Encoder tasks (SST-2,
MRPC) are not part of this version. `--quick` is one task, seed and rank; `--smoke` a random two-layer model.

    python bench/quality_adapter.py --model MODEL_DIR --shared SHARED_DIR --work DIR [--hours H]
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT)]

from adapter_grid.cells import Cells  # noqa: E402
from adapter_grid.summary import THEIRS, summary  # noqa: E402
from adapter_grid.tasks import SPLITS  # noqa: E402
from adapter_grid.work import LOOSE, Setting, Work  # noqa: E402

SIZES = (0.2, 0.3, 0.5, 0.8, 1.2, 1.85, 2.8)
BASES = ("nf4:64", "lm2:64")
TASKS = ("gsm8k", "reference", "mbpp", "xsum")
LIMITS = {
    "error_vs_loraquant_same_bits": "<= 0.25",
    "bits_for_loraquant_gain": "<= 0.25",
    "retained_gain_050": ">= 0.97",
    "retained_gain_080": ">= 0.985",
    "added_nats_050": "<= 0.03",
}
TRAIN = {"steps": 300, "batch": 4, "length": 512, "lr": 5e-4}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", dest="mode", action="store_const", const="smoke")
    parser.add_argument("--quick", dest="mode", action="store_const", const="quick")
    parser.add_argument("--model", type=Path, help="a transformers folder of SmolLM2-135M-Instruct")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="the shared data folder")
    parser.add_argument("--work", type=Path, help="where bases, adapters and cells are kept")
    parser.add_argument("--hours", type=float, default=1e6, help="begin no cell after so many hours")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    mode = given.mode or "full"
    torch.set_num_threads(given.threads)
    if mode == "smoke":
        with tempfile.TemporaryDirectory() as place:
            return run(mode, smoke(Path(place)), given.hours, given.threads)
    if given.model is None or given.work is None:
        parser.error("--model and --work are needed")
    cells = Cells(given.work / "cells.jsonl")
    return run(mode, Work(given.work, given.model, given.shared, cells, 16, TRAIN, {}), given.hours, given.threads)


def smoke(place: Path) -> Work:
    from tests.helpers import tiny_llama

    (place / "model").mkdir()
    training = {"steps": 2, "batch": 2, "length": 32, "lr": 1e-2}
    return Work(place, tiny_llama(place / "model"), place, Cells(place / "cells.jsonl"), 4, training, {"length": 32})


def plan(mode: str) -> list[Setting]:
    """Adapters in the order in which they are worth having: one task with three seeds, then tasks, then ranks."""
    if mode == "smoke":
        return [Setting("nf4:64", "words", 8, 0)]
    if mode == "quick":
        return [Setting("lm2:64", "reference", 16, 0)]
    first = [Setting(base, "gsm8k", 16, seed) for seed in range(3) for base in BASES]
    tasks = [Setting(base, task, 16, seed) for task in TASKS for seed in range(3) for base in BASES]
    ranks = [Setting(base, task, rank, 0) for rank in (8, 64) for task in TASKS for base in BASES]
    return list(dict.fromkeys([*first, *tasks, *ranks]))


def ways(mode: str) -> Iterator[tuple[str, object, dict[str, Any]]]:
    """(method, asked, settings of compress) in order of importance."""
    yield THEIRS, "", {"method": "loraquant", "high": 2, "ratio": 0.8}
    sizes = (3.0, 4.0) if mode == "smoke" else SIZES
    yield from (("waterfill", size, {"bits": size}) for size in sizes)
    yield "loraquant 3@0.9", "", {"method": "loraquant", "high": 3, "ratio": 0.9}
    yield from (("truncate 16", rank, {"method": "truncate", "rank": rank}) for rank in (1, 2))
    yield from (("truncate 8", rank, {"method": "truncate", "rank": rank, "width": 8}) for rank in (1, 2, 4))
    if mode == "smoke":
        yield LOOSE[1], "", {}
        return
    yield "waterfill unrefined", 0.5, {"bits": 0.5, "refine": False}
    yield "sign", "", {"method": "sign"}
    yield from (("rtn", high, {"method": "rtn", "high": high}) for high in (2, 3))
    yield from (("gptq", high, {"method": "gptq", "high": high}) for high in (2, 3))
    yield from ((f"loraquant by {by}", "", {"method": "loraquant", "split": by}) for by in ("norm", "random"))
    yield "loraquant unrefined", "", {"method": "loraquant", "refine": False}
    yield from ((method, "", {}) for method in LOOSE)


def run(mode: str, work: Work, hours: float, threads: int) -> int:
    began, missing = time.monotonic(), []
    settings = plan(mode)
    for setting in settings:
        if time.monotonic() - began > 3600 * hours:
            missing.append(setting.name)
            continue
        work.reference(setting)
        for method, asked, options in ways(mode):
            show(work.packed(setting, method, asked, options))
        published = work.packed(setting, THEIRS, "", {})
        same = work.packed(setting, "waterfill", "loraquant's bits", {"bits": round(published["true_bits"], 4)})
        imitated = work.packed(setting, "waterfill", 4.0 if mode == "smoke" else 0.5, {})
        if 0 < imitated.get("error", 0) < 1:
            show(
                work.packed(setting, "shrink", "waterfill's error", {"method": "shrink", "quality": imitated["error"]})
            )
        show(same)
    judged = [s for s in settings if s.rank == 16 or mode == "smoke"]
    result = {
        "bench": "quality_adapter",
        "mode": mode,
        "shape": {"adapters": len(settings), "cells": sum(1 for _ in work.cells)},
        "threads": threads,
        "splits": {s.task: SPLITS[s.task] for s in settings},
        "bases": summary(work.cells, judged),
        "limits": LIMITS,
        "not_run": missing,
    }
    print(json.dumps(result))
    return 0


def show(cell: dict[str, Any]) -> None:
    name = "{task} {base} r{rank} s{seed}: {method} {asked}".format(**cell)
    if "skipped" in cell:
        print(f"{name}: skipped, {cell['skipped']}", flush=True)
    else:
        print(
            f"{name}: {cell['true_bits']:.3f} true bits, error {cell['error']:.4f}, loss {cell['loss']:.4f}", flush=True
        )


if __name__ == "__main__":
    sys.exit(main())
