"""``bitloft::packed_linear`` and ``bitloft::packed_linear_grad_input``: the products as operators of torch.

An operator takes a packed tensor as the list of its stored tensors, with its format and shape beside them. What the
native library must be told of a list is kept by the addresses and sizes in it, so that a call costs microseconds.
``torch.library.register_autograd`` would cost as much again: it looks through all arguments, nested ones too, before it
finds that no gradient is wanted; the autograd kernel here asks three tensors. Each is the other's gradient.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bitloft.formats import Format, layout
from bitloft.kernels import cpu_linear, ops
from bitloft.packed import PackedTensor


def flat(packed: PackedTensor) -> tuple[list[Tensor], str, list[int], bool]:
    """A packed tensor as the operators take it."""
    return list(packed.tensors().values()), str(packed.format), list(packed.shape), packed.arranged


_LIBRARY = torch.library.Library("bitloft", "FRAGMENT")
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor[] weight, str format, int[] shape, bool arranged, Tensor? bias=None, "
    "Tensor? addend=None, bool invariant=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "packed_linear_grad_input(Tensor grad, Tensor[] weight, str format, int[] shape, bool arranged) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_KEPT: dict[tuple[object, ...], cpu_linear.Weight] = {}  # by all that a description depends on; they own nothing
_MOST = 4096


def _packed_linear(
    x: Tensor, weight: list[Tensor], format: str, shape: list[int], arranged: bool, bias: Tensor | None = None,
    addend: Tensor | None = None, invariant: bool = False,
) -> Tensor:  # fmt: skip
    if bias is None and addend is None:
        key = (format, *shape, arranged, *map(Tensor.data_ptr, weight), *[part.nbytes for part in weight])
        kept = _KEPT.get(key)
        if kept is not None and cpu_linear.fits(x, kept):
            return cpu_linear.packed_linear(x, kept, invariant=invariant)
    packed = _packed(weight, format, shape, arranged)
    if bias is None and addend is None and cpu_linear.takes(x, packed):
        if len(_KEPT) >= _MOST:
            _KEPT.clear()
        _KEPT[key] = cpu_linear.described(packed)
    return ops.packed_linear(x, packed, bias=bias, addend=addend, invariant=invariant)


def _grad_input(grad: Tensor, weight: list[Tensor], format: str, shape: list[int], arranged: bool) -> Tensor:
    return ops.packed_linear_grad_input(grad, _packed(weight, format, shape, arranged))


def _packed(parts: list[Tensor], fmt: str, shape: list[int], arranged: bool) -> PackedTensor:
    parsed, size = Format.parse(fmt), tuple(shape)
    found = PackedTensor.from_tensors(parsed, size, dict(zip(layout(size, parsed), parts, strict=True)))
    return replace(found, arranged=arranged)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, addend: Tensor | None, *rest: Any) -> Tensor:
        ctx.weight, ctx.rest = rest[0], rest[1:4]
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = torch.ops.bitloft.packed_linear(x, *rest[:4], bias, addend, *rest[4:])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        dx = torch.ops.bitloft.packed_linear_grad_input(grad, ctx.weight, *ctx.rest)
        bias = sum_rows(grad) if ctx.needs_input_grad[1] else None
        return dx, bias, grad.float() if ctx.needs_input_grad[2] else None, *[None] * 5


class _GradInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, *rest: Any) -> Tensor:
        ctx.rest = rest
        with torch._C._AutoDispatchBelowAutograd():
            dx: Tensor = torch.ops.bitloft.packed_linear_grad_input(grad, *rest)
        return dx

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.bitloft.packed_linear(grads[0], *ctx.rest), *[None] * 4


def sum_rows(grad: Tensor) -> Tensor:
    """The gradient of a bias [rows] in float32."""
    return grad.float().reshape(-1, grad.shape[-1]).sum(0)


def _with_gradients(
    x: Tensor, weight: list[Tensor], format: str, shape: list[int], arranged: bool, bias: Tensor | None = None,
    addend: Tensor | None = None, invariant: bool = False,
) -> Tensor:  # fmt: skip
    graded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, addend))
    if graded:
        y: Tensor = _Linear.apply(x, bias, addend, weight, format, shape, arranged, invariant)  # type: ignore[no-untyped-call]
        return y
    if type(x) is Tensor and not torch._C._len_torch_dispatch_stack():  # nobody listens: dispatching again is dear
        return _packed_linear(x, weight, format, shape, arranged, bias, addend, invariant)
    below = torch.ops.bitloft.packed_linear.default
    with torch._C._AutoDispatchBelowAutograd():
        return below(x, weight, format, shape, arranged, bias, addend, invariant)  # type: ignore[no-any-return]


def _grad_input_with_gradients(grad: Tensor, *rest: Any) -> Tensor:
    if torch.is_grad_enabled() and grad.requires_grad:
        dx: Tensor = _GradInput.apply(grad, *rest)  # type: ignore[no-untyped-call]
        return dx
    below = torch.ops.bitloft.packed_linear_grad_input.default
    with torch._C._AutoDispatchBelowAutograd():
        return below(grad, *rest)  # type: ignore[no-any-return]


_LIBRARY.impl("packed_linear", _packed_linear, "CompositeExplicitAutograd")
_LIBRARY.impl("packed_linear_grad_input", _grad_input, "CompositeExplicitAutograd")
_LIBRARY.impl("packed_linear", _with_gradients, "Autograd")
_LIBRARY.impl("packed_linear_grad_input", _grad_input_with_gradients, "Autograd")


@torch.library.register_fake("bitloft::packed_linear", lib=_LIBRARY)
def _fake(
    x: Tensor, weight: list[Tensor], format: str, shape: list[int], arranged: bool, bias: Tensor | None = None,
    addend: Tensor | None = None, invariant: bool = False,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], shape[0])


@torch.library.register_fake("bitloft::packed_linear_grad_input", lib=_LIBRARY)
def _fake_grad_input(grad: Tensor, weight: list[Tensor], format: str, shape: list[int], arranged: bool) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], shape[1])
