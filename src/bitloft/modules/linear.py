"""QuantLinear: a frozen packed weight and its start as a layer, y = x W^T + s0 * (x A0^T) B0^T + bias.

The codes are an int8 ``weight`` Parameter that does not train; scales and the start's parts are integer buffers. This
layout (measured against a ``qweight`` buffer and a virtual ``weight``) is the one that transformers loads, saves and
reloads bit-equal with no name mapping, that PEFT adapts by its default dispatch, and that fails loudly where bitloft
was not registered. T5 casts activations to ``wo.weight.dtype`` unless that is int8, hence int8 and not uint8. Integer
buffers because ``.half()`` or ``.to(bfloat16)`` casts every float buffer.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitloft.formats import Format, layout
from bitloft.kernels import ops
from bitloft.packed import DTYPES, PackedTensor
from bitloft.solvers.base import Solution


def tensor_name(owner: str, part: str) -> str:
    """Name of the module tensor that holds a part of ``weight``, ``a0`` or ``b0``: the codes have the bare name."""
    return owner if part == "codes" else f"{owner}_{part}"


class QuantLinear(nn.Linear):
    """A linear layer whose weight [out_features, in_features] is stored in ``format``.

    ``rank`` 0 means no start. Computes in the dtype of its input (under autocast, in autocast's dtype); only the input
    and the bias get gradients.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: Format,
        *,
        bias: Tensor | None = None,
        rank: int = 0,
        scaling: float = 0.0,
        start_format: Format | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own constructor would allocate the dense weight
        self.in_features, self.out_features = in_features, out_features
        self.format, self.rank, self.scaling = format, rank, scaling
        self.start_format = start_format if rank else None
        self.start_enabled = True
        self._hold((out_features, in_features), format, "weight", device)
        if self.start_format is not None:
            self._hold((rank, in_features), self.start_format, "a0", device)
            self._hold((rank, out_features), self.start_format, "b0", device)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def _hold(self, shape: tuple[int, ...], fmt: Format, owner: str, device: Any) -> None:
        """Allocate the parts of one packed tensor."""
        for part, (dtype, size) in layout(shape, fmt).items():
            empty = torch.zeros(size, dtype=DTYPES[dtype], device=device)
            if (name := tensor_name(owner, part)) == "weight":
                self.weight = nn.Parameter(empty, requires_grad=False)
            else:
                self.register_buffer(name, empty)

    def _parts(self, shape: tuple[int, ...], fmt: Format, owner: str) -> PackedTensor:
        held = {part: getattr(self, tensor_name(owner, part)) for part in layout(shape, fmt)}
        return PackedTensor(fmt, shape, **held | {"codes": held["codes"].data})

    def packed_weight(self) -> PackedTensor:
        """The weight [out, in] as stored; shares memory with the module."""
        return self._parts((self.out_features, self.in_features), self.format, "weight")

    def packed_start(self) -> tuple[PackedTensor, PackedTensor] | None:
        """A0 [rank, in] and B0^T [rank, out] as stored, or None without a start."""
        if self.start_format is None:
            return None
        return (
            self._parts((self.rank, self.in_features), self.start_format, "a0"),
            self._parts((self.rank, self.out_features), self.start_format, "b0"),
        )

    def start_a(self) -> Float[Tensor, "rank columns"]:
        """A0 in float32; [0, in] without a start."""
        start = self.packed_start()
        return ops.decode(start[0]) if start else torch.zeros(0, self.in_features)

    def start_b(self) -> Float[Tensor, "rows rank"]:
        """B0 in float32; [out, 0] without a start."""
        start = self.packed_start()
        return ops.decode(start[1]).T if start else torch.zeros(self.out_features, 0)

    def dense(self) -> Float[Tensor, "rows columns"]:
        """The matrix that this layer multiplies by, Q + s0 * B0 @ A0 (Q alone while the start is disabled), float32."""
        weight = ops.decode(self.packed_weight())
        if self.start_format is not None and self.start_enabled:
            weight = weight + self.scaling * (self.start_b() @ self.start_a())
        return weight

    def forward(self, input: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        x = _autocast(input)
        y: Tensor = _PackedLinear.apply(x, self.packed_weight())  # type: ignore[no-untyped-call]
        start = self.packed_start() if self.start_enabled else None
        if start is not None:
            y = y + self.scaling * ((x @ ops.decode(start[0], x.dtype).T) @ ops.decode(start[1], x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        start = f", start=rank {self.rank} in {self.start_format}" if self.start_format else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}{start}"

    def tensors_of(self, solution: Solution) -> dict[str, Tensor]:
        """The module tensors, by name, that hold a solution of this layer's shape and formats."""
        tensors = {tensor_name("weight", part): t for part, t in solution.weight.tensors().items()}
        if solution.start is not None:
            tensors |= {tensor_name("a0", part): t for part, t in solution.start.a.tensors().items()}
            tensors |= {tensor_name("b0", part): t for part, t in solution.start.bt.tensors().items()}
        return tensors

    def load_solution(self, solution: Solution) -> None:
        """Take over a solver's result."""
        for name, tensor in self.tensors_of(solution).items():
            if name == "weight":
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor)


class _PackedLinear(torch.autograd.Function):
    """The packed product with the only gradient that a frozen weight needs: that of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedTensor) -> Tensor:
        ctx.weight = weight
        return ops.packed_linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return ops.packed_linear_grad_input(grads[0], ctx.weight), None


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """The packed layers of a model by module path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at the path ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
