"""Solvers: pure functions from weights to codes and factors. They see tensors and options, never files or modules."""

from dataclasses import replace

import torch
from torch import Tensor

from bitloft.errors import CheckpointError, OptionError
from bitloft.formats import Format
from bitloft.options import QuantizeOptions
from bitloft.rules import ModulePlan
from bitloft.solvers.base import Solution
from bitloft.solvers.calibrated import Statistics, calibrated
from bitloft.solvers.loftq import loftq
from bitloft.solvers.lowrank import generator_for
from bitloft.solvers.qalora import qalora
from bitloft.solvers.qlora import qlora
from bitloft.solvers.rotation import rotated, rotated_moment

__all__ = ["Solution", "Statistics", "check_rank", "require_finite", "solve"]


def require_finite(name: str, weight: Tensor) -> None:
    """Raise CheckpointError on NaN or infinity."""
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError(
            f"tensor {name} holds NaN or infinity; the source model is damaged and cannot be quantized."
        )


def check_rank(name: str, shape: tuple[int, ...], plan: ModulePlan) -> None:
    """Raise OptionError where the rank of a matrix's start exceeds min(out, in)."""
    if plan.start_rank > min(shape):
        raise OptionError(
            f"rank {plan.rank} exceeds min(m, n) = {min(shape)} of {name} {shape}; "
            "use a smaller rank (for this module alone: rank_for) or skip this module."
        )


def solve(
    name: str, weight: Tensor, plan: ModulePlan, options: QuantizeOptions, statistics: Statistics | None = None
) -> Solution:
    """Quantize one matrix [out, in] by the solver, format, rank and scaling of its ``plan``; ``options`` give the rest.

    ``name`` seeds the SVD and appears in errors. Of a plan with ``rotated`` the solution stands for rotated inputs, and
    ``statistics`` are of those that the matrix reads. Raises CheckpointError on NaN or infinity, OptionError where the
    rank exceeds min(out, in), and for ``calibrated`` where its metric needs ``statistics`` and none are given.
    """
    require_finite(name, weight)
    check_rank(name, tuple(weight.shape), plan)
    matrix, fmt = weight.detach().float(), Format.parse(plan.format)
    if plan.rotated:
        matrix = rotated(matrix)
        if statistics is not None and statistics.moment is not None:
            statistics = replace(statistics, moment=rotated_moment(statistics.moment))
    if plan.solver == "qalora":
        return qalora(matrix, fmt)
    if plan.solver == "calibrated":
        if statistics is None and options.metric != "none":
            raise OptionError(
                f"the calibrated solver has no statistics of the inputs of {name}; quantize with calibrate=FILE (a "
                "model cannot be calibrated while it is loaded), or use metric none."
            )
        return calibrated(
            matrix,
            fmt,
            rank=plan.start_rank,
            scaling=plan.scaling,
            start_format=Format.parse(options.start_format),
            statistics=statistics or Statistics(None),
            options=options,
            generator=generator_for(options.seed, name),
        )
    if not plan.start_rank:
        return qlora(matrix, fmt)
    return loftq(
        matrix,
        fmt,
        rank=plan.start_rank,
        scaling=plan.scaling,
        start_format=Format.parse(options.start_format),
        steps=None if options.steps == "auto" else int(options.steps),
        generator=generator_for(options.seed, name),
    )
