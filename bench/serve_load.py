"""S-LoRA's experiment: what 1 to 2,000 adapters cost a server of one base, at a fixed rate and at saturation.

Packed adapters (r16 at 0.5 and 1.8 bits, in equal numbers) on a 2-bit base; popularity is Zipf's with exponent 1, and
the adapters in memory are held to a quarter of all adapters' bytes. The engine runs in this process, without HTTP;
answers are greedy and of fixed length. Adapters beyond a few are copies of packed ones with other codes: a server's
work does not depend on what the codes say, and answers still differ by adapter.

throughput_2000_vs_5        answer tokens a second with 2,000 adapters / with 5, at saturation; each the best of 3 runs
                            (two of them in turn: a neighbour of some seconds would decide a single one)
mixed32_vs_base_only        steps a second of 32 rows with 32 adapters / of 32 rows of the base (whose start runs too)
vs_peft_adapter_names       requests a second of this engine / of PEFT's generate with adapter_names, same requests, to
                            100 adapters by Zipf's law, each the best of two runs in turn (``peft`` has 5 adapters too:
                            what PEFT takes grows with their number)
cold_adapter_first_token_ms what the first token of an adapter that has to be read takes longer (median)
wrong_answers               answers under load that differ from the same request alone, in a fresh row
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from served import adapters as made
from served import arguments, peft_peer

from bitloft.integrations.loading import load
from bitloft.integrations.record import base_record, load_tokenizer
from bitloft.modules.multi import AdapterBank
from bitloft.options import ServeOptions
from bitloft.quantize import quantize
from bitloft.serve.engine import Engine
from bitloft.serve.requests import Request, RequestError, Sampling
from bitloft.serve.store import AdapterStore

GOALS = {"throughput_2000_vs_5": 0.9, "mixed32_vs_base_only": 0.7, "vs_peft_adapter_names": 4.0}
BITS = (0.5, 1.8)


@dataclass(frozen=True)
class Size:
    """One mode: numbers of adapters, requests of each run, tokens of prompts and answers, PEFT's requests."""

    counts: tuple[int, ...]
    requests: int
    prompt: tuple[int, int]
    answer: int
    peft: int
    checked: int
    steps: int


MODES = {
    "full": Size((1, 5, 100, 1000, 2000), 600, (16, 64), 32, 64, 200, 20),
    "quick": Size((1, 5, 100, 1000, 2000), 96, (16, 64), 32, 32, 16, 12),
    "smoke": Size((1, 3, 8), 24, (4, 12), 6, 4, 24, 3),
}


def main() -> int:
    given = arguments(__doc__)
    size = MODES[given.mode]
    with tempfile.TemporaryDirectory() as temporary:
        place = given.work or Path(temporary)
        figures = measured(given, size, place)
    shape = {"requests": size.requests, "prompt": size.prompt, "answer": size.answer, "bits": BITS, "zipf": 1.0}
    harness.finish("serve_load", given, shape, figures)
    short = any(figures[name] < goal for name, goal in GOALS.items()) or figures["wrong_answers"]
    return int(given.mode != "smoke" and bool(short))


def measured(given: argparse.Namespace, size: Size, place: Path) -> dict[str, Any]:
    """All figures. The base and the adapters are made where they do not exist yet."""
    source = made.toy(place / "toy") if given.mode == "smoke" else given.smollm2
    base = place / "base"
    if not base.exists():
        quantize(source, base, format="lm2:64", rank=16)
    harness.say(f"{max(size.counts)} adapters")
    pool, total = made.pool(place, base, max(size.counts), BITS)
    harness.say("the base is loaded")
    model, tokenizer, record = load(base), load_tokenizer(base), base_record(base)
    bench = Bench(model, tokenizer, record, pool, size)
    rows = [bench.run(count) for count in size.counts]
    columns = ("adapters", "tokens_per_second", "first_ms_p50", "first_ms_p95", "first_ms_p99", "token_ms_p50",
               "token_ms_p95", "token_ms_p99", "goodput", "hit_rate", "wrong")  # fmt: skip
    for kind in ("saturated", "fixed_rate"):
        print(kind)
        harness.table(columns, [[row["adapters"], *(row[kind].get(c) for c in columns[1:])] for row in rows])
    few = next(row for row in rows if row["adapters"] >= min(5, size.counts[-1]))
    best = {row["adapters"]: [row["saturated"]["tokens_per_second"]] for row in (few, rows[-1])}
    for count in (*reversed(best), *best):
        best[count].append(bench.saturated(count))
    harness.say("steps of 32 rows")
    step = bench.steps()
    harness.say("adapters that have to be read")
    cold = bench.cold()
    figures: dict[str, Any] = {
        "throughput_2000_vs_5": round(max(best[rows[-1]["adapters"]]) / max(best[few["adapters"]]), 3),
        "throughputs": {str(count): found for count, found in best.items()},
        "mixed32_vs_base_only": step["mixed32_vs_base_only"],
        "cold_adapter_first_token_ms": cold,
        "wrong_answers": sum(row[kind]["wrong"] for row in rows for kind in ("saturated", "fixed_rate")),
        "checked_answers": sum(row[kind]["checked"] for row in rows for kind in ("saturated", "fixed_rate")),
    }
    figures |= {f"step_{name}": value for name, value in step.items() if name != "mixed32_vs_base_only"}
    peft = {count: bench.beside_peft(source, count) for count in PEFT_ADAPTERS}
    figures |= {"vs_peft_adapter_names": peft[PEFT_ADAPTERS[-1]]["ratio"], "peft": peft}
    return figures | {
        "adapters_bytes": total, "goals": GOALS, "runs": rows,
        "adapters_made": "a few packed adapters, the others copies of them with other codes (bench/served/adapters.py)",
    }  # fmt: skip


class Bench:
    """One base with its pool of adapters; every run has a store and an engine of its own."""

    def __init__(self, model: Any, tokenizer: Any, record: Any, pool: Sequence[Path], size: Size) -> None:
        self.model, self.tokenizer, self.record, self.pool, self.size = model, tokenizer, record, pool, size

    def engine(self, count: int, share: float = 0.25, **settings: Any) -> Engine:
        total = sum(file.stat().st_size for path in self.pool[:count] for file in path.glob("adapter_model*"))
        largest = max(sum(f.stat().st_size for f in path.glob("adapter_model*")) for path in self.pool[:count]) + 4096
        budget = max(int(share * total), min(count, 4) * largest)  # one that no adapter fits in serves nobody
        options = ServeOptions(
            adapter_budget=None if share >= 1 else str(budget), max_queue=100_000, queue_seconds=3600.0,
            request_seconds=3600.0, adapter_share=1.0, **settings,
        )  # fmt: skip
        store = AdapterStore(AdapterBank(self.model), self.record, "base", options)
        for path in self.pool[:count]:
            store.add(path.name, path, later=True)
        engine = Engine(self.model, self.tokenizer, store, options)
        engine._running.eos = frozenset()  # answers of fixed length
        return engine

    def jobs(self, count: int, requests: int, seed: int) -> list[tuple[int, list[int]]]:
        """(adapter, prompt) of every request: Zipf's law over the adapters, one prompt in three shared by all."""
        chance = random.Random(seed)
        weights = [1 / rank for rank in range(1, count + 1)]
        vocabulary = self.model.config.vocab_size
        shared = [chance.randrange(3, vocabulary) for _ in range(self.size.prompt[1])]
        found = []
        for adapter in chance.choices(range(count), weights, k=requests):
            length = chance.randint(*self.size.prompt)
            own = [chance.randrange(3, vocabulary) for _ in range(length)]
            found.append((adapter, shared[:length] if chance.random() < 0.33 else own))
        return found

    def run(self, count: int) -> dict[str, Any]:
        """Saturation first, then seven tenths of the rate that it showed."""
        engine = self.engine(count)
        engine.start()
        try:
            jobs = self.jobs(count, self.size.requests, SEED)
            harness.say(f"{count} adapters, saturated")
            saturated, many = asyncio.run(self._load(engine, jobs, None))
            rate = 0.7 * saturated["requests_per_second"]
            harness.say(f"{count} adapters, {rate:.2f} requests a second")
            fixed, fewer = asyncio.run(self._load(engine, jobs, rate))
            harness.say(f"{count} adapters, {self.size.checked} requests alone")
            asyncio.run(self._check(engine, jobs, ((saturated, many), (fixed, fewer))))
        finally:
            engine.stop()
            engine.store.close()
        return {"adapters": count, "saturated": saturated, "fixed_rate": fixed}

    def saturated(self, count: int) -> float:
        """Answer tokens a second at saturation, once more."""
        harness.say(f"{count} adapters, saturated again")
        engine = self.engine(count)
        engine.start()
        try:
            figures, _ = asyncio.run(self._load(engine, self.jobs(count, self.size.requests, SEED), None))
        finally:
            engine.stop()
            engine.store.close()
        return float(figures["tokens_per_second"])

    async def _load(
        self, engine: Engine, jobs: Sequence[tuple[int, list[int]]], rate: float | None
    ) -> tuple[dict[str, Any], list[Request]]:
        chance, before, made = random.Random(1), engine.store.stats(), []
        began = time.monotonic()
        due = began
        for adapter, prompt in jobs:
            if rate is not None:
                due += chance.expovariate(rate)
                await asyncio.sleep(max(due - time.monotonic(), 0))
            made.append(engine.submit(prompt, self.pool[adapter].name, Sampling(self.size.answer)))
            if rate is None and len(made) % 8 == 0:
                await asyncio.sleep(0)
        firsts = await asyncio.gather(*(_answered(request) for request in made))
        seconds = time.monotonic() - began
        after = engine.store.stats()
        figures = {
            "requests_per_second": round(len(jobs) / seconds, 3),
            "rate": None if rate is None else round(rate, 3),
            "tokens_per_second": round(sum(len(r.tokens) for r in made) / seconds, 2),
            **_spread("first", [first for first, _ in firsts]),
            **_spread("token", [token for _, token in firsts]),
            "goodput": round(
                sum(r.finished is not None and len(r.tokens) == self.size.answer for r in made) / seconds, 3
            ),
            "hit_rate": round(
                (after.hits - before.hits) / len(jobs), 3
            ),  # requests whose adapter was there when they came
            "loads": after.loads - before.loads,
            "evictions": after.evictions - before.evictions,
        }
        return figures, made

    async def _check(
        self,
        engine: Engine,
        jobs: Sequence[tuple[int, list[int]]],
        runs: Sequence[tuple[dict[str, Any], Sequence[Request]]],
    ) -> None:
        """Ask some requests again, each alone, and write into the figures of both runs how many answers differ. A near
        tie between two tokens may fall differently with another number of rows, which rounds otherwise; that is
        counted apart, with the gap of the logits."""
        chosen = random.Random(2).sample(range(len(jobs)), min(self.size.checked, len(jobs)))
        for figures, _ in runs:
            figures.update(checked=len(chosen), wrong=0, ties=0)
        for i in chosen:
            adapter, prompt = jobs[i]
            alone = engine.submit(prompt, self.pool[adapter].name, Sampling(self.size.answer, logprobs=2))
            await alone.collect()
            for figures, answers in runs:
                pairs = zip(alone.tokens, answers[i].tokens, strict=True)
                at = next((n for n, (one, other) in enumerate(pairs) if one != other), None)
                if at is not None:
                    top = alone.logprobs[at].top
                    tie = top[0][2] - top[1][2] < TIE and answers[i].tokens[at] in (top[0][0], top[1][0])
                    figures["ties" if tie else "wrong"] += 1

    def steps(self) -> dict[str, float]:
        """Milliseconds of a step of 32 rows: the base's, 32 adapters', and of a step with one row."""
        count = min(32, len(self.pool))
        engine = self.engine(count, share=1.0)
        backend, store = engine.backend, engine.store
        with store.holding(*(path.name for path in self.pool[:count])) as keys:
            mixed = [keys[i % count] for i in range(32)]
            found: dict[str, list[float]] = {"base": [], "mixed": []}
            rows = [backend.open(512) for _ in range(32)]
            from bitloft.serve.backend import Piece

            backend.run([Piece(row, [5] * 16, None) for row in rows])
            for i in range(self.size.steps + 2):
                for name, owners in (("base", [None] * 32), ("mixed", mixed)):
                    pieces = [Piece(row, [5], key) for row, key in zip(rows, owners, strict=True)]
                    began = time.perf_counter()
                    backend.run(pieces)
                    if i > 1:
                        found[name].append(time.perf_counter() - began)
        store.close()
        base, several = (statistics.median(found[name]) for name in ("base", "mixed"))
        return {"mixed32_vs_base_only": round(base / several, 3), "base32_ms": round(1e3 * base, 2),
                "mixed32_ms": round(1e3 * several, 2)}  # fmt: skip

    def cold(self) -> float:
        """First token of an adapter that has to be read, less the first token of the same one when it is there."""
        count = min(64, len(self.pool))
        engine = self.engine(count, share=0.1)
        engine.start()

        async def first(name: str) -> float:
            request = engine.submit([5] * 8, name, Sampling(1))
            await request.collect()
            return (request.first or 0) - request.accepted

        async def both() -> float:
            names = [path.name for path in self.pool[:count]]
            differences = []
            for name in reversed(names):
                if not engine.store.find(name).resident:
                    cold = await first(name)
                    differences.append(cold - await first(name))
            return statistics.median(differences) if differences else float("nan")

        try:
            return round(1e3 * asyncio.run(both()), 2)
        finally:
            engine.stop()
            engine.store.close()

    def beside_peft(self, source: Path, count: int) -> dict[str, Any]:
        """The same requests here and through PEFT, everything in memory in both; the best of two runs in turn."""
        count = min(count, len(self.pool))
        peer = peft_peer.Peer(source, self.pool, self.jobs(count, self.size.peft, 7), self.size.answer)
        theirs, ours = list[float](), list[float]()
        for turn in (1, 2):
            harness.say(f"{self.size.peft} requests to {count} adapters through PEFT, then here ({turn} of 2)")
            theirs.append(peer.seconds())
            ours.append(self.seconds(count, self.size.peft, 7))
        return {
            "ratio": round(min(theirs) / min(ours), 2),
            "ours_seconds": [round(one, 3) for one in ours],
            "seconds": [round(one, 3) for one in theirs],
            **peer.about,
        }

    def seconds(self, count: int, requests: int, seed: int) -> float:
        """What some requests take at once, everything in memory."""
        engine = self.engine(count, share=1.0)
        engine.start()
        try:
            jobs = self.jobs(count, requests, seed)

            async def all_of_them() -> float:
                began = time.monotonic()
                made = [engine.submit(p, self.pool[a].name, Sampling(self.size.answer)) for a, p in jobs]
                await asyncio.gather(*(request.collect() for request in made))
                return time.monotonic() - began

            asyncio.run(all_of_them())
            return asyncio.run(all_of_them())
        finally:
            engine.stop()
            engine.store.close()


SEED = 0  # the same for every number of adapters: prompts are then the same, and only whose they are differs
PEFT_ADAPTERS = (5, 100)  # of the requests that PEFT answers too, by Zipf's law; the last is the figure
TIE = 1e-3  # difference of two logarithms below which either token is right


async def _answered(request: Request) -> tuple[float, float]:
    """Seconds to the first token, and for each of the others."""
    try:
        await request.collect()
    except RequestError as error:
        raise RuntimeError(f"a request under load ended with {error.code}: {error}") from error
    first, finished = request.first or 0.0, request.finished or 0.0
    return first - request.accepted, (finished - first) / max(len(request.tokens) - 1, 1)


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        f"{name}_ms_p{p}": round(1e3 * ordered[min(len(ordered) * p // 100, len(ordered) - 1)], 1) for p in (50, 95, 99)
    }


if __name__ == "__main__":
    sys.exit(main())
