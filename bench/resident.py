"""10,000 adapters in the memory of one process that answers, and 4,000 of Llama-2-7B's shapes.

Adapters are r16 on all linears at 0.5 true bits, each with a buffer of its own, read from files as a server reads them
and attached to the base's bank (the second kind: read and held, there is no such base here to run). Resident memory is
what the process grew by; the files are copies with other codes (bench/served/adapters.py), which another process makes
and writes: what making them leaves in an allocator is not what reading them takes.

gib_per_10000     GiB that 10,000 adapters of SmolLM2 take; in the mode's own count, scaled (``counted`` says how many)
gib_16_bit        what they would take in 16 bits
answers           requests to adapters at random among them, while all are resident
llama7b_gib_per_4000  the same for 4,000 adapters of Llama-2-7B's shapes
"""

import asyncio
import gc
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import torch
from served import adapters as made
from served import arguments

from bitloft.adapters import read_packed, serialize
from bitloft.integrations.loading import load
from bitloft.integrations.record import base_record, load_tokenizer
from bitloft.modules.held import Held
from bitloft.modules.multi import AdapterBank
from bitloft.options import ServeOptions
from bitloft.quantize import quantize
from bitloft.serve.engine import Engine
from bitloft.serve.requests import Sampling
from bitloft.serve.store import AdapterStore

BITS = 0.5
GIB = 1 << 30
LLAMA7B = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096), "self_attn.v_proj": (4096, 4096),
           "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (4096, 11008), "mlp.up_proj": (4096, 11008),
           "mlp.down_proj": (11008, 4096)}  # fmt: skip
MODES = {"full": (10_000, 4_000, 32), "quick": (2_000, 400, 32), "smoke": (30, 4, 1)}  # adapters, of 7B, its layers
GOALS = {"gib_per_10000": 5.0, "llama7b_gib_per_4000": 12.0}
ASKED = 40


def main() -> int:
    given = arguments(__doc__)
    count, large, layers = MODES[given.mode]
    with tempfile.TemporaryDirectory() as temporary:
        place = given.work or Path(temporary)
        source = made.toy(place / "toy") if given.mode == "smoke" else given.smollm2
        if not (place / "base").exists():
            quantize(source, place / "base", format="lm2:64", rank=16)
        made.packed(place, made.shapes_of(place / "base"), BITS, place / "base")
        small = alone(serving, place, count)
        stack(place / "llama7b", layers)
        wide = alone(holding, place / "llama7b", large)
    harness.table(list(small), [list(small.values())])
    harness.table(list(wide), [list(wide.values())])
    figures: dict[str, Any] = {
        "gib_per_10000": round(small["bytes"] / count * 10_000 / GIB, 3),
        "gib_16_bit": round(2 * small["values"] * 10_000 / GIB, 1),
        "answers": small["answers"],
        "wrong_answers": small["wrong"],
        "seconds_to_load": small["seconds"],
        "llama7b_gib_per_4000": round(wide["bytes"] / wide["adapters"] * 4_000 / GIB, 3),
        "goals": GOALS,
        "smollm2": small,
        "llama7b": wide,
    }
    harness.finish("resident", given, {"counted": [count, wide["adapters"]], "rank": made.RANK, "bits": BITS}, figures)
    short = figures["wrong_answers"] or any(figures[name] > goal for name, goal in GOALS.items())
    return int(given.mode != "smoke" and bool(short))


def stack(place: Path, layers: int) -> None:
    """One packed adapter of Llama-2-7B's shapes, every layer with the blocks of the first: packing all would take
    minutes and give the same bytes."""
    out = place / f"packed-{BITS}"
    if out.exists():
        return
    one = {f"model.layers.0.{name}": pair for name, pair in LLAMA7B.items()}
    packed = read_packed(made.packed(place / "layer", one, BITS, None))
    modules = [
        replace(module, name=name.replace("layers.0.", f"layers.{i}."))
        for i in range(layers)
        for name, module in packed.modules.items()
    ]
    record = {"base": None, "source": None, "start": None, "method": dict(packed.method), "error": packed.error,
              "values": layers * packed.values}  # fmt: skip
    out.mkdir(parents=True)
    for name, data in serialize(packed.config, sorted(modules, key=lambda m: m.name), record).items():
        (out / name).write_bytes(data)


def alone(call: Any, place: Path, count: int) -> dict[str, Any]:
    """``call`` in a process of its own: one that has freed memory would reuse it and not grow."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found: dict[str, Any] = pool.submit(call, place, count, torch.get_num_threads()).result()
    return found


@contextmanager
def writer(source: Path) -> Iterator[Callable[[Path, int], None]]:
    """Writes copies of ``source`` into a directory, from a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _open, (source,)) as pool:
        yield lambda path, seed: pool.submit(_write, path, seed).result()


_copies: list[made.Copies] = []


def _open(source: Path) -> None:
    torch.set_num_threads(1)
    _copies.append(made.Copies(source))


def _write(path: Path, seed: int) -> None:
    path.mkdir(exist_ok=True)
    for name, data in _copies[0].files(seed).items():
        (path / name).write_bytes(data)


def serving(place: Path, count: int, threads: int) -> dict[str, Any]:
    """Growth by ``count`` adapters of a store without a budget, and what some of them answer afterwards."""
    torch.set_num_threads(threads)
    base = place / "base"
    model, tokenizer, record = load(base), load_tokenizer(base), base_record(base)
    options = ServeOptions(max_queue=1000, adapter_share=1.0)
    store = AdapterStore(AdapterBank(model), record, "base", options)
    engine = Engine(model, tokenizer, store, options)
    engine._running.eos = frozenset()
    with tempfile.TemporaryDirectory() as temporary, writer(place / f"packed-{BITS}") as write:
        first = Path(temporary) / "first"
        write(first, count)
        store.add("first", first)  # what is made once for all is not counted
        gc.collect()
        before, began = resident(), time.perf_counter()
        for i in range(count):
            path = Path(temporary) / f"a{i}"
            write(path, i)
            store.add(path.name, path)
            for file in path.iterdir():
                file.unlink()
        gc.collect()
        grown, seconds = resident() - before, time.perf_counter() - began
        values = read_packed(first).values
    engine.start()
    names = [f"a{i}" for i in random.Random(0).sample(range(count), min(ASKED, count))]

    async def ask() -> list[list[int]]:
        asked = [engine.submit([5, 6, 7, 8], name, Sampling(8)) for name in names]
        await asyncio.gather(*(request.collect() for request in asked))
        return [request.tokens for request in asked]

    async def one(name: str) -> list[int]:
        request = engine.submit([5, 6, 7, 8], name, Sampling(8))
        await request.collect()
        return request.tokens

    together = asyncio.run(ask())
    wrong = sum(asyncio.run(one(name)) != tokens for name, tokens in zip(names[:8], together, strict=False))
    stats = store.stats()
    engine.stop()
    store.close()
    return {
        "adapters": count, "bytes": grown, "counted_bytes": stats.bytes, "values": values, "resident": stats.resident,
        "answers": len(together), "distinct_answers": len({tuple(tokens) for tokens in together}), "wrong": wrong,
        "seconds": round(seconds, 1),
    }  # fmt: skip


def holding(place: Path, count: int, threads: int) -> dict[str, Any]:
    """Growth by ``count`` adapters that are read and held as a bank holds them; one of them is described once."""
    torch.set_num_threads(threads)
    source = place / f"packed-{BITS}"
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    count = min(count, max(int(0.6 * free / sum(file.stat().st_size for file in source.iterdir())), 1))
    held = []
    with tempfile.TemporaryDirectory() as temporary, writer(source) as write:
        path = Path(temporary) / "one"
        write(path, count)
        modules = tuple(read_packed(path).modules)
        Held(read_packed(path)).described(modules)
        gc.collect()
        before = resident()
        for i in range(count):
            write(path, i)
            held.append(Held(read_packed(path)))
        held[0].described(modules)
        held[0].release()
        gc.collect()
        grown = resident() - before
    return {"adapters": count, "bytes": grown, "counted_bytes": sum(one.nbytes for one in held)}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
