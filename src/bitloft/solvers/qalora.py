"""QA-LoRA (Xu et al. 2023, arXiv 2309.14717): an adapter that sees only sums over groups, so it merges into the shifts.

    y = W x + s * B A p(x),   p(x)[g] = sum of x over group g          A [rank, groups], B [rows, rank]

Every column of a group has the same coefficient s * (B A)[row, g], which is what a shift per (row, group) is: the
merged weight keeps its codes and scales, its shifts grow by s * B A, and it computes the same function up to the
rounding of the shifts to fp16. Merging a plain LoRA would need new codes, which round most of it away.

The start is zero: the least-squares shift of each group leaves no group mean for a pooled adapter to repair.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from bitloft.errors import OptionError
from bitloft.formats import Format
from bitloft.packed import PackedTensor, pack_halves, scale_exponent, unpack_halves
from bitloft.solvers.base import Solution
from bitloft.solvers.qlora import qlora

# parts that are fp16 patterns in units of 2**exponent
HALVES = {"scales", "shifts", "scale_low", "scale_step"}


def qalora(weight: Float[Tensor, "rows columns"], fmt: Format) -> Solution:
    """Q = round(W) in ``fmt``, which must hold shifts per group. No start. Raises OptionError without shifts."""
    require_shifts(fmt)
    return qlora(weight, fmt)


def require_shifts(fmt: Format) -> None:
    """Raise OptionError unless pooled adapters can merge into ``fmt``."""
    if not fmt.shift:
        raise OptionError(
            f"qalora merges adapters into a shift per group, which {fmt} does not store; use {fmt}+shift."
        )


def pooled(x: Float[Tensor, "*batch columns"], fmt: Format) -> Float[Tensor, "*batch groups"]:
    """p(x): sums over the groups of a row of ``fmt``; the last group may be short."""
    columns = x.shape[-1]
    padded = pad(x, (0, fmt.width(columns) - columns))
    sums: Tensor = padded.unflatten(-1, (fmt.groups(columns), -1)).sum(-1)
    return sums


def merge_pooled(
    packed: PackedTensor, a: Float[Tensor, "rank groups"], b: Float[Tensor, "rows rank"], scaling: float
) -> PackedTensor:
    """``packed`` with scaling * B @ A added to its shifts; codes are the same tensor.

    The exponent rises where the new shifts would leave fp16's range, which moves scales by a power of two.
    Raises OptionError for a format without shifts or factors of other shapes.
    """
    require_shifts(packed.format)
    if packed.shifts is None or (b.shape[0], a.shape[1]) != tuple(packed.shifts.shape) or a.shape[0] != b.shape[1]:
        raise OptionError(
            f"a pooled adapter for a {packed.format} weight of shape {packed.shape} has A [rank, "
            f"{packed.format.groups(packed.shape[-1])}] and B [{packed.shape[0]}, rank]; found {tuple(a.shape)} and "
            f"{tuple(b.shape)}."
        )
    shifts = unpack_halves(packed.shifts, packed.exponent) + scaling * (b.float() @ a.float())
    exponent = torch.maximum(packed.exponent, scale_exponent(shifts))
    parts = packed.tensors() | {"exponent": exponent}
    for name in HALVES & parts.keys():
        if parts[name].dtype == torch.int16 and name != "shifts":
            parts[name] = pack_halves(unpack_halves(parts[name], packed.exponent), exponent)
    return PackedTensor.from_tensors(packed.format, packed.shape, parts | {"shifts": pack_halves(shifts, exponent)})
