"""The rebase verb: an adapter moved to another quantization of the same model by a short distillation.

An adapter answers to the base it was trained on, rounding errors included. On another base of the same model it is
nearly right, and a few hundred steps make up the rest: towards the answers of its own base with it, where that one is
at hand (``trained_on``), towards the text itself where it is not. What comes out is a plain PEFT adapter that names the
new base by fingerprint.

Models are held whole: the new base, and beside it the one that teaches. Training anew costs as much memory and many
times the steps; folding W_old - W_new into the adapter would ask for its full rank.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bitloft.adapters import is_packed, read_adapter, read_packed
from bitloft.checkpoint import write_json, writing
from bitloft.errors import AdapterError, CheckpointError
from bitloft.factors import Factors, Pair, read_factors, write_lora
from bitloft.integrations.loading import load
from bitloft.integrations.opening import open_model
from bitloft.integrations.record import BaseRecord, base_record, load_tokenizer
from bitloft.modules.adapted import linear_of
from bitloft.modules.multi import AdapterBank
from bitloft.modules.trial import Plain, applied
from bitloft.options import RebaseOptions
from bitloft.solvers.adapter import components
from bitloft.tasks.distill import Batch, Course, Losses, descend, divergences, hold_out, mean_loss
from bitloft.tasks.lm import Collator, DataReport, Example, check_length, encode_rows, target_logits, target_losses
from bitloft.tasks.precision import choose_precision
from bitloft.tasks.rows import read_rows

REPORT = "rebase_report.json"
TEACHER = "teacher"
FAINT = 1e-3  # of the strongest component: a weaker one starts with this much on one side, lest no gradient reach it

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class RebaseReport:
    """What ``rebase`` did. Losses are nats per token on ``tokens`` held-out targets: of the new base alone, with the
    adapter as it was, and as it is now; ``loss_teacher`` that of the base it was trained on with it, None without one.

    ``kept`` is False where the loss did not fall: the adapter is then written as it was. ``model_bytes`` are those of
    the models that were held at a time, whole.
    """

    out: str
    adapter: str
    base: str
    teacher: str | None
    steps: int
    loss_base: float
    loss_before: float
    loss_after: float
    loss_teacher: float | None
    tokens: int
    kept: bool
    data: DataReport
    rank: int
    dtype: str
    model_bytes: int
    notes: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rebase(
    adapter: str | Path,
    to: str | Path,
    data: str | Path,
    out: str | Path,
    options: RebaseOptions | None = None,
    *,
    trained_on: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> RebaseReport:
    """Move ``adapter`` (PEFT directory or packed) to the packed base ``to``, learning from the rows of ``data``.

    ``trained_on`` is the base that it was trained on: packed, a 16-bit model, or a bitsandbytes or GPTQ folder; it then
    teaches, and both models are in memory. Without it the text itself is learned. Settings are the fields of
    RebaseOptions. Raises AdapterError for an adapter of this base or another model, CheckpointError where ``out`` is
    there or a model cannot be read, DataError for bad rows or too few, BitloftError where the loss is not finite.
    """
    began, options, out = time.perf_counter(), options or RebaseOptions(**settings), Path(out)
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists already; remove it or choose another place.")
    record, factors = base_record(to), read_factors(adapter)
    notes = _require_same_model(factors, record)
    examples, counts = encode_rows(read_rows(data), load_tokenizer(to), options.length)
    learned, judged = hold_out(examples)
    model = load(to).requires_grad_(False)
    check_length(options.length, model.config)
    teacher = None if trained_on is None else _teacher(trained_on, factors, record, model.config)
    lesson = _Lesson(model, factors, options, teacher, Collator.for_tokenizer(load_tokenizer(to)))
    before, pairs = lesson.judge(lesson.losses, judged), lesson.pairs()
    lesson.learn(learned, progress)
    after = lesson.judge(lesson.losses, judged)
    if after < before:
        pairs = lesson.pairs()
    else:
        notes.append(f"{options.steps} steps did not lower the held-out loss; the adapter was written as it was.")
    with writing(out, overwrite=overwrite) as directory:
        rank = _write(directory, pairs, factors, record)
        report = RebaseReport(
            out=str(out),
            adapter=str(adapter),
            base=str(to),
            teacher=None if trained_on is None else str(trained_on),
            steps=options.steps,
            loss_base=lesson.judge(lesson.losses_of_base, judged),
            loss_before=before,
            loss_after=after,
            loss_teacher=None if teacher is None else lesson.judge(lesson.losses_of_teacher, judged),
            tokens=sum(example.targets for example in judged),
            kept=after < before,
            data=counts,
            rank=rank,
            dtype=lesson.precision.name,
            model_bytes=lesson.model_bytes,
            notes=tuple(notes),
            seconds=time.perf_counter() - began,
        )
        write_json(directory / REPORT, report.to_dict())
    return report


def _write(directory: Path, pairs: dict[str, Pair], old: Factors, record: BaseRecord) -> int:
    """The adapter as a PEFT directory that names the new base; returns its rank."""
    made = {"base": record.fingerprint, "source": record.source, "start": "frozen"}
    config = {"task_type": old.config.get("task_type")}
    return write_lora(directory, pairs, base_name=str(record.directory), config=config, record=made)


class _Lesson:
    """The new base with the adapter on trial, and the bank of the model that teaches it, if there is one."""

    def __init__(
        self,
        model: PreTrainedModel,
        factors: Factors,
        options: RebaseOptions,
        teacher: AdapterBank | None,
        collate: Collator,
    ) -> None:
        pairs = {name: pair for name, pair in factors.pairs.items() if pair.rank}  # a packed one may have dropped some
        if not pairs:
            raise AdapterError(f"adapter {factors.path} changes nothing; there is nothing to move.")
        for name, pair in pairs.items():
            linear_of(model, name, pair, factors.path)
        self.model, self.teacher, self.options, self.collate = model, teacher, options, collate
        self.precision = choose_precision(options.dtype, model.device)
        self.factors = {name: _balanced(pair) for name, pair in pairs.items()}

    @property
    def model_bytes(self) -> int:
        """Bytes of parameters and buffers of the models that are held."""
        models = [self.model] if self.teacher is None else [self.model, self.teacher.model]
        return sum({t.data_ptr(): t.nbytes for m in models for t in (*m.parameters(), *m.buffers())}.values())

    def pairs(self) -> dict[str, Pair]:
        """A copy of the factors as they are now."""
        return {n: Pair(f.a.detach().clone(), f.bt.detach().T.clone().contiguous()) for n, f in self.factors.items()}

    def learn(self, examples: Sequence[Example], progress: Progress | None) -> None:
        """The course of the options, from the factors as they are."""
        options = self.options
        groups = [{"params": [p for own in self.factors.values() for p in own.parameters()], "pace": 1.0}]
        course = Course(options.steps, options.lr, options.batch, options.seed)
        descend(self.goal, groups, examples, self.collate, course, progress)

    def judge(self, losses: Losses, examples: Sequence[Example]) -> float:
        """Mean loss in nats per token."""
        return mean_loss(losses, examples, self.collate, self.options.batch)[0]

    def goal(self, batch: Batch) -> Float[Tensor, " targets"]:
        """What is minimized: the divergence from the teacher, or the loss of the text."""
        if self.teacher is None:
            return self.losses(batch)
        with torch.no_grad(), self._taught(batch):
            wanted, _ = target_logits(self.teacher.model, batch)
        with self._adapted():
            logits, _ = target_logits(self.model, batch)
        return divergences(logits, wanted)

    def losses(self, batch: Batch) -> Float[Tensor, " targets"]:
        """Loss of every target on the new base with the adapter."""
        with self._adapted():
            return target_losses(self.model, batch)[0]

    def losses_of_base(self, batch: Batch) -> Float[Tensor, " targets"]:
        with self._autocast():
            return target_losses(self.model, batch)[0]

    def losses_of_teacher(self, batch: Batch) -> Float[Tensor, " targets"]:
        """Loss of every target on the model that it was trained on, with the adapter as it was."""
        if self.teacher is None:
            raise AdapterError("there is no base to teach.")
        with self._taught(batch):
            return target_losses(self.teacher.model, batch)[0]

    @contextmanager
    def _adapted(self) -> Iterator[None]:
        with self._autocast(), applied(self.model, self.factors):
            yield

    @contextmanager
    def _taught(self, batch: Batch) -> Iterator[None]:
        rows = [TEACHER] * len(batch["labels"])
        with self._autocast(), self.teacher.rows(rows) if self.teacher is not None else nullcontext():
            yield

    def _autocast(self) -> AbstractContextManager[None]:
        return self.precision.autocast(self.model.device)


def _balanced(pair: Pair) -> Plain:
    """The singular components of B A, shared evenly between both sides."""
    exact = components(pair.a, pair.b, 1.0)
    root = exact.s.sqrt().unsqueeze(1)
    left = root * exact.u
    right = root.clamp_min(FAINT * float(root.amax()) or FAINT) * exact.v
    return Plain(right, left)


def _require_same_model(factors: Factors, record: BaseRecord) -> list[str]:
    """What is to be told of the adapter's origin. Raises AdapterError where there is nothing to move, or nowhere to."""
    if factors.base == record.fingerprint:
        raise AdapterError(f"adapter {factors.path} was trained for this base; there is nothing to move.")
    if factors.source is None or record.source is None:
        return ["the adapter or the base does not say of which model it is; only names and shapes were compared."]
    if factors.source != record.source:
        raise AdapterError(
            f"adapter {factors.path} is of another model (fingerprint {factors.source[:12]}) than {record.directory} "
            f"({record.source[:12]}); it can be moved between bases of one model only."
        )
    return []


def _teacher(trained_on: str | Path, factors: Factors, record: BaseRecord, config: Any) -> AdapterBank:
    """The model that the adapter was trained on, with it attached. Raises AdapterError where it is another one."""
    home = open_model(trained_on)
    if home.record is not None and factors.base not in (None, home.record.fingerprint):
        raise AdapterError(
            f"{trained_on} is {home.record.fingerprint[:12]}, but {factors.path} was trained for the base "
            f"{str(factors.base)[:12]}; give that one."
        )
    if home.model.config.get_text_config().vocab_size != config.get_text_config().vocab_size:
        raise AdapterError(f"{trained_on} has another vocabulary than {record.directory}; it cannot teach it.")
    bank = AdapterBank(home.model)
    bank.attach(TEACHER, read_packed(factors.path) if is_packed(factors.path) else read_adapter(factors.path))
    return bank
