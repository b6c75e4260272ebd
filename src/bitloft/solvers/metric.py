"""The norm in which a base solver measures errors: |E L|^2 = tr(E S E^T), the mean square of E x over inputs x.

    S = mean of x x^T + damping * mean(diag S) * I = L L^T        L lower triangular, columns in an order of choice

``full`` takes S whole, ``diagonal`` its diagonal (each input counts for its power, correlations are ignored), ``none``
the identity: the squared error of the weights, no data. Error feedback walks the columns of L from the last to the
first, so the order is part of the metric; the norm does not depend on it.

The best product of rank r for an error E is closed-form in any of them (QERA, CLoQ: SVD_r(E L) L^-1). Its inverse-free
form needs the left singular vectors only, U U^T E, and no triangular solve that a nearly singular S would spoil.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitloft.errors import OptionError
from bitloft.formats import Format
from bitloft.solvers.lowrank import truncated_svd

GROWTH = 10.0  # of the damping, where S with less of it has no Cholesky factor in double precision
LIMIT = 10.0
PROJECTED_DAMPING = 0.01  # S' is singular by construction


@dataclass(frozen=True)
class Metric:
    """S [columns, columns] (damping included; None stands for I) and the columns in the order of L's rows.

    ``damping`` is what was added, relative to the mean of the diagonal.
    """

    moment: Float[Tensor, "columns columns"] | None
    order: Int[Tensor, " columns"] | None
    root: Float[Tensor, "columns columns"] | None
    damping: float = 0.0

    def seen(self, rows: Float[Tensor, "k columns"]) -> Float[Tensor, "k columns"]:
        """Rows as the metric sees them, rows @ L."""
        if self.root is None:
            return rows
        return (rows if self.order is None else rows[:, self.order]) @ self.root

    def error(self, rows: Float[Tensor, "k columns"]) -> float:
        """|rows @ L|^2."""
        return float(self.seen(rows).double().square().sum())

    def within(self, a: Float[Tensor, "rank columns"]) -> Float[Tensor, "rank rank"]:
        """A S A^T: the second moment of what the rows of ``a`` see."""
        seen = self.seen(a)
        return seen @ seen.T

    def without(self, a: Float[Tensor, "rank columns"]) -> "Metric":
        """The metric of an error that a product with ``a`` on its right will repair: min over B of |(E - B A) L|^2.

        That is |E L (I - P)|^2 with P on the rows of A L (ProjQ, arXiv 2606.00494): S' = S - S A^T (A S A^T)^-1 A S,
        of rank columns - r, hence damped anew.
        """
        if self.moment is None:
            seen = torch.linalg.qr(a.T).Q
            moment = torch.eye(a.shape[1], device=a.device) - seen @ seen.T
        else:
            right = self.moment @ a.T
            moment = self.moment - right @ torch.linalg.lstsq(self.within(a), right.T).solution
        return _of(moment, self.order, max(self.damping, PROJECTED_DAMPING))


def metric_of(
    moment: Float[Tensor, "columns columns"] | None,
    fmt: Format,
    *,
    kind: str = "full",
    order: str = "forward",
    damping: float = 0.01,
) -> Metric:
    """The metric of a second moment S = mean of x x^T [columns, columns], for error feedback over groups of ``fmt``.

    Orders: ``forward`` chooses codes from the first column to the last (GPTQ), ``reverse`` the other way,
    ``activation`` from the group whose inputs have most power to the one with least, and so within groups (GPTQ's
    act-order, groups kept whole). The damping grows tenfold until L exists. Raises OptionError where S is not square,
    not finite or zero.
    """
    if moment is None or kind == "none":
        return Metric(None, None, None)
    power = moment.diagonal().float()
    if moment.shape[0] != moment.shape[1] or not bool(torch.isfinite(moment).all()) or float(power.mean()) <= 0:
        raise OptionError(
            f"an input second moment of shape {tuple(moment.shape)} must be square, finite and not zero; collect it "
            "anew, from text that reaches every module."
        )
    if kind == "diagonal":
        return _of(torch.diag(power), None, damping)
    return _of(moment.float(), _columns(power, fmt, order), damping)


def _columns(power: Float[Tensor, " columns"], fmt: Format, order: str) -> Int[Tensor, " columns"] | None:
    """Columns in the order of L's rows: the first to be chosen comes last. Groups stay together."""
    count = power.numel()
    if order == "reverse":
        return None
    if order == "forward":
        return torch.arange(count - 1, -1, -1)
    groups = torch.arange(count) // fmt.group_size(count)
    of_group = torch.zeros(int(groups[-1]) + 1).index_add_(0, groups, power.cpu())
    found = sorted(range(count), key=lambda j: (float(of_group[groups[j]]), int(groups[j]), float(power[j])))
    return torch.tensor(found)


def _of(moment: Float[Tensor, "columns columns"], order: Int[Tensor, " columns"] | None, damping: float) -> Metric:
    """Damp and factor; the damping that it took is in the metric."""
    mean = float(moment.diagonal().double().mean())
    s = moment if order is None else moment[order][:, order]
    symmetric = (s.double() + s.T.double()) / 2
    while damping <= LIMIT:
        eye = torch.eye(len(s), dtype=torch.float64, device=s.device)
        root, failed = torch.linalg.cholesky_ex(symmetric + damping * mean * eye)
        if not bool(failed):
            damped = moment + damping * mean * torch.eye(len(s), device=s.device)
            return Metric(damped, order, root.float(), damping)
        damping = max(damping, 1e-6) * GROWTH
    raise OptionError(f"an input second moment of shape {tuple(moment.shape)} is not positive; collect it anew.")


def best_product(
    error: Float[Tensor, "rows columns"],
    metric: Metric,
    rank: int,
    generator: torch.Generator,
    row_weights: Float[Tensor, " rows"] | None = None,
) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank columns"], Float[Tensor, " rank"]]:
    """B [rows, rank], A [rank, columns] of least |D (error - B A) L|, and the singular values that they repair.

    D = diag(sqrt(row_weights)), I without: B = D^-1 U, A = U^T D error with U the leading left singular vectors of
    D error L. The same product as D^-1 SVD_r(D error L) L^-1.
    """
    root = None if row_weights is None else row_weights.sqrt().unsqueeze(1)
    weighed = error if root is None else root * error
    u, s, _ = truncated_svd(metric.seen(weighed), rank, generator)
    return u if root is None else u / root, u.T @ weighed, s
