"""The plan verb: what a job takes in bytes and time on a machine, before anything is computed.

    bytes    counted by the functions that write the files (``footprint.py``)
    time     features of the work times the rates that were measured on the machine (``machine.py``)
    serving  replicas for the requests, and a simulation of store and router (``traffic.py``)

A model's config is enough. What a plan cannot know it says: a quantizing process has its largest matrix in memory
besides what torch itself takes, and traffic is taken as independent requests under Zipf's law.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitloft import machine as machines
from bitloft.errors import OptionError
from bitloft.footprint import Footprint, Shape, footprint, sketched
from bitloft.machine import Machine, Progress, gathering, read_machine, settings, solving, write_machine
from bitloft.options import PlanOptions
from bitloft.report import Section, Table, lines, page
from bitloft.slots import bytes_of
from bitloft.traffic import Outcome, Servers, Traffic, che, replicas_needed, simulate, zipf

GIB = 1 << 30
PROCESS = 700_000_000  # bytes of a process with torch and transformers loaded, nothing in it
WORK = 16  # bytes a weight that the solvers hold at once: float32 of W, of Q, of the residual, and of a copy
ACTIVATIONS = 40  # bytes a token, layer and hidden value that training keeps; logits count apart


@dataclass(frozen=True)
class Stage:
    """One stage on one node: bytes that it writes, memory of all its processes, seconds (None: not measured)."""

    name: str
    disk: int
    memory: int
    seconds: float | None
    note: str = ""


@dataclass(frozen=True)
class PlanReport:
    """What ``plan`` found. Times need a machine file; ``outcome`` is the simulation of serving."""

    model: str
    machine: str | None
    footprint: Footprint
    stages: tuple[Stage, ...]
    adapters_per_gib: float
    adapters_per_gib_plain: float
    replicas: int | None
    throughput: float | None
    budget: int
    outcome: Outcome | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)


def plan(
    model: str | Path,
    options: PlanOptions | None = None,
    *,
    machine: str | Path | Machine | None = None,
    measure: bool = False,
    progress: Progress | None = None,
    **given: Any,
) -> PlanReport:
    """Plan quantizing, training, packing and serving of ``model`` (folder, URL or hub name; its config is enough).

    Settings are the fields of PlanOptions. ``machine`` is a machine file (times and replicas need one); with
    ``measure`` this machine is measured for these options first, and the file written. Raises OptionError for rates
    that the file does not have, CheckpointError for a model that is not found.
    """
    options = options or PlanOptions(**given)
    if measure and not isinstance(machine, str | Path):
        raise OptionError("measuring writes a machine file; name it (--machine FILE).")
    with sketched(str(model)) as source:
        found = footprint(source, options)
    held = machine if isinstance(machine, Machine) else None
    if isinstance(machine, str | Path):
        file = Path(machine)
        held = read_machine(file) if file.exists() or not measure else None
        if measure:
            held = machines.measure(options, _formats(found), held, progress=progress)
            write_machine(file, held)
    stages = (_quantize(found, options, held), _train(found, options, held), _compress(found, options, held))
    budget = _budget(found, options, held)
    throughput = None if held is None else _throughput(found, options, held)
    replicas = throughput and replicas_needed(options.requests, throughput, utilisation=options.utilisation)
    outcome = None
    if held is not None and throughput and replicas:
        outcome = simulate(
            _traffic(found, options), _servers(found, options, held, throughput, replicas, budget),
            requests=options.played, seed=options.seed,
        )  # fmt: skip
    return PlanReport(
        model=str(model),
        machine=None if held is None else held.name,
        footprint=found,
        stages=(*stages, _serve(found, options, held, budget)),
        adapters_per_gib=GIB / max(found.adapter_packed, 1),
        adapters_per_gib_plain=GIB / max(found.adapter_plain, 1),
        replicas=replicas or None,
        throughput=throughput,
        budget=budget,
        outcome=outcome,
    )


def _formats(found: Footprint) -> list[str]:
    return list(dict.fromkeys(shape.format for shape in found.shapes))


def _most(found: Footprint) -> str:
    """The format that most weights have: rates of whole forwards are measured with one."""
    return max(found.shapes, key=lambda shape: shape.weights).format


def _quantize(found: Footprint, options: PlanOptions, held: Machine | None) -> Stage:
    largest = max(shape.rows * shape.columns for shape in found.shapes)
    memory = options.jobs * (PROCESS + WORK * largest)
    seconds = None
    if held is not None:
        shapes = [(shape.rows, shape.columns) for shape in found.shapes for _ in range(shape.count)]
        reading = gathering(options, shapes, options.samples * options.calibrate_length)
        fixed = {"runs": 1.0, "bytes": float(found.source)} | reading
        alone = held.seconds("quantize", settings(options, _most(found))["quantize"], fixed)
        work = sum(
            held.seconds("quantize", settings(options, shape.format)["quantize"], _work(shape, options))
            for shape in found.shapes
        )
        seconds = alone + work / (options.jobs * _together(held))
    return Stage("quantize", found.base, memory, seconds, f"{options.jobs} processes a node")


def _work(shape: Shape, options: PlanOptions) -> dict[str, float]:
    return {name: value * shape.count for name, value in solving(options, shape.rows, shape.columns).items()}


def _together(held: Machine) -> float:
    """How many of one machine all nodes are worth."""
    return held.nodes * held.efficiency if held.nodes > 1 else 1.0


def _features(found: Footprint) -> dict[str, float]:
    return {"weights": float(found.weights), "head": float(found.head), "layers": float(found.layers)}


def _train(found: Footprint, options: PlanOptions, held: Machine | None) -> Stage:
    tokens = options.batch * options.length
    hidden = max((shape.columns for shape in found.shapes), default=0)
    logits = 0 if not found.head else 4 * tokens * found.head // max(min(s.columns for s in found.shapes), 1)
    memory = PROCESS + found.loaded + found.adapter_training + ACTIVATIONS * tokens * found.layers * hidden + logits
    seconds = None
    if held is not None:
        sizes = _features(found)
        features = {f"{name}_tokens": value * tokens for name, value in sizes.items()} | {"layers": sizes["layers"]}
        step = held.seconds("train", settings(options, _most(found))["train"], features)
        seconds = step * options.accumulate * options.train_steps / _together(held)
    note = f"{options.train_steps} steps of {options.accumulate * tokens} tokens; memory is an estimate"
    return Stage("train", found.adapter_plain, memory, seconds, note)


def _compress(found: Footprint, options: PlanOptions, held: Machine | None) -> Stage:
    modules = sum(shape.count for shape in found.shapes)
    seconds = None
    if held is not None:
        features = {"adapters": 1.0, "modules": float(modules), "values": float(found.adapter_values)}
        one = held.seconds("compress", settings(options, _most(found))["compress"], features)
        seconds = one * options.adapters / (held.cores * _together(held))
    disk = options.adapters * found.adapter_packed
    return Stage("compress", disk, PROCESS, seconds, f"{options.adapters} adapters, one process a core")


def _serve(found: Footprint, options: PlanOptions, held: Machine | None, budget: int) -> Stage:
    caches = options.concurrency * (options.prompt + options.answer) * found.cache
    stored = options.adapters * found.adapter_packed
    memory = PROCESS + found.loaded + caches + min(budget, stored)
    return Stage("serve", found.base + stored, memory, None, f"{options.concurrency} requests at once; a replica")


def _budget(found: Footprint, options: PlanOptions, held: Machine | None) -> int:
    """Bytes for adapters on a replica."""
    if options.adapter_budget is not None:
        return bytes_of(options.adapter_budget, "adapter_budget")
    if held is None:
        return options.adapters * found.adapter_packed
    caches = options.concurrency * (options.prompt + options.answer) * found.cache
    left = held.memory - PROCESS - found.loaded - caches
    if left <= 0:
        raise OptionError(
            f"a replica of {found.name} takes {PROCESS + found.loaded + caches:,} bytes without any adapter, and "
            f"{held.name} has {held.memory:,}; plan fewer requests at once, a smaller format or another machine."
        )
    return left // 2


def _throughput(found: Footprint, options: PlanOptions, held: Machine) -> float:
    """Requests a second of a replica whose batch is full: prompts are read one by one, answers written together."""
    reading, _, step = _times(found, options, held)
    return 1 / (reading + options.answer * step / options.concurrency)


def _times(found: Footprint, options: PlanOptions, held: Machine) -> tuple[float, float, float]:
    """Seconds to read a prompt, of a decoding step of one row, and of a full batch."""
    asked, sizes = settings(options, _most(found)), _features(found)
    features = {f"{name}_tokens": value * options.prompt for name, value in sizes.items() if name != "head"}
    reading = held.seconds("prefill", asked["prefill"], features | sizes)
    steps = []
    for rows in (1, options.concurrency):
        times = {f"{name}_rows": value * rows for name, value in sizes.items()}
        steps.append(held.seconds("decode", asked["decode"], sizes | times))
    return reading, steps[0], steps[1]


def _traffic(found: Footprint, options: PlanOptions) -> Traffic:
    sizes = np.full(options.adapters, max(found.adapter_packed, 1))
    return Traffic(options.adapters, options.zipf, options.requests, sizes)


def _servers(
    found: Footprint, options: PlanOptions, held: Machine, throughput: float, replicas: int, budget: int
) -> Servers:
    reading, _, full = _times(found, options, held)
    return Servers(
        replicas=replicas, budget=budget, throughput=throughput, service=reading + options.answer * full,
        load_seconds=LOAD[0], load_rate=LOAD[1], router=options.router, price=held.price,
    )  # fmt: skip


LOAD = (0.005, 200e6)  # seconds of opening and checking a packed adapter, and bytes a second of reading and summing it


def page_of(report: PlanReport, options: PlanOptions) -> str:
    """One HTML page: the stages, and hit rate over the adapters' memory. Raises OptionError without matplotlib."""
    rows = tuple((s.name, f"{s.disk:,}", f"{s.memory:,}", _spell(s.seconds), s.note) for s in report.stages)
    parts: list[Section] = [Section("Stages", (Table(("stage", "bytes on disk", "memory", "time", "note"), rows),))]
    shares, sizes = zipf(options.adapters, options.zipf), _traffic(report.footprint, options).sizes
    total = int(sizes.sum())
    series = {}
    for exponent in sorted({0.6, 0.8, 1.0, options.zipf}):
        law = zipf(options.adapters, exponent) if exponent != options.zipf else shares
        points = [(float(part), float(law @ che(law, sizes, int(part * total)))) for part in np.linspace(0.02, 1, 25)]
        series[f"zipf {exponent:g}"] = points
    shown = lines(series, x="memory for adapters, share of all", y="requests that find theirs", caption="Hit rate")
    parts.append(Section("Adapters in memory", (shown,)))
    if report.outcome is not None:
        found = report.outcome
        facts = (("hit rate", f"{found.hit_rate:.4f}"), ("loads a second", f"{found.loads_per_second:.3g}"),
                 ("bytes loaded a second", f"{found.load_traffic:.4g}"), ("busiest replica", f"{found.busiest:.0%}"),
                 *((name, f"{seconds:.3f} s") for name, seconds in found.latency.items()),
                 ("cost of a million requests", f"{found.cost:.4g}"))  # fmt: skip
        curve = {"latency": [(float(name[1:]), seconds) for name, seconds in found.latency.items()]}
        drawn = lines(curve, x="per cent of requests", y="seconds at most", caption="Latency, busiest replica")
        parts.append(Section("Traffic", (Table(("", ""), facts), drawn)))
    return page(f"Plan for {report.model}", parts)


def _spell(seconds: float | None) -> str:
    if seconds is None:
        return "not measured"
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def rows_of(report: PlanReport) -> Sequence[tuple[str, ...]]:
    """The stages for a table on a terminal."""
    return [(s.name, f"{s.disk:,}", f"{s.memory:,}", _spell(s.seconds), s.note) for s in report.stages]
