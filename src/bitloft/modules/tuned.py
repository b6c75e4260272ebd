"""TunedLinear: a packed layer while its start, and optionally its scales and codes, are tuned.

    y = x (G o Q(V))^T + s0 * (x A^T) B^T + bias    G = one gain per stored scale, 1 at first
                                                    Q(V) = scale * (level nearest to V - zero) + shift

A and B are tuned in float and rounded to the start's format in every forward, the gradient going straight through
(Bengio et al. 2013, arXiv 1308.3432): rounding at the end instead lost two thirds of what tuning had gained. G
multiplies whole groups, so the gradient of a gain is that of the matrix summed over its group: one dense gradient lives
at a time. Gains, not scales, are tuned because then one learning rate fits matrices of any magnitude. V are positions
of the codes on their grid, for the same reason. They begin on the levels, so that a code moves only where gradients
agree over many steps; begun where W lies, codes that error feedback had chosen against rounding fall back at once.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitloft.formats import Format
from bitloft.kernels import ops
from bitloft.kernels.product import packed_product
from bitloft.modules.linear import QuantLinear
from bitloft.modules.parts import load_tensors, tensor_name
from bitloft.packed import PackedTensor, pack_bits, pack_halves, scale_exponent, scales_of, unpack_bits, unpack_halves
from bitloft.solvers.grids import Grids


class TunedLinear(nn.Module):
    """Stands in for ``layer``: with ``start`` trainable ``a`` [rank, in] and ``bt`` [rank, out], with ``scales``
    ``gain`` of the stored scales' shape, with ``codes`` ``place`` [out, in]; None where the layer has no start, no
    scales or stores them in 8 bits, no codes of its own for each value."""

    def __init__(self, layer: QuantLinear, *, start: bool, scales: bool, codes: bool = False) -> None:
        super().__init__()
        self.layer = layer
        packed = layer.packed_weight()
        scaled = scales and packed.scales.numel() > 0 and not layer.format.dq
        self.a = nn.Parameter(_stored_a(layer)) if start and layer.rank else None
        self.bt = nn.Parameter(layer.start_b().T.contiguous()) if start and layer.rank else None
        self.gain = nn.Parameter(torch.ones(packed.scales.shape)) if scaled else None
        coded = codes and layer.format.family not in ("half", "trellis")
        self.place = nn.Parameter(_levels(packed)) if coded else None
        self._grids = Grids.of(packed) if coded else None

    @property
    def spacing(self) -> float:
        """The mean distance of two levels: what a position moves by between codes; 0 where no codes are tuned."""
        if self.place is None:
            return 0.0
        levels = Grids.of(self.layer.packed_weight()).levels
        return float(levels[-1] - levels[0]) / (len(levels) - 1)

    def forward(self, input: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        layer, device = self.layer, input.device.type
        x = layer.turned(input.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else input)
        if self.gain is None and self.place is None:
            y = packed_product(x, layer.packed_weight())
        else:
            y = _TunedProduct.apply(x, self.gain, self.place, self)  # type: ignore[no-untyped-call]
        if layer.rank:
            a, bt = self._factors()
            y = y + layer.scaling * ((x @ a.to(x.dtype).T) @ bt.to(x.dtype))
        return y if layer.bias is None else y + layer.bias.to(y.dtype)

    def _factors(self) -> tuple[Float[Tensor, "rank columns"], Float[Tensor, "rank rows"]]:
        """A and B^T as they are stored, or would be."""
        layer = self.layer
        if self.a is None or self.bt is None:
            return _stored_a(layer), layer.start_b().T
        return _Rounded.apply(self.a, layer.start_format), _Rounded.apply(self.bt, layer.start_format)  # type: ignore[no-untyped-call]

    def values(self) -> Float[Tensor, "rows columns"]:
        """Q(V), float32."""
        if self.place is None or self._grids is None:
            return ops.decode(self.layer.packed_weight())
        return self._grids.values(_codes(self.place, self._grids.levels))

    @torch.no_grad()
    def settle(self) -> dict[str, Tensor]:
        """Round what was tuned into the layer's formats; the changed tensors by their names in the layer."""
        layer, packed = self.layer, {}
        layer.restore()  # what is written below is in the stored order
        if self.a is not None and self.bt is not None and layer.start_format is not None:
            packed = {"a0": ops.encode(self.a, layer.start_format), "b0": ops.encode(self.bt, layer.start_format)}
        weight = layer.packed_weight()
        if self.place is not None and self._grids is not None:
            weight = packed["weight"] = _recoded(weight, _codes(self.place, self._grids.levels))
        if self.gain is not None:
            packed["weight"] = _rescaled(weight, self.gain)
        parts = {tensor_name(p, part): t for p, held in packed.items() for part, t in held.tensors().items()}
        changed = {name: tensor for name, tensor in parts.items() if name != "weight" or self.place is not None}
        load_tensors(layer, changed)
        return changed


def _stored_a(layer: QuantLinear) -> Float[Tensor, "rank columns"]:
    """A0 as it is stored, for inputs that may be rotated."""
    start = layer.packed_start()
    return ops.decode(start[0]) if start else torch.zeros(0, layer.in_features)


def _levels(packed: PackedTensor) -> Float[Tensor, "rows columns"]:
    """The level of every stored code."""
    columns = packed.shape[1]
    codes = unpack_bits(packed.codes, packed.format.bits, packed.format.width(columns))[:, :columns]
    return Grids.of(packed).levels[codes.int()]


def _codes(place: Float[Tensor, "rows columns"], levels: Float[Tensor, " levels"]) -> Tensor:
    """The nearest level of every position; one comparison a level is a third of what ``bucketize`` takes."""
    codes = torch.zeros(place.shape, dtype=torch.uint8)
    for middle in ((levels[1:] + levels[:-1]) / 2).tolist():
        codes += place > middle
    return codes


class _Rounded(torch.autograd.Function):
    """What a factor becomes when it is stored; the gradient of the factor itself."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, fmt: Format) -> Tensor:
        return ops.decode(ops.encode(factor, fmt))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _TunedProduct(torch.autograd.Function):
    """x (G o Q(V))^T with the gradients of x, of the gains and, straight through, of the positions.

    A position outside of the levels is not pushed further out.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None, place: Tensor | None, tuned: TunedLinear) -> Tensor:
        values, weight = tuned.values(), tuned.layer.packed_weight()
        dense = (values if gain is None else _gained(values, gain, weight)).to(x.dtype)
        ctx.save_for_backward(x, dense, *(t for t in (gain, place) if t is not None))
        ctx.tuned, ctx.gained = tuned, gain is not None
        return x @ dense.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        (x, dense, *rest), tuned, grad = ctx.saved_tensors, ctx.tuned, grads[0]
        gain = rest.pop(0) if ctx.gained else None
        place = rest.pop(0) if rest else None
        weight = tuned.layer.packed_weight()
        slopes = (grad.flatten(0, -2).T @ x.flatten(0, -2)).float()
        summed = _summed(slopes * tuned.values(), gain, weight) if gain is not None else None
        moved = None
        if place is not None:
            scales = tuned._grids.scales if gain is None else tuned._grids.scales * gain
            at = torch.arange(place.shape[1]) // tuned._grids.size
            levels = tuned._grids.levels
            outward = ((place > levels[-1]) & (slopes < 0)) | ((place < levels[0]) & (slopes > 0))
            moved = (slopes * scales[:, at]).masked_fill_(outward, 0.0)
        return grad @ dense, summed, moved, None


def _summed(products: Tensor, gain: Tensor, weight: PackedTensor) -> Float[Tensor, "scaled groups"]:
    """The gradient of gains: sums over their groups; a TENSOR format's one gain is for all of them."""
    slopes = _by_group(products, weight).sum(-1)
    return slopes.sum((0, 1)).reshape(1, 1) if gain.numel() == 1 else slopes


def _gained(
    values: Float[Tensor, "rows columns"], gain: Float[Tensor, "scaled groups"], weight: PackedTensor
) -> Float[Tensor, "rows columns"]:
    """G o Q; a TENSOR format's one gain is for all groups."""
    rows, columns = weight.shape
    return (_by_group(values, weight) * gain.unsqueeze(-1)).reshape(rows, -1)[:, :columns]


def _by_group(values: Float[Tensor, "rows columns"], weight: PackedTensor) -> Float[Tensor, "rows groups size"]:
    """Rows cut into the groups of ``weight``, padded with zeros to whole ones."""
    rows, columns = values.shape
    size = weight.format.group_size(columns)
    return nn.functional.pad(values, (0, -columns % size)).view(rows, -1, size)


def _recoded(weight: PackedTensor, codes: Tensor) -> PackedTensor:
    """Other codes under the same scales."""
    fmt, columns = weight.format, weight.shape[1]
    padded = nn.functional.pad(codes, (0, fmt.width(columns) - columns))
    return PackedTensor.from_tensors(fmt, weight.shape, weight.tensors() | {"codes": pack_bits(padded, fmt.bits)})


def _rescaled(weight: PackedTensor, gain: Float[Tensor, "scaled groups"]) -> PackedTensor:
    """The same codes with every scale, and shift, multiplied by its gain."""
    scales = scales_of(weight, slice(None), torch.float32) * gain
    parts = weight.tensors()
    if weight.shifts is None:
        exponent = scale_exponent(scales)
    else:
        shifts = unpack_halves(weight.shifts, weight.exponent) * gain
        exponent = scale_exponent(scales, shifts)
        parts["shifts"] = pack_halves(shifts, exponent)
    parts |= {"scales": pack_halves(scales, exponent), "exponent": exponent}
    return PackedTensor.from_tensors(weight.format, weight.shape, parts)
