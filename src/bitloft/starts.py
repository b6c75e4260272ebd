"""A LoRA start for a base that somebody else quantized: A, B from the truncated SVD of W - Q, as a PEFT adapter.

    minimize |W - Q - B A|    over B A of rank r, Q fixed

LoftQ's last step without the alternation, since Q cannot move. The start is the adapter itself (PEFT trains on from
it, over that base alone), with the scaling folded in: alpha = r. bitloft_adapter.json names what it was made for.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitloft.checkpoint import writing
from bitloft.errors import CheckpointError, OptionError
from bitloft.factors import Pair, write_lora
from bitloft.float8 import Stored
from bitloft.integrations.foreign import open_foreign
from bitloft.integrations.source import open_source
from bitloft.patterns import matches
from bitloft.solvers.base import relative
from bitloft.solvers.lowrank import balanced_factors, generator_for, truncated_svd

ITERATIONS = 6  # of the one SVD: a warm-started alternation gets as many over its steps

# called with (done, total, module name) after each matrix
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class StartedMatrix:
    """Relative Frobenius errors |W - Q| / |W| and |W - Q - B A| / |W| of one matrix."""

    name: str
    shape: tuple[int, int]
    error_before: float
    error_after: float


@dataclass(frozen=True)
class StartReport:
    """What ``start_for`` made, and for which base (``fingerprint``: of its weight files)."""

    out: str
    base: str
    kind: str
    fingerprint: str
    rank: int
    matrices: tuple[StartedMatrix, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def start_for(
    base: str | Path,
    model: str | Path,
    out: str | Path,
    rank: int = 16,
    *,
    target: Sequence[str] = (),
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> StartReport:
    """Write the start of ``base`` (a bitsandbytes 4-bit or GPTQ folder, or a GGUF file) as a PEFT adapter in ``out``.

    ``model`` is the 16-bit original. ``target`` are shell patterns over module paths (default: all that the base
    quantizes). Raises OptionError for a rank that a matrix cannot have or a pattern that matches nothing,
    CheckpointError where base and model do not fit each other or cannot be read.
    """
    began = time.perf_counter()
    if rank < 1:
        raise OptionError(f"rank is {rank}; use 1 or more.")
    foreign, source = open_foreign(base), open_source(str(model))
    if source.gguf:
        raise CheckpointError(f"{model} is a GGUF file; give the folder of the 16-bit original.")
    names = [name for name in foreign.matrices if not target or any(matches(name, p) for p in target)]
    for pattern in target:
        if not any(matches(name, pattern) for name in foreign.matrices):
            raise OptionError(f"target {pattern!r} matches none of the base's {len(foreign.matrices)} matrices.")
    tensors, pairs, rows = source.tensors(), {}, []
    with writing(out, overwrite=overwrite) as directory, torch.no_grad():
        for done, name in enumerate(names, start=1):
            pair, row = _solve(name, _original(tensors, name, source.name), foreign.read(name), rank, seed)
            pairs[name] = pair
            rows.append(row)
            if progress is not None:
                progress(done, len(names), name)
        record = {"base": foreign.fingerprint, "source": source.fingerprint(), "start": "foreign", "kind": foreign.kind}
        write_lora(directory, pairs, base_name=str(base), record=record)
    seconds = time.perf_counter() - began
    return StartReport(str(out), foreign.name, foreign.kind, foreign.fingerprint, rank, tuple(rows), seconds)


def _original(tensors: dict[str, Stored], name: str, model: str) -> Tensor:
    if f"{name}.weight" not in tensors:
        raise CheckpointError(f"{model} holds no {name}.weight, which the base has; give the model it was made of.")
    return tensors[f"{name}.weight"].read().float()


def _solve(name: str, weight: Tensor, quantized: Tensor, rank: int, seed: int) -> tuple[Pair, StartedMatrix]:
    if weight.shape != quantized.shape or weight.ndim != 2:
        raise CheckpointError(
            f"{name} is {tuple(weight.shape)} in the model but {tuple(quantized.shape)} in the base; give the model "
            "that the base was made of."
        )
    if rank > min(weight.shape):
        raise OptionError(f"rank {rank} exceeds min(m, n) = {min(weight.shape)} of {name}; use a smaller rank.")
    residual = weight - quantized
    if not bool(torch.isfinite(residual).all()):
        raise CheckpointError(f"{name} holds NaN or infinity in the model or the base; one of them is damaged.")
    before = relative(residual, weight)
    if before > 1:
        raise CheckpointError(f"{name} of the base is no nearer to the model's than zero is; the models differ.")
    u, s, vt = truncated_svd(residual, rank, generator_for(seed, name), iterations=ITERATIONS)
    a, bt = balanced_factors(u, s, vt, 1.0)
    pair = Pair(a.contiguous(), bt.T.contiguous())
    after = relative(residual - pair.product(), weight)
    return pair, StartedMatrix(name, (weight.shape[0], weight.shape[1]), before, after)
