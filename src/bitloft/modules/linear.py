"""QuantLinear: a frozen packed weight and its start as a layer, y = x W^T + s0 * (x A0^T) B0^T + bias.

The codes are an int8 ``weight`` Parameter that does not train; scales and the start's parts are integer buffers. This
layout (measured against a ``qweight`` buffer and a virtual ``weight``) is the one that transformers loads, saves and
reloads bit-equal with no name mapping, that PEFT adapts by its default dispatch, and that fails loudly where bitloft
was not registered. T5 casts activations to ``wo.weight.dtype`` unless that is int8, hence int8 and not uint8. Integer
buffers because ``.half()`` or ``.to(bfloat16)`` casts every float buffer.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitloft.formats import Format
from bitloft.kernels import ops
from bitloft.kernels.lora import Start
from bitloft.kernels.product import few_rows, packed_product
from bitloft.modules.arrangement import Arrangement
from bitloft.modules.parts import allocate, held, load_tensors, solution_tensors
from bitloft.packed import PackedTensor
from bitloft.solvers.base import Solution
from bitloft.solvers.rotation import rotated, unrotated


class QuantLinear(Arrangement, nn.Linear):
    """A linear layer whose weight [out_features, in_features] is stored in ``format``.

    ``rank`` 0 means no start. ``rotated``: codes and A0 stand for x R (``solvers.rotation``), which every forward makes
    of its input; what is on top of the layer, such as an adapter, reads x. Computes in the dtype of its input (under
    autocast, in autocast's dtype); only the input and the bias get gradients.
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
        rotated: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own constructor would allocate the dense weight
        self.in_features, self.out_features = in_features, out_features
        self.format, self.rank, self.scaling, self.rotated = format, rank, scaling, rotated
        self.start_format = start_format if rank else None
        self.start_enabled = True
        self.batch_invariant = False  # one kernel and one order of sums at any number of rows
        self.activations: str | None = None  # what the input is rounded to for the product: bf16, int8, or nothing
        self._kept_start: tuple[Tensor | None, Tensor | None, Start] | None = None
        # what an AdapterBank adds in float32 before the output is rounded: input -> [*batch, rows], or None for
        # nothing; where it adds something, a start that it is given is in it
        self.deltas: Callable[[Tensor, Start | None], Tensor | None] | None = None
        allocate(self, "weight", (out_features, in_features), format, device, parameter=True)
        if self.start_format is not None:
            allocate(self, "a0", (rank, in_features), self.start_format, device)
            allocate(self, "b0", (rank, out_features), self.start_format, device)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def packed_start(self) -> tuple[PackedTensor, PackedTensor] | None:
        """A0 [rank, in] and B0^T [rank, out] as stored, or None without a start."""
        if self.start_format is None:
            return None
        return (
            held(self, "a0", (self.rank, self.in_features), self.start_format),
            held(self, "b0", (self.rank, self.out_features), self.start_format),
        )

    def start_a(self) -> Float[Tensor, "rank columns"]:
        """A0 in float32, for the layer's own inputs; [0, in] without a start."""
        start = self.packed_start()
        a = ops.decode(start[0]) if start else torch.zeros(0, self.in_features)
        return unrotated(a) if self.rotated else a

    def start_b(self) -> Float[Tensor, "rows rank"]:
        """B0 in float32; [out, 0] without a start."""
        start = self.packed_start()
        return ops.decode(start[1]).T if start else torch.zeros(self.out_features, 0)

    def dense(self) -> Float[Tensor, "rows columns"]:
        """The matrix that this layer multiplies by, Q + s0 * B0 @ A0 (Q alone while the start is disabled), float32."""
        weight = ops.decode(self.packed_weight())
        weight = unrotated(weight) if self.rotated else weight
        if self.start_format is not None and self.start_enabled:
            weight = weight + self.scaling * (self.start_b() @ self.start_a())
        return weight

    def forward(self, input: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        start, addend = self._start() if self.start_enabled else None, None
        if self.deltas is not None:
            shared = None if self.rotated or not few_rows(input) else start  # one pass over the rows instead of two
            addend = self.deltas(input, shared)
            start = start if addend is None or shared is None else None
        return packed_product(
            self.turned(input),
            self._held() if torch.compiler.is_compiling() else self.operand(),
            start,
            bias=self.bias,
            addend=addend,
            invariant=self.batch_invariant,
            activations=self.activations,
        )

    def turned(self, rows: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch columns"]:
        """Inputs, or rows of a matrix that reads them, as the codes and A0 stand for them."""
        return rotated(rows) if self.rotated else rows

    def _start(self) -> Start | None:
        """The start for products, the same object while no tensor is replaced."""
        if self.start_format is None:
            return None
        a, bt = self._buffers["a0"], self._buffers["b0"]
        kept = self._kept_start
        if kept is None or kept[0] is not a or kept[1] is not bt or torch.compiler.is_compiling():
            kept = a, bt, Start(*(self.packed_start() or ()), self.scaling)  # type: ignore[call-arg]
            self._kept_start = kept
        return kept[2]

    def extra_repr(self) -> str:
        start = f", start=rank {self.rank} in {self.start_format}" if self.start_format else ""
        turned = ", rotated" if self.rotated else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}{start}{turned}"

    def tensors_of(self, solution: Solution) -> dict[str, Tensor]:
        """The module tensors, by name, that hold a solution of this layer's shape and formats."""
        return solution_tensors(solution, "weight", "a0", "b0")

    def load_solution(self, solution: Solution) -> None:
        """Take over a solver's result, in the stored order."""
        self.arranged = None
        load_tensors(self, self.tensors_of(solution))


class QuantConv1D(QuantLinear):
    """What a transformers ``Conv1D`` (GPT-2's linear, weight [in, out]) becomes: a QuantLinear [out, in].

    The matrix is transposed once, while it is quantized: groups and start then lie along the input axis as in any other
    linear, and kernels, banks and PEFT see nothing new (``fan_in_fan_out`` is about a dense weight's orientation;
    adapters have the same shapes either way). The class only remembers what to turn back into.
    """


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """The packed layers of a model by module path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at the path ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
