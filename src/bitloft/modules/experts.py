"""QuantExperts: the fused experts of a mixture (transformers 5 keeps each projection as one 3-D parameter), packed.

    y[token] = sum over the token's experts e of  p[token, e] * down_e(gate(up_e(x[token])))

Each expert's matrix [out, in] is solved on its own and has its own start. An expert that no token chose is not decoded,
and only one is decoded at a time. The alternative, a QuantLinear per expert and projection, makes tens of thousands of
modules of a large mixture, and adapters on linears that see only some tokens could not be served mixed.

What the dense module knows besides its weights (activation, gate, biases, a norm) is taken over as it is, so that one
class stands for all models whose experts follow transformers' experts interface.
"""

from collections.abc import Callable, Container
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bitloft.kernels.lora import Start
from bitloft.kernels.product import packed_product
from bitloft.modules.parts import Held
from bitloft.rules import StoredModule

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
_MODULE = frozenset(vars(nn.Module()))  # what every module has: not to be copied


def projections(module: nn.Module) -> tuple[str, ...]:
    """The 3-D parameters of a module that follows the experts interface; empty for any other module."""
    described = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "num_experts"))
    parameters = dict(module.named_parameters(recurse=False))
    return tuple(n for n in PROJECTIONS if described and n in parameters and parameters[n].dim() == 3)


def matrices(module: nn.Module, weight: Float[Tensor, "experts _ _"]) -> Float[Tensor, "experts rows columns"]:
    """The matrices [out, in] of a projection's 3-D parameter, which some models store as [in, out]."""
    return weight.transpose(1, 2) if module.is_transposed else weight


class Delta(NamedTuple):
    """An adapter on one projection of all experts: y += scaling * x A^T B^T, each expert with its own A and B."""

    a: Float[Tensor, "experts rank columns"]
    b: Float[Tensor, "experts rows rank"]
    scaling: float


class QuantExperts(nn.Module):
    """The experts of ``dense``; ``pack`` turns its projections, one by one, into packed ones."""

    num_experts: int
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.source: Any = type(dense)
        self.parts: dict[str, Held] = {}
        self.deltas: dict[str, list[Delta]] = {}  # adapters on a projection, while they are active
        take_over(self, dense, without=())

    def pack(self, name: str, stored: StoredModule) -> None:
        """Replace the dense parameter ``name`` by zeroed parts of ``stored``'s format, on the same device."""
        parameter = self.get_parameter(name)
        count, rows, columns = matrices(self, parameter).shape
        order = list(self._parameters)
        del self._parameters[name]
        self.parts[name] = Held(self, name, (rows, columns), stored, parameter.device, stack=count)
        _order(self, order)

    def dense_shape(self, name: str) -> tuple[int, int, int]:
        """The shape of the dense parameter ``name``, in the orientation that the model has it in."""
        if name not in self.parts:
            experts, *others = self.get_parameter(name).shape
        else:
            experts, others = self.num_experts, list(self.parts[name].shape)
            others = others[::-1] if self.is_transposed else others
        return experts, others[0], others[1]

    def dense(self, name: str) -> Float[Tensor, "experts rows columns"]:
        """Q + s0 * B0 @ A0 of every expert's projection ``name`` in float32."""
        return torch.stack([self.parts[name].dense(self, index) for index in range(self.num_experts)])

    def unpacked(self, dtype: torch.dtype) -> nn.Module:
        """The dense module again, of its own class, its weights in ``dtype``."""
        module: nn.Module = self.source.__new__(self.source)
        nn.Module.__init__(module)
        packed = {name for name, _ in self.named_buffers(recurse=False) if name.startswith(tuple(self.parts))}
        take_over(module, self, without={"source", "parts", "deltas", *self.parts, *packed})
        for name in self.parts:
            weight = matrices(self, self.dense(name).to(dtype)).contiguous()
            module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        _order(module, list(self._parameters))
        return module

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens hidden"]:
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # the mark of a slot that another process computes
                continue
            token, slot = torch.where(top_k_index == expert)
            y = self._expert(expert, hidden_states[token]) * top_k_weights[token, slot, None]
            out = out.index_add(0, token, y.to(out.dtype))
        return out

    def _expert(self, expert: int, x: Float[Tensor, "some hidden"]) -> Float[Tensor, "some hidden"]:
        if self.has_gate:
            y = self.source._apply_gate(self, self._project("gate_up_proj", expert, x))
        else:
            y = self.act_fn(self._project("up_proj", expert, x))
        y = self._project("down_proj", expert, y)
        return self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y

    def _project(self, name: str, expert: int, x: Float[Tensor, "some columns"]) -> Float[Tensor, "some rows"]:
        if name in self.parts:
            part = self.parts[name]
            start = part.start(self, expert)
            y = packed_product(x, part.weight(self, expert), None if start is None else Start(*start, part.scaling))
        else:
            y = nn.functional.linear(x, matrices(self, self.get_parameter(name))[expert])
        for delta in self.deltas.get(name, ()):
            y = y + delta.scaling * (x.to(delta.a.dtype) @ delta.a[expert].T @ delta.b[expert].T).to(y.dtype)
        return y + getattr(self, f"{name}_bias")[expert].to(y.dtype) if self.has_bias else y

    def extra_repr(self) -> str:
        packed = ", ".join(f"{name}={part.format}" for name, part in self.parts.items())
        return f"{self.source.__name__}, {self.num_experts} experts, {packed}"


def _order(module: nn.Module, names: list[str]) -> None:
    """Put parameters in the dense module's order: PEFT nests its wrappers, and names its files' tensors, by it."""
    for name in names:
        module._parameters[name] = module._parameters.pop(name)


def take_over(module: nn.Module, source: nn.Module, without: Container[str]) -> None:
    """Give ``module`` the attributes, children, buffers and parameters of ``source``, except those in ``without``."""
    for name, value in vars(source).items():
        if name not in _MODULE and name not in without:
            setattr(module, name, value)
    for name, child in source.named_children():
        module.add_module(name, child)
    for name, parameter in source.named_parameters(recurse=False):
        if name not in without:
            module.register_parameter(name, parameter)
    for name, buffer in source.named_buffers(recurse=False):
        if name not in without:
            module.register_buffer(name, buffer, persistent=name not in source._non_persistent_buffers_set)
