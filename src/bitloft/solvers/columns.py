"""Error feedback and sweeps where the codes of a whole column are one walk (``kernels.columnwise``).

What ``feedback`` and ``sweeps`` do with levels that every value chooses for itself. Columns are visited in the same
order; the values that a column would take if it were continuous go to one Viterbi walk down its rows, whose steps weigh
the square of each row's scale. So the walk sees exactly what the metric charges for this column, and nothing of the
trellis's gain is lost to the feedback, as it would be along a row (``docs/decisions.md``).

Scales begin as those that give a group, as it will be coded, the spread that the levels are made for; refits move them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from bitloft.formats import Format
from bitloft.kernels import columnwise
from bitloft.kernels.ops import decode, encode_trellis
from bitloft.packed import PackedTensor, scales_of
from bitloft.solvers.blocks import BLOCK, SEARCHED, blocks_of, pulled
from bitloft.solvers.metric import Metric
from bitloft.solvers.sweeps import least_scales, moment_of


@dataclass(frozen=True)
class _Codes:
    """Codes [columns, bytes], the levels [rows, columns] that they stand for and the scales [rows, groups]; all of them
    change in place."""

    fmt: Format
    codes: Int8[Tensor, "columns bytes"]
    levels: Float[Tensor, "rows columns"]
    scales: Float[Tensor, "rows groups"]

    def choose(self, column: int, aim: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Take the codes nearest to ``aim``; the values that they stand for."""
        scales = self.scales[:, column // self.fmt.group]
        found = columnwise.walked(aim.unsqueeze(0), scales, self.fmt, encode_trellis)
        self.codes[column], self.levels[:, column] = found.codes[0], decode(found)[0]
        return self.levels[:, column] * scales

    def values(self) -> Float[Tensor, "rows columns"]:
        return self.levels * self.scales.repeat_interleave(self.fmt.group, 1)[:, : self.levels.shape[1]]


def trellised(x: Float[Tensor, "rows columns"], plain: PackedTensor, metric: Metric, sweeps: int) -> PackedTensor:
    """``x`` in the format of ``plain`` by feedback under ``metric``, then ``sweeps`` refits of scales and codes.

    ``plain`` has the scales of groups over SEARCHED values, and the codes of none.
    """
    fmt, scales = plain.format, scales_of(plain, slice(None), torch.float32)
    chosen = _Codes(fmt, plain.codes.clone(), torch.zeros_like(x), scales.clone())
    _walk(x, chosen, metric)
    for _ in range(sweeps):
        chosen.scales.copy_(least_scales(x, chosen.levels, chosen.scales, fmt.group, metric))
        _sweep(x, chosen, moment_of(metric, x))
    if sweeps:
        chosen.scales.copy_(least_scales(x, chosen.levels, chosen.scales, fmt.group, metric))
    return columnwise.assembled(plain.shape, fmt, chosen.codes, chosen.scales)


def _walk(x: Float[Tensor, "rows columns"], chosen: _Codes, metric: Metric) -> None:
    """Codes of all columns, the last of the metric's order first."""
    root, size = metric.root, chosen.fmt.group
    if root is None:
        raise ValueError("feedback needs a metric")
    order = torch.arange(x.shape[1]) if metric.order is None else metric.order
    whole = size <= SEARCHED
    errors, permuted = torch.zeros_like(x), x[:, order]
    for block in reversed(blocks_of(order // size, whole=whole)):
        target = pulled(permuted, errors, root, block)
        if whole:
            group = int(order[block.start]) // size
            chosen.scales[:, group] = columnwise.natural_scales(target, chosen.fmt.bits)
        errors[:, block] = _feed(target, root[block, block], order[block].tolist(), chosen)
        errors[:, block] += permuted[:, block] - target


def _feed(
    target: Float[Tensor, "rows size"], root: Float[Tensor, "size size"], columns: list[int], chosen: _Codes
) -> Float[Tensor, "rows size"]:
    """Errors against ``target`` of the codes that one block's columns get, from the last to the first."""
    weights = (root / root.diagonal()).T.contiguous()  # row j: L_ij / L_jj
    rows = target.T.contiguous()
    errors = torch.zeros_like(rows)
    for j in reversed(range(len(columns))):
        errors[j] = rows[j] - chosen.choose(columns[j], rows[j] + weights[j, j + 1 :] @ errors[j + 1 :])
    return errors.T


def _sweep(x: Float[Tensor, "rows columns"], chosen: _Codes, moment: Float[Tensor, "columns columns"]) -> None:
    """One visit to every column, in order: a walk to x_j + sum_{i!=j} e_i S_ij / S_jj, the other errors as they are."""
    errors = x - chosen.values()
    pulls = errors @ moment  # kept equal to errors @ S
    for begin in range(0, x.shape[1], BLOCK):
        block = slice(begin, min(begin + BLOCK, x.shape[1]))
        own, wanted = moment[block, block], x[:, block].T.contiguous()
        pull, before = pulls[:, block].T.contiguous(), errors[:, block].T.contiguous()
        after = before.clone()
        for j in range(len(after)):
            error = wanted[j] - chosen.choose(begin + j, wanted[j] + pull[j] / own[j, j] - after[j])
            pull.addr_(own[:, j], error - after[j])
            after[j] = error
        pulls.addmm_((after - before).T, moment[block])
