"""What a machine does in a second, measured once and kept in a TOML file that plans are made from.

    seconds = sum of coefficient * feature     quantize: matrices, weights, edges (rows + columns), bytes read; where a
                                               text is measured also columns^3, rows * columns^2, and tokens times
                                               weights and times columns^2
                                               train: weights * tokens, head * tokens, layers * tokens, layers
                                               compress: adapters, modules, values
                                               prefill, decode: weights, head, layers, each also times rows

Coefficients are fitted, none negative, to real runs of the verbs on small random Llamas, so that overheads are in them
that a count of operations does not know. They hold for the settings that they were measured with (format, rank,
threads ...); a plan for others asks for another measurement instead of guessing.
"""

import itertools
import os
import platform
import statistics
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitloft.checkpoint import replace_text
from bitloft.compress import compress
from bitloft.errors import KernelError, OptionError
from bitloft.factors import Pair, write_lora
from bitloft.footprint import random_llama, random_text
from bitloft.integrations.decoder import Decoder, reason
from bitloft.integrations.loading import load
from bitloft.integrations.peft import fresh_adapter
from bitloft.options import PlanOptions, QuantizeOptions
from bitloft.quantize import quantize
from bitloft.quantize_report import QuantizeReport
from bitloft.tasks.lm import target_losses

Progress = Callable[[int, int, str], None]
KINDS = ("quantize", "train", "compress", "prefill", "decode")
# hidden, intermediate, layers, vocabulary of what is measured: widths, depth and head vary one by one
MODELS = ((128, 256, 1, 512), (256, 768, 4, 512), (576, 1536, 1, 512), (576, 1536, 2, 8192))
SMALL = ((64, 128, 1, 128), (128, 256, 2, 256))  # the same in a second, for tests of the way and not of the figures
# modules, rows and columns of the adapters that are packed
ADAPTERS = ((8, 576, 576), (28, 576, 1536), (56, 576, 576), (14, 1024, 2816))
SMALL_ADAPTERS = ((2, 64, 64), (4, 64, 96))
ROWS = (1, 8)  # of a decoding step
CALIBRATION = (12, 128)  # sequences and tokens of each that the solver calibrated is measured with


@dataclass(frozen=True)
class Rates:
    """Coefficients of one kind of work, in seconds, for the settings that they were measured with."""

    kind: str
    setting: dict[str, Any]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Machine:
    """``memory`` in bytes; ``nodes`` of the same kind, which keep ``efficiency`` of their speed together; ``price`` of
    one for an hour."""

    name: str
    cores: int
    memory: int
    nodes: int = 1
    efficiency: float = 0.85
    price: float = 0.0
    rates: tuple[Rates, ...] = field(default=())

    def seconds(self, kind: str, setting: Mapping[str, Any], features: Mapping[str, float]) -> float:
        """Seconds of work. Raises OptionError where these settings were not measured."""
        for found in self.rates:
            if found.kind == kind and found.setting == dict(setting):
                return sum(value * features.get(name, 0.0) for name, value in found.seconds.items())
        asked = ", ".join(f"{key} {value}" for key, value in setting.items())
        raise OptionError(
            f"the machine {self.name} has no rates of {kind} for {asked}; measure it there with the same options "
            "(`bitloft plan MODEL --machine FILE --measure`)."
        )


def read_machine(file: Path) -> Machine:
    """A machine or cluster file. Raises OptionError naming what is missing or not readable."""
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
        about, rows = dict(found["machine"]), found.get("rates", [])
        rates = tuple(Rates(row["kind"], dict(row["setting"]), dict(row["seconds"])) for row in rows)
        machine = Machine(**about | {"rates": rates})
        positive = (machine.cores, machine.memory, machine.nodes, machine.efficiency)
        if min(positive) <= 0 or machine.price < 0 or any(r.kind not in KINDS for r in rates):
            raise ValueError("a number in it is not positive, or a kind of rates is unknown")
        return machine
    except OSError as error:
        raise OptionError(
            f"cannot read the machine file {file} ({error.strerror}); make one with `bitloft plan MODEL --machine "
            f"{file} --measure` on that machine."
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise OptionError(f"{file} is no machine file ({error}); docs/scale.md shows one.") from error


def write_machine(file: Path, machine: Machine) -> None:
    """Write ``machine`` as TOML, whole or not at all."""
    lines = ["[machine]"]
    for name in ("name", "cores", "memory", "nodes", "efficiency", "price"):
        lines.append(f"{name} = {_toml(getattr(machine, name))}")
    for rates in machine.rates:
        lines += ["", "[[rates]]", f"kind = {_toml(rates.kind)}"]
        for name, values in (("setting", rates.setting), ("seconds", rates.seconds)):
            pairs = ", ".join(f"{key} = {_toml(value)}" for key, value in values.items())
            lines.append(f"{name} = {{ {pairs} }}")
    replace_text(file, "\n".join(lines) + "\n")


def _toml(value: object) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(float(value)) if isinstance(value, float) else str(value)


def settings(options: PlanOptions, fmt: str) -> dict[str, dict[str, Any]]:
    """What rates of each kind depend on, for one format of the base."""
    shared = {"format": fmt, "rank": options.rank}
    cores = torch.get_num_threads()
    return {
        "quantize": shared | {"solver": options.solver, "steps": options.steps, "threads": options.threads},
        "train": shared | {"adapter_rank": options.adapter_rank, "dtype": options.dtype, "threads": cores},
        "compress": {"adapter_rank": options.adapter_rank, "bits": options.adapter_bits},
        "prefill": shared | {"threads": cores},
        "decode": shared | {"threads": cores},
    }


def measure(
    options: PlanOptions,
    formats: Sequence[str],
    known: Machine | None = None,
    *,
    models: Sequence[tuple[int, int, int, int]] = MODELS,
    kinds: Sequence[str] = KINDS,
    progress: Progress | None = None,
) -> Machine:
    """Measure this machine for these options and formats; what ``known`` holds of other settings stays, and of other
    ``kinds`` of work."""
    made: list[Rates] = []
    for done, fmt in enumerate(formats):
        with tempfile.TemporaryDirectory(prefix="bitloft-measure-") as place:
            made += _of_format(options, fmt, Path(place), models, kinds)
        if progress is not None:
            progress(done + 1, len(formats), fmt)
    machine = known or Machine(_name(), os.cpu_count() or 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    fresh = [(rates.kind, rates.setting) for rates in made]
    kept = tuple(rates for rates in machine.rates if (rates.kind, rates.setting) not in fresh)
    unique = {(rates.kind, str(rates.setting)): rates for rates in made}
    return replace(machine, rates=(*kept, *unique.values()))


def _name() -> str:
    return platform.node() or "this machine"


def solving(options: PlanOptions, rows: int, columns: int) -> dict[str, float]:
    """Features of the work on one matrix."""
    found = {"matrices": 1.0, "weights": float(rows * columns), "edges": float(rows + columns)}
    if options.solver == "calibrated":  # factors of the second moment, and error fed from column to column
        found |= {"cubes": float(columns) ** 3, "squares": float(rows) * columns**2}
    return found


def gathering(options: PlanOptions, shapes: Sequence[tuple[int, int]], tokens: int) -> dict[str, float]:
    """Features of reading a text through the model: its products, and the second moments of what they multiply."""
    if options.solver != "calibrated":
        return {}
    weights, moments = sum(r * c for r, c in shapes), sum(c * c for _, c in shapes)
    return {"weights_tokens": float(weights) * tokens, "moments": float(moments) * tokens}


def _of_format(
    options: PlanOptions, fmt: str, place: Path, models: Sequence[tuple[int, int, int, int]], kinds: Sequence[str]
) -> list[Rates]:
    rows: dict[str, list[tuple[dict[str, float], float]]] = {kind: [] for kind in KINDS}
    for number, shape in enumerate(models):
        rank = min(options.rank, min(shape[:2]) // 2)
        source, base = random_llama(place / f"model{number}", *shape), place / f"base{number}"
        report = _quantized(source, base, replace(options.quantizing(), format=fmt, rules=(), rank=rank), options)
        rows["quantize"] += [(solving(options, *matrix.shape), matrix.seconds) for matrix in report.matrices]
        rest = report.seconds - sum(matrix.seconds for matrix in report.matrices)
        shapes = [(matrix.shape[0], matrix.shape[1]) for matrix in report.matrices]
        reading = gathering(options, shapes, prod(CALIBRATION))
        rows["quantize"].append(({"runs": 1.0, "bytes": float(report.source_bytes)} | reading, rest))
        sizes = _sizes(shape, report.weights)
        if "train" in kinds:
            _trained(base, options, min(options.adapter_rank, min(shape[:2]) // 2), sizes, rows["train"])
        if "decode" in kinds:
            _served(base, sizes, rows["prefill"], rows["decode"])
    for number, adapter in enumerate(ADAPTERS if models is MODELS else SMALL_ADAPTERS):
        if "compress" in kinds:
            rows["compress"].append(_compressed(adapter, place / f"adapter{number}", options))
    asked = settings(options, fmt)
    return [Rates(kind, asked[kind], fitted(found)) for kind, found in rows.items() if found]


def _quantized(source: Path, base: Path, chosen: QuantizeOptions, options: PlanOptions) -> QuantizeReport:
    if chosen.solver == "calibrated":
        samples, length = CALIBRATION
        text = random_text(source, samples * (length + 1))
        chosen = replace(chosen, calibrate=str(text), samples=samples, calibrate_length=length)
    return quantize(str(source), base, chosen, threads=options.threads)


def _sizes(shape: tuple[int, int, int, int], weights: int) -> dict[str, float]:
    hidden, _, layers, vocabulary = shape
    return {"weights": float(weights), "head": float(hidden * vocabulary), "layers": float(layers)}


def _trained(
    base: Path, options: PlanOptions, rank: int, sizes: Mapping[str, float], rows: list[tuple[dict[str, float], float]]
) -> None:
    """Time optimizer steps as ``train`` takes them."""
    length = min(options.length, 256)
    model = fresh_adapter(load(base, arrange=False), rank=rank, alpha=rank).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    ids = torch.randint(0, 100, (options.batch, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    half = options.dtype == "bfloat16"

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses, _ = target_losses(model, batch)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    tokens = float(ids.numel())
    features = {f"{name}_tokens": value * tokens for name, value in sizes.items()} | {"layers": sizes["layers"]}
    rows.append((features, _median(step, 3)))


def _compressed(shape: tuple[int, int, int], place: Path, options: PlanOptions) -> tuple[dict[str, float], float]:
    """Time packing a made-up adapter (modules, rows, columns) whose spectra fall tenfold, as trained ones do."""
    generator = torch.Generator().manual_seed(0)
    modules, rows, columns = shape
    rank = options.adapter_rank
    steep = torch.logspace(0, -1, rank)[:, None]
    pairs = {
        f"model.layers.{i}.self_attn.q_proj": Pair(
            torch.randn(rank, columns, generator=generator) * steep, torch.randn(rows, rank, generator=generator) * 0.01
        )
        for i in range(modules)
    }
    values = modules * rank * (rows + columns)
    write_lora(place / "plain", pairs, base_name="measured")
    bits = max(
        options.adapter_bits, 8 * 8000 / values
    )  # names and sums of a tiny adapter take more than its bits allow
    usual = torch.get_num_threads()
    torch.set_num_threads(1)  # as bulk compressing runs
    try:
        report = compress(place / "plain", place / "packed", bits=bits)
    finally:
        torch.set_num_threads(usual)
    return {"adapters": 1.0, "modules": float(modules), "values": float(values)}, report.seconds


def _served(
    base: Path,
    sizes: Mapping[str, float],
    prefill: list[tuple[dict[str, float], float]],
    decode: list[tuple[dict[str, float], float]],
) -> None:
    """Time reading a prompt and a step of the native decoder; nothing where it does not run here."""
    model = load(base)
    if reason(model) is not None:
        return
    try:
        decoder = Decoder(model)
        for tokens in (64, 256):
            prompt = [[1 + i % 100 for i in range(tokens)]]
            times = {f"{name}_tokens": value * tokens for name, value in sizes.items() if name != "head"}
            prefill.append((times | dict(sizes), _median(partial(decoder.prefill, prompt), 3)))
        for count in ROWS:
            rows, _ = decoder.prefill([[1, 2, 3]] * count)
            features = dict(sizes) | {f"{name}_rows": value * count for name, value in sizes.items()}
            decode.append((features, _median(partial(decoder.step, rows, [1] * count), 20)))
    except KernelError as error:
        raise OptionError(f"serving cannot be measured here: {error}") from error


def _median(run: Callable[[], object], repeats: int) -> float:
    run()
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def fitted(rows: Sequence[tuple[Mapping[str, float], float]]) -> dict[str, float]:
    """Coefficients, none negative, of the least sum of squared relative errors; features without a use are left out.

    With few features every subset can be tried, which is exact: of the subsets whose least squares are not negative,
    the best.
    """
    names = list(dict.fromkeys(name for features, _ in rows for name in features))
    # in units of each feature's largest value, and of each row's seconds
    matrix = np.asarray([[features.get(name, 0.0) for name in names] for features, _ in rows])
    seconds = np.asarray([max(spent, 1e-9) for _, spent in rows])
    units = matrix.max(axis=0)
    scaled = matrix / np.where(units > 0, units, 1) / seconds[:, None]
    best: tuple[float, dict[str, float]] = (float("inf"), {})
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(range(len(names)), count):
            part = scaled[:, chosen]
            solution, *_ = np.linalg.lstsq(part, np.ones(len(rows)), rcond=None)
            lost = float(np.square(part @ solution - 1).sum())
            if (solution >= 0).all() and lost < best[0] * (1 - 1e-6):
                best = lost, {names[i]: float(c / units[i]) for i, c in zip(chosen, solution, strict=True)}
    return best[1]
