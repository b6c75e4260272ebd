"""What every base solver returns, and the two facts they share: the packed start and the error that is reported."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.formats import Format
from bitloft.kernels.ops import decode, encode
from bitloft.packed import PackedTensor


@dataclass(frozen=True)
class Start:
    """A0 [rank, columns] and B0^T [rank, rows] as stored, and s0: the base computes Q + s0 * B0 @ A0.

    B0 is kept transposed so that both factors are packed along their singular components.
    """

    a: PackedTensor
    bt: PackedTensor
    scaling: float

    def product(self) -> Float[Tensor, "rows columns"]:
        return self.scaling * (decode(self.bt).T @ decode(self.a))


@dataclass(frozen=True)
class Calibrated:
    """The same two relative errors where inputs are, sqrt(tr(E S E^T) / tr(W S W^T)); S over ``tokens`` inputs, with
    ``damping`` times the mean of its diagonal added."""

    before: float
    after: float
    damping: float
    tokens: int


@dataclass(frozen=True)
class Solution:
    """Codes of one matrix with its start. Errors are relative: |W - Q| / |W| and |W - Q - s0*B0*A0| / |W| (Frobenius),
    measured on what is stored, so a loaded model shows the same figures. ``calibrated`` is there where inputs were."""

    weight: PackedTensor
    start: Start | None
    error_before: float
    error_after: float
    calibrated: Calibrated | None = None


def relative(residual: Float[Tensor, "rows columns"], weight: Float[Tensor, "rows columns"]) -> float:
    """|residual| / |weight|; 0 for a zero matrix that is reproduced exactly."""
    return ratio(norm(residual), norm(weight))


def norm(x: Float[Tensor, "*any"]) -> float:
    """|x|, row by row and then in double: one float32 sum over 16 million values is off by a part in a thousand."""
    return float(torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1).double()))


def ratio(error: float, norm: float) -> float:
    """error / norm; where there is nothing to divide by, the error itself."""
    return error / norm if norm > 0 else error


def pack_start(a: Float[Tensor, "rank columns"], bt: Float[Tensor, "rank rows"], scaling: float, fmt: Format) -> Start:
    return Start(encode(a, fmt), encode(bt, fmt), scaling)
