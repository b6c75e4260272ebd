"""TunedLinear: a packed layer while its start, and optionally its scales, are tuned; the codes stay as they are.

    y = x (G o Q)^T + s0 * (x A^T) B^T + bias,   G = one gain per stored scale, 1 at first

A and B are tuned in float and rounded to the start's format in every forward, the gradient going straight through
(Bengio et al. 2013, arXiv 1308.3432): rounding at the end instead lost two thirds of what tuning had gained. G
multiplies whole groups, so the gradient of a gain is that of the matrix summed over its group: one dense gradient lives
at a time. Gains, not scales, are tuned because then one learning rate fits matrices of any magnitude.
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
from bitloft.packed import PackedTensor, pack_halves, scale_exponent, scales_of, unpack_halves


class TunedLinear(nn.Module):
    """Stands in for ``layer``: with ``start`` trainable ``a`` [rank, in] and ``bt`` [rank, out], with ``scales``
    ``gain`` of the stored scales' shape; None where the layer has no start, no scales or stores them in 8 bits."""

    def __init__(self, layer: QuantLinear, *, start: bool, scales: bool) -> None:
        super().__init__()
        self.layer = layer
        weight = layer.packed_weight()
        scaled = scales and weight.scales.numel() > 0 and not layer.format.dq
        self.a = nn.Parameter(layer.start_a().contiguous()) if start and layer.rank else None
        self.bt = nn.Parameter(layer.start_b().T.contiguous()) if start and layer.rank else None
        self.gain = nn.Parameter(torch.ones(weight.scales.shape)) if scaled else None

    def forward(self, input: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        layer, device = self.layer, input.device.type
        x = input.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else input
        if self.gain is None:
            y = packed_product(x, layer.packed_weight())
        else:
            y = _GainedLinear.apply(x, self.gain, layer.packed_weight())  # type: ignore[no-untyped-call]
        if layer.rank:
            a, bt = self._factors()
            y = y + layer.scaling * ((x @ a.to(x.dtype).T) @ bt.to(x.dtype))
        return y if layer.bias is None else y + layer.bias.to(y.dtype)

    def _factors(self) -> tuple[Float[Tensor, "rank columns"], Float[Tensor, "rank rows"]]:
        """A and B^T as they are stored, or would be."""
        layer = self.layer
        if self.a is None or self.bt is None:
            return layer.start_a(), layer.start_b().T
        return _Rounded.apply(self.a, layer.start_format), _Rounded.apply(self.bt, layer.start_format)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def settle(self) -> dict[str, Tensor]:
        """Round what was tuned into the layer's formats; the changed tensors by their names in the layer."""
        layer, packed = self.layer, {}
        layer.restore()  # what is written below is in the stored order
        if self.a is not None and self.bt is not None and layer.start_format is not None:
            packed = {"a0": ops.encode(self.a, layer.start_format), "b0": ops.encode(self.bt, layer.start_format)}
        if self.gain is not None:
            packed["weight"] = _rescaled(layer.packed_weight(), self.gain)
        parts = {tensor_name(p, part): t for p, held in packed.items() for part, t in held.tensors().items()}
        changed = {name: tensor for name, tensor in parts.items() if name != "weight"}  # codes are as they were
        load_tensors(layer, changed)
        return changed


class _Rounded(torch.autograd.Function):
    """What a factor becomes when it is stored; the gradient of the factor itself."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, fmt: Format) -> Tensor:
        return ops.decode(ops.encode(factor, fmt))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _GainedLinear(torch.autograd.Function):
    """x (G o Q)^T with the gradients of x and of the gains."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, weight: PackedTensor) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.weight = weight
        return x @ _gained(weight, gain, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, gain), weight, grad = ctx.saved_tensors, ctx.weight, grads[0]
        dense = grad.flatten(0, -2).T @ x.flatten(0, -2)
        slopes = _by_group(dense.float() * ops.decode(weight), weight).sum(-1)
        summed = slopes.sum((0, 1)).reshape(1, 1) if gain.numel() == 1 else slopes
        return grad @ _gained(weight, gain, grad.dtype), summed, None


def _gained(
    weight: PackedTensor, gain: Float[Tensor, "scaled groups"], dtype: torch.dtype
) -> Float[Tensor, "rows columns"]:
    """G o Q; a TENSOR format's one gain is for all groups."""
    rows, columns = weight.shape
    values = _by_group(ops.decode(weight, dtype), weight) * gain.to(dtype).unsqueeze(-1)
    return values.reshape(rows, -1)[:, :columns]


def _by_group(values: Float[Tensor, "rows columns"], weight: PackedTensor) -> Float[Tensor, "rows groups size"]:
    """Rows cut into the groups of ``weight``, padded with zeros to whole ones."""
    rows, columns = values.shape
    size = weight.format.group_size(columns)
    return nn.functional.pad(values, (0, -columns % size)).view(rows, -1, size)


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
