"""A LoRA step on SmolLM2, batch 4 x 256: packed at 2 bits against dense bfloat16, in time and in memory.

Both models compute in bfloat16, carry the same PEFT adapter (rank 16 on all linears) and take the same AdamW step on
the same tokens. Steps alternate between the two in one process, and the ratio is the median over such pairs. Peak
memory is the high-water mark of a process of its own that loads the model and takes two steps, measured twice: as the C
library's allocator leaves it (what a user sees, holes between freed blocks included), and with every block over 128 KiB
handed back at once (``_live``: what the tensors need). The last line of stdout is one JSON object:
lm2_vs_dense_bf16_time is to stay at or below 1.10.

SmolLM2's folder: --smollm2 or BITLOFT_SMOLLM2; without one a random model of its shape is made.
"""

import gc
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import torch

from bitloft.integrations import register
from bitloft.integrations.loading import load, quiet_loading
from bitloft.integrations.peft import fresh_adapter
from bitloft.options import QuantizeOptions
from bitloft.quantize import quantize

SHAPES = {"full": (4, 256, 12), "quick": (4, 256, 5), "smoke": (2, 16, 1)}  # batch, tokens, pairs of steps
FORMAT, RANK = "lm2:64", 16
LIMIT = 1.10


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--smollm2", type=Path, default=os.environ.get("BITLOFT_SMOLLM2"))
    given = parser.parse_args()
    harness.begin(given)
    batch, tokens, pairs = SHAPES[given.mode]
    with tempfile.TemporaryDirectory() as place:
        source = (
            Path(given.smollm2) if given.smollm2 and given.mode != "smoke" else random_model(Path(place), given.mode)
        )
        packed = Path(place) / "packed"
        quantize(str(source), packed, QuantizeOptions(format=FORMAT, solver="qlora", rank=RANK))
        paths = {"dense": source, "lm2": packed}
        peaks = {name: peak(name, path, batch, tokens) for name, path in paths.items()}
        live = {name: peak(name, path, batch, tokens, live=True) for name, path in paths.items()}
        steps = {name: stepper(name, path, batch, tokens) for name, path in paths.items()}
        seconds = alternate(steps, pairs)
    ratio = statistics.median(ours / dense for ours, dense in zip(seconds["lm2"], seconds["dense"], strict=True))
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    columns = ("model", "s a step", "peak MiB", "live MiB")
    harness.table(columns, [(name, middle[name], peaks[name], live[name]) for name in middle])
    result = {
        "lm2_vs_dense_bf16_time": round(ratio, 4),
        "peak_memory_saved_mib": round(peaks["dense"] - peaks["lm2"], 1),
        "peak_memory_saved_mib_live": round(live["dense"] - live["lm2"], 1),
        "seconds_per_step": {name: round(value, 4) for name, value in middle.items()},
        "peak_mib": {name: round(value, 1) for name, value in peaks.items()},
        "limit": LIMIT,
    }
    shape = {"batch": batch, "tokens": tokens, "pairs": pairs, "rank": RANK, "format": FORMAT, "source": source.name}
    harness.finish("train_step", given, shape, result)
    return 1 if ratio > LIMIT and given.mode != "smoke" else 0


def random_model(place: Path, mode: str) -> Path:
    """A random Llama of SmolLM2-135M's shape, toy-sized for the smoke run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = mode == "smoke"
    config = LlamaConfig(
        vocab_size=512 if small else 49152, hidden_size=64 if small else 576, num_hidden_layers=2 if small else 30,
        intermediate_size=128 if small else 1536, num_attention_heads=4 if small else 9,
        num_key_value_heads=2 if small else 3, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(place / "random")
    return place / "random"


def stepper(name: str, path: Path, batch: int, tokens: int) -> Callable[[], float]:
    """A function that takes one optimizer step and returns its seconds."""
    from transformers import AutoModelForCausalLM

    register()
    with quiet_loading():
        model: Any = (
            load(path, dtype=torch.bfloat16, arrange=False)  # as `bitloft train` does
            if name == "lm2"
            else AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        )
    model = fresh_adapter(model, rank=RANK, alpha=RANK).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, 500, (batch, tokens), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    return step


def alternate(steps: dict[str, Callable[[], float]], pairs: int) -> dict[str, list[float]]:
    """Seconds of each, taken in turns after one step of each that warms up."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(pairs):
        for name, step in steps.items():
            seconds[name].append(step())
    return seconds


def peak(name: str, path: Path, batch: int, tokens: int, *, live: bool = False) -> float:
    """High-water mark in MiB of a fresh process that takes two steps; ``live``: of one that keeps no freed block."""
    setting = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)} if live else {}  # read by glibc when a process starts
    with mock.patch.dict(os.environ, setting), multiprocessing.get_context("spawn").Pool(1) as pool:
        return float(pool.apply(_peak, (name, path, batch, tokens, torch.get_num_threads())))


def _peak(name: str, path: Path, batch: int, tokens: int, threads: int) -> float:
    torch.set_num_threads(threads)
    step = stepper(name, path, batch, tokens)
    for _ in range(2):
        step()
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    sys.exit(main())
