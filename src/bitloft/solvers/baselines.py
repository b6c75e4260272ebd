"""What water-filling and LoRAQuant are compared with: the methods of LoRAQuant's tables and the controls it lacks.

They take the factors as trained (``Trained``: A [r, in], B^T [r, out]) with groups of 128 along each component, and
return blocks that the packed file stores, so that the same bytes are counted:

    rtn       min-max grid with an integer zero point
    sign      one bit, mean magnitude
    gptq      rtn's grid, errors fed forward (Frantar et al. 2022): over inputs of A, over components of B
    truncated a lower rank at 16 or 8 bits: the leading singular components, or the trained pairs of largest norm

PB-LLM and BiLLM keep a mask of single values, which the file has no place for; ``pb_llm`` and ``billm`` return Loose
factors with the bytes of their masks counted. ``shrunk`` is no compression at all: it tells how much of a "gain" is a
smaller norm.
"""

from collections.abc import Callable
from math import ceil, sqrt

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitloft.errors import OptionError
from bitloft.formats import Format
from bitloft.kernels.ops import decode, encode
from bitloft.packed import PackedTensor
from bitloft.solvers.adapter import Components, Loose, PackedBlock, Trained, root_of
from bitloft.solvers.feedback import fed_forward

GROUP = 128
SALIENT = 0.1  # part of the weights that PB-LLM keeps in 8 bits (its paper's setting)
SPLITS = 30  # break-points that BiLLM tries between small and large magnitudes


def rtn(trained: Trained, bits: int) -> tuple[PackedBlock, ...]:
    """One block in ``uniform{bits}:128``, ranges at min and max."""
    return _block(trained, Format("uniform", bits, GROUP))


def sign(trained: Trained) -> tuple[PackedBlock, ...]:
    """One block in ``sign:128``."""
    return _block(trained, Format("sign", 1, GROUP))


def _block(trained: Trained, fmt: Format) -> tuple[PackedBlock, ...]:
    return (PackedBlock(encode(trained.a, fmt), encode(trained.bt, fmt)),)


def gptq(
    trained: Trained, bits: int, moment: Float[Tensor, "columns columns"] | None = None
) -> tuple[PackedBlock, ...]:
    """One block in ``uniform{bits}:128`` with GPTQ's error feedback; ``moment`` is S of the inputs, None for I.

    A sees the inputs: with S = I nothing correlates and A is rounded. B sees A x, whose second moment is A S A^T for
    the A that is stored; its columns are rounded in order of their power, the rest of the error moving to later ones.
    """
    fmt = Format("uniform", bits, GROUP)
    a = encode(trained.a, fmt)
    if moment is not None:
        a = fed_forward(trained.a, a, root_of(moment))
    stored = decode(a).double()
    seen = stored @ stored.T if moment is None else stored @ moment.double() @ stored.T
    return (PackedBlock(a, _columns_fed(trained.bt, seen.float(), fmt)),)


def _columns_fed(bt: Float[Tensor, "rank out"], moment: Float[Tensor, "rank rank"], fmt: Format) -> PackedTensor:
    """Components of B rounded one after the other, strongest input first, each one's error corrected in the rest."""
    if not bool(moment.any()):
        return encode(bt, fmt)
    order = moment.diagonal().argsort()
    lower = root_of(moment[order][:, order])
    exact, aims = bt[order], torch.zeros_like(bt)
    errors = torch.zeros_like(bt)
    for i in reversed(range(len(bt))):
        aims[i] = exact[i] + lower[i + 1 :, i] @ errors[i + 1 :] / lower[i, i]
        errors[i] = exact[i] - decode(encode(aims[i : i + 1], fmt))[0]
    return encode(aims[order.argsort()], fmt)


def truncated(
    exact: Components, trained: Trained, *, rank: int, width: int, by: str = "svd"
) -> tuple[PackedBlock, ...]:
    """Rank ``rank`` at 16 or 8 bits a value: leading singular components (``svd``) or pairs by ``norm``.

    Raises OptionError for another width or way, or a rank below 1.
    """
    if width not in (8, 16) or by not in ("svd", "norm") or rank < 1:
        raise OptionError(f"cannot truncate to rank {rank} at {width} bits by {by!r}; use 8 or 16 bits, svd or norm.")
    fmt = Format.parse("half:row" if width == 16 else "int8:row")
    root = exact.s.sqrt().unsqueeze(1)
    a, bt = root * exact.v, root * exact.u
    if by == "norm":
        order = (trained.a.norm(dim=1) * trained.bt.norm(dim=1)).argsort(descending=True)
        a, bt = trained.a[order], trained.bt[order]
    return (PackedBlock(encode(a[:rank].contiguous(), fmt), encode(bt[:rank].contiguous(), fmt)),)


def shrunk(exact: Components, error: float) -> tuple[PackedBlock, ...]:
    """The whole product at 16 bits times 1 - sqrt(error): as far from the exact one as a method of that error.

    ``error`` is a relative squared error up to 1. What this control gains over the adapter is due to a smaller norm.
    """
    if not 0 <= error <= 1:
        raise OptionError(f"the error to shrink by is {error}; use a relative squared error from 0 to 1.")
    root = (exact.s * (1 - sqrt(error))).sqrt().unsqueeze(1)
    fmt = Format.parse("half:row")
    return (PackedBlock(encode(root * exact.v, fmt), encode(root * exact.u, fmt)),)


def pb_llm(trained: Trained, salient: float = SALIENT) -> Loose:
    """PB-LLM (arXiv 2310.00034): the values of largest magnitude in 8 bits, the others one bit, and a mask of one bit.

    Bits per value: 1 mask + 8 or 1, and per group of 128 a scale for the signs and a scale and zero point in 8 bits.
    """
    return _masked(trained, lambda x: _pb_llm(x, salient))


def _pb_llm(x: Float[Tensor, "groups size"], salient: float) -> tuple[Tensor, float]:
    cut = x.abs().flatten().kthvalue(max(round((1 - salient) * x.numel()), 1)).values
    kept = x.abs() > cut
    low, high = (x * kept).amin(1, keepdim=True), (x * kept).amax(1, keepdim=True)
    step = ((high - low) / 255).clamp_min(1e-30)
    fine = ((x - low) / step).round() * step + low
    bits = x.numel() + 8 * float(kept.sum()) + float((~kept).sum()) + x.shape[0] * (16 + 16 + 8)
    return torch.where(kept, fine, _signs(x, ~kept)), bits


def billm(trained: Trained) -> Loose:
    """BiLLM (arXiv 2402.04291) on factors: two signs for salient components, for the others signs at two scales.

    Salient are the tenth of the components where a second sign, on what the first leaves, gains most over the split of
    the others at the magnitude of least error into small and large values, which costs one mask bit a value. Both are
    two bits a value: BiLLM's own count, 1.1, leaves the mask out.
    """
    return _masked(trained, _billm)


def _masked(trained: Trained, code: Callable[[Tensor], tuple[Tensor, float]]) -> Loose:
    """Both factors through ``code`` in groups of 128 along each component, and the bytes of all."""
    made, bits = [], 0.0
    for factor in (trained.a, trained.bt):
        parts = [code(part) for part in factor.split(GROUP, dim=1)]
        made.append(torch.cat([part for part, _ in parts], dim=1))
        bits += sum(cost for _, cost in parts)
    return Loose(made[0], made[1], ceil(bits / 8))


def _billm(x: Float[Tensor, "groups size"]) -> tuple[Tensor, float]:
    everywhere = torch.ones_like(x, dtype=torch.bool)
    first = _signs(x, everywhere)
    twice = first + _signs(x - first, everywhere)
    split, best = first, (x - first).square().sum(1)
    for part in range(1, SPLITS):
        large = x.abs() > x.abs().amax(1, keepdim=True) * part / SPLITS
        made = torch.where(large, _signs(x, large), _signs(x, ~large))
        error = (x - made).square().sum(1)
        split, best = torch.where((error < best)[:, None], made, split), torch.minimum(error, best)
    fall = best - (x - twice).square().sum(1)
    salient = torch.zeros(len(x), dtype=torch.bool)
    salient[fall.argsort(descending=True)[: ceil(len(x) / 10)]] = True
    bits = 2 * x.numel() + x.shape[0] * (16 * 2)  # both kinds: two bits a value, two scales a group
    return torch.where((salient & (fall > 0))[:, None], twice, split), float(bits)


def _signs(x: Float[Tensor, "groups size"], where: Bool[Tensor, "groups size"]) -> Float[Tensor, "groups size"]:
    """sign(x) times the mean magnitude of the values of each group that ``where`` selects."""
    scale = (x.abs() * where).sum(1, keepdim=True) / where.sum(1, keepdim=True).clamp_min(1)
    return torch.where(x >= 0, scale, -scale)
