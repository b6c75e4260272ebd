"""A short course of training for factors on a frozen model: towards a teacher's answers, or towards the text itself.

    towards a teacher   sum over targets of  sum_v p_v (log p_v - log q_v)     p the teacher's, q the model's
    towards the text    -log q(label)

AdamW without weight decay, gradients clipped at norm 1, cosine after a short warm-up, as `train` has it; its Trainer is
for runs that are interrupted and resumed, this for a few hundred steps whose state is not worth a checkpoint.
Whether it helped is judged on rows that it has not seen: the last tenth.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.errors import BitloftError, DataError
from bitloft.tasks.lm import CHUNK, Collator, Example, batches

HELD_OUT = 0.1
HELD_OUT_LIMIT = 64  # sequences: a mean over them is measured twice, and must not take longer than the course
WARMUP = 0.05

Batch = dict[str, Tensor]
Losses = Callable[[Batch], Float[Tensor, " targets"]]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Course:
    """``steps`` of ``batch`` sequences at a learning rate that peaks at ``lr``; ``seed`` orders the data."""

    steps: int
    lr: float
    batch: int
    seed: int


def hold_out(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """(to learn from, to judge by): the last tenth of the rows, of one document the last tenth of its blocks.

    Raises DataError where there is only one.
    """
    one_document = len({example.row for example in examples}) == 1
    owners = [i if one_document else example.row for i, example in enumerate(examples)]
    units = sorted(set(owners))
    if len(units) < 2:
        raise DataError("the data is one sequence; give two or more, since some are held out to judge by.")
    first = units[-max(int(HELD_OUT * len(units)), 1)]
    learned = [example for example, owner in zip(examples, owners, strict=True) if owner < first]
    judged = [example for example, owner in zip(examples, owners, strict=True) if owner >= first]
    return learned, judged[:HELD_OUT_LIMIT]


def mean_loss(losses: Losses, examples: Sequence[Example], collate: Collator, size: int) -> tuple[float, int]:
    """Mean of ``losses`` over all targets of the examples, and how many they are."""
    total, count = 0.0, 0
    with torch.no_grad():
        for _, batch in batches(examples, size, collate):
            found = losses(batch)
            total, count = total + float(found.double().sum()), count + found.numel()
    return total / max(count, 1), count


def descend(
    losses: Losses,
    groups: Sequence[dict[str, Any]],
    examples: Sequence[Example],
    collate: Collator,
    course: Course,
    progress: Progress | None = None,
) -> None:
    """Train the parameters of ``groups`` (AdamW's, each with a factor ``pace`` to the learning rate) in place.

    Raises BitloftError where the loss is not finite.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW([{**group, "lr": course.lr} for group in groups], weight_decay=0.0)
    for step, batch in enumerate(_order(examples, collate, course), start=1):
        for group in optimizer.param_groups:
            group["lr"] = course.lr * group["pace"] * pace(step, course.steps)
        loss = losses(batch).mean()
        if not math.isfinite(float(loss.detach())):
            raise BitloftError(f"the loss became {float(loss.detach())} at step {step}; lower the learning rate.")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if progress is not None:
            progress(step, course.steps, f"loss {float(loss.detach()):.4f}")


def pace(step: int, steps: int) -> float:
    """The share of the peak learning rate at ``step`` (from 1) of ``steps``: a rise, then half a cosine to zero."""
    rise = max(int(WARMUP * steps), 1)
    if step <= rise:
        return step / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise + 1, 1)))


def _order(examples: Sequence[Example], collate: Collator, course: Course) -> Iterator[Batch]:
    """``steps`` batches, the examples in a new order every time they are used up."""
    generator, waiting = torch.Generator().manual_seed(course.seed), list[int]()
    for _ in range(course.steps):
        while len(waiting) < course.batch:
            waiting += torch.randperm(len(examples), generator=generator).tolist()
        chosen, waiting = waiting[: course.batch], waiting[course.batch :]
        yield collate([examples[i] for i in chosen])


def divergences(
    logits: Float[Tensor, "targets vocabulary"], wanted: Float[Tensor, "targets vocabulary"]
) -> Float[Tensor, " targets"]:
    """Kullback-Leibler divergence of the model's tokens (``logits``) from the teacher's (``wanted``), in nats.

    Differentiable in ``logits``, in float32 a few rows at a time, since the logits of a batch outweigh many a model.
    """
    found: Tensor = _Divergences.apply(logits, wanted)  # type: ignore[no-untyped-call]
    return found


class _Divergences(torch.autograd.Function):
    """d/d logits = softmax(logits) - softmax(wanted)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        ctx.save_for_backward(logits, wanted)
        parts = []
        for student, teacher in _chunks(logits, wanted):
            q, p = student.float().log_softmax(1), teacher.float().log_softmax(1)
            parts.append((p.exp() * (p - q)).sum(1))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, wanted = ctx.saved_tensors
        slopes = [s.float().softmax(1) - t.float().softmax(1) for s, t in _chunks(logits, wanted)]
        return (torch.cat(slopes) * grads[0].unsqueeze(1)).to(logits.dtype), None


def _chunks(*logits: Tensor) -> Iterable[tuple[Tensor, ...]]:
    step = max(CHUNK // max(logits[0].shape[1], 1), 1)
    return zip(*(part.split(step) for part in logits), strict=True)
