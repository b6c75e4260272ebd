"""What is measured without training: weights, outputs before training, packed adapters, sizes, memory.

Each probe yields cells (row, seed, metrics). The adapters are those that the g2p recipe's ``qlora nf2`` rows trained,
r8 of all linears; ``float`` is the adapter as trained, ``trained in float`` the one of ``lora`` put on that base.
"""

import json
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bitloft.checkpoint import read_json, read_tensors
from bitloft.compress import compress
from bitloft.integrations.source import open_source
from bitloft.judge import judge
from bitloft.options.recipe import Row, recipe_of
from bitloft.packing import block_bytes
from bitloft.regimes import Bench, dense_source, opened
from bitloft.solvers.adapter import Components, Loose, PackedBlock, Trained, components, factors, product_error
from bitloft.solvers.baselines import rtn, sign
from bitloft.solvers.loraquant import loraquant, loraquant_across, loraquant_unsplit
from bitloft.tasks.catalog import find_task, form_of
from claims_grid.work import Work, row_losses

Found = Iterator[tuple[str, int, Callable[[], dict[str, Any]]]]
Blocks = Sequence[PackedBlock | Loose]
WIDTHS = ("nf2", "nf3", "nf4")
PAPER = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096), "gate": (11008, 4096),
         "up": (11008, 4096), "down": (4096, 11008)}  # fmt: skip
LAYERS = 32


def weights(work: Work) -> Found:
    """|W - Q - s B A| / |W| of every matrix of two models, QLoRA's and LoftQ's with one step."""
    for width in WIDTHS:
        for name, settings in (("qlora", {"rank": 1}), ("loftq", {"rank": 16 if "minilm" in work.recipes else 4})):
            yield f"{name} {width}", 0, partial(_errors, work, name, width, settings)


def _errors(work: Work, regime: str, width: str, settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, float] = {}
    for model in [name for name in ("g2p", "minilm") if name in work.recipes]:
        rank = settings["rank"] if model == "minilm" else min(settings["rank"], 8)
        row = Row(regime, f"{width}:64", rank=rank, quantize={"steps": 1} if regime == "loftq" else {})
        report = read_json(work.bench(model).base(row) / "bitloft_report.json")
        side = "error_after" if regime == "loftq" else "error_before"
        found |= {f"{model} {m['name']}": m[side] for m in report["matrices"]}
    return {"error": found}


def outputs(work: Work) -> Found:
    """Loss before training of Q + s B A on held-out rows: Q rounded the same way, the factor fitted in three norms."""
    plain = {"feedback": "none", "sweeps": 0, "rounds": 1, "samples": 256, "calibrate_length": 32}
    plain["samples"] = min(256, (work.recipes["g2p"].train_rows or 512) // 2)
    for width in WIDTHS:
        for metric in ("none", "diagonal", "full"):
            row = Row(
                "calibrated", f"{width}:64", rank=8, start="frozen", untrained=True, quantize=plain | {"metric": metric}
            )
            yield f"{metric} {width}", 0, partial(_untrained, work, row)


def _untrained(work: Work, row: Row) -> dict[str, Any]:
    bench = work.bench("g2p")
    return {"rows": row_losses(bench, opened(bench.base(row), row, 0))}


def adapters(work: Work) -> Found:
    """Loss, product error and true bits (codes, scales and zero points; no header) of packed adapters, by method."""
    for seed in work.recipes["g2p"].seeds:
        for name in METHODS:
            yield name, seed, partial(_judged, work, seed, name)


METHODS: dict[str, Callable[[Components, Trained], Blocks] | None] = {
    "base": None,
    "float": None,
    "trained in float": None,
    "2@0.8": lambda e, t: loraquant(e, high=2, ratio=0.8),
    "3@0.9": lambda e, t: loraquant(e, high=3, ratio=0.9),
    "sign": lambda e, t: sign(t),
    "rtn 2": lambda e, t: rtn(t, 2),
    "2@0.8 by norm": lambda e, t: loraquant_unsplit(e, t, high=2, ratio=0.8, by="norm"),
    "2@0.8 at random": lambda e, t: loraquant_unsplit(e, t, high=2, ratio=0.8, by="random"),
    "2@0.8 across": lambda e, t: [loraquant_across(e, high=2, ratio=0.8)],
}


def _judged(work: Work, seed: int, name: str) -> dict[str, Any]:
    make = METHODS[name]
    bench, row = work.bench("g2p"), work.row("g2p", "qlora nf2")
    model = opened(bench.base(row), row, seed)
    source = "lora" if name == "trained in float" else "qlora nf2"
    pairs = _pairs(read_tensors(work.kept("g2p", source, seed)))
    lost = whole = size = values = 0.0
    with torch.no_grad():
        for path, (a, b) in pairs.items():
            layer = model.get_submodule(path)
            if make is not None:
                exact, trained = components(a, b, 1.0), Trained(a, b.T.contiguous())
                blocks = make(exact, trained)
                sides = [factors(block) for block in blocks]
                lost, whole = lost + product_error(exact, list(blocks)), whole + exact.energy
                size += sum(x.nbytes if isinstance(x, Loose) else block_bytes(x) for x in blocks)
                values += a.numel() + b.numel()
                a, b = torch.cat([side[0] for side in sides]), torch.cat([side[1] for side in sides]).T
            layer.lora_A["default"].weight.copy_(a if name != "base" else torch.zeros_like(a))
            layer.lora_B["default"].weight.copy_(b)
    loss = list(row_losses(bench, model).values())
    found: dict[str, Any] = {"loss": round(sum(loss) / len(loss), 6)}
    return found | ({"error": lost / whole, "bits": 8 * size / values} if make is not None else {})


def _pairs(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every module, by the path of its LoRA layer."""
    paths = sorted({name.partition(".lora_")[0] for name in tensors if ".lora_" in name})
    return {p: (tensors[f"{p}.lora_A.default.weight"], tensors[f"{p}.lora_B.default.weight"]) for p in paths}


def ranges(work: Work) -> Found:
    """The share of the squared error of the leading components that searching their ranges removes, per adapter."""
    for seed in work.recipes["g2p"].seeds:
        for bits in (2, 3):
            yield f"{bits} bits", seed, partial(_share, work, seed, bits)
        yield "nothing", seed, lambda: {"share": 0.0}


def _share(work: Work, seed: int, bits: int) -> dict[str, Any]:
    lost = {True: 0.0, False: 0.0}
    for a, b in _pairs(read_tensors(work.kept("g2p", "qlora nf2", seed))).values():
        exact = components(a, b, 1.0)
        for refine in lost:
            lost[refine] += product_error(exact, list(loraquant(exact, high=bits, ratio=1.0, refine=refine)))
    return {"share": 1 - lost[True] / lost[False]}


def bits(work: Work) -> Found:
    """True bits of LoRAQuant at r16 on random factors of 7B shapes: flat spectra, and ones that fall tenfold."""
    for seed in range(3):
        for name, steep in (("flat", 0.0), ("steep", -1.0)):
            for high, ratio in ((2, 0.8), (3, 0.9)):
                yield f"{name} {high}@{ratio}", seed, partial(_bits, seed, steep, high, ratio)


def _bits(seed: int, decay: float, high: int, ratio: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(16, 4096, generator=generator) * torch.logspace(0, decay, 16)[:, None]
    b = torch.randn(4096, 16, generator=generator)
    blocks = loraquant(components(a, b, 1.0), high=high, ratio=ratio)
    return {"bits": 8 * sum(map(block_bytes, blocks)) / (a.numel() + b.numel())}


def sizes(work: Work) -> Found:
    """LoftQ's Table 7 at its own way of counting, from bench/sizes.py."""
    import sizes as table

    for name, spelling in (("2 bits", "nf2:64"), ("4 bits", "nf4:64")):
        yield name, 0, partial(_paper_like, table, spelling)


def _paper_like(table: Any, spelling: str) -> dict[str, Any]:
    rows = table.measure("llama-2-7b")["settings"]
    return {"per cent": next(row["paper_like"] for row in rows if row["format"] == spelling)}


def memory(work: Work) -> Found:
    """An all-linear r16 adapter of 7B shapes: bytes in 16 bit, packed on disk, and what reading one and four adds to
    the process. One layer of seven matrices is packed, thirty-two of them are counted; resident is of whole copies."""
    found: dict[str, float] = {}

    def once(name: str) -> dict[str, Any]:
        if not found:
            found.update(_memory())
        return {"ratio" if name == "four over one" else "MB": round(found[name], 4)}

    for name in ("float", "2@0.8 on disk", "2@0.8 resident", "four over one"):
        yield name, 0, partial(once, name)


def _memory() -> dict[str, float]:
    import adapter_memory

    with tempfile.TemporaryDirectory() as place:
        plain, packed = Path(place) / "plain", Path(place) / "packed"
        values = _write_layer(plain)
        report = compress(plain, packed, method="loraquant", high=2, ratio=0.8)
        grown = []
        for count in (LAYERS, 4 * LAYERS):  # a process each: one that has freed memory would reuse it and not grow
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                grown.append(pool.apply(adapter_memory.measured, (packed, count))["resident_bytes"])
        return {
            "float": 2 * values * LAYERS / 1e6,
            "2@0.8 on disk": report.bytes * LAYERS / 1e6,
            "2@0.8 resident": grown[0] / 1e6,
            "four over one": grown[1] / grown[0],
        }


def _write_layer(directory: Path) -> int:
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, (rows, columns) in PAPER.items():
        key = f"base_model.model.model.layers.0.{name}_proj"
        tensors[f"{key}.lora_A.weight"] = torch.randn(16, columns, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(rows, 16, generator=generator) * 0.01
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": [f"{n}_proj" for n in PAPER]}
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return sum(tensor.numel() for tensor in tensors.values())


def paper(work: Work) -> Found:
    """A row for every task of the papers that has data here: its own metrics on a few real rows, as ``eval --task``."""
    for task in (*DECODED, *ENCODED) if "smollm2" in work.recipes else ():
        yield task, 0, partial(_paper_task, work, task)


DECODED = ("wikitext2", "gsm8k", "math", "humaneval", "mbpp", "xsum", "cnn_dailymail")
ENCODED = {"sst2": "glue_sst2", "mrpc": "glue_mrpc", "rte": "glue_rte", "cola": "glue_cola", "qnli": "glue_qnli",
           "mnli": "glue_mnli", "anli": "anli", "squad": "squad_v1"}  # fmt: skip
TAUGHT = ("sst2", "mrpc", "rte", "cola")  # whose training rows are at hand; the other heads are random
LENGTH = {"cnn_dailymail": 2048}  # tokens, where no article is shorter than 512
LIMITS = {"decoder": 2, "encoder": 64, "taught": 320}


def _paper_task(work: Work, task: str) -> dict[str, Any]:
    data = Path(str(work.recipes["smollm2"].data)).parent
    if task in DECODED:
        found = judge(
            work.recipes["smollm2"].model, task, data / task, limit=LIMITS["decoder"], batch=2,
            length=LENGTH.get(task, 512), allow_code_execution=True,
        )  # fmt: skip
        return {score.name: score.value for score in found.scores}
    settings = {"model": work.recipes["minilm"].model, "task": task, "data": str(data / ENCODED[task]), "length": 96}
    settings |= {"train_rows": LIMITS["taught"], "test_rows": LIMITS["encoder"], "rows": [{"regime": "lora"}]}
    settings["train"] = {"steps": 10, "batch": 32, "lr": 3e-3}
    recipe = recipe_of(settings)
    row, place = recipe.rows[0], work.directory / "paper"
    if task in TAUGHT:
        cell = Bench.open(recipe, place).run(row, 0)
        return {score["name"]: score["value"] for score in cell["scores"]}
    chosen = find_task(task)
    model = opened(dense_source(Path(recipe.model), chosen, place), row, 0)
    form = form_of(chosen, model.config, open_source(recipe.model).tokenizer, length=recipe.length)
    rows = chosen.rows(recipe.data, "test", recipe.test_rows)
    return {score.name: score.value for score in form.judge(model.eval(), rows, 16)}


PROBES: dict[str, Callable[[Work], Found]] = {
    "sizes": sizes,
    "bits": bits,
    "memory": memory,
    "weights": weights,
    "outputs": outputs,
    "ranges": ranges,
    "adapters": adapters,
    "paper": paper,
}
