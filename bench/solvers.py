"""Every number format with every solver on three real models, before any training: weight error and what it does.

    SmolLM2    decoder           perplexity of the first tokens of WikiText-2's test text
    MiniLM     encoder           area under the ROC curve of the cosine of two sentences, on MRPC's validation pairs
    BART-g2p   encoder-decoder   share of dictionary words whose pronunciation comes out exactly

Error is |W - Q - s0*B0*A0| / |W| over all matrices together, with the start as it is stored; true bits count scales and
start. The float model is the first row of each. Cells are kept in bench/results/cells and measured once; another run
goes on where an interrupted one stopped. SmolLM2's "full precision" already lies on a 4-bit grid (it comes from Q4_1).

Folders: --smollm2, --minilm (or BITLOFT_SMOLLM2, BITLOFT_MINILM), --shared for BART-g2p and the data (BITLOFT_SHARED).
"""

import argparse
import csv
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor, nn

from bitloft.integrations.loading import quiet_loading
from bitloft.integrations.record import load_tokenizer
from bitloft.kernels.ops import decode
from bitloft.modules.select import select_modules
from bitloft.options import QuantizeOptions
from bitloft.rules import ModulePlan
from bitloft.solvers import solve

FORMATS = (
    "uniform2:tensor", "nf2:64", "book2:64", "lm2:64", "lm2:64+dq", "uniform2:64", "nf3:64", "lm3:64", "book3:64",
    "uniform3:64", "nf4:64", "nf4:64+dq", "lm4:64", "lm4:64+dq", "uniform4:64", "lm2:64+shift", "lm4:64+shift",
)  # fmt: skip
SOLVERS = (("qlora", 1), ("loftq", 1), ("loftq", 5), ("qalora", 1))  # with T; qalora needs a shift per group
QUICK = ("nf2:64", "lm2:64", "nf4:64")


@dataclass(frozen=True)
class Case:
    """A model with its measure: ``better`` says which way it goes."""

    name: str
    model: nn.Module
    rank: int
    metric: str
    better: str
    measure: Callable[[nn.Module], float]


def main() -> int:
    arguments = _parser().parse_args()
    harness.begin(arguments)
    path = None if arguments.mode == "smoke" else harness.RESULTS / "cells" / f"solvers-{arguments.mode}.jsonl"
    cells, found = harness.Cells(path), {}
    formats = FORMATS if arguments.mode == "full" else QUICK[1:] if arguments.mode == "smoke" else QUICK
    for case in _cases(arguments):
        found[case.name] = rows = _grid(case, formats, cells)
        print(f"\n{case.name}: {case.metric}, {case.better} is better")
        columns = ("format", "solver", "T", "rank", "error", case.metric, "true bits", "seconds")
        keys = ("format", "solver", "steps", "rank", "error", "value", "true_bits", "seconds")
        harness.table(columns, [[row[key] for key in keys] for row in rows])
    shape = {"models": list(found), "formats": len(formats), "solvers": len(SOLVERS)}
    harness.finish("solvers", arguments, shape, {"cells": found, "order": _order(found)})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__)
    for name in ("smollm2", "minilm", "shared"):
        variable = f"BITLOFT_{name.upper()}"
        parser.add_argument(
            f"--{name}", type=Path, default=os.environ.get(variable), help=f"folder (default: {variable})"
        )
    return parser


def _grid(case: Case, formats: tuple[str, ...], cells: harness.Cells) -> list[dict[str, Any]]:
    """The float model, then each format with each solver; the model is as it was afterwards."""
    first = {"model": case.name, "format": "float", "solver": "-", "steps": 0, "rank": 0}
    rows = [cells.get(first, lambda: _figures(0.0, case.measure(case.model), 32.0, 0.0))]
    chosen = [name for name, kind in select_modules(case.model, QuantizeOptions()).chosen.items() if kind == "linear"]
    weights = {name: case.model.get_parameter(f"{name}.weight").data.clone() for name in chosen}
    for spelling in formats:
        for solver, steps in SOLVERS:
            if solver == "qalora" and not spelling.endswith("+shift"):
                continue
            rank = case.rank if solver == "loftq" else 0
            key = {"model": case.name, "format": spelling, "solver": solver, "steps": steps, "rank": rank}
            plan, options = ModulePlan(spelling, solver, rank), QuantizeOptions(steps=steps)
            rows.append(cells.get(key, partial(_cell, case, weights, plan, options)))
    for name, weight in weights.items():
        case.model.get_submodule(name).weight.data = weight
    return [{**row["key"], **{k: v for k, v in row.items() if k != "key"}} for row in rows]


def _cell(case: Case, weights: dict[str, Tensor], plan: ModulePlan, options: QuantizeOptions) -> dict[str, float]:
    """Solve every matrix, put the result in its place, measure."""
    lost = energy = stored = seconds = 0.0
    for name, weight in weights.items():
        spent, solution = harness.seconds_of(partial(solve, name, weight, plan, options))
        seconds += spent
        values, stored = decode(solution.weight), stored + solution.weight.nbytes
        if solution.start is not None:
            values, stored = (
                values + solution.start.product(),
                stored + solution.start.a.nbytes + solution.start.bt.nbytes,
            )
        lost += float((weight - values).double().square().sum())
        energy += float(weight.double().square().sum())
        case.model.get_submodule(name).weight.data = values
    bits = 8 * stored / sum(weight.numel() for weight in weights.values())
    return _figures(math.sqrt(lost / energy), case.measure(case.model), bits, seconds)


def _figures(error: float, value: float, bits: float, seconds: float) -> dict[str, float]:
    return {
        "error": round(error, 5),
        "value": round(value, 5),
        "true_bits": round(bits, 4),
        "seconds": round(seconds, 2),
    }


def _order(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, int]]:
    """How often LoftQ's error is below QLoRA's with the same format, and of how many comparisons."""
    order = {}
    for name, rows in found.items():
        plain = {row["format"]: row["error"] for row in rows if row["solver"] == "qlora"}
        pairs = [(row["error"], plain[row["format"]]) for row in rows if row["solver"] == "loftq"]
        order[name] = {"loftq_below_qlora": sum(a < b for a, b in pairs), "of": len(pairs)}
    return order


def _cases(arguments: argparse.Namespace) -> Iterator[Case]:
    if arguments.mode == "smoke":
        yield _toy()
        return
    few = arguments.mode == "quick"
    shared = None if arguments.shared is None else Path(arguments.shared)
    if arguments.smollm2 and shared:
        yield _smollm2(Path(arguments.smollm2), shared / "data" / "wikitext2" / "test.txt", 2 if few else 16)
    if arguments.minilm and shared:
        yield _minilm(Path(arguments.minilm), shared / "data" / "glue_mrpc" / "validation.tsv", 100 if few else 408)
    if shared:
        yield _bart(shared / "models" / "bart-g2p-us", 100 if few else 400)
    for name, given in (("SmolLM2", arguments.smollm2), ("MiniLM", arguments.minilm), ("data", shared)):
        if not given:
            print(f"{name}: not measured (no folder given)")


def _toy() -> Case:
    """A random two-layer Llama: its loss on fixed tokens stands for a perplexity."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    ids = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(1))

    @torch.inference_mode()
    def loss(model: nn.Module) -> float:
        return float(model(input_ids=ids, labels=ids).loss)

    return Case("toy", LlamaForCausalLM(config).eval(), 8, "loss", "lower", loss)


def _smollm2(folder: Path, text: Path, blocks: int) -> Case:
    from transformers import AutoModelForCausalLM

    from bitloft.evaluate import evaluate

    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, directory = load_tokenizer(folder), tempfile.mkdtemp()
    piece = Path(directory) / "slice.txt"  # four characters a token, with room to spare
    piece.write_text(text.read_text(encoding="utf-8")[: blocks * 512 * 8], encoding="utf-8")

    def perplexity(model: nn.Module) -> float:
        return evaluate(model, piece, tokenizer=tokenizer, length=512, limit=blocks, batch=2).perplexity

    return Case("SmolLM2", model, 16, "perplexity", "lower", perplexity)


def _minilm(folder: Path, pairs: Path, limit: int) -> Case:
    from transformers import AutoModel, AutoTokenizer

    with quiet_loading():
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pairs.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))[:limit]
    labels = torch.tensor([int(row["Quality"]) for row in rows])

    @torch.inference_mode()
    def embed(model: nn.Module, column: str) -> Tensor:
        parts = []
        for at in range(0, len(rows), 32):
            texts = [row[column] for row in rows[at : at + 32]]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
            mask = batch["attention_mask"].unsqueeze(-1)
            parts.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
        return nn.functional.normalize(torch.cat(parts), dim=1)

    def auc(model: nn.Module) -> float:
        cosine = (embed(model, "#1 String") * embed(model, "#2 String")).sum(1)
        above = cosine[labels == 1][:, None] - cosine[labels == 0][None]
        return float((above > 0).double().mean() + (above == 0).double().mean() / 2)

    return Case("MiniLM", model, 16, "MRPC AUC", "higher", auc)


def _bart(folder: Path, limit: int) -> Case:
    from transformers import BartForConditionalGeneration

    with quiet_loading():
        model = BartForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    graphemes, phonemes = model.config.grapheme_chars, model.config.phoneme_chars
    words = _words(json.loads((folder / "gold.json").read_text(encoding="utf-8")), graphemes, phonemes)
    words = words[:: max(len(words) // limit, 1)][:limit]
    width = max(len(word) for word, _ in words) + 2
    ids = torch.zeros(len(words), width, dtype=torch.int64)
    for row, (word, _) in zip(ids, words, strict=True):
        row[: len(word) + 2] = torch.tensor([1, *(graphemes.index(letter) for letter in word), 2])

    symbols = dict(enumerate(phonemes))  # a broken model says ids that are no phoneme

    @torch.inference_mode()
    def exact(model: nn.Module) -> float:
        generate: Any = model.generate
        answers = generate(input_ids=ids, attention_mask=(ids != 0).long(), max_length=64, num_beams=1)
        said = ["".join(symbols.get(i, "?") for i in answer.tolist() if i > 3) for answer in answers]
        return sum(a == b for a, (_, b) in zip(said, words, strict=True)) / len(words)

    return Case("BART-g2p", model, 8, "words exact", "higher", exact)


def _words(gold: dict[str, Any], graphemes: str, phonemes: str) -> list[tuple[str, str]]:
    """Dictionary entries of one pronunciation that the model's two alphabets can spell, in dictionary order."""
    return [
        (word, sound)
        for word, sound in gold.items()
        if isinstance(sound, str)
        and len(word) > 2
        and set(word) <= set(graphemes[4:])
        and set(sound) <= set(phonemes[4:])
    ]


if __name__ == "__main__":
    sys.exit(main())
