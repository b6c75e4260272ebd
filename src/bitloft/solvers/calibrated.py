"""The calibrated solver: LoftQ's alternation with both of its steps measured where the inputs are.

    minimize  tr(E S E^T),   E = W - Q - s*B*A,   S = second moment of the inputs on the already quantized prefix

The quantize step is error feedback with scales searched in the same norm (``feedback``); the low-rank step is the
closed-form optimum (``metric.best_product``: CLoQ arXiv 2501.18475, QERA arXiv 2410.06040). Later rounds quantize
either what the product leaves, ``W - s*B*A`` (``residual``, as LoftQ), or W itself in the norm that forgets what B can
still repair behind the same A (``projection``, ProjQ arXiv 2606.00494). The best iterate by the stored error is kept.

The rank may first go to W's own leading directions, which then need no codes (``split``, SRR arXiv 2602.02001): k of
least rho_k(W L) * rho_{r-k}(E L), rho_j being the share of energy beyond rank j. That is one more iterate, not a rule.

The alternative, gradient steps on scales and factors per layer (ApiQ), takes hours where this takes minutes, and a
model-level stage can follow either.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.formats import Format
from bitloft.kernels.ops import decode, encode
from bitloft.options import QuantizeOptions
from bitloft.packed import PackedTensor
from bitloft.solvers.base import Calibrated, Solution, Start, relative
from bitloft.solvers.feedback import quantized
from bitloft.solvers.lowrank import truncated_svd
from bitloft.solvers.metric import Metric, best_product, metric_of


@dataclass(frozen=True)
class Statistics:
    """What the calibration text says of one matrix: S = mean of x x^T over ``tokens`` inputs, and optionally the mean
    squared gradient of each output (the Fisher weight of its row)."""

    moment: Float[Tensor, "columns columns"] | None
    tokens: int = 0
    rows: Float[Tensor, " rows"] | None = None


def calibrated(
    weight: Float[Tensor, "rows columns"],
    fmt: Format,
    *,
    rank: int,
    scaling: float,
    start_format: Format,
    statistics: Statistics,
    options: QuantizeOptions,
    generator: torch.Generator,
) -> Solution:
    """Q, A, B of least error under the input second moment; ``options`` give metric, order, rounds, variant and split.

    ``weight`` is float32; ``rank`` 0 gives Q alone, in one round. Raises OptionError for a moment that is no moment.
    """
    order = options.feedback if options.feedback != "none" else "forward"
    metric = metric_of(statistics.moment, fmt, kind=options.metric, order=order, damping=options.damping)
    metric_of_a = metric
    if rank and order == "activation" and start_format.group != fmt.group:  # an order keeps one group size together
        metric_of_a = metric_of(
            statistics.moment, start_format, kind=options.metric, order=order, damping=options.damping
        )
    job = _Job(weight, fmt, metric, metric_of_a, rank, scaling, start_format, statistics.rows, options, generator)
    best = min(job.iterates(), key=lambda iterate: iterate.error)
    whole, after = metric.error(weight), weight - best.dense
    facts = Calibrated(
        before=(metric.error(weight - decode(best.packed)) / whole) ** 0.5 if whole else 0.0,
        after=(metric.error(after) / whole) ** 0.5 if whole else 0.0,
        damping=metric.damping,
        tokens=statistics.tokens,
    )
    before = relative(weight - decode(best.packed), weight)
    return Solution(best.packed, best.start, before, relative(after, weight), facts)


@dataclass(frozen=True)
class _Iterate:
    packed: PackedTensor
    start: Start | None
    dense: Float[Tensor, "rows columns"]
    error: float


@dataclass(frozen=True)
class _Job:
    """One matrix on its way."""

    weight: Float[Tensor, "rows columns"]
    fmt: Format
    metric: Metric
    metric_of_a: Metric  # the same norm, in an order for the start's groups
    rank: int
    scaling: float
    start_format: Format
    row_weights: Float[Tensor, " rows"] | None
    options: QuantizeOptions
    generator: torch.Generator

    def iterates(self) -> Iterator[_Iterate]:
        last = self._iterate(self.weight, self.metric)
        yield last
        if last.start is None:
            return
        kept = self._kept(last)
        if kept:
            b, a, _ = best_product(self.weight, self.metric, kept, self.generator, self.row_weights)
            last = self._iterate(self.weight - b @ a, self.metric)
            yield last
        for _ in range(self.options.rounds - 1):
            start = last.start
            if start is None:
                return
            if self.options.variant == "projection":
                last = self._iterate(self.weight, self.metric.without(decode(start.a)))
            else:
                last = self._iterate(self.weight - start.product(), self.metric)
            yield last

    def _iterate(self, target: Float[Tensor, "rows columns"], metric: Metric) -> _Iterate:
        """Quantize ``target`` in ``metric`` and repair what is left of W."""
        fed = self.options.feedback != "none"
        packed = quantized(target, self.fmt, metric, self.options.sweeps) if fed else encode(target, self.fmt)
        dense = decode(packed)
        start = self._start(self.weight - dense) if self.rank else None
        if start is not None:
            dense = dense + start.product()
        return _Iterate(packed, start, dense, self.metric.error(self._weighed(self.weight - dense)))

    def _weighed(self, rows: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """D rows: each output by the root of its weight."""
        return rows if self.row_weights is None else rows * self.row_weights.sqrt().unsqueeze(1)

    def _start(self, error: Float[Tensor, "rows columns"]) -> Start:
        """The best product as it is stored: A rounded with feedback from the inputs, then B fitted to that A."""
        _, a, _ = best_product(error, self.metric, self.rank, self.generator, self.row_weights)
        stored = quantized(_leveled(a), self.start_format, self.metric_of_a, self.options.sweeps)
        a = decode(stored)
        seen = self.metric.seen(a)
        bt = torch.linalg.lstsq(seen @ seen.T, seen @ self.metric.seen(error).T).solution
        return Start(stored, encode(bt / self.scaling, self.start_format), self.scaling)

    def _kept(self, first: _Iterate) -> int:
        """k of the rank split: directions of W that are kept before quantizing."""
        if self.options.split != "auto":
            return min(int(self.options.split), self.rank)
        error = self.weight - decode(first.packed)
        of_weight, of_error = (_beyond(self.metric.seen(m), self.rank, self.generator) for m in (self.weight, error))
        return int((of_weight * of_error.flip(0)).argmin())


def _leveled(a: Float[Tensor, "rank columns"]) -> Float[Tensor, "rank columns"]:
    """Rows at the same norm (B takes up the difference), so that fp16 scales of one tensor fit all."""
    norms: Tensor = torch.linalg.vector_norm(a, dim=1, keepdim=True)
    return a / norms.clamp_min(1e-30)


def _beyond(matrix: Float[Tensor, "rows columns"], rank: int, generator: torch.Generator) -> Float[Tensor, " ranks"]:
    """rho_0 .. rho_rank: the share of |matrix|^2 beyond each rank."""
    energy = matrix.square().sum()
    s = truncated_svd(matrix, rank, generator)[1].square()
    kept = torch.cat([torch.zeros(1), s.cumsum(0)])
    return (1 - kept / energy.clamp_min(1e-30)).clamp_min(0)
