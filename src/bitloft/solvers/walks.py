"""Trellis codes of rows under an input metric: |(x - s y) L|^2, y on the trellis, S = L L^T.

A walk can weigh columns, not pairs of them. So the first codes are those of least error in the diagonal D of S; then
each row is pulled, z = y + a D^-1 S (x - y): what column j would be if it alone could move, taken a part of the way
since all move at once. The walk towards z may end in better codes or worse; what is worse is left.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.formats import Format
from bitloft.kernels.ops import decode, encode_trellis
from bitloft.packed import PackedTensor, pack_scales

PULLS = (0.5, 0.5, 0.25)


def fitted(
    x: Float[Tensor, "rows columns"],
    fmt: Format,
    root: Float[Tensor, "columns columns"] | None,
    pulls: tuple[float, ...] = PULLS,
) -> PackedTensor:
    """``x`` in trellis codes with a scale per row, of least error in the metric of ``root`` = L (None: I)."""
    if root is None:
        return encode_trellis(x, fmt)
    moment = root @ root.T
    power = moment.diagonal().contiguous()
    best = encode_trellis(x, fmt, power)
    values, scales, errors = _scaled(x, best, moment)
    for part in pulls:
        target = values + part * ((x - values) @ moment) / power
        found = encode_trellis(target, fmt, power)
        again, own, left = _scaled(x, found, moment)
        better = left < errors
        values, scales = torch.where(better, again, values), torch.where(better, own, scales)
        errors = torch.where(better, left, errors)
        codes = torch.where(better, found.codes, best.codes)
        best = PackedTensor(fmt, best.shape, codes, best.scales, best.exponent)
    stored, exponent = pack_scales(scales)
    return PackedTensor(fmt, best.shape, best.codes, stored, exponent)


def _scaled(
    x: Float[Tensor, "rows columns"], packed: PackedTensor, moment: Float[Tensor, "columns columns"]
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
    """Values and scales with each row's scale of least error in the metric, and those errors."""
    bare = PackedTensor(
        Format(packed.format.family, packed.format.bits, -1),
        packed.shape,
        packed.codes,
        packed.scales[:, :0],
        packed.exponent,
    )
    y = decode(bare)
    seen = y @ moment
    scales = (x * seen).sum(1, keepdim=True) / (y * seen).sum(1, keepdim=True).clamp_min(1e-30)
    rest = x - scales * y
    return scales * y, scales, (rest * (rest @ moment)).sum(1, keepdim=True)
