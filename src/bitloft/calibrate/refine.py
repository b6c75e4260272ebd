"""One tuning of a finished base against the model that it was made of: what repairs the base is the base's.

Matrices were solved one by one; what their errors do together only the whole model shows (RILQ, arXiv 2412.01129). So
the start A0, B0 of every packed linear, and optionally scales, norms and the codes themselves, are tuned for a few
hundred steps on general text (``tuning`` has the loss), rounded as they are stored, and written in their old places.
All adapters share the result and carry their task alone.

Memory: the packed model, float copies of what is tuned and twice that of AdamW's moments (with codes, a dozen bytes
for every weight of the model). The teacher goes first, one
block at a time (``teacher``); its last hidden states wait on disk, 2 bytes a value. Both are in
OUT.work/refine, which a resumed run goes on from. A part of the text is held out: a tuning that does not lower the loss
there is dropped.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from bitloft.calibrate.teacher import TeacherStates
from bitloft.calibrate.tuning import Losses, Student, tune
from bitloft.errors import DataError, OptionError
from bitloft.formats import Format
from bitloft.integrations.loading import load
from bitloft.integrations.source import Source
from bitloft.kernels.ops import decode
from bitloft.modules.linear import QuantConv1D, quant_linears, replace_module
from bitloft.modules.tuned import TunedLinear
from bitloft.options import QuantizeOptions
from bitloft.shards import DTYPES
from bitloft.solvers.base import relative
from bitloft.stream import Plan
from bitloft.tasks.lm import encode_rows
from bitloft.tasks.precision import choose_precision
from bitloft.tasks.rows import read_rows

LENGTH = 256  # tokens of a sequence
BATCH = 4
CODES_SHARE = 20.0  # of the learning rate, in distances between levels
HELD = 16  # sequences that are measured and never trained on

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class RefineReport:
    """What refining did: losses on held-out sequences ``before`` and ``after``, both as stored. ``kept`` is False where
    they did not fall and everything stayed as it was. ``teacher`` says what of the 16-bit model was in memory,
    ``against`` what next tokens were compared with."""

    steps: int
    sequences: int
    tokens: int
    parts: tuple[str, ...]
    values: int
    before: Losses
    after: Losses
    kept: bool
    teacher: str
    against: str = "text"  # the only one there was, in reports that do not say

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "RefineReport":
        """From its JSON form."""
        losses = {name: Losses(**record[name]) for name in ("before", "after")}
        return cls(**{**record, **losses, "parts": tuple(record["parts"])})


@dataclass(frozen=True)
class Refined:
    """``tensors``: what changes of the stored ones, by name; ``errors``: relative Frobenius errors |W - Q| / |W| and
    |W - Q - s0*B0*A0| / |W| of every matrix whose values changed, by its name in the report."""

    tensors: dict[str, Tensor]
    errors: dict[str, tuple[float, float]]
    report: RefineReport


def refine(
    source: Source, options: QuantizeOptions, plan: Plan, directory: Path, work: Path, progress: Progress | None = None
) -> Refined:
    """Tune the base in ``directory``, made of ``source`` by ``plan``; nothing in ``directory`` is written.

    ``options`` give ``refine`` (steps), ``refine_rate``, ``refine_against``, ``refine_parts``, ``calibrate`` (the text)
    and ``seed``; ``work`` holds what a resumed run goes on from. Raises OptionError for a model that cannot be refined,
    DataError for a text that is too short.
    """
    work.mkdir(exist_ok=True)
    ids = sequences(source, plan, options)
    teacher = TeacherStates.ask(source, ids, work, progress)
    model = load(directory, arrange=False)  # scales are replaced below, in the stored order
    precision = choose_precision("auto", model.device)
    held = [teacher.batch(range(i, i + BATCH)) for i in range(0, HELD, BATCH)]
    before = Student(model, {}, precision, options.refine_against).measure(held)
    student = Student(model, _tuned(model, options), precision, options.refine_against)
    order = _order(len(ids), options)
    tune(
        student,
        lambda step: teacher.batch(order[step * BATCH : (step + 1) * BATCH]),
        steps=options.refine,
        rate=options.refine_rate,
        state=work / "state.safetensors",
        progress=progress,
    )
    changed = _settle(student, plan)
    after = student.measure(held)
    kept = after.total < before.total
    report = RefineReport(
        steps=options.refine,
        sequences=len(ids) - HELD,
        tokens=(len(ids) - HELD) * LENGTH,
        parts=options.refine_parts,
        values=sum(parameter.numel() for parameter, _ in student.tuned.values()),
        before=before,
        after=after if kept else before,
        kept=kept,
        teacher=teacher.held,
        against=options.refine_against,
    )
    return Refined(changed, _errors(plan, student.model), report) if kept else Refined({}, {}, report)


def sequences(source: Source, plan: Plan, options: QuantizeOptions) -> Int[Tensor, "sequences length"]:
    """The held-out sequences, then those to train on: as many as the steps take, drawn by the seed.

    Raises OptionError for a model that cannot be refined, DataError for a text that is too short: before anything is
    quantized, if it is called then.
    """
    if options.calibrate is None or source.tokenizer is None:
        raise OptionError("refine needs a text and a model with a tokenizer; give calibrate, or leave refine out.")
    if plan.skeleton.model.config.is_encoder_decoder:
        raise OptionError(f"refine takes decoders and encoders; {source.name} is both at once. Leave refine out.")
    config, scaled = plan.skeleton.model.config, ("final_logit_softcapping", "logits_scaling", "logit_scale")
    if options.refine_against == "teacher" and any(getattr(config, name, None) not in (None, 1.0) for name in scaled):
        raise OptionError(
            f"refine_against is teacher, and {source.name} scales what its head says, which is not built; use text."
        )
    started = any(matrix.start_rank for matrix in plan.quantizer.plans.values())
    if not started and set(options.refine_parts) == {"start"}:
        raise OptionError("refine has nothing to tune: this base has no start (rank 0) and refine_parts no other part.")
    walked = {m.format for m in plan.quantizer.plans.values() if Format.parse(m.format).family == "trellis"}
    if walked and "codes" in options.refine_parts:
        raise OptionError(
            f"refine cannot tune codes of {min(walked)}: each stands for a value with its neighbours only; leave codes "
            "out of refine_parts."
        )
    examples, _ = encode_rows(read_rows(options.calibrate), source.tokenizer, LENGTH)
    whole = [example.ids for example in examples if len(example.ids) == LENGTH]
    least = HELD + BATCH
    if len(whole) < least:
        raise DataError(
            f"{options.calibrate} has {len(whole)} sequences of {LENGTH} tokens; refining needs {least * LENGTH:,} "
            "tokens or more."
        )
    drawn = torch.randperm(len(whole), generator=torch.Generator().manual_seed(options.seed)).tolist()
    return torch.stack([whole[i] for i in drawn[: HELD + BATCH * options.refine]])


def _order(count: int, options: QuantizeOptions) -> list[int]:
    """Which sequences each step takes: epoch after epoch in a new order, the held-out ones never."""
    generator = torch.Generator().manual_seed(options.seed)
    order: list[int] = []
    while len(order) < BATCH * options.refine:
        order += (HELD + torch.randperm(count - HELD, generator=generator)).tolist()
    return order


def _tuned(model: nn.Module, options: QuantizeOptions) -> dict[str, tuple[nn.Parameter, float]]:
    """Everything to tune that ``refine_parts`` names, with its share of the learning rate; the model's packed linears
    are replaced by tuned ones."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    tuned: dict[str, tuple[nn.Parameter, float]] = {}
    for name, layer in quant_linears(model).items():
        stand_in = TunedLinear(layer, **{part: part in options.refine_parts for part in ("start", "scales", "codes")})
        replace_module(model, name, stand_in)
        shares = {"a": 1.0, "bt": 1.0, "gain": 1.0, "place": CODES_SHARE * stand_in.spacing}
        for leaf, share in shares.items():
            parameter = getattr(stand_in, leaf)
            if parameter is not None:
                tuned[f"{name}.{leaf}"] = (parameter, share)
    for name, parameter in model.named_parameters() if "norms" in options.refine_parts else ():
        if _is_norm(model, name):
            parameter.requires_grad_(True)
            tuned[name] = (parameter, float(parameter.detach().abs().mean()))
    return tuned


def _is_norm(model: nn.Module, name: str) -> bool:
    """True for the weight of a normalization: one value a channel, in a module that is called one."""
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and "norm" in type(model.get_submodule(path)).__name__.lower()


@torch.no_grad()
def _settle(student: Student, plan: Plan) -> dict[str, Tensor]:
    """Round all that was tuned to what is stored of it, and put the packed layers back; stored tensors by name."""
    changed: dict[str, Tensor] = {}
    for name, module in list(student.model.named_modules()):
        if isinstance(module, TunedLinear):
            changed |= {f"{name}.{leaf}": tensor for leaf, tensor in module.settle().items()}
            replace_module(student.model, name, module.layer)
    for name, parameter in student.model.named_parameters():
        if name in student.tuned:
            changed[name] = parameter.detach().to(DTYPES[plan.outputs[name].dtype])
            parameter.copy_(changed[name])
    return changed


@torch.no_grad()
def _errors(plan: Plan, model: nn.Module) -> dict[str, tuple[float, float]]:
    """The errors of every packed linear anew, from the source's weights."""
    errors, layers = {}, quant_linears(model)
    for step in plan.steps.values():
        names = {matrix.target: matrix.name for matrix in step.matrices if matrix.name in layers}
        for target, weight in step.reading.read(plan.skeleton.tensors, plan.skeleton.model) if names else ():
            layer = layers.get(names.get(target, ""))
            if layer is None:
                continue
            dense = weight.float().T if isinstance(layer, QuantConv1D) else weight.float()
            without = relative(layer.turned(dense) - decode(layer.packed_weight()), dense)
            errors[names[target]] = (without, relative(dense - layer.dense(), dense))
    return errors
