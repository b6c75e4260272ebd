"""Factors on trial: low-rank pairs added to some linears of a frozen model while a block of code runs.

    y += (x A^T) B^T       (A, B^T) = factors(), one module of parameters per linear

``Plain`` factors are their parameters. ``Coded`` ones are the components of a packed adapter, value = scale * level
[code], trained at the size they have: each code has a latent number, whose nearest level is used (of trellis codes the
levels of the walk that is nearest to all latents of a component, found anew in every step), and the gradient passes the
rounding as if it were not there (straight-through: Bengio et al., arXiv 1308.3432); scales move by a factor
exp(t). Latents are in units of the levels, so that one step means the same for every component.

Hooks, as AdapterBank has them and for its reasons. PEFT's layers would do for plain pairs alone, and rename weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int16, UInt8
from torch import Tensor, nn

from bitloft.errors import OptionError
from bitloft.formats import ROW, UNIT, Format
from bitloft.kernels.ops import decode, encode_trellis
from bitloft.kernels.search import nearest
from bitloft.packed import PackedTensor, pack_bits, pack_scales, unpack_halves
from bitloft.solvers.adapter import PackedBlock


class Plain(nn.Module):
    """A [k, in] and B^T [k, out] as parameters."""

    def __init__(self, a: Float[Tensor, "k columns"], bt: Float[Tensor, "k rows"]) -> None:
        super().__init__()
        self.a, self.bt = nn.Parameter(a.clone()), nn.Parameter(bt.clone())

    def forward(self) -> tuple[Float[Tensor, "k columns"], Float[Tensor, "k rows"]]:
        return self.a, self.bt


class Coded(nn.Module):
    """The blocks of one module of a water-filled adapter (A with a scale per row, B^T bare levels).

    ``codes`` says whether latents train too, or the scales alone. Raises OptionError for blocks of another layout.
    """

    start: Tensor  # [components, 1], the scales before

    def __init__(self, blocks: Sequence[PackedBlock], *, codes: bool = True) -> None:
        super().__init__()
        self.formats = [(block.a.format, block.bt.format) for block in blocks]
        if any(a.group != ROW or bt.group != UNIT for a, bt in self.formats):
            raise OptionError("only water-filled blocks, with one scale per component, can be distilled.")
        self.a = nn.ParameterList(nn.Parameter(_levels(block.a), requires_grad=codes) for block in blocks)
        self.bt = nn.ParameterList(nn.Parameter(_levels(block.bt), requires_grad=codes) for block in blocks)
        scales = [unpack_halves(block.a.scales, block.a.exponent) for block in blocks]
        self.register_buffer("start", torch.cat(scales))
        self.growth = nn.Parameter(torch.zeros_like(self.start))

    def scales(self) -> Float[Tensor, "components 1"]:
        """One per component, in block order."""
        return self.start * self.growth.exp()

    def forward(self) -> tuple[Float[Tensor, "k columns"], Float[Tensor, "k rows"]]:
        a = [_straight(x, fmt) for x, (fmt, _) in zip(self.a, self.formats, strict=True)]
        bt = [_straight(x, fmt) for x, (_, fmt) in zip(self.bt, self.formats, strict=True)]
        return self.scales() * torch.cat(a), torch.cat(bt)

    def blocks(self, scales: Int16[Tensor, "components 1"], exponent: Tensor) -> tuple[PackedBlock, ...]:
        """The blocks as they are stored now, with these scales (fp16 patterns in units of 2**exponent)."""
        parts = scales.split([len(x) for x in self.a])
        return tuple(
            PackedBlock(_packed(a, left, own, exponent), _packed(bt, right, own[:, :0], torch.zeros_like(exponent)))
            for a, bt, (left, right), own in zip(self.a, self.bt, self.formats, parts, strict=True)
        )


def packed_again(factors: Mapping[str, Coded]) -> dict[str, tuple[PackedBlock, ...]]:
    """The blocks of every module, all scales in one unit as water-filling stores them."""
    scales, exponent = pack_scales(torch.cat([coded.scales().detach() for coded in factors.values()]))
    parts = scales.split([len(coded.start) for coded in factors.values()])
    return {name: coded.blocks(own, exponent) for (name, coded), own in zip(factors.items(), parts, strict=True)}


def _levels(packed: PackedTensor) -> Float[Tensor, "k width"]:
    """The level of every code, without its scale."""
    bare = PackedTensor(
        Format(packed.format.family, packed.format.bits, UNIT),
        packed.shape,
        packed.codes,
        packed.scales[:, :0],
        torch.zeros_like(packed.exponent),
    )
    return decode(bare)


def _packed(latent: Tensor, fmt: Format, scales: Tensor, exponent: Tensor) -> PackedTensor:
    columns = latent.shape[1]
    if fmt.family == "trellis":
        walked = encode_trellis(latent, Format(fmt.family, fmt.bits, UNIT))
        return PackedTensor(fmt, (len(latent), columns), walked.codes, scales, exponent)
    codes = nn.functional.pad(_codes(latent.detach(), fmt), (0, fmt.width(columns) - columns))
    return PackedTensor(fmt, (len(latent), columns), pack_bits(codes, fmt.bits), scales, exponent)


def _straight(latent: Float[Tensor, "k width"], fmt: Format) -> Float[Tensor, "k width"]:
    with torch.no_grad():
        if fmt.family == "trellis":
            levels = decode(encode_trellis(latent, Format(fmt.family, fmt.bits, UNIT)))
        else:
            levels = torch.tensor(fmt.levels)[_codes(latent, fmt).int()]
        rounding = levels - latent
    return latent + rounding


def _codes(latent: Float[Tensor, "k width"], fmt: Format) -> UInt8[Tensor, "k width"]:
    return nearest(latent, torch.ones(len(latent), 1), fmt.levels)


@contextmanager
def applied(model: nn.Module, factors: Mapping[str, nn.Module]) -> Iterator[None]:
    """Forwards inside add the factors; ``factors`` maps paths of linears to modules that return (A, B^T)."""
    handles = [model.get_submodule(name).register_forward_hook(_adding(own)) for name, own in factors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(factors: nn.Module) -> Any:
    def hook(linear: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        a, bt = factors()
        added: Tensor = output + ((args[0] @ a.T) @ bt).to(output.dtype)
        return added

    return hook
