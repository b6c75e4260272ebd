"""The main job, step by step, through bitloft's public functions: each step says what it does and what it found."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bitloft
from bitloft.adapters import is_packed, read_packed
from bitloft.checkpoint import fingerprint, sha256, weight_files
from bitloft.generate import generate
from bitloft.options import CompressOptions, EvalOptions, GenerateOptions, QuantizeOptions, TrainOptions
from bitloft.report import pm, size
from bitloft.terminal import progress
from scripts.demo import data, model, server
from scripts.demo.ledger import Ledger, Result
from scripts.demo.settings import FORMATS, PROMPTS, TRAINED_ON, Settings

WAYS = ("waterfill", "loraquant")


class Lap:
    """One run of the demo in ``directory``; every method is a step, to be called in the order of ``run``."""

    def __init__(self, directory: Path, settings: Settings, ledger: Ledger, model_name: str | None) -> None:
        self.directory, self.settings, self.ledger, self.model_name = directory, settings, ledger, model_name

    def run(self) -> Result:
        """Every step in order; all results by name."""
        found: Result = {"model": self.model()}
        found["data"] = {skill: self.data(skill) for skill in self.settings.skills}
        found["bases"] = {name: self.quantize(name, found["model"]) for name in FORMATS}
        found["eval"] = {
            "16-bit": {skill: self.evaluate(skill, "16-bit", Path(found["model"]["path"])) for skill in found["data"]}
        }
        for name in FORMATS:
            found["eval"][name] = {skill: self.evaluate(skill, name, self.base(name)) for skill in found["data"]}
        found["train"] = {skill: self.train(skill) for skill in found["data"]}
        found["packed"] = {way: {skill: self.compress(skill, way) for skill in found["data"]} for way in WAYS}
        base = self.base(TRAINED_ON)
        for way in ("trained", *WAYS):
            adapters = {skill: self.adapter(skill, way) for skill in found["data"]}
            found["eval"][way] = {skill: self.evaluate(skill, way, base, path) for skill, path in adapters.items()}
        found["answers"] = self.answer()
        found["server"] = self.serve()
        return found

    def base(self, name: str) -> Path:
        return self.directory / f"base-{name}"

    def adapter(self, skill: str, way: str) -> Path:
        """Trained, waterfill or loraquant."""
        return self.directory / way / skill

    def model(self) -> Result:
        def run() -> Result:
            return model.fetch(self.directory / "model") if self.model_name is None else model.local(self.model_name)

        doing = f"getting {self.model_name or 'SmolLM2-135M-Instruct'} as a 16-bit folder"
        place = [] if self.model_name else [self.directory / "model"]
        return self.ledger.step("model", doing, {"model": self.model_name}, run, told_model, place)

    def data(self, skill: str) -> Result:
        place = self.directory / "data" / skill
        about = {"reference": "Python's language reference (pydoc)", "docstrings": "functions of the standard library"}
        return self.ledger.step(
            f"data-{skill}",
            f"writing training and held-out rows for the skill '{skill}' from {about[skill]}",
            {"source": sha256(Path(data.__file__)), "python": sys.version},
            lambda: data.prepare(skill, place),
            lambda r: (
                f"{r['train']['rows']} rows to train on, {r['held']['rows']} held out, "
                f"{r['cut']} repetitions of held-out text cut from training"
            ),
            [place / "train.jsonl", place / "held.jsonl"],
        )

    def quantize(self, name: str, source: Result) -> Result:
        options = QuantizeOptions(format=FORMATS[name], rank=self.settings.rank, steps=self.settings.solver_steps)
        out = self.base(name)

        def run() -> Result:
            with progress("   quantizing") as step:
                report = bitloft.quantize(source["path"], out, options, overwrite=True, progress=step)
            return summed(report.to_dict())

        doing = f"quantizing to {options.format} by LoftQ, start of rank {options.rank}"
        depends = {"source": source["fingerprint"], "options": asdict(options)}
        return self.ledger.step(f"base-{name}", doing, depends, run, told_base, [out])

    def train(self, skill: str) -> Result:
        wanted = self.settings.skills[skill]
        options = TrainOptions(
            rank=self.settings.rank, steps=wanted.steps, batch=wanted.batch, lr=wanted.lr, length=self.settings.length,
            save_every=0, log_every=max(wanted.steps // 12, 1),
        )  # fmt: skip
        base, rows, out = self.base(TRAINED_ON), self.rows(skill, "train"), self.adapter(skill, "trained")

        def run() -> Result:
            with progress("   training") as step:
                report = bitloft.train(base, rows, out, options, overwrite=True, progress=step)
            return report.to_dict()

        doing = f"training a fresh adapter for '{skill}' on the {TRAINED_ON} base: {wanted.steps} steps, start frozen"
        depends = {"base": identity(base), "data": sha256(rows), "options": asdict(options)}
        return self.ledger.step(f"train-{skill}", doing, depends, run, told_training, [out])

    def compress(self, skill: str, way: str) -> Result:
        source, out = self.adapter(skill, "trained"), self.adapter(skill, way)
        options = CompressOptions(method="loraquant", high=2, ratio=0.8)
        if way == "waterfill":
            options = CompressOptions(bits=self.settings.bits)

        def run() -> Result:
            report = bitloft.compress(source, out, options, overwrite=True)
            return {key: value for key, value in asdict(report).items() if key != "modules"}

        asked = f"{options.bits:g} true bits by waterfill" if way == "waterfill" else "LoRAQuant's 2@0.8"
        depends = {"adapter": identity(source), "options": asdict(options)}
        doing = f"compressing the adapter '{skill}' to {asked}"
        return self.ledger.step(f"{way}-{skill}", doing, depends, run, told_packed, [out])

    def evaluate(self, skill: str, name: str, base: Path, adapter: Path | None = None) -> Result:
        wanted = self.settings.skills[skill]
        options = EvalOptions(length=self.settings.length, limit=wanted.limit, batch=wanted.measured, dtype="auto")
        rows = self.rows(skill, "held")

        def run() -> Result:
            with progress("   evaluating") as step:
                return bitloft.evaluate(base, rows, adapter, options, progress=step).to_dict()

        depends = {
            "base": identity(base), "data": sha256(rows), "options": asdict(options),
            "adapter": None if adapter is None else identity(adapter),
        }  # fmt: skip
        what = f"the {name} model" if adapter is None else f"the adapter '{skill}' ({name})"
        doing = f"measuring {what} on held-out '{skill}'"
        return self.ledger.step(f"eval-{name}-{skill}", doing, depends, run, told_loss)

    def answer(self) -> Result:
        """Every prompt answered by the base and by each packed adapter, in one batch."""
        base, names = self.base(TRAINED_ON), [None, *self.settings.skills]
        packed = {skill: self.adapter(skill, "waterfill") for skill in self.settings.skills}
        rows = [(prompt, name) for prompt in PROMPTS for name in names]

        def run() -> Result:
            options = GenerateOptions(max_tokens=self.settings.answer)
            texts = generate(base, [prompt for prompt, _ in rows], packed, [name for _, name in rows], options)
            pairs = zip(rows, texts, strict=True)
            return {"rows": [{"prompt": p, "adapter": name or "base", "answer": text} for (p, name), text in pairs]}

        depends = {
            "base": identity(base), "adapters": {name: identity(path) for name, path in packed.items()},
            "rows": rows, "tokens": self.settings.answer,
        }  # fmt: skip
        doing = f"answering {len(PROMPTS)} prompts by the base and both packed adapters: {len(rows)} rows in one batch"
        return self.ledger.step("answers", doing, depends, run, told_answers)

    def serve(self) -> Result:
        """A server process over the packed adapters, from start to its exit code."""
        base, place = self.base(TRAINED_ON), self.directory / "waterfill"

        def run() -> Result:
            return server.talk(base, place, tuple(self.settings.skills), PROMPTS, self.settings.answer)

        doing = "starting `bitloft serve`, asking it through the openai client, stopping it"
        depends = {"base": identity(base), "adapters": [identity(p) for p in sorted(place.iterdir()) if p.is_dir()]}
        return self.ledger.step("server", doing, depends, run, told_server)

    def rows(self, skill: str, side: str) -> Path:
        return self.directory / "data" / skill / f"{side}.jsonl"


def identity(directory: Path) -> str:
    """What the weights of a base, model or adapter directory are, whichever kind it is."""
    return read_packed(directory).sha256 if is_packed(directory) else fingerprint(weight_files(directory))


def summed(report: dict[str, Any]) -> Result:
    """A quantize report with its matrices reduced to mean errors."""
    matrices = report.pop("matrices")
    means = {key: sum(m[key] for m in matrices) / len(matrices) for key in ("error_before", "error_after")}
    return report | means | {"matrices": len(matrices), "left": len(report["left"])}


def told_model(r: Result) -> str:
    note = f"; its weights were already rounded to {r['already']}" if r["already"] else ""
    return f"{size(r['stored_bytes'])} of 16-bit weights from {r['origin']}{note}"


def told_base(r: Result) -> str:
    return (
        f"{size(r['stored_bytes'])} stored, of it embeddings {size(r['embedding_bytes'])}; {r['true_bits']:.2f} true "
        f"bits per weight, {r['true_bits_with_start']:.2f} with the start; mean error {r['error_before']:.3f} rounded, "
        f"{r['error_after']:.3f} with the start"
    )


def told_training(r: Result) -> str:
    return (
        f"{r['parameters']:,} values trained; loss {r['first_loss']:.2f} -> {r['last_loss']:.2f}, "
        f"{r['seconds_per_step']:.1f} s a step in {r['dtype']}"
    )


def told_packed(r: Result) -> str:
    return (
        f"{size(r['bytes'])} in place of {size(r['source_bytes'])}: {r['true_bits']:.3f} true bits a value, "
        f"{r['payload_bits']:.3f} of them codes; relative squared error {r['error']:.4f}"
    )


def told_loss(r: Result) -> str:
    loss, perplexity = pm(r["loss"], r["stderr"]), pm(r["perplexity"], r["perplexity_stderr"])
    return f"loss {loss} nats, perplexity {perplexity} over {r['tokens']:,} tokens of {r['clusters']} rows"


def told_answers(r: Result) -> str:
    return "".join(f"\n   [{row['adapter']}] {' '.join(row['answer'].split())[:100]}" for row in r["rows"]).strip()


def told_server(r: Result) -> str:
    return (
        f"{len(r['models'])} models listed, ready after {r['ready_seconds']:.1f} s, {r['tokens']} tokens answered; "
        f"streamed text {'equal to' if r['stream_equal'] else 'DIFFERENT from'} the whole answer; exit code {r['exit']}"
    )
