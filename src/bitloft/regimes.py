"""A row of a recipe as a model to train: every weight, or an adapter over a float, rounded or repaired base.

    full         every weight, in float          lora         W + s B A, W in float
    qlora        Q + s B A, B = 0                qalora       Q + s B P A, P sums groups; merges into Q's shifts
    loftq        Q + s0 B0 A0, trained from there (or frozen, with a fresh adapter over it)
    calibrated   the same, Q and the start solved where the inputs of the task's training text are

All rows get the same rows of data in the same order, the same head (drawn from the seed) and the same linears to adapt:
those that quantizing packs. Heads (classifiers, poolers) are trained with every row, as the papers have it.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from bitloft.checkpoint import read_json, write_json, write_tensors
from bitloft.errors import OptionError
from bitloft.integrations.loading import load, quiet_loading
from bitloft.integrations.opening import quantized_by
from bitloft.integrations.peft import fresh_adapter, start_adapter
from bitloft.integrations.source import open_source
from bitloft.integrations.trainer import Progress, make_trainer
from bitloft.modules.linear import quant_linears
from bitloft.modules.select import HEADS, select_modules
from bitloft.options import QuantizeOptions, TrainOptions
from bitloft.options.recipe import Recipe, Row
from bitloft.quantize import quantize
from bitloft.quantize_report import QuantizeReport
from bitloft.tasks.catalog import Form, Task, calibration_text, find_task, form_of, head_of
from bitloft.tasks.precision import choose_precision
from bitloft.tasks.scores import Score
from bitloft.tasks.sources import Row as DataRow
from bitloft.tasks.sources import held_out
from bitloft.tasks.words import with_tokenizer

BITS = "bits.json"  # beside a base: what quantizing came to
CALIBRATED_ROWS = 2000  # of the training data, at most


@dataclass
class Bench:
    """A recipe opened: its task, data and dense model, and a directory that keeps bases for every row and seed."""

    recipe: Recipe
    task: Task
    source: Path
    work: Path
    train: list[DataRow]
    held: list[DataRow]
    test: list[DataRow]
    _examples: list[Any] | None = None

    @classmethod
    def open(cls, recipe: Recipe, work: Path) -> "Bench":
        """Read the data and make the dense model ready; what they raise passes through."""
        found = open_source(recipe.model)
        task = find_task(recipe.task, found.config())
        source = dense_source(Path(found.folder), task, work)
        rows = task.rows(recipe.data, "train", recipe.train_rows)
        train, held = (rows, []) if not recipe.rates else held_out(rows)
        test = task.rows(recipe.data, "test", recipe.test_rows)
        return cls(recipe, task, source, work, train, held[: recipe.held_rows], test)

    def form(self, model: Any) -> Form:
        recipe, source = self.recipe, open_source(str(self.source))
        return form_of(
            self.task,
            model.config,
            source.tokenizer,
            length=recipe.length,
            generates=recipe.generates,
            beams=recipe.beams,
            limit=recipe.test_rows,
        )

    def calibration(self) -> Path:
        """The text that calibrated rows measure: the recipe's own, or that of the training rows."""
        if self.recipe.calibrate is not None:
            return Path(self.recipe.calibrate)
        return calibration_text(self.task, self.train[:CALIBRATED_ROWS], self.work / "calibrate" / self.recipe.task)

    def base(self, row: Row) -> Path:
        """The packed base of a row, made once; the dense model where it has none."""
        out = self.place(row)
        if row.format is not None and not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            began = time.perf_counter()
            report = quantize(self.source, out, self._quantizing(row), resume=True)
            write_json(_bits_file(out), _bits(report) | {"seconds": round(time.perf_counter() - began, 2)})
        return out

    def place(self, row: Row) -> Path:
        """Where the base of a row is or will be; the text that it is calibrated on is made."""
        if row.format is None:
            return self.source
        options = self._quantizing(row)
        name = hashlib.sha256(json.dumps([str(self.source.resolve()), asdict(options)]).encode()).hexdigest()[:12]
        return self.work / "bases" / f"{row.regime}-{row.format.replace(':', '_')}-{name}"

    def _quantizing(self, row: Row) -> QuantizeOptions:
        options = row.options
        if (options.solver == "calibrated" and options.metric != "none") or options.refine:
            options = replace(options, calibrate=str(self.calibration()))
        return options

    def run(
        self, row: Row, seed: int, *, rate: float | None = None, held: bool = False, keep: Path | None = None
    ) -> dict[str, Any]:
        """Train a row from a seed and judge it: scores, bits, losses, seconds. ``held``: on the held-out rows.

        ``keep`` is a safetensors file for the trained parameters by their names in the model.
        """
        recipe = self.recipe
        options = replace(recipe.train, seed=seed, lr=rate or row.lr or recipe.train.lr)
        base = self.base(row)
        model = opened(base, row, seed, dropout=options.dropout)
        form = self.form(model)
        began = time.perf_counter()
        history: tuple[tuple[int, float, float], ...] = ()
        if not row.untrained:
            self._examples = form.examples(self.train) if self._examples is None else self._examples
            history = fit(model, form, self._examples, options)
        spent = time.perf_counter() - began
        if keep is not None:
            keep.parent.mkdir(parents=True, exist_ok=True)
            trained = {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
            write_tensors(keep, trained)
        device = next(model.parameters()).device
        with choose_precision(options.dtype, device).autocast(device):
            scores = form.judge(model.eval(), self.held if held else self.test, recipe.batch)
        return {
            "scores": [score.to_dict() for score in scores],
            "loss": [round(loss, 5) for _, loss, _ in (history[:1] + history[-1:] if history else ())],
            "lr": options.lr,
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "train_seconds": round(spent, 2),
            "seconds": round(time.perf_counter() - began, 2),
            **(read_json(_bits_file(base)) if row.format is not None else {"true_bits": 16.0, "with_start": 16.0}),
        }


def _bits_file(base: Path) -> Path:
    return base.with_name(f"{base.name}.{BITS}")


def _bits(report: QuantizeReport) -> dict[str, Any]:
    errors = [(m.error_before, m.error_after) for m in report.matrices]
    return {
        "true_bits": round(report.true_bits, 5),
        "with_start": round(report.true_bits_with_start, 5),
        "payload_bits": round(report.payload_bits, 5),
        "error_before": round(sum(before for before, _ in errors) / len(errors), 6),
        "error_after": round(sum(after for _, after in errors) / len(errors), 6),
    }


def dense_source(model: Path, task: Task, work: Path) -> Path:
    """The model's folder with the head that the task wants; an encoder's head is fresh, drawn from seed 0.

    A model that pronounces words gets the tokenizer of its letters. What is made lies below ``work``.
    """
    if task.name == "g2p":
        return with_tokenizer(model, work / "models" / f"{model.resolve().name}-words")
    head = head_of(task)
    if head is None:
        return model
    named = (read_json(model / "config.json").get("architectures") or [""])[0]
    if head.removeprefix("AutoModelFor") in named:
        return model
    out = work / "models" / f"{model.resolve().name}-{task.name}"
    if not out.exists():
        settings = {"num_labels": task.outputs} if hasattr(task, "outputs") else {}
        with quiet_loading(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = getattr(transformers, head).from_pretrained(model, use_safetensors=True, **settings)
        beside = out.with_name(out.name + ".partial")
        shutil.rmtree(beside, ignore_errors=True)
        made.float().save_pretrained(beside)
        tokenizer = open_source(str(model)).tokenizer
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        beside.rename(out)
    return out


def opened(base: Path, row: Row, seed: int, *, dropout: float = 0.0) -> Any:
    """The row's model in float32 with what it trains switched on; its head drawn from ``seed``."""
    packed = quantized_by(base) == "bitloft"
    own_start = row.regime in ("loftq", "calibrated") and row.start == "trainable"
    if packed:
        model = load(base, start="trainable" if own_start else "frozen", arrange=False, verify=False)
    else:
        model = open_source(str(base)).load().float().eval()
    reset_head(model, seed)
    alpha = row.alpha or row.rank
    adapted: nn.Module
    if row.regime == "full":
        adapted = model.requires_grad_(True)
    elif own_start:
        adapted = start_adapter(model, dropout=dropout)
    else:
        targets = tuple(quant_linears(model)) or tuple(select_modules(model, QuantizeOptions()).chosen)
        pooled = next(iter(quant_linears(model).values())).format.group if row.regime == "qalora" else None
        adapted = fresh_adapter(
            model, rank=row.rank, alpha=alpha, dropout=dropout, targets=targets, seed=seed, pooled=pooled
        )
    for name, parameter in adapted.named_parameters():
        if in_head(name):
            parameter.requires_grad_(True)
    return adapted


def in_head(name: str) -> bool:
    """Whether a parameter is a task head's."""
    return any(part in HEADS for part in name.split("."))


def reset_head(model: PreTrainedModel, seed: int) -> None:
    """Draw the last linear of a task head anew, as transformers does: normal, 0.02 wide, bias zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        fresh = last in ("classifier", "qa_outputs", "score") or name.endswith("classifier.out_proj")
        if fresh and isinstance(module, nn.Linear):
            with torch.no_grad():
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * 0.02)
                if module.bias is not None:
                    module.bias.zero_()


def fit(
    model: nn.Module,
    form: Form,
    examples: Sequence[Any],
    options: TrainOptions,
    progress: Any = None,
) -> tuple[tuple[int, float, float], ...]:
    """Train in place on ``form.examples(rows)``, as `bitloft train` does; (step, loss, learning rate) as logged.

    Raises OptionError where there is nothing to train, BitloftError where the loss is not finite.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise OptionError("this model has no parameter to train.")
    shown = Progress(progress)
    precision = choose_precision(options.dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory() as place:
        trainer = make_trainer(
            model,
            examples,
            form.collate,
            form.losses,
            replace(options, save_every=0),
            bf16=precision.dtype == torch.bfloat16,
            work=Path(place),
            shown=shown,
            shifted=form.shifted,
            by_length=isinstance(examples[0], dict),
        )
        trainer.train()
    return tuple(shown.history)


def rates_of(recipe: Recipe, row: Row) -> tuple[float, ...]:
    """The learning rates that are searched for a row: none for an untrained one or one that names its own."""
    return () if row.untrained or row.lr is not None else recipe.rates


def main_score(scores: Sequence[dict[str, Any]], metric: str | None) -> dict[str, Any]:
    """The score that a table sorts by: the named one, else the first. Raises OptionError for a name that is absent."""
    names = [score["name"] for score in scores]
    if metric is None:
        return scores[0]
    if metric not in names:
        raise OptionError(f"this task has no metric {metric!r}; it has {', '.join(names)}.")
    return scores[names.index(metric)]


def figures(scores: Sequence[Score]) -> dict[str, float]:
    """Values by name."""
    return {score.name: score.value for score in scores}
