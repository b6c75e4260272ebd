"""`bitloft plan` against what happened: bytes of every stage, and times of quantizing, training and packing.

The machine is measured as `bitloft plan --measure` does it, then a model that was not part of the measurement is
planned from its config alone and really quantized, trained on and packed. Bytes compared: weight files of the base,
trained adapter, packed adapter, memory of the loaded base, keys and values of a token. The solver calibrated is
measured and run too, with a made-up text (not on SmolLM2). bytes_error and time_error are the largest relative
differences. Goals: 0.01 and 0.3. Times need a machine that does nothing else.

The model: SmolLM2 where --smollm2 or BITLOFT_SMOLLM2 names it (full), else a random Llama of other widths and depth.
"""

import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import torch

from bitloft.adapters import WEIGHTS_FILE
from bitloft.checkpoint import weight_files
from bitloft.compress import compress
from bitloft.footprint import random_llama, random_text
from bitloft.integrations.loading import load
from bitloft.integrations.peft import fresh_adapter, save_adapter
from bitloft.machine import KINDS, MODELS, SMALL, measure
from bitloft.options import PlanOptions
from bitloft.plan import PlanReport, plan
from bitloft.quantize import quantize
from bitloft.tasks.lm import target_losses

SHAPES = {"full": (768, 2048, 6, 8192), "quick": (448, 1344, 5, 4096), "smoke": (96, 192, 2, 256)}
STEPS = {"full": 4, "quick": 3, "smoke": 1}
LIMITS = {"bytes_error": 0.01, "time_error": 0.3}


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--smollm2", type=Path, default=os.environ.get("BITLOFT_SMOLLM2"))
    given = parser.parse_args()
    harness.begin(given)
    small = given.mode == "smoke"
    options = PlanOptions(
        format="lm2:64", rank=8 if small else 16, adapter_rank=8 if small else 16, adapters=1, batch=2,
        length=16 if small else 256, train_steps=1, adapter_bits=4.0 if small else 0.8, played=1000,
    )  # fmt: skip
    asked = replace(options, solver="calibrated", samples=4 if small else 24, calibrate_length=32 if small else 256)
    machine = None
    for one, kinds in ((options, KINDS), (asked, ("quantize",))):
        harness.say(f"measuring with the solver {one.solver}")
        machine = measure(one, [one.format], machine, models=SMALL if small else MODELS, kinds=kinds)
    with tempfile.TemporaryDirectory() as place:
        named = given.smollm2 if given.mode == "full" and given.smollm2 else None
        model = Path(named) if named else random_llama(Path(place) / "model", *SHAPES[given.mode])
        alone = Path(place) / "config" / model.name
        alone.mkdir(parents=True)
        (alone / "config.json").write_bytes((model / "config.json").read_bytes())
        report = plan(alone, options, machine=machine)
        harness.say(f"{report.footprint.weights:,} weights quantized, trained on and packed")
        sizes, times = happened(model, Path(place), options, STEPS[given.mode])
        seconds = planned_seconds(report, machine.cores if machine else 1)
        if named is None:  # there is no text of a given length for another tokenizer
            harness.say("the same model calibrated")
            seconds["calibrated"] = plan(alone, asked, machine=machine).stage("quantize").seconds or 0.0
            times["calibrated"] = calibrated(model, Path(place) / "calibrated", asked)
    planned = {"bytes": planned_bytes(report), "seconds": seconds}
    rows = [(name, planned["bytes"][name], size, planned["bytes"][name] / size - 1) for name, size in sizes.items()]
    rows += [
        (name, planned["seconds"][name], spent, planned["seconds"][name] / spent - 1) for name, spent in times.items()
    ]
    harness.table(("what", "planned", "happened", "difference"), rows)
    errors = {name: difference for name, _, _, difference in rows}
    figures: dict[str, Any] = {
        "bytes_error": round(max(abs(errors[name]) for name in sizes), 5),
        "time_error": round(max(abs(errors[name]) for name in times), 4),
        "errors": {name: round(value, 5) for name, value in errors.items()},
        "seconds": {name: round(value, 4) for name, value in times.items()},
        "limits": LIMITS,
    }
    harness.finish("plan_accuracy", given, {"model": model.name, "weights": report.footprint.weights}, figures)
    late = given.mode != "smoke" and figures["time_error"] > LIMITS["time_error"]
    return 1 if figures["bytes_error"] > LIMITS["bytes_error"] or late else 0


def planned_bytes(report: PlanReport) -> dict[str, float]:
    found = report.footprint
    return {
        "base": float(found.base), "adapter": float(found.adapter_plain), "packed": float(found.adapter_packed),
        "loaded": float(found.loaded), "cache": float(found.cache),
    }  # fmt: skip


def planned_seconds(report: PlanReport, cores: int) -> dict[str, float]:
    """Of one step and of one adapter by one process (a plan shares adapters among the cores)."""
    found = {name: report.stage(name).seconds or 0.0 for name in ("quantize", "train", "compress")}
    return found | {"compress": found["compress"] * cores}


def happened(model: Path, place: Path, options: PlanOptions, steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes and seconds of the real thing."""
    base = place / "base"
    made = quantize(str(model), base, options.quantizing())
    loaded = load(base, arrange=False)
    memory = float(loaded.get_memory_footprint())
    with torch.no_grad():
        cache = loaded(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=True).past_key_values
    per_token = sum(tensor.nbytes for layer in cache for tensor in layer[:2]) / 4
    adapted = fresh_adapter(loaded, rank=options.adapter_rank, alpha=options.adapter_rank).train()
    step = trained(adapted, options, steps)
    (place / "adapter").mkdir()
    record: dict[str, Any] = {"base": None, "source": None, "start": "frozen"}
    save_adapter(adapted, place / "adapter", base="planned", record=record)
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    packed = compress(place / "adapter", place / "packed", bits=options.adapter_bits)
    torch.set_num_threads(usual)
    sizes = {
        "base": float(sum(file.stat().st_size for file in weight_files(base))),
        "adapter": float((place / "adapter" / WEIGHTS_FILE).stat().st_size), "packed": float(packed.bytes),
        "loaded": memory, "cache": per_token,
    }  # fmt: skip
    return sizes, {"quantize": made.seconds, "train": step, "compress": packed.seconds}


def calibrated(model: Path, base: Path, options: PlanOptions) -> float:
    """Seconds of quantizing with a text of as many tokens as were planned."""
    text = random_text(model, options.samples * (options.calibrate_length + 1))
    chosen = replace(
        options.quantizing(), calibrate=str(text), samples=options.samples, calibrate_length=options.calibrate_length
    )
    return quantize(str(model), base, chosen).seconds


def trained(adapted: Any, options: PlanOptions, steps: int) -> float:
    """The median seconds of optimizer steps on random tokens, which also gives the adapter a spectrum."""
    from time import perf_counter

    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    spent = []
    for number in range(steps + 1):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, 200, (options.batch, options.length), generator=generator)
        began = perf_counter()
        losses, _ = target_losses(adapted, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        spent.append(perf_counter() - began)
    return statistics.median(spent[1:])


if __name__ == "__main__":
    sys.exit(main())
