"""Peak memory and speed of quantizing a model that is larger than the memory it gets: LLaMA-2-7B's shapes, 2 bits.

A checkpoint of heavy-tailed random fp16 weights (Student t with 5 degrees of freedom) is written shard by shard beside
``--dir`` and deleted afterwards, the output too. ``quantize`` then runs in a process of its own (nf2:64, LoftQ, r 64)
while this one samples /proc: RssAnon + RssShmem of that process and its children together, since those are what a
machine must have (pages of files can be dropped). VmHWM, which counts those pages too, stands beside it.

Floor: reading the files once and encoding every weight once, with as many processes and threads. Both are measured
here: the read with the file cache dropped as far as the kernel lets a user (POSIX_FADV_DONTNEED), the encoding on one
matrix of each shape.

    python bench/stream_quantize.py --shape 7b --jobs 2 --dir /somewhere/with/20GB
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch

from bitloft.kernels.ops import encode
from bitloft.shards import INDEX, Spec, open_shards, shard_files
from bitloft.slots import lay_out, reserve, write

# hidden, intermediate, layers, heads, key-value heads, vocabulary
SHAPES = {
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "tiny": (128, 256, 2, 4, 4, 512),
}
RANKS = {"7b": 64, "1b": 64, "tiny": 16}
SHARD = 5_000_000_000
GIB = 1 << 30
RUN = """
import json, sys
from bitloft.quantize import quantize
if __name__ == "__main__":
    source, out, options, run = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
    report = quantize(source, out, **options, **run)
    print(json.dumps({"seconds": report.seconds, "weights": report.weights, "true_bits": report.true_bits,
                      "with_start": report.true_bits_with_start, "stored": report.stored_bytes,
                      "error": sum(m.error_after for m in report.matrices) / len(report.matrices)}))
"""


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default=None, help="model to imitate (default: 7b; quick 1b)")
    parser.add_argument("--dir", type=Path, default=None, help="where the checkpoint goes (default: a temporary place)")
    parser.add_argument("--jobs", type=int, default=1, help="processes of quantize")
    arguments = parser.parse_args()
    arguments.threads = arguments.threads or 1  # of each process, as quantize has it
    harness.begin(arguments)
    shape = arguments.shape or {"smoke": "tiny", "quick": "1b", "full": "7b"}[arguments.mode]
    options: dict[str, Any] = {"format": "nf2:64", "solver": "loftq", "rank": RANKS[shape]}
    run = {"jobs": arguments.jobs, "threads": arguments.threads}
    place = Path(tempfile.mkdtemp(prefix="bitloft-stream-", dir=arguments.dir))
    try:
        wrote = write_checkpoint(place / "model", shape)
        print(f"wrote {wrote / GIB:.2f} GiB of fp16 in the shapes of {shape}")
        read, encoded = floor_seconds(place / "model", options["format"], run)
        found, memory = measured(place, options, run)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    floor = read + encoded
    print(f"quantized in {found['seconds']:.1f} s; floor {floor:.1f} s ({read:.1f} reading, {encoded:.1f} encoding)")
    print(f"peak {memory.anonymous / GIB:.3f} GiB of its own, {memory.all / GIB:.3f} GiB with file pages")
    figures = {
        "peak_rss_gib": round(memory.anonymous / GIB, 4),
        "vm_hwm_gib": round(memory.all / GIB, 4),
        "minutes": round(found["seconds"] / 60, 3),
        "weights_per_second": round(found["weights"] / found["seconds"]),
        "floor_ratio": round(found["seconds"] / floor, 3),
        "floor_seconds": {"read": round(read, 3), "encode": round(encoded, 3)},
        "jobs": arguments.jobs,
        "weights": found["weights"],
        "true_bits": round(found["true_bits"], 4),
        "true_bits_with_start": round(found["with_start"], 4),
        "stored_gib": round(found["stored"] / GIB, 4),
        "error": round(found["error"], 5),
        "samples": memory.samples,
        "limit_gib": 3.0,
    }
    names = ("hidden", "intermediate", "layers", "heads", "kv_heads", "vocabulary")
    dimensions = dict(zip(names, SHAPES[shape], strict=True))
    harness.finish("stream_quantize", arguments, {"model": shape, **dimensions, **options}, figures)
    return 1 if arguments.mode == "full" and memory.anonymous > 3.0 * GIB else 0


def write_checkpoint(directory: Path, shape: str) -> int:
    """A LlamaForCausalLM folder of random weights, a tensor at a time; returns the bytes of its weights."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    kv = hidden // heads * kv_heads
    matrices = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden), "mlp.down_proj": (hidden, intermediate),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    specs = {"model.embed_tokens.weight": Spec("F16", (vocabulary, hidden))}
    for layer in range(layers):
        specs |= {f"model.layers.{layer}.{name}.weight": Spec("F16", size) for name, size in matrices.items()}
    specs |= {"model.norm.weight": Spec("F16", (hidden,)), "lm_head.weight": Spec("F16", (vocabulary, hidden))}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16",
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    slots = lay_out(directory, specs, SHARD)
    reserve(directory, slots)
    noise = heavy_tailed(1 << 22)
    for number, (name, spec) in enumerate(specs.items()):
        write(slots, [(name, pieces(spec, noise, number))])
    if slots.index is not None:
        (directory / INDEX).write_text(json.dumps(slots.index))
    return slots.nbytes


def heavy_tailed(count: int) -> torch.Tensor:
    """Student t with 5 degrees of freedom, scaled to a weight's size, in fp16."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(6, count, generator=generator)
    return (0.02 * normal[0] / normal[1:].square().mean(0).sqrt()).half()


def pieces(spec: Spec, noise: torch.Tensor, number: int) -> Iterator[torch.Tensor]:
    """The values of one tensor: the noise from another place and, each time, with another sign and size per row.

    Fresh noise for 7e9 weights would take longer than the benchmark; rows that differ in size and sign leave nothing
    of the repetition that a rank-64 start could use.
    """
    generator = torch.Generator().manual_seed(number)
    if len(spec.shape) == 1:
        yield torch.ones(spec.shape, dtype=torch.float16)
        return
    rows, columns = spec.shape
    band = max(1, len(noise) // 2 // columns)
    for start in range(0, rows, band):
        count = min(band, rows - start)
        offset = int(torch.randint(len(noise) - count * columns + 1, (1,), generator=generator))
        sizes = torch.randn(count, 1, generator=generator).sign() * (0.5 + torch.rand(count, 1, generator=generator))
        yield noise[offset : offset + count * columns].view(count, columns) * sizes.half()


def floor_seconds(model: Path, fmt: str, run: dict[str, int]) -> tuple[float, float]:
    """Seconds to read every file once, and to encode every packed weight once by so many jobs."""
    read = 0.0
    for file in shard_files(model):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        while os.read(handle, 1 << 24):
            pass
        read += time.perf_counter() - began
        os.close(handle)
    counts: dict[tuple[int, ...], int] = {}
    for name, entry in open_shards(model).items():
        if "proj" in name:
            counts[entry.spec.shape] = counts.get(entry.spec.shape, 0) + 1
    encoded = 0.0
    for size, count in counts.items():
        rows = min(size[0], max(64, (1 << 24) // size[1]))  # part of a large matrix: time is proportional to its rows
        weight = heavy_tailed(rows * size[1]).float().view(rows, size[1])
        seconds, _ = harness.seconds_of(partial(encode, weight, fmt), 2)
        encoded += seconds * count * size[0] / rows
    return read, encoded / run["jobs"]


@dataclass
class Memory:
    """Peaks of a process and its children: ``anonymous`` sampled, ``all`` the kernel's own high-water marks."""

    anonymous: int = 0
    all: int = 0
    samples: int = 0


def measured(place: Path, options: dict[str, object], run: dict[str, int]) -> tuple[dict[str, float], Memory]:
    """Quantize in a process of its own; what it reports, and its memory."""
    script = place / "run.py"
    script.write_text(RUN)
    given = [str(place / "model"), str(place / "out"), json.dumps(options), json.dumps(run)]
    command = [sys.executable, str(script), *given]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    memory, stop = Memory(), threading.Event()
    watcher = threading.Thread(target=watch, args=(child.pid, memory, stop))
    watcher.start()
    out, _ = child.communicate()
    stop.set()
    watcher.join()
    if child.returncode:
        raise SystemExit(f"quantize ended with {child.returncode}")
    return json.loads(out.strip().splitlines()[-1]), memory


def watch(pid: int, memory: Memory, stop: threading.Event) -> None:
    """Sample a process tree every 20 ms."""
    marks: dict[int, int] = {}
    while not stop.wait(0.02):
        anonymous = 0
        for member in family(pid):
            status = status_of(member)
            anonymous += status.get("RssAnon", 0) + status.get("RssShmem", 0)
            marks[member] = status.get("VmHWM", 0)
        memory.anonymous = max(memory.anonymous, anonymous)
        memory.all = max(memory.all, sum(marks.values()))
        memory.samples += 1


def family(pid: int) -> list[int]:
    """A process and all that it started, as far as they still run."""
    found = [pid]
    for member in found:
        try:
            text = Path(f"/proc/{member}/task/{member}/children").read_text()
        except OSError:
            continue
        found += [int(child) for child in text.split()]
    return found


def status_of(pid: int) -> dict[str, int]:
    """The memory lines of /proc/PID/status in bytes; nothing of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.partition(":") for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, _, value in fields}


if __name__ == "__main__":
    sys.exit(main())
