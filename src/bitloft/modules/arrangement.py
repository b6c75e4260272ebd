"""A module whose packed weight may lie in memory in another order than in the file: codes of 64 rows interleaved.

The native kernels read that order at memory bandwidth. It has the same size and lives in the same tensors, so it must
never leave the module unnoticed: state_dict, load_state_dict, copies, pickles and moves go through the stored order.
The alternative, a second copy of the weight, would double the memory of what exists to be small.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from bitloft.errors import KernelError
from bitloft.formats import Format, layout
from bitloft.kernels import cpu, cpu_linear
from bitloft.modules.parts import held, tensor_name
from bitloft.packed import PackedTensor

ORDER = "rows64"  # what ``arranged`` says of codes in the order of native/product.hpp
_SCALES = tensor_name("weight", "scales")


class Arrangement(nn.Module):
    """Adds ``arrange`` and ``restore`` to a module that holds ``weight`` [out_features, in_features] in ``format``.

    ``arranged`` names the order that the codes are in: None is the stored one.
    """

    in_features: int
    out_features: int
    format: Format
    arranged: str | None = None
    _operand: tuple[tuple[int, ...], PackedTensor] | None = None

    def arrange(self) -> bool:
        """Bring the codes into the order that the native kernels read fastest, in place; whether they are in it now.

        Nothing happens without native kernels, for a format or width that has no other order, and for codes that are no
        plain tensor on the CPU (a shard of FSDP, a fake tensor).
        """
        possible = cpu.library() is not None and cpu_linear.can_arrange(self.format, self.in_features)
        if self.arranged is None and possible and self._plain() and self._held().codes.is_contiguous():
            cpu_linear.arrange(self._held())
            self.arranged = ORDER
        return self.arranged is not None

    def restore(self) -> None:
        """Bring the stored order back, in place. Raises KernelError where the codes were sharded or moved meanwhile."""
        if self.arranged is not None:
            cpu_linear.restore(self._held())
            self.arranged = None

    def packed_weight(self) -> PackedTensor:
        """The weight [out, in] as stored; shares memory with the module unless that is arranged, then it is a copy."""
        return cpu_linear.canonical(self._held())

    def operand(self) -> PackedTensor:
        """The weight as products take it, in whatever order it lies; the same object while no tensor is replaced."""
        buffers = self._buffers
        pointers = (
            self._parameters["weight"].data_ptr(),  # type: ignore[union-attr]
            *[buffers[name].data_ptr() for name in _buffer_names(self.format)],  # type: ignore[union-attr]
        )
        kept = self._operand
        if kept is None or kept[0] != pointers or kept[1].arranged is (self.arranged is None):
            kept = self._operand = pointers, self._held()
        return kept[1]

    def _plain(self) -> bool:
        return type(self.weight.data) is Tensor and self.weight.device.type == "cpu"

    def _held(self) -> PackedTensor:
        if self.arranged is not None and not self._plain():
            raise KernelError(
                f"the codes of a {self.format} layer were sharded or moved while they were arranged; "
                "load the model with arrange=False, or call restore() before."
            )
        stored = held(self, "weight", (self.out_features, self.in_features), self.format)
        return replace(stored, arranged=self.arranged is not None)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.arranged is not None:
            packed = self.packed_weight()
            destination[f"{prefix}weight"], destination[prefix + _SCALES] = packed.codes, packed.scales

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        arranged = self.arranged is not None
        self.restore()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if arranged and not local_metadata.get("assign_to_params_buffers"):  # assigned tensors belong to the caller
            self.arrange()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        arranged = self.arranged is not None
        self.restore()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if arranged:
            self.arrange()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles are made of: the stored order."""
        state = self.__dict__ | {"_operand": None}
        if self.arranged is not None:
            packed = self.packed_weight()
            weight = nn.Parameter(packed.codes, requires_grad=False)
            state["_parameters"] = self._parameters | {"weight": weight}
            state["_buffers"] = self._buffers | {_SCALES: packed.scales}
            state["arranged"] = None
        return state


def arrange(model: nn.Module) -> int:
    """Arrange every packed layer of a model that can be, but for weights that two modules share; how many are."""
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    layers = [module for module in model.modules() if isinstance(module, Arrangement)]
    return sum(layer.arrange() for layer in layers if uses[id(layer.weight)] == 1)


def _buffer_names(fmt: Format) -> tuple[str, ...]:
    found = _NAMES.get(fmt)
    if found is None:
        found = _NAMES[fmt] = tuple(tensor_name("weight", part) for part in layout((1, 1), fmt) if part != "codes")
    return found


_NAMES: dict[Format, tuple[str, ...]] = {}
