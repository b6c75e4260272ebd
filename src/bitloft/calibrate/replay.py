"""Capture and replay: the arguments of every block of a stack, per batch, and the check that they suffice.

See ``blocks`` for the words. What is kept per batch: the outputs of the block reached so far, and constants, of which
equal ones are kept once for all batches.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitloft.calibrate.blocks import Call, Done, Key, Stack, StandIn, answer_like, element, replaced
from bitloft.calibrate.text import Batch
from bitloft.integrations.body import Body

Begin = Callable[[int], None]  # told the number of each batch before it runs


@dataclass(frozen=True)
class Trace:
    """What one real forward did: the calls and outputs of every block, in order."""

    calls: list[tuple[str, Call, Any]]


def trace(body: Body, stacks: Sequence[Stack], batch: Batch) -> Trace:
    """Run the model for real, each block filled for its own call only."""
    found: list[tuple[str, Call, Any]] = []
    handles = []
    for name in (block for stack in stacks for block in stack.blocks):
        block = body.model.get_submodule(name)

        def before(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
            body.fill(body.within(name))
            found.append((name, Call(args, kwargs), None))

        def after(_: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            found[-1] = (*found[-1][:2], output)
            body.drop(name)

        handles += [
            block.register_forward_pre_hook(before, with_kwargs=True),
            block.register_forward_hook(after, with_kwargs=True),
        ]
    try:
        body.model(**batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Trace(found)


def linked(traced: Trace, stacks: Sequence[Stack]) -> list[Stack] | str:
    """The stacks with their links, or why they cannot be replayed."""
    order = [name for name, _, _ in traced.calls]
    if order != [block for stack in stacks for block in stack.blocks]:
        return "its blocks do not run once each, in order"
    seen = {name: (call, output) for name, call, output in traced.calls}
    result = []
    for stack in stacks:
        found: list[dict[Key, int | None]] = []
        for one, two in zip(stack.blocks, stack.blocks[1:], strict=False):
            output, call = seen[one][1], seen[two][0]
            parts = {None: output} if isinstance(output, Tensor) else dict(enumerate(output))
            found.append({k: i for k, v in call.items() for i, part in parts.items() if v is part and v is not None})
        links = found[0] if found else _alone(*seen[stack.blocks[0]])
        if not links or any(other != links for other in found):
            return f"the input of {stack.blocks[-1]} is not the output of the block before it"
        result.append(replace(stack, links=links))
    return result


def _alone(call: Call, output: Any) -> dict[Key, int | None]:
    """The hidden states of a stack of one block: its first argument of the output's shape."""
    index = None if isinstance(output, Tensor) else 0
    shape = element(output, index).shape
    return {key: index for key, value in [*call.items()][::-1] if isinstance(value, Tensor) and value.shape == shape}


class Replay:
    """The calls of one stack for all batches, and the outputs of the block that was run last."""

    def __init__(self, body: Body, stacks: Sequence[Stack], forms: dict[str, Any]) -> None:
        self.body, self.stacks, self.forms = body, stacks, forms
        self.finished: dict[str, list[Any]] = {}  # last block of a stack -> its output for each batch

    def capture(self, batches: Sequence[Batch], stack: Stack) -> None:
        """Note the constants of ``stack`` for every batch; earlier stacks must be finished."""
        self.stack, self.calls = stack, list[list[Call]]()
        self.outputs: list[Any] = [None] * len(batches)
        for number, batch in enumerate(batches):
            calls: list[Call] = []
            stand_ins = self._stand_ins(stack, calls, number)
            with replaced(self.body.model, stand_ins), suppress(Done):
                self.body.model(**batch.inputs)
            self.calls.append([self._shared(call, at) for at, call in enumerate(calls)])

    def _stand_ins(self, stack: Stack, calls: list[Call], number: int) -> dict[str, StandIn]:
        model, made = self.body.model, self._known(self.stacks[: self.stacks.index(stack)], number)
        key = next(k for k, index in stack.links.items() if index in (None, 0))
        for name in stack.blocks:

            def answer(call: Call, name: str = name) -> Any:
                if name == stack.blocks[-1]:
                    raise Done
                return answer_like(self.forms[name], call[key])

            made[name] = StandIn(model.get_submodule(name), calls, answer)
        return made

    def _known(self, stacks: Sequence[Stack], number: int) -> dict[str, StandIn]:
        """Stand-ins that give what the last block of their finished stack gave for a batch."""
        made = {}
        for stack in stacks:
            known = self.finished[stack.blocks[-1]][number]
            for name in stack.blocks:
                made[name] = StandIn(self.body.model.get_submodule(name), [], lambda _, known=known: known)
        return made

    def _shared(self, call: Call, at: int) -> Call:
        """The call with constants of the batch before where they are equal; links are kept of the first block only."""
        before = self.calls[-1][at] if self.calls else None
        values: dict[Key, Any] = {}
        for key, value in call.items():
            if key in self.stack.links:
                values[key] = value if at == 0 else None
            elif before is not None and same(value, before[key]):
                values[key] = before[key]
        return call.replaced(values)

    def run(self, at: int, begin: Begin) -> Iterator[tuple[int, Any]]:
        """Run block ``at`` of the captured stack on every batch; gives (batch, output) one at a time."""
        block = self.body.model.get_submodule(self.stack.blocks[at])
        for number, calls in enumerate(self.calls):
            call = calls[at]
            if at:
                before = self.outputs[number]
                call = call.replaced({key: element(before, index) for key, index in self.stack.links.items()})
            begin(number)
            yield number, block(*call.args, **call.kwargs)

    def gather(self, at: int, begin: Begin) -> None:
        """Run block ``at`` for its hooks' sake."""
        for _ in self.run(at, begin):
            pass

    def advance(self, at: int) -> None:
        """Run block ``at`` for good: its outputs become the next block's inputs."""
        for number, output in self.run(at, lambda _: None):
            self.outputs[number] = output
        if at == len(self.stack.blocks) - 1:
            self.finished[self.stack.blocks[-1]] = self.outputs

    def finish(self, batches: Sequence[Batch], begin: Begin) -> None:
        """Run what is outside of all blocks, on the finished blocks' outputs."""
        for number, batch in enumerate(batches):
            begin(number)
            with replaced(self.body.model, self._known(self.stacks, number)):
                self.body.model(**batch.inputs)


class Whole:
    """The model run from its inputs for every block: for those whose blocks cannot be replayed. It is all in memory."""

    def __init__(self, body: Body, batches: Sequence[Batch], calls: Counter[str]) -> None:
        """``calls``: how often each block runs in one forward."""
        self.body, self.batches, self.counts = body, batches, calls
        body.stay()

    def capture(self, batches: Sequence[Batch], stack: Stack) -> None:
        """Nothing needs to be known beforehand."""
        self.stack = stack

    def gather(self, at: int, begin: Begin) -> None:
        """Run the model as far as block ``at``."""
        name, calls = self.stack.blocks[at], 0

        def ended(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == self.counts[name]:
                raise Done

        handle = self.body.model.get_submodule(name).register_forward_hook(ended)
        try:
            for number, batch in enumerate(self.batches):
                calls = 0
                begin(number)
                with suppress(Done):
                    self.body.model(**batch.inputs)
        finally:
            handle.remove()

    def advance(self, at: int) -> None:
        """The next forward passes the block anyway."""

    def finish(self, batches: Sequence[Batch], begin: Begin) -> None:
        """Run the whole model."""
        for number, batch in enumerate(batches):
            begin(number)
            self.body.model(**batch.inputs)


def reproduces(body: Body, traced: Trace, stacks: Sequence[Stack], batch: Batch) -> str | None:
    """None where stand-ins capture the same constants as the real forward had; else why not."""
    forms = {name: output for name, _, output in traced.calls}
    seen = {name: call for name, call, _ in traced.calls}
    replay = Replay(body, stacks, forms)
    for stack in stacks:
        try:
            replay.capture([batch], stack)
        except (TypeError, AttributeError, RuntimeError, IndexError, ValueError) as error:
            return f"its forward fails without its blocks ({error})"
        if len(replay.calls[0]) != len(stack.blocks):
            return "its forward leaves blocks out without their values"
        for name, call in zip(stack.blocks, replay.calls[0], strict=True):
            for key, value in seen[name].items():
                if key not in stack.links and not same(value, call[key]):
                    return f"argument {key} of {name} depends on the blocks before it"
        replay.finished[stack.blocks[-1]] = [forms[stack.blocks[-1]]]
    return None


def same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal; what is no tensor, number or collection of them need only be of one type."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, int | float | str | bool | None) or isinstance(other, int | float | str | bool | None):
        return type(one) is type(other) and one == other
    return type(one) is type(other)
