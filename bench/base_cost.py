"""What each stage of making a base costs, per million weights, and how that grows with a model's width and depth.

Random Llama models: a small one, one of twice its depth, one of twice its width. Stages of a 2-bit base with a start of
rank 16 (`loftq`; of the calibrated solver `gather`, `solve` and `advance`; `gradients` for --fisher; of refining
`teacher` and `refine`, and `refine codes`) in seconds of one run, per million packed weights; and the peak of resident
memory over what the process had before, per run: loftq, calibrated, calibrated with fisher, refined. A stage that
holds one block at a time has the same peak at any depth.

The last line of stdout is one JSON object: ``seconds_per_million`` and ``mib_per_million`` of the wide model,
``seconds_with_width`` and ``seconds_with_depth`` (those per million over the small model's) and ``memory_with_depth``.
``tokens`` is what gather, advance and gradients read; their seconds are proportional to it, as those of refine are to
its steps.
"""

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
import torch

from bitloft.calibrate import refine
from bitloft.quantize import quantize

WORDS = "the quick brown fox jumps over the lazy dog . a base is packed once and an adapter is trained on it in turn"
# width and depth of the small model, calibration sequences, their length, steps of refining
SHAPES = {"full": (512, 8, 64, 512, 40), "quick": (256, 4, 32, 256, 10), "smoke": (64, 1, 4, 32, 2)}
RANK = 16
RUNS: dict[str, dict[str, Any]] = {
    "loftq": {},
    "calibrated": {"solver": "calibrated"},
    "fisher": {"solver": "calibrated", "fisher": True, "rounds": 1},
    "refined": {"refine_parts": ("start",)},
    "refined codes": {"refine_parts": ("start", "codes")},
}


def main() -> int:
    given = harness.parser(__doc__).parse_args()
    harness.begin(given)
    width, depth, samples, length, steps = SHAPES[given.mode]
    if given.mode == "smoke":
        refine.LENGTH, refine.BATCH, refine.HELD = 32, 2, 2
    models = {"small": (width, depth), "deep": (width, 2 * depth), "wide": (2 * width, depth)}
    seconds: dict[str, dict[str, float]] = {}
    memory: dict[str, dict[str, float | None]] = {}
    weights: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as place:
        text = Path(place) / "text.txt"
        text.write_text(" ".join([WORDS] * (2 * samples * length // 24 + 40 * refine.LENGTH)), encoding="utf-8")
        for name, shape in models.items():
            model = random_model(Path(place) / name, *shape)
            seconds[name], memory[name] = {}, {}
            for run, settings in RUNS.items():
                asked = {"calibrate": str(text), "samples": samples, "calibrate_length": length, "refine": steps}
                used = asked if "refine_parts" in settings else {k: v for k, v in asked.items() if k != "refine"}
                found = measured(model, Path(place) / f"{name}-{run}", settings | (used if settings else {}))
                weights[name], memory[name][run] = found["weights"], found["peak"]
                seconds[name] |= stages(run, found)
    rates = {name: {s: t / weights[name] * 1e6 for s, t in seconds[name].items()} for name in models}
    columns = ("seconds per million weights", *(f"{name} {weights[name] / 1e6:.1f} M" for name in models))
    harness.table(columns, [(stage, *(rates[name][stage] for name in models)) for stage in rates["small"]])
    print()
    harness.table(("peak MiB", *models), [(run, *(memory[name][run] or "-" for name in models)) for run in RUNS])
    found = {
        "tokens": samples * length,
        "refine_tokens": refine.BATCH * refine.LENGTH * steps,
        "seconds_per_million": rounded(rates["wide"]),
        "seconds_with_width": rounded({s: rates["wide"][s] / rates["small"][s] for s in rates["small"]}),
        "seconds_with_depth": rounded({s: rates["deep"][s] / rates["small"][s] for s in rates["small"]}),
        "mib_per_million": rounded({r: m / weights["wide"] * 1e6 for r, m in memory["wide"].items() if m is not None}),
        "memory_with_depth": rounded(
            {r: (memory["deep"][r] or 0) / m for r, m in memory["small"].items() if m}  # None: no Linux
        ),
    }
    harness.finish("base_cost", given, {"models": models, "weights": weights, "rank": RANK}, found)
    return 0


def measured(model: Path, out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Quantize once: seconds in all and by what was reported as being done, weights, and the rise of memory."""
    at, spent = [time.perf_counter()], dict[str, float]()

    def step(done: int, total: int, what: str) -> None:
        now, kind = time.perf_counter(), what.split(",")[0]
        kind = kind if kind in ("asking the teacher", "refining") else "solve"
        spent[kind] = spent.get(kind, 0.0) + now - at[0]
        at[0] = now

    peak = harness.Peak()
    threads = torch.get_num_threads()
    report = quantize(model, out, format="lm2:64", rank=RANK, threads=threads, progress=step, **settings)
    calibration = report.calibration.seconds if report.calibration is not None else {}
    return {"peak": peak.mib(), "weights": report.weights, "spent": spent, "calibration": calibration}


def stages(run: str, found: Mapping[str, Any]) -> dict[str, float]:
    """The stages that a run is measured for, by name."""
    spent, calibration = found["spent"], found["calibration"]
    if run == "loftq":
        return {"loftq": spent["solve"]}
    if run == "calibrated":
        return {stage: calibration[stage] for stage in ("gather", "solve", "advance")}
    if run == "fisher":
        return {"gradients": calibration["gradients"]}
    if run == "refined":
        return {"teacher": spent["asking the teacher"], "refine": spent["refining"]}
    return {"refine codes": spent["refining"]}


def random_model(folder: Path, width: int, depth: int) -> Path:
    """A Llama of SmolLM2's proportions with a vocabulary of a few words."""
    from base_grid.toys import tokenizer_of
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": width * 8 // 3 // 64 * 64 or 64, "num_hidden_layers": depth}
    heads = {"num_attention_heads": max(width // 64, 1), "num_key_value_heads": max(width // 64, 1)}
    words = len(tokenizer_of(folder))
    LlamaForCausalLM(LlamaConfig(vocab_size=words, max_position_embeddings=1024, **shape, **heads)).save_pretrained(
        folder
    )
    return folder


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {key: float(f"{value:.4g}") for key, value in values.items()}


if __name__ == "__main__":
    sys.exit(main())
