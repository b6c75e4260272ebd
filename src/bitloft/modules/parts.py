"""How a module holds packed tensors: one tensor per part of ``layout``, named ``prefix`` (codes) or ``prefix_part``.

    weight, weight_scales, weight_exponent, ..., a0, a0_scales, ..., b0, b0_scales, ...

The codes of a weight are an int8 Parameter that does not train, everything else is integer buffers (``modules.linear``
says why). Experts hold one tensor per part for all experts, with a leading axis: a tensor per expert would be tens of
thousands of names in one file. The parts are asked from ``layout``, never listed here.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitloft.formats import Format, layout
from bitloft.kernels.ops import decode
from bitloft.packed import DTYPES, PackedTensor
from bitloft.rules import StoredModule
from bitloft.solvers.base import Solution

Device = torch.device | str | None


def tensor_name(prefix: str, part: str) -> str:
    """The module tensor that holds ``part`` of the packed tensor ``prefix``."""
    return prefix if part == "codes" else f"{prefix}_{part}"


def allocate(
    module: nn.Module,
    prefix: str,
    shape: tuple[int, ...],
    fmt: Format,
    device: Device,
    *,
    stack: int | None = None,
    parameter: bool = False,
) -> None:
    """Give ``module`` zeroed tensors for a packed tensor of ``shape``, ``stack`` of them along a leading axis.

    ``parameter`` makes the codes a Parameter; else they are a buffer like the other parts.
    """
    for part, (dtype, size) in layout(shape, fmt).items():
        empty = torch.zeros(size if stack is None else (stack, *size), dtype=DTYPES[dtype], device=device)
        if parameter and part == "codes":
            module.register_parameter(prefix, nn.Parameter(empty, requires_grad=False))
        else:
            module.register_buffer(tensor_name(prefix, part), empty)


def held(module: nn.Module, prefix: str, shape: tuple[int, ...], fmt: Format, index: int | None = None) -> PackedTensor:
    """The packed tensor that ``module`` holds as ``prefix``; of a stack the one at ``index``. Shares its memory."""
    parts = {part: getattr(module, tensor_name(prefix, part)).data for part in layout(shape, fmt)}
    if index is not None:
        parts = {part: tensor[index] for part, tensor in parts.items()}
    return PackedTensor(fmt, shape, **parts)


def prefixes(leaf: str, kind: str) -> tuple[str, str, str]:
    """What the names of weight, A0 and B0 begin with in the module that holds the parameter ``leaf``."""
    return (leaf, f"{leaf}_a0", f"{leaf}_b0") if kind == "experts" else ("weight", "a0", "b0")


def _split(name: str, kind: str) -> tuple[str, str]:
    """The module's path with a dot, and the parameter's name in it."""
    if kind != "experts":
        return f"{name}.", "weight"
    parent, _, leaf = name.rpartition(".")
    return f"{parent}.", leaf


def stored_names(name: str, stored: StoredModule) -> set[str]:
    """Full names of all tensors that hold one packed module (for ``experts``: parameter)."""
    owner, leaf = _split(name, stored.kind)
    weight, *start = prefixes(leaf, stored.kind)
    wanted = [(weight, stored.format), *((prefix, stored.start_format) for prefix in start if stored.rank)]
    return {owner + tensor_name(prefix, part) for prefix, fmt in wanted for part in layout((1, 1), Format.parse(fmt))}


def stored_tensors(name: str, kind: str, solutions: list[Solution]) -> dict[str, Tensor]:
    """What a file holds of one packed module, by full tensor name; experts give one solution per expert, in order.

    ``name`` is a module path, or for ``experts`` the path of the parameter.
    """
    owner, leaf = _split(name, kind)
    each = [solution_tensors(solution, *prefixes(leaf, kind)) for solution in solutions]
    if kind == "experts":
        return {owner + key: torch.stack([tensors[key] for tensors in each]) for key in each[0]}
    return {owner + key: tensor for key, tensor in each[0].items()}


def solution_tensors(solution: Solution, weight: str, a0: str, b0: str) -> dict[str, Tensor]:
    """The module tensors, by name, that hold a solution under the given prefixes."""
    packed = {weight: solution.weight}
    if solution.start is not None:
        packed |= {a0: solution.start.a, b0: solution.start.bt}
    return {
        tensor_name(prefix, part): tensor for prefix, held in packed.items() for part, tensor in held.tensors().items()
    }


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put stored tensors, by their names in ``module``, in place of what it holds."""
    parameters = dict(module.named_parameters(recurse=False))
    for name, tensor in tensors.items():
        if name in parameters:
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
        else:
            setattr(module, name, tensor)


class Held:
    """One weight [rows, columns] and its start inside a module, under ``prefix``; a stack of them for experts.

    Keeps shapes and formats only: the tensors are looked up in the module at every call, so they may be loaded, moved
    or shared at any time.
    """

    def __init__(
        self, module: nn.Module, prefix: str, shape: tuple[int, int], stored: StoredModule, device: Device,
        stack: int | None = None,
    ) -> None:  # fmt: skip
        self.prefix, self.shape = prefix, shape
        self.format, self.rank, self.scaling = Format.parse(stored.format), stored.rank, stored.scaling
        self.start_format = Format.parse(stored.start_format)
        _, self.a0, self.b0 = prefixes(prefix, "linear" if stack is None else "experts")
        allocate(module, prefix, shape, self.format, device, stack=stack, parameter=True)
        if self.rank:
            allocate(module, self.a0, (self.rank, shape[1]), self.start_format, device, stack=stack)
            allocate(module, self.b0, (self.rank, shape[0]), self.start_format, device, stack=stack)

    def weight(self, module: nn.Module, index: int | None = None) -> PackedTensor:
        """Q [rows, columns] as stored."""
        return held(module, self.prefix, self.shape, self.format, index)

    def start(self, module: nn.Module, index: int | None = None) -> tuple[PackedTensor, PackedTensor] | None:
        """A0 [rank, columns] and B0^T [rank, rows] as stored, or None without a start."""
        if not self.rank:
            return None
        rows, columns = self.shape
        return (
            held(module, self.a0, (self.rank, columns), self.start_format, index),
            held(module, self.b0, (self.rank, rows), self.start_format, index),
        )

    def dense(
        self, module: nn.Module, index: int | None = None, *, start: bool = True
    ) -> Float[Tensor, "rows columns"]:
        """Q + s0 * B0 @ A0 in float32; Q alone without ``start``."""
        weight = decode(self.weight(module, index))
        factors = self.start(module, index) if start else None
        if factors is not None:
            weight = weight + self.scaling * (decode(factors[1]).T @ decode(factors[0]))
        return weight
