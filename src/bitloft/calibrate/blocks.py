"""What a replay of blocks is made of: calls, stacks with their links, and stand-ins for blocks.

    stack     a ModuleList whose children's class is in ``_no_split_modules``: a decoder's layers, an encoder's
    link      an argument of block i+1 that *is* an output of block i in a real forward (hidden states, T5's bias)
    constant  every other argument (masks, rotary tables, encoder states): captured once per batch from a forward in
              which stand-ins take the blocks' places

Replaying block i on the outputs of block i-1 then costs one block's weights, however large the model. Whether that is
the model's forward is checked, not assumed: one real forward of one sequence, blocks loaded and dropped one by one,
says which arguments are links, and the constants must be the same with stand-ins as without. Where they are not (shared
layers, work done between blocks), the model stays whole in memory and is run from its inputs for every block.

The alternative, a table of argument names per architecture, ages with every release of transformers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from bitloft.modules.linear import replace_module

Key = int | str  # of an argument: its position or its name


@dataclass
class Call:
    """The arguments of one call of a block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def items(self) -> Iterator[tuple[Key, Any]]:
        yield from enumerate(self.args)
        yield from self.kwargs.items()

    def __getitem__(self, key: Key) -> Any:
        return self.args[key] if isinstance(key, int) else self.kwargs[key]

    def replaced(self, values: Mapping[Key, Any]) -> "Call":
        args = tuple(values.get(i, value) for i, value in enumerate(self.args))
        return Call(args, {name: values.get(name, value) for name, value in self.kwargs.items()})


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after the other. ``links``: argument -> which output of the block before it (None: the
    output itself, where it is no tuple)."""

    blocks: tuple[str, ...]
    links: dict[Key, int | None] = field(default_factory=dict)


def stacks_of(model: Any) -> list[Stack]:
    """Every list of blocks of a transformers model, in model order; blocks inside blocks are not looked for."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    found: list[Stack] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for stack in found for block in stack.blocks)
        children = {f"{name}.{i}" if name else i: type(m).__name__ for i, m in module.named_children()}
        if isinstance(module, nn.ModuleList) and children and not inside and set(children.values()) <= kinds:
            found.append(Stack(tuple(children)))
    return found


class Done(Exception):  # noqa: N818 (no error: it ends a forward that has gone far enough)
    """Raised inside a forward when what was wanted of it is known."""


class StandIn(nn.Module):
    """In a block's place: notes the call and returns what it is told to. Other attributes are the block's."""

    def __init__(self, block: nn.Module, calls: list[Call], answer: Any) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)
        self.calls, self.answer = calls, answer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(Call(args, kwargs))
        return self.answer(self.calls[-1])


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Modules in the places of others for a while."""
    usual = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            replace_module(model, name, module)
        yield
    finally:
        for name, module in usual.items():
            replace_module(model, name, module)


def element(output: Any, index: int | None) -> Any:
    return output if index is None else output[index]


def answer_like(output: Any, hidden: Tensor) -> Any:
    """``hidden`` in the form that a block's output has; what else it returns is None."""
    return hidden if isinstance(output, Tensor) else (hidden, *[None] * (len(output) - 1))
