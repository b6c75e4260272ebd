"""Joint refinement of a module's codes: coordinate moves over components, each taken only where the error falls.

    |D - sum_i b_i a_i^T|^2,   b_i, a_i = the stored (coded) components, D = s*B*A whole, dropped components included

With all but one factor fixed, the error is a quadratic in that factor with a diagonal Hessian: |a_i|^2 |t - b_i|^2 with
the target t = (D - sum_{j != i} b_j a_j^T) a_i / |a_i|^2. So rounding t to the nearest level is the exact best move for
b_i (not in a metric of outputs, where it is kept if it loses less); for a_i the codes and their scale are searched for
its target, and kept if they lose less. Trellis codes are walked towards the target on either side, and what a walk
wants of the scale goes to a_i, which has one. First a code is chosen for each component alone; here each sees what the
others left, and what stays out of the file altogether.

Least squares with requantization (CALDERA) solves for all factors at once and rounds afterwards; one component at a
time needs no inverse and never goes up.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.formats import ROW, Format
from bitloft.kernels import search
from bitloft.kernels.ops import decode, encode, encode_trellis
from bitloft.packed import PackedTensor, pack_bits, pack_halves, unpack_halves
from bitloft.solvers.adapter import Components, PackedBlock
from bitloft.solvers.feedback import fed_forward

ROUNDS = 2  # of both sides; a third lowers the error by less than a thousandth


def refined(exact: Components, blocks: tuple[PackedBlock, ...], rounds: int = ROUNDS) -> tuple[PackedBlock, ...]:
    """Water-filled blocks (A with a scale per row, B^T bare levels) with better codes; formats and sizes stay."""
    if not blocks:
        return blocks
    a = [row for block in blocks for row in _rows(block.a)]
    bt = [row for block in blocks for row in _rows(block.bt)]
    right, left = torch.cat([decode(row) for row in a]), torch.cat([decode(row) for row in bt])
    for _ in range(rounds):
        _move_left(exact, right, left, a, bt)
        _move_right(exact, right, left, a)
    made, at = [], 0
    for block in blocks:
        rows = slice(at, at + block.a.shape[0])
        made.append(PackedBlock(_joined(block.a, a[rows]), _joined(block.bt, bt[rows])))
        at = rows.stop
    return tuple(made)


def _rows(packed: PackedTensor) -> list[PackedTensor]:
    shape = (1, packed.shape[1])
    return [
        PackedTensor(packed.format, shape, packed.codes[i : i + 1], packed.scales[i : i + 1], packed.exponent)
        for i in range(packed.shape[0])
    ]


def _joined(like: PackedTensor, rows: list[PackedTensor]) -> PackedTensor:
    codes, scales = torch.cat([r.codes for r in rows]), torch.cat([r.scales for r in rows])
    return PackedTensor(like.format, like.shape, codes, scales, like.exponent)


def _move_left(
    exact: Components,
    right: Float[Tensor, "k columns"],
    left: Float[Tensor, "k out"],
    scaled: list[PackedTensor],
    stored: list[PackedTensor],
) -> None:
    """Every b_i to the levels nearest to its target, trellis codes with the scale of a_i; all change in place."""
    seen = exact.seen(right)
    gram = (seen @ seen.T).float()
    inner = ((seen @ exact.seen(exact.v).T * exact.s.double()) @ exact.u.double()).float()
    cost = partial(_cost, exact.out_seen)
    for i, packed in enumerate(stored):
        own = gram[i, i]
        if own <= 0:
            continue
        target = (left[i] + (inner[i] - gram[i] @ left) / own)[None]
        if packed.format.family != "trellis":
            codes = search.nearest(target, torch.ones(1, 1), packed.format.levels)
            found = _coded(packed, codes, packed.scales)
            values = decode(found)
            if exact.out_root is None or cost(target - values) < cost(target - left[i : i + 1]):
                stored[i], left[i] = found, values[0]
            continue
        walked, grown, growth = _walked(target, packed, scaled[i], exact.out_powers)
        if growth and cost(target - growth * decode(walked)) < cost(target - left[i : i + 1]):
            stored[i], scaled[i] = walked, grown
            left[i], right[i] = decode(walked)[0], decode(grown)[0]
            gram[i] *= growth
            gram[:, i] *= growth
            inner[i] *= growth


def _cost(seen: Callable[[Tensor], Tensor], error: Float[Tensor, "1 n"]) -> float:
    return float(seen(error).square().sum())


def _walked(
    target: Float[Tensor, "1 out"],
    packed: PackedTensor,
    scaled: PackedTensor,
    powers: Float[Tensor, " out"] | None,
) -> tuple[PackedTensor, PackedTensor, float]:
    """Codes of ``target`` without a scale, ``scaled`` with theirs on top of its own, and by how much that grew."""
    fmt = packed.format
    found = encode_trellis(target, Format(fmt.family, fmt.bits, ROW), powers)
    before = unpack_halves(scaled.scales, scaled.exponent)
    scales = pack_halves(before * unpack_halves(found.scales, found.exponent), scaled.exponent)
    after = unpack_halves(scales, scaled.exponent)
    growth = float(after / before) if float(before) and bool(torch.isfinite(after)) else 0.0
    walked = PackedTensor(fmt, packed.shape, found.codes, packed.scales, packed.exponent)
    return walked, PackedTensor(scaled.format, scaled.shape, scaled.codes, scales, scaled.exponent), growth


def _move_right(
    exact: Components, right: Float[Tensor, "k columns"], left: Float[Tensor, "k out"], stored: list[PackedTensor]
) -> None:
    """Every a_i to the best codes and scale found for its target; ``right`` and ``stored`` change in place."""
    seen, cost = exact.out_seen(left), partial(_cost, exact.seen)
    gram = (seen @ seen.T).float()
    inner = ((seen @ exact.out_seen(exact.u).T * exact.s.double()) @ exact.v.double()).float()
    for i, packed in enumerate(stored):
        own = gram[i, i]
        if own <= 0:
            continue
        target = (right[i] + (inner[i] - gram[i] @ right) / own)[None]
        found = _searched(exact, target, packed)
        values = decode(found)
        if cost(target - values) < cost(target - right[i : i + 1]):
            stored[i], right[i] = found, values[0]


def _searched(exact: Components, target: Float[Tensor, "1 columns"], packed: PackedTensor) -> PackedTensor:
    """The codes of ``target`` with the scale of least error in the metric."""
    trellis = packed.format.family == "trellis"
    found = encode_trellis(target, packed.format, exact.powers) if trellis else encode(target, packed.format)
    scale = unpack_halves(found.scales, found.exponent)
    if exact.root is not None and not trellis:
        found = fed_forward(target, found, exact.root)
    levels = torch.where(scale > 0, decode(found) / scale, 0.0)
    x, y = exact.seen(target), exact.seen(levels)
    best = (x * y).sum() / y.square().sum().clamp_min(1e-300)
    scales = pack_halves(best.float().reshape(1, 1), packed.exponent)
    return PackedTensor(packed.format, packed.shape, found.codes, scales, packed.exponent)


def _coded(packed: PackedTensor, codes: Tensor, scales: Tensor) -> PackedTensor:
    width = packed.format.width(packed.shape[1])
    padded = torch.nn.functional.pad(codes, (0, width - codes.shape[1]))
    return PackedTensor(packed.format, packed.shape, pack_bits(padded, packed.format.bits), scales, packed.exponent)
