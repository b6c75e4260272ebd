"""The steps of ``refine``: AdamW on what is tuned, against the teacher's last hidden states and the next token.

    loss = (1 - w) * next token + w * mean over tokens of |h - t|^2 / |t|^2

h, t: last hidden states (after the final norm) of the packed and of the full-precision model. The first term is the
cross entropy with the text (``against`` text) or the divergence KL(teacher || student) of what the head makes of t and
of h (``against`` teacher). A model without a next-token head has the second term alone.

The state of a run (values, moments, step) is one safetensors file, replaced whole, so that a killed run goes on and
ends with the same bytes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bitloft.checkpoint import read_tensors, replace_tensors
from bitloft.errors import CheckpointError
from bitloft.tasks.lm import divergences, target_losses
from bitloft.tasks.precision import Precision

HIDDEN_SHARE = 0.5  # RILQ (arXiv 2412.01129) weighs the two losses alike
WARMUP = 10  # steps in which the rate rises
SAVE_EVERY = 25
LARGEST_GRADIENT = 1.0
LEAST_GRADIENT = 1e-12  # what AdamW divides by at least: one code of millions has gradients near its usual 1e-8


@dataclass(frozen=True)
class Losses:
    """Nats per token against the text or the teacher (None without a head) and relative squared error of the last
    hidden states."""

    next_token: float | None
    hidden: float

    @property
    def total(self) -> float:
        """What is minimized."""
        return float(mixed(self.next_token, self.hidden))


def mixed(entropy: Any, error: Any) -> Any:
    """Both terms as one loss, of numbers or tensors."""
    return error if entropy is None else (1 - HIDDEN_SHARE) * entropy + HIDDEN_SHARE * error


@dataclass
class Student:
    """A transformers model with what is tuned of it: trainable tensors by name, each with its share of the rate.
    ``against``: text or teacher, which its next tokens are compared with."""

    model: Any
    tuned: dict[str, tuple[nn.Parameter, float]]
    precision: Precision
    against: str = "text"

    def terms(
        self, ids: Int[Tensor, "batch length"], target: Float[Tensor, "batch length width"]
    ) -> tuple[Float[Tensor, ""] | None, Float[Tensor, ""]]:
        """Both terms of the loss for one batch."""
        caught: list[Tensor] = []
        handle = self.model.base_model.register_forward_hook(lambda m, args, out: caught.append(out[0]))
        try:
            with self.precision.autocast(ids.device):
                head, nats = self.model.get_output_embeddings(), None
                if head is not None and self.against == "text":
                    nats = target_losses(self.model, {"input_ids": ids, "labels": ids})[0].mean()
                else:
                    self.model.base_model(input_ids=ids)
                    if head is not None:
                        nats = self._divergence(head, caught[0], target)
        finally:
            handle.remove()
        wanted, found = target.float(), caught[0].float()
        error = (found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)
        return nats, error.mean()

    def _divergence(self, head: nn.Module, found: Tensor, wanted: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = head(wanted.to(found.dtype))
        return divergences(head(found).flatten(0, 1), teacher.flatten(0, 1)).mean()

    @torch.no_grad()
    def measure(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Losses:
        """Means over batches of equal size."""
        found = [self.terms(ids, target) for ids, target in batches]
        nats = [float(first) for first, _ in found if first is not None]
        return Losses(_mean(nats) if nats else None, _mean([float(error) for _, error in found]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def tune(
    student: Student,
    batch_of: Callable[[int], tuple[Tensor, Tensor]],
    *,
    steps: int,
    rate: float,
    state: Path,
    progress: Callable[[int, int, str], None] | None = None,
) -> int:
    """Run the steps that ``state`` does not hold yet; ``batch_of(step)`` gives ids and teacher states.

    Returns the step that it went on from. Raises CheckpointError where a loss is not finite.
    """
    names = list(student.tuned)
    parameters = [student.tuned[name][0] for name in names]
    groups = [{"params": [p], "lr": rate * share, "peak": rate * share} for p, share in student.tuned.values()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, eps=LEAST_GRADIENT)
    first = _restore(state, names, parameters, optimizer)
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _course(step, steps)
        loss = mixed(*student.terms(*batch_of(step)))
        if not bool(torch.isfinite(loss)):
            raise CheckpointError(f"the loss of refining is {loss.item()} at step {step + 1}; use a lower refine_rate.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            _save(state, step + 1, names, parameters, optimizer)
        if progress is not None:
            progress(step + 1, steps, f"refining, loss {float(loss.detach()):.3f}")
    return first


def _course(step: int, steps: int) -> float:
    """Linear rise, then cosine to zero."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _save(state: Path, step: int, names: list[str], parameters: list[nn.Parameter], optimizer: Any) -> None:
    tensors = {"step": torch.tensor(step)}
    for name, parameter in zip(names, parameters, strict=True):
        moments = optimizer.state[parameter]
        tensors |= {f"{name}:value": parameter.detach(), f"{name}:mean": moments["exp_avg"]}
        tensors |= {f"{name}:square": moments["exp_avg_sq"]}
    replace_tensors(state, tensors)


def _restore(state: Path, names: list[str], parameters: list[nn.Parameter], optimizer: Any) -> int:
    """Take over a saved state; the number of steps that it has behind it."""
    if not state.is_file():
        return 0
    held = read_tensors(state)
    for name, parameter in zip(names, parameters, strict=True):
        parameter.data.copy_(held[f"{name}:value"])
        moments = {"exp_avg": held[f"{name}:mean"], "exp_avg_sq": held[f"{name}:square"]}
        optimizer.state[parameter] = {"step": held["step"].float()} | moments
    return int(held["step"])
