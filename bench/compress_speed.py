"""How long `compress` takes on an adapter of Llama-2-7B's shapes (r16, all linears, 40 M values), and against what.

The other side is what LoRAQuant's released code does per matrix: the full SVD of B*A, then 300 gradient steps on each
of the leading components. It is timed on four modules (q, o, gate, down) with ten steps each and extrapolated to all;
the JSON says from what. `--quick` packs the same adapter and times two modules (q, gate) with three steps; `--smoke` is
a toy. The floor is reading the file and coding every factor once at each width. The last line of stdout is one JSON
object.
"""

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import harness
import torch
from safetensors.torch import save_file

from bitloft.adapters import read_adapter
from bitloft.compress import compress
from bitloft.formats import ROW
from bitloft.kernels.ops import encode
from bitloft.solvers.loraquant import split
from bitloft.solvers.waterfill import WIDTHS, code_format

Shape = tuple[int, int]
LLAMA = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096), "self_attn.v_proj": (4096, 4096),
         "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096),
         "mlp.down_proj": (4096, 11008)}  # fmt: skip
TOY = {"self_attn.q_proj": (256, 256), "mlp.down_proj": (256, 704)}
RANK, STEPS = 16, 300
DECAY = torch.logspace(0, -1.2, RANK)  # singular values of the made-up adapter
LEADING = split(DECAY, 0.8)  # the components that the published way refines
BITS = 0.8
LIMITS = {"seconds": 60.0, "speedup_vs_full_svd": 50.0}


@dataclass(frozen=True)
class Mode:
    """What is packed, and the modules and gradient steps that the published way is timed on."""

    shapes: dict[str, Shape]
    layers: int
    timed: tuple[str, ...]
    steps: int


MODES = {
    "full": Mode(LLAMA, 32, ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"), 10),
    "quick": Mode(LLAMA, 32, ("self_attn.q_proj", "mlp.gate_proj"), 3),
    "smoke": Mode(TOY, 2, ("self_attn.q_proj", "mlp.down_proj"), 2),
}


def main() -> int:
    given = harness.parser(__doc__).parse_args()
    harness.begin(given)
    mode = MODES[given.mode]
    bits = 2 * BITS if given.mode == "smoke" else BITS
    with tempfile.TemporaryDirectory() as place:
        values = write_adapter(Path(place) / "adapter", mode.shapes, mode.layers)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own: its peak memory is its own
            packed = pool.apply(measured, (Path(place), bits, torch.get_num_threads()))
        floor = floor_seconds(Path(place) / "adapter")
    print(f"packed in {packed['seconds']:.1f} s, {packed['seconds'] / floor:.1f} times the floor of {floor:.2f} s")
    there = published(mode)
    speedup = round(there["published_seconds"] / packed["seconds"], 1)
    shape = {"layers": mode.layers, "modules": mode.layers * len(mode.shapes), "rank": RANK, "values": values}
    result = {
        **packed,
        "floor_seconds": round(floor, 3),
        **there,
        "speedup_vs_full_svd": speedup,
        "speedup_vs_svd_alone": round(there["published_svd_seconds"] / packed["seconds"], 1),
        "limits": LIMITS,
    }
    harness.finish("compress_speed", given, shape, result)
    over = packed["seconds"] > LIMITS["seconds"] or speedup < LIMITS["speedup_vs_full_svd"]
    return 1 if over and given.mode != "smoke" else 0


def write_adapter(directory: Path, shapes: dict[str, Shape], layers: int) -> int:
    """Random factors in fp16 whose spectra fall like a trained adapter's; returns the number of values."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            a = torch.randn(RANK, columns, generator=generator) * DECAY[:, None]
            tensors[f"{key}.lora_A.weight"] = a.half()
            tensors[f"{key}.lora_B.weight"] = (torch.randn(rows, RANK, generator=generator) * 0.01).half()
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 32,
        "target_modules": sorted(n.split(".")[1] for n in shapes),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return sum(t.numel() for t in tensors.values())


def measured(place: Path, bits: float, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    report = compress(place / "adapter", place / "packed", bits=bits)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": round(seconds, 3),
        "peak_rss_gib": round(peak / 2**20, 3),
        "rss_before_gib": round(before / 2**20, 3),
        "true_bits": round(report.true_bits, 4),
        "error": round(report.error, 5),
    }


def floor_seconds(adapter: Path) -> float:
    """What no way of trying every width on every component can save: the file read, each factor coded once a width."""
    begin = time.perf_counter()
    for pair in read_adapter(adapter).pairs:
        for factor in (pair.a, pair.b.T.contiguous()):
            for bits in WIDTHS:
                encode(factor, code_format(bits, ROW))
    return time.perf_counter() - begin


def published(mode: Mode) -> dict[str, Any]:
    """Seconds of the published way for all modules: each module counts as the mean of the timed ones of its shape."""
    svds: dict[Shape, list[float]] = {}
    steps: dict[Shape, list[float]] = {}
    for name in mode.timed:
        rows, columns = mode.shapes[name]
        svd, step = svd_seconds(rows, columns), step_seconds(rows, columns, mode.steps)
        print(f"{name} {rows} x {columns}: full SVD {svd:.1f} s, gradient step {step * 1e3:.0f} ms", flush=True)
        kind = (max(rows, columns), min(rows, columns))  # a matrix and its transpose cost the same
        svds.setdefault(kind, []).append(svd)
        steps.setdefault(kind, []).append(step)
    kinds = [(max(shape), min(shape)) for shape in mode.shapes.values()]
    svd_all = mode.layers * sum(mean(svds[kind]) for kind in kinds)
    steps_all = mode.layers * LEADING * STEPS * sum(mean(steps[kind]) for kind in kinds)
    return {
        "published_seconds": round(svd_all + steps_all, 1),
        "published_svd_seconds": round(svd_all, 1),
        "published_components": LEADING,
        "published_from": f"{len(mode.timed)} modules ({', '.join(mode.timed)}), {mode.steps} of {STEPS} steps each",
    }


def svd_seconds(rows: int, columns: int) -> float:
    a, b = torch.randn(RANK, columns), torch.randn(rows, RANK)
    begin = time.perf_counter()
    torch.linalg.svd(b @ a, full_matrices=False)
    return time.perf_counter() - begin


def step_seconds(rows: int, columns: int, count: int) -> float:
    """Seconds of one gradient step on one component, the mean of ``count`` after one that warms up."""
    left, right = torch.randn(rows, requires_grad=True), torch.randn(columns, requires_grad=True)
    exact = torch.outer(left.detach(), right.detach())
    optimizer = torch.optim.SGD([left, right], lr=1e-2)
    begin = 0.0
    for step in range(count + 1):
        begin = time.perf_counter() if step == 1 else begin
        optimizer.zero_grad()
        (exact - torch.outer(rounded(left), rounded(right))).norm().backward()
        optimizer.step()
    return (time.perf_counter() - begin) / count


def rounded(x: torch.Tensor) -> torch.Tensor:
    groups = torch.nn.functional.pad(x, (0, -len(x) % 128)).view(-1, 128)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = ((high - low) / 3).clamp_min(1e-5)
    zero = torch.round(-low / scale).clamp(0, 3)
    return ((torch.clamp(torch.round(groups / scale) + zero, 0, 3) - zero) * scale).view(-1)[: len(x)]


if __name__ == "__main__":
    sys.exit(main())
