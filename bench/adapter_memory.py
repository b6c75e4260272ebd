"""Bytes of 1 to 10,000 packed adapters on disk and in memory, beside their payload.

One adapter of SmolLM2-135M's shapes (r16, all linears) is packed; copies of its directory are read as a server reads
them, each with a payload of its own, and views of one adapter are made and released again. Resident memory is what the
process grew by. Counts that would take more than half of the free memory are left out, and the JSON says which. The
last line of stdout is one JSON object.
"""

import gc
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import harness
import torch
from safetensors.torch import save_file

from bitloft.adapters import PackedAdapter, read_packed
from bitloft.compress import compress

SMOLLM2 = {"self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
           "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
           "mlp.down_proj": (576, 1536)}  # fmt: skip
MODES = {
    "full": (30, (1, 10, 100, 1000, 10_000)),
    "quick": (30, (1, 10, 100, 1000)),
    "smoke": (4, (1, 20, 100)),
}
RANK = 16
LIMIT = 1.1  # resident bytes per payload byte, at the largest count


def main() -> int:
    parser = harness.parser(__doc__)
    parser.set_defaults(threads=1)
    parser.add_argument("--bits", type=float, default=0.5)
    given = parser.parse_args()
    harness.begin(given)
    mode = given.mode
    layers, counts = MODES[mode]
    with tempfile.TemporaryDirectory() as place:
        plain, packed = Path(place) / "plain", Path(place) / "packed"
        values = write_adapter(plain, layers)
        report = compress(plain, packed, bits=given.bits)
        rows = []
        for count in counts:
            if fits(count * report.bytes):  # a process each: one that has freed memory would reuse it and not grow
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    rows.append(pool.apply(measured, (packed, count)))
    last = rows[-1]
    over = last["resident_per_payload"] > LIMIT
    shape = {"modules": layers * len(SMOLLM2), "rank": RANK, "values": values}
    result = {
        "true_bits": round(report.true_bits, 4),
        "bytes_on_disk": report.bytes,
        "bytes_16_bit": 2 * values,
        "counts": rows,
        "left_out": [count for count in counts if count not in [row["adapters"] for row in rows]],
        "resident_per_payload": last["resident_per_payload"],
        "limit": LIMIT,
    }
    harness.finish("adapter_memory", given, shape, result)
    return 1 if over and mode != "smoke" else 0


def write_adapter(directory: Path, layers: int) -> int:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in SMOLLM2.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            a = torch.randn(RANK, columns, generator=generator) * torch.logspace(0, -1.2, RANK)[:, None]
            tensors[f"{key}.lora_A.weight"] = a
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.01
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    targets = sorted(name.split(".")[1] for name in SMOLLM2)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return sum(t.numel() for t in tensors.values())


def measured(packed: Path, count: int) -> dict[str, float]:
    """Growth of the resident set by ``count`` adapters in memory; one of them is used, then released."""
    torch.set_num_threads(1)
    use(read_packed(packed))  # what is loaded once for all is not counted
    gc.collect()
    before = resident()
    held = [read_packed(packed) for _ in range(count)]
    use(held[0])
    gc.collect()
    grown = resident() - before
    payload = sum(adapter.payload.numel() for adapter in held)
    return {
        "adapters": count,
        "payload_bytes": payload,
        "resident_bytes": grown,
        "resident_per_payload": round(grown / payload, 4),
    }


def use(adapter: PackedAdapter) -> None:
    for module in adapter.modules.values():
        _ = module.blocks
    adapter.modules.release()  # type: ignore[attr-defined]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fits(size: int) -> bool:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return size < free / 2


if __name__ == "__main__":
    sys.exit(main())
