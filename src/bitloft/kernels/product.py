"""The product of a packed layer, y = x W^T + s0 (x A0^T) B0^T + bias + addend, with gradients and under torch.compile.

Start, bias and what adapters add are summed in float32 and rounded once: rounded first, a young adapter is lost in the
last bit of bfloat16 (docs/decisions.md). The weight is frozen, so backward needs the input's gradient only.

Eager calls go straight to ``ops.packed_linear``; traced ones through the operator ``bitloft::packed_linear``, which
takes the stored tensors as a list. The detour costs some microseconds, where one row of a 2-bit product takes a
hundred.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitloft.errors import KernelError
from bitloft.kernels import cpu_lora, ops
from bitloft.kernels.lora import Start
from bitloft.kernels.operators import flat, sum_rows
from bitloft.packed import PackedTensor

FEW = 64  # rows up to which the start is multiplied from its codes; with more, decoding it once is cheaper


def packed_product(
    x: Float[Tensor, "*batch columns"],
    weight: PackedTensor,
    start: Start | None = None,
    *,
    bias: Float[Tensor, " rows"] | None = None,
    addend: Float[Tensor, "*batch rows"] | None = None,
    invariant: bool = False,
    activations: str | None = None,
) -> Float[Tensor, "*batch rows"]:
    """x W^T + s0 (x A0^T) B0^T + bias + addend in the dtype of ``x`` (under autocast, in autocast's).

    ``addend`` is float32; ``activations`` rounds the operands of x W^T alone (``ops.packed_linear``).
    Gradients reach ``x``, ``bias`` and ``addend``. Raises KernelError on a wrong width.
    """
    x = _autocast(x)
    y: Tensor
    graded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, addend))
    if graded and not torch.compiler.is_compiling():
        y = _Product.apply(x, weight, start, bias, addend, invariant, activations)  # type: ignore[no-untyped-call]
        return y
    if start is not None:
        addend = _start_product(x, start, weight.shape[0], addend)
    if torch.compiler.is_compiling():
        if activations is not None:
            raise KernelError(f"activations {activations!r} and torch.compile do not go together; leave out one.")
        y = torch.ops.bitloft.packed_linear(x, *flat(weight), bias, addend, invariant)
    else:
        y = ops.packed_linear(x, weight, bias=bias, addend=addend, invariant=invariant, activations=activations)
    return y


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def few_rows(x: Tensor) -> bool:
    """Whether ``x`` [*batch, columns] has so few rows that a start is multiplied from its codes."""
    return x.numel() <= FEW * max(x.shape[-1], 1)


def start_blocks(start: Start) -> cpu_lora.Blocks:
    """The start as the native side sees it, kept with its A."""
    kept: cpu_lora.Blocks | None = start.a.__dict__.get("_blocks")
    if kept is None:
        kept = cpu_lora.Blocks([(start.a, start.bt)], start.scaling)
        object.__setattr__(start.a, "_blocks", kept)
    return kept


def _start_product(x: Tensor, start: Start, features: int, addend: Tensor | None) -> Tensor:
    """s0 (x A0^T) B0^T + addend in float32."""
    count = x.numel() // max(x.shape[-1], 1)
    if few_rows(x) and cpu_lora.at_once(x, addend) and cpu_lora.takes(x, start[:2]):
        out = x.new_empty(*x.shape[:-1], features, dtype=torch.float32) if addend is None else addend
        job = cpu_lora.Job(features, _EVERY_ROW, [], start_blocks(start)).to(out, add=addend is not None)
        cpu_lora.run(x.reshape(1, count, x.shape[-1]), _EVERY_ROW, [job])
        return out
    y: Tensor
    if torch.compiler.is_compiling():
        inner = torch.ops.bitloft.packed_linear(x, *flat(start.a), None, None, False)
        y = torch.ops.bitloft.packed_linear_grad_input(start.scaling * inner.float(), *flat(start.bt))
    else:
        inner = x @ ops.decode(start.a, x.dtype).T
        y = (start.scaling * inner.float()) @ ops.decode(start.bt)
    return y if addend is None else y + addend


_EVERY_ROW = cpu_lora.Rows(1, [])


class _Product(torch.autograd.Function):
    """The product with the gradients that a frozen weight and start leave: of input, bias and addend.

    The start's share of the input's gradient is computed in the dtype of ``x``: the gradient comes in it, and passes
    over a float32 copy of every output are what a step would notice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: PackedTensor,
        start: Start | None,
        bias: Tensor | None,
        addend: Tensor | None,
        invariant: bool,
        activations: str | None,
    ) -> Tensor:
        ctx.weight, ctx.start = weight, start
        if start is not None:
            given = addend.clone() if addend is not None and ctx.needs_input_grad[4] else addend  # it may be added to
            addend = _start_product(x, start, weight.shape[0], given)
        return ops.packed_linear(x, weight, bias=bias, addend=addend, invariant=invariant, activations=activations)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        wanted, _, _, bias, addend, *_ = ctx.needs_input_grad
        dx = ops.packed_linear_grad_input(grad, ctx.weight) if wanted else None
        if dx is not None and ctx.start is not None:
            a, bt, scaling = ctx.start
            dx += (scaling * (grad @ ops.decode(bt, grad.dtype).T)) @ ops.decode(a, grad.dtype)
        return dx, None, None, sum_rows(grad) if bias else None, grad.float() if addend else None, None, None
