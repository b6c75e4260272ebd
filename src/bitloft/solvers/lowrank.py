"""The one SVD of the project: truncated, seeded, and warm-started where a solver calls it again.

Randomized subspace iteration (Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1): a random or given basis of
``rank + OVERSAMPLE`` columns is multiplied by ``M M^T`` a few times, then an exact SVD of the small projection follows.
A full SVD of a 4096 x 4096 matrix takes a hundred times longer and its other singular vectors are thrown away.
"""

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor

OVERSAMPLE = 8
ITERATIONS = 3


def generator_for(seed: int, name: str) -> torch.Generator:
    """A generator seeded by (seed, tensor name): the same bytes come out whatever ran before, or resumed after."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def truncated_svd(
    matrix: Float[Tensor, "rows columns"],
    rank: int,
    generator: torch.Generator,
    start: Float[Tensor, "columns warm"] | None = None,
    iterations: int = ITERATIONS,
) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, " rank"], Float[Tensor, "rank columns"]]:
    """U [rows, rank], S [rank] descending, V^T [rank, columns] of the leading part of ``matrix`` (float32).

    ``start`` holds right singular vectors of a nearby matrix; random columns fill the rest of the basis.
    """
    rows, columns = matrix.shape
    size = min(rank + OVERSAMPLE, rows, columns)
    warm = None if start is None else start[:, :size]
    fresh = size - (0 if warm is None else warm.shape[1])
    basis = torch.randn(columns, fresh, generator=generator).to(matrix)
    if warm is not None:
        basis = torch.cat([warm.to(matrix), basis], dim=1)
    for _ in range(iterations):
        left = torch.linalg.qr(matrix @ basis).Q
        basis = torch.linalg.qr(matrix.T @ left).Q
    left = torch.linalg.qr(matrix @ basis).Q
    u, s, vt = torch.linalg.svd(left.T @ matrix, full_matrices=False)
    return (left @ u)[:, :rank], s[:rank], vt[:rank]


def balanced_factors(
    u: Float[Tensor, "rows rank"], s: Float[Tensor, " rank"], vt: Float[Tensor, "rank columns"], scaling: float
) -> tuple[Float[Tensor, "rank columns"], Float[Tensor, "rank rows"]]:
    """A [rank, columns] and B^T [rank, rows] with scaling * B @ A = U diag(S) V^T, sqrt(S) on each side."""
    root = (s / scaling).clamp_min(0).sqrt().unsqueeze(1)
    return root * vt, root * u.T
