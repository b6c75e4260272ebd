"""A fixed rotation of a linear layer's inputs, after which no few of them are large: W x = (W R)(R^T x), R orthogonal.

    R = diag(signs) (C_m x H_k)      columns = m * k, k the largest power of two in it, m odd
    H_k   Hadamard / sqrt(k)         C_m   the orthonormal DCT-II of m values (1 where m is 1)

(randomized Hadamard as in QuIP, arXiv 2307.13304, and QuaRot, arXiv 2404.00456; they look Hadamard matrices of odd
multiples up in tables, which do not exist for every width). Signs come from the width alone, so that everybody who
knows the width knows R, and q, k and v, which read the same inputs, share it.
"""

import math
from functools import lru_cache
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor


def rotated(x: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch columns"]:
    """x R: inputs, or rows of a matrix that reads them, in the rotated basis. Differentiable; in the dtype of ``x``."""
    signs, odd, hadamard = _factors(x.shape[-1], x.dtype, str(x.device))
    return _mixed(x * signs, odd, hadamard)


def unrotated(x: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch columns"]:
    """x R^T, the inverse of ``rotated``."""
    signs, odd, hadamard = _factors(x.shape[-1], x.dtype, str(x.device))
    return _mixed(x, odd.T, hadamard) * signs


def rotated_moment(moment: Float[Tensor, "columns columns"]) -> Float[Tensor, "columns columns"]:
    """R^T S R: the second moment of rotated inputs."""
    return rotated(rotated(moment).T.contiguous())


def _mixed(x: Tensor, odd: Tensor, hadamard: Tensor) -> Tensor:
    parts: Tensor = x.unflatten(-1, (len(odd), len(hadamard))) @ hadamard
    return (parts if len(odd) == 1 else odd.T @ parts).flatten(-2)


@lru_cache(maxsize=64)
def _factors(columns: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """signs [columns], C [m, m] and H [k, k]."""
    power = columns & -columns
    bits = Random(f"bitloft rotation {columns}").getrandbits(columns)  # of Python, whose numbers do not change
    signs = torch.tensor([1.0 - 2.0 * (bits >> i & 1) for i in range(columns)], dtype=torch.float64)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]) / math.sqrt(2)
    count = columns // power
    n, k = torch.arange(count, dtype=torch.float64).unsqueeze(1), torch.arange(count, dtype=torch.float64)
    odd = torch.cos(math.pi / count * (n + 0.5) * k) * math.sqrt(2 / count)
    odd[:, 0] = math.sqrt(1 / count)
    signs, odd, hadamard = (part.to(device=device, dtype=dtype) for part in (signs, odd, hadamard))
    return signs, odd, hadamard
