"""How long `compress` takes on an adapter of Llama-2-7B's shapes (r16, all linears, 40 M values), and against what.

The other side is what LoRAQuant's released code does per matrix: the full SVD of B*A, then 300 gradient steps on each
of the leading components. It is timed on one module of each shape, fewer steps, and extrapolated to all modules; the
JSON says from how many. `--quick` packs one layer, `--smoke` a toy. The last line of stdout is one JSON object.
"""

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import harness
import torch
from safetensors.torch import save_file

from bitloft.compress import compress
from bitloft.solvers.loraquant import split

LLAMA = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096), "self_attn.v_proj": (4096, 4096),
         "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096),
         "mlp.down_proj": (4096, 11008)}  # fmt: skip
TOY = {"self_attn.q_proj": (256, 256), "mlp.down_proj": (256, 704)}
MODES = {"full": (LLAMA, 32), "quick": (LLAMA, 1), "smoke": (TOY, 2)}
RANK, STEPS, TIMED_STEPS = 16, 300, 5
DECAY = torch.logspace(0, -1.2, RANK)  # singular values of the made-up adapter
LEADING = split(DECAY, 0.8)  # the components that the published way refines
BITS = 0.8
LIMITS = {"seconds": 60.0, "speedup_vs_full_svd": 50.0}


def main() -> int:
    given = harness.parser(__doc__).parse_args()
    harness.begin(given)
    mode = given.mode
    shapes, layers = MODES[mode]
    with tempfile.TemporaryDirectory() as place:
        values = write_adapter(Path(place) / "adapter", shapes, layers)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own: its peak memory is its own
            packed = pool.apply(measured, (Path(place), 2 * BITS if mode == "smoke" else BITS, torch.get_num_threads()))
    published = layers * sum(full_svd_seconds(*shape) for shape in shapes.values())
    speedup = round(published / packed["seconds"], 1)
    shape = {"layers": layers, "modules": layers * len(shapes), "rank": RANK, "values": values}
    result = {
        **packed,
        "published_seconds": round(published, 1),
        "published_from": f"a module of each of {len(set(shapes.values()))} shapes, {TIMED_STEPS} of {STEPS} steps",
        "published_components": LEADING,
        "speedup_vs_full_svd": speedup,
        "limits": LIMITS,
    }
    harness.finish("compress_speed", given, shape, result)
    over = packed["seconds"] > LIMITS["seconds"] or speedup < LIMITS["speedup_vs_full_svd"]
    return 1 if over and mode == "full" else 0


def write_adapter(directory: Path, shapes: dict[str, tuple[int, int]], layers: int) -> int:
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


def full_svd_seconds(rows: int, columns: int) -> float:
    """Seconds of the published way for one module: the SVD of the product, and all gradient steps (extrapolated)."""
    a, b = torch.randn(RANK, columns), torch.randn(rows, RANK)
    begin = time.perf_counter()
    torch.linalg.svd(b @ a, full_matrices=False)
    decomposed = time.perf_counter() - begin
    left, right = torch.randn(rows, requires_grad=True), torch.randn(columns, requires_grad=True)
    exact = torch.outer(left.detach(), right.detach())
    optimizer = torch.optim.SGD([left, right], lr=1e-2)
    begin = 0.0
    for step in range(TIMED_STEPS + 1):
        begin = time.perf_counter() if step == 1 else begin  # the first one warms up
        optimizer.zero_grad()
        (exact - torch.outer(rounded(left), rounded(right))).norm().backward()
        optimizer.step()
    per_step = (time.perf_counter() - begin) / TIMED_STEPS
    return decomposed + LEADING * STEPS * per_step


def rounded(x: torch.Tensor) -> torch.Tensor:
    groups = torch.nn.functional.pad(x, (0, -len(x) % 128)).view(-1, 128)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = ((high - low) / 3).clamp_min(1e-5)
    zero = torch.round(-low / scale).clamp(0, 3)
    return ((torch.clamp(torch.round(groups / scale) + zero, 0, 3) - zero) * scale).view(-1)[: len(x)]


if __name__ == "__main__":
    sys.exit(main())
