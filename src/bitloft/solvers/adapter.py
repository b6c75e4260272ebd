"""What adapter solvers share: the singular components of s*B*A, the packed pairs they return, a product's error.

B @ A [out, in] never exists. With thin factorizations B = Q_b R_b and A^T = Q_a R_a the small matrix s*R_b R_a^T [r, r]
carries the singular values, and every norm and inner product of two products is a sum over Gram matrices of factors:

    <B1 A1, B2 A2> = sum((B1^T B2) * (A1 A2^T))

Errors may be weighed by where inputs are and by what outputs matter: with S = L L^T the second moment of a module's
inputs x and G = R R^T that of the gradients g of the loss by its outputs, |R^T D L|^2 = tr(G D S D^T) is the mean
square of g . D x where x and g are independent (K-FAC, arXiv 1503.05671). So A L and R^T B take the places of A and B
in all of the above (a whitened SVD).

A full SVD of B @ A costs out*in*min(out, in) instead of (out + in)*r^2, a factor of about 10^4 for a 4096-wide model.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.errors import AdapterError, OptionError
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
class Trained:
    """The trained factors as rows: A [r, in] and B^T [r, out], the factor s folded into ``bt``."""

    a: Float[Tensor, "rank columns"]
    bt: Float[Tensor, "rank out"]


@dataclass(frozen=True)
class Loose:
    """Factors that the file has no layout for, and the bytes that they would take: for comparison, never packed."""

    a: Float[Tensor, "k columns"]
    bt: Float[Tensor, "k out"]
    nbytes: int


@dataclass(frozen=True)
class Components:
    """s*B@A = sum_i s_i u_i v_i^T, components as rows, s descending.

    ``root`` is L with S = L L^T, S [in, in] being the second moment of the module's inputs; ``out_root`` is R with
    G = R R^T, G [out, out] that of the gradients of its outputs; None stands for I. The norm in which the s are
    singular values, and in which every error is measured, is |R^T D L|: rows of ``u @ R`` and of ``v @ L`` have norm 1,
    and both are orthogonal.
    """

    u: Float[Tensor, "rank out"]
    s: Float[Tensor, " rank"]
    v: Float[Tensor, "rank columns"]
    root: Float[Tensor, "columns columns"] | None = None
    out_root: Float[Tensor, "out out"] | None = None

    @property
    def energy(self) -> float:
        """|R^T s*B@A L|^2 (Frobenius)."""
        return float(self.s.double().square().sum())

    @property
    def powers(self) -> Float[Tensor, " columns"] | None:
        """What an error of each column costs if it is alone: the diagonal of S; None without a metric."""
        return _diagonal(self.root)

    @property
    def out_powers(self) -> Float[Tensor, " out"] | None:
        """The same of each output: the diagonal of G."""
        return _diagonal(self.out_root)

    def seen(self, rows: Float[Tensor, "k columns"]) -> Float[Tensor, "k columns"]:
        """Rows as the input metric sees them, rows @ L, in double precision."""
        return _seen(rows, self.root)

    def out_seen(self, rows: Float[Tensor, "k out"]) -> Float[Tensor, "k out"]:
        """Rows as the output metric sees them, rows @ R, in double precision."""
        return _seen(rows, self.out_root)


def _diagonal(root: Float[Tensor, "n n"] | None) -> Float[Tensor, " n"] | None:
    return None if root is None else root.square().sum(1)


def _seen(rows: Float[Tensor, "k n"], root: Float[Tensor, "n n"] | None) -> Float[Tensor, "k n"]:
    return rows.double() if root is None else rows.double() @ root.double()


def root_of(moment: Float[Tensor, "n n"], damping: float = 0.01) -> Float[Tensor, "n n"]:
    """L lower triangular with L L^T = S + damping * mean(diag S) * I, of a second moment S = mean of x x^T.

    The damping keeps directions that the calibration text never used from being free to err. Raises OptionError where S
    is not square, not finite or not positive.
    """
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1] or not bool(torch.isfinite(moment).all()):
        raise OptionError(f"a second moment of shape {tuple(moment.shape)} must be square and finite.")
    s = moment.double()
    mean = float(s.diagonal().mean())
    found, failed = torch.linalg.cholesky_ex((s + s.T) / 2 + damping * mean * torch.eye(len(s), dtype=s.dtype))
    if mean <= 0 or bool(failed):
        raise OptionError(f"a second moment of shape {tuple(moment.shape)} is not positive; collect it anew.")
    lower: Tensor = found.float()
    return lower


def components(
    a: Float[Tensor, "rank columns"],
    b: Float[Tensor, "out rank"],
    scaling: float,
    root: Float[Tensor, "columns columns"] | None = None,
    out_root: Float[Tensor, "out out"] | None = None,
) -> Components:
    """Thin SVD of ``scaling * b @ a`` through QR of both factors, in double precision.

    With ``root`` L and ``out_root`` R it is the SVD of ``R^T (scaling * b @ a) L`` (whitened), whose right rows times
    L^-1 are the rows of ``v``, and left ones times R^-1 those of ``u``. Components that are only rounding noise get
    s = 0. The sign is fixed (the largest entry of each u is positive), so the bytes
    that follow do not depend on LAPACK's choice. Raises AdapterError where the product leaves float32.
    """
    qb, rb = torch.linalg.qr(_seen(b.T, out_root).T)
    qa, ra = torch.linalg.qr(_seen(a, root).T)
    u, s, vt = torch.linalg.svd(scaling * (rb @ ra.T))
    rows, columns = (qb @ u).T, vt @ qa.T
    s = torch.where(s > s[0] * max(b.shape[0], a.shape[1]) * NOISE, s, 0.0)
    if not bool(torch.isfinite(s.float()).all()):
        raise AdapterError(
            f"the product of the factors reaches {float(s[0]):.3g}, beyond float32; the adapter is damaged."
        )
    rows, columns = _unseen(rows, out_root), _unseen(columns, root)
    flip = torch.where(rows.gather(1, rows.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
    made = ((x * flip).float().contiguous() for x in (rows, columns))
    return Components(next(made), s.float(), next(made), root, out_root)


def _unseen(rows: Float[Tensor, "k n"], root: Float[Tensor, "n n"] | None) -> Float[Tensor, "k n"]:
    """rows @ root^-1."""
    return rows if root is None else torch.linalg.solve_triangular(root.double(), rows, upper=False, left=False)


def product_error(exact: Components, blocks: Iterable[PackedBlock | Loose]) -> float:
    """|R^T (sum_i s_i u_i v_i^T - sum_blocks bt^T a) L|^2 (Frobenius) of what is stored, to 1e-7 of the energy."""
    stored = [(exact.out_seen(bt), exact.seen(a)) for a, bt in map(factors, blocks)]
    if not stored:
        return exact.energy
    bt, a = torch.cat([s[0] for s in stored]), torch.cat([s[1] for s in stored])
    cross = ((bt @ exact.out_seen(exact.u).T) * (a @ exact.seen(exact.v).T) * exact.s.double()).sum()
    own = ((bt @ bt.T) * (a @ a.T)).sum()
    return max(exact.energy - 2 * float(cross) + float(own), 0.0)


def factors(block: PackedBlock | Loose) -> tuple[Float[Tensor, "k columns"], Float[Tensor, "k out"]]:
    """A [k, in] and B^T [k, out] as numbers."""
    return (block.a, block.bt) if isinstance(block, Loose) else (decode(block.a), decode(block.bt))
