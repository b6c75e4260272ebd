"""What adapter solvers share: the singular components of s*B*A, the packed pairs they return, a product's error.

B @ A [out, in] never exists. With thin factorizations B = Q_b R_b and A^T = Q_a R_a the small matrix s*R_b R_a^T [r, r]
carries the singular values, and every norm and inner product of two products is a sum over Gram matrices of factors:

    <B1 A1, B2 A2> = sum((B1^T B2) * (A1 A2^T))

A full SVD of B @ A costs out*in*min(out, in) instead of (out + in)*r^2, a factor of about 10^4 for a 4096-wide model.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.errors import AdapterError
from bitloft.kernels.ops import decode
from bitloft.packed import PackedTensor

# Singular values below this part of the largest (times the larger width) are rounding noise of float32 factors.
NOISE = 2.0**-24


@dataclass(frozen=True)
class PackedBlock:
    """k components at one width: A [k, in] and B^T [k, out], delta += decode(bt).T @ decode(a)."""

    a: PackedTensor
    bt: PackedTensor


@dataclass(frozen=True)
class Components:
    """s*B@A = sum_i s_i u_i v_i^T, components as rows, s descending; rows of ``u`` and ``v`` have norm 1."""

    u: Float[Tensor, "rank out"]
    s: Float[Tensor, " rank"]
    v: Float[Tensor, "rank columns"]

    @property
    def energy(self) -> float:
        """|s*B@A|^2 (Frobenius)."""
        return float(self.s.double().square().sum())


def components(a: Float[Tensor, "rank columns"], b: Float[Tensor, "out rank"], scaling: float) -> Components:
    """Thin SVD of ``scaling * b @ a`` through QR of both factors, in double precision.

    Components that are only rounding noise get s = 0. The sign is fixed (the largest entry of each u is positive), so
    the bytes that follow do not depend on LAPACK's choice. Raises AdapterError where the product leaves float32.
    """
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, vt = torch.linalg.svd(scaling * (rb @ ra.T))
    rows, columns = (qb @ u).T, vt @ qa.T
    flip = torch.where(rows.gather(1, rows.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
    s = torch.where(s > s[0] * max(b.shape[0], a.shape[1]) * NOISE, s, 0.0)
    if not bool(torch.isfinite(s.float()).all()):
        raise AdapterError(
            f"the product of the factors reaches {float(s[0]):.3g}, beyond float32; the adapter is damaged."
        )
    return Components((rows * flip).float().contiguous(), s.float(), (columns * flip).float().contiguous())


def product_error(exact: Components, blocks: Iterable[PackedBlock]) -> float:
    """|sum_i s_i u_i v_i^T - sum_blocks bt^T a|^2 (Frobenius) of what is stored, to about 1e-7 of the energy."""
    stored = [(decode(block.bt).double(), decode(block.a).double()) for block in blocks]
    if not stored:
        return exact.energy
    bt, a = torch.cat([s[0] for s in stored]), torch.cat([s[1] for s in stored])
    cross = ((bt @ exact.u.double().T) * (a @ exact.v.double().T) * exact.s.double()).sum()
    own = ((bt @ bt.T) * (a @ a.T)).sum()
    return max(exact.energy - 2 * float(cross) + float(own), 0.0)
