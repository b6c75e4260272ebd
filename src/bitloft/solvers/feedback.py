"""Codes chosen one after the other, each correcting the errors made so far: GPTQ's error feedback (arXiv 2210.17323).

With S = L L^T (L lower) the weighed square of an error e is |e L|^2 = sum_j (sum_{i>=j} e_i L_ij)^2. From the last
entry to the first, the term of j is least for the level nearest to x_j + sum_{i>j} e_i L_ij / L_jj. GPTQ walks
the other way with the Cholesky factor of S^-1; the two are the same up to the order, and this one inverts nothing.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.formats import UNIT
from bitloft.kernels.encoding import unpack_zeros
from bitloft.packed import PackedTensor, pack_bits, scales_of


def fed_forward(
    x: Float[Tensor, "rows columns"], packed: PackedTensor, root: Float[Tensor, "columns columns"]
) -> PackedTensor:
    """``packed`` with codes chosen anew for ``x`` under the metric of ``root`` = L; scales and zero points stay."""
    fmt, columns = packed.format, x.shape[1]
    scales, zeros = _per_column(packed, columns)
    levels = torch.tensor(fmt.levels)
    middles = (levels[1:] + levels[:-1]) / 2
    weights = (root / root.diagonal()).T.contiguous()  # row j: L_ij / L_jj
    errors = torch.zeros_like(x)
    codes = torch.zeros(x.shape[0], fmt.width(columns), dtype=torch.uint8)
    for j in reversed(range(columns)):
        target = x[:, j] + errors[:, j + 1 :] @ weights[j, j + 1 :]
        code = torch.bucketize(target / scales[:, j].clamp_min(1e-30) + zeros[:, j], middles)
        errors[:, j] = x[:, j] - (levels[code] - zeros[:, j]) * scales[:, j]
        codes[:, j] = code.to(torch.uint8)
    return PackedTensor.from_tensors(fmt, packed.shape, packed.tensors() | {"codes": pack_bits(codes, fmt.bits)})


def _per_column(packed: PackedTensor, columns: int) -> tuple[Float[Tensor, "rows columns"], Tensor]:
    """The scale and the zero point of every entry."""
    fmt, rows = packed.format, packed.shape[0]
    if fmt.group == UNIT:
        return torch.ones(rows, columns), torch.zeros(rows, columns)
    size = fmt.group_size(columns)
    scales = scales_of(packed, slice(None), torch.float32).repeat_interleave(size, 1)[:, :columns]
    if packed.zeros is None:
        return scales, torch.zeros_like(scales)
    zeros = unpack_zeros(packed.zeros, fmt.bits, fmt.groups(columns)).float()
    return scales, zeros.repeat_interleave(size, 1)[:, :columns]
