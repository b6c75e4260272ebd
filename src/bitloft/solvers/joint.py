"""Joint diagonalization of a set of adapters (arXiv 2407.00066): one pair of bases for all, a few numbers for each.

    minimize over U [k, out], V [k, in], d_i [k]:   sum_i |s_i B_i A_i - U^T diag(d_i) V|^2

This is a CP decomposition of the stack of products, solved by alternating least squares; each half step is linear and
the products stay factored. The bases belong to a set, not to an adapter, so no packed directory can hold them: these
are factors for comparison, with their bytes counted as 16-bit numbers and the bases shared out evenly.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.errors import OptionError
from bitloft.solvers.adapter import Components, Loose

ROUNDS = 30
RIDGE = 1e-9  # relative, keeps the normal equations solvable when components coincide


def joint_diagonal(adapters: Sequence[Components], rank: int, rounds: int = ROUNDS) -> list[Loose]:
    """One pair of factors of rank ``rank`` per adapter for the same module of each: a = V, bt = diag(d_i) U.

    Raises OptionError without adapters, for other widths or for a rank below 1.
    """
    shapes = {(c.u.shape[1], c.v.shape[1]) for c in adapters}
    if len(shapes) != 1 or rank < 1:
        raise OptionError(
            f"joint diagonalization takes one module of several adapters and a rank of at least 1; found {len(shapes)} "
            f"shapes and rank {rank}."
        )
    u, v = _start(adapters, rank)
    weights = _weights(adapters, u, v)
    for _ in range(rounds):
        u = _basis(adapters, v, weights, left=True)
        v = _basis(adapters, u, weights, left=False)
        u, v = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-30) for x in (u, v))
        weights = _weights(adapters, u, v)
    size = 2 * (-(-(u.numel() + v.numel()) // len(adapters)) + u.shape[0])
    return [Loose(v.float(), (d[:, None] * u).float(), size) for d in weights]


def _start(adapters: Sequence[Components], rank: int) -> tuple[Tensor, Tensor]:
    """The strongest components of all adapters, as many as the rank asks for and the adapters have."""
    strength = torch.cat([c.s for c in adapters])
    chosen = strength.argsort(descending=True)[:rank]
    rows = torch.cat([c.u for c in adapters])[chosen], torch.cat([c.v for c in adapters])[chosen]
    return rows[0].double(), rows[1].double()


def _basis(
    adapters: Sequence[Components], other: Float[Tensor, "k width"], weights: Float[Tensor, "n k"], left: bool
) -> Float[Tensor, "k out"]:
    """The least-squares U for fixed V and weights (``left``), or V for fixed U."""
    gram = other @ other.T * (weights.T @ weights)
    target = torch.zeros(0)
    for d, c in zip(weights, adapters, strict=True):
        near, far = (c.u, c.v) if left else (c.v, c.u)
        part = d[:, None] * ((other @ far.double().T * c.s.double()) @ near.double())
        target = part if not target.numel() else target + part
    ridge = RIDGE * float(gram.diagonal().mean()) + 1e-300
    found: Tensor = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), target)
    return found


def _weights(adapters: Sequence[Components], u: Float[Tensor, "k out"], v: Tensor) -> Float[Tensor, "n k"]:
    gram = (u @ u.T) * (v @ v.T)
    inner = [((u @ c.u.double().T) * c.s.double() * (v @ c.v.double().T)).sum(1) for c in adapters]
    ridge = RIDGE * float(gram.diagonal().mean()) + 1e-300
    found: Tensor = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), torch.stack(inner, 1))
    return found.T
