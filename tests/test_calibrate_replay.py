"""Replay: block by block it computes what the model computes, and says so where it cannot."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bitloft.calibrate.blocks import Stack, stacks_of
from bitloft.calibrate.replay import Replay, Whole, linked, reproduces, same, trace
from bitloft.calibrate.text import Batch
from bitloft.integrations.body import Body
from bitloft.integrations.source import open_source
from tests.architectures import inputs, make

LAYERS = {"llama": {"num_hidden_layers": 2}, "t5": {"num_layers": 2}, "bart": {"encoder_layers": 2}, "bert": {}}


def opened(name: str, directory: Path) -> tuple[Body, list[Stack]]:
    make(name, **LAYERS.get(name, {})).save_pretrained(directory)
    body = Body(open_source(str(directory)))
    stacks = stacks_of(body.model)
    body.fill_all_but([block for stack in stacks for block in stack.blocks])
    return body, stacks


@pytest.mark.parametrize("name", ["llama", "t5", "bart", "bert", "gpt2", "gemma3"])
@torch.no_grad()
def test_replayed_block_by_block_the_output_is_the_models(name: str, tmp_path: Path) -> None:
    body, stacks = opened(name, tmp_path)
    batches = [Batch(inputs(name)), Batch({key: value.flip(1) for key, value in inputs(name).items()})]
    traced = trace(body, stacks, Batch({key: value[:1] for key, value in batches[0].inputs.items()}))
    assert all(p.is_meta for p in body.model.get_submodule(stacks[0].blocks[0]).parameters())
    found = linked(traced, stacks)
    assert not isinstance(found, str)
    assert reproduces(body, traced, found, Batch({k: v[:1] for k, v in batches[0].inputs.items()})) is None
    replay = Replay(body, found, {block: output for block, _, output in traced.calls})
    for stack in found:
        replay.capture(batches, stack)
        for at, block in enumerate(stack.blocks):
            body.fill(body.within(block))
            replay.advance(at)
    last = found[-1].blocks[-1]
    whole = make(name, **LAYERS.get(name, {}))
    for number, batch in enumerate(batches):
        seen: list[Any] = []
        handle = whole.get_submodule(last).register_forward_hook(lambda m, a, output, seen=seen: seen.append(output))
        whole(**batch.inputs, use_cache=False) if name != "bert" else whole(**batch.inputs)
        handle.remove()
        ours, theirs = (x if isinstance(x, torch.Tensor) else x[0] for x in (replay.outputs[number], seen[0]))
        assert torch.allclose(ours, theirs, atol=1e-5)


@torch.no_grad()
def test_blocks_that_run_twice_or_change_between_are_told(tmp_path: Path) -> None:
    body, stacks = opened("llama", tmp_path)
    batch = Batch({key: value[:1] for key, value in inputs("llama").items()})
    traced = trace(body, stacks, batch)
    twice = type(traced)([*traced.calls, traced.calls[-1]])
    assert "do not run once each" in str(linked(twice, stacks))
    name, call, output = traced.calls[1]
    apart = type(traced)([traced.calls[0], (name, call.replaced({0: call[0] * 2}), output)])
    assert "is not the output of the block before it" in str(linked(apart, stacks))
    found = linked(traced, stacks)
    assert not isinstance(found, str)
    key = next(k for k, v in call.items() if k not in found[0].links and v is not None)
    moved = type(traced)([traced.calls[0], (name, call.replaced({key: torch.zeros(1)}), output)])
    assert "depends on the blocks before it" in str(reproduces(body, moved, found, batch))


@torch.no_grad()
def test_the_whole_model_runs_as_far_as_the_block(tmp_path: Path) -> None:
    body, stacks = opened("llama", tmp_path)
    whole = Whole(body, [Batch(inputs("llama"))] * 2, Counter(stacks[0].blocks))
    whole.capture([], stacks[0])
    begun: list[int] = []
    ran: list[str] = []
    for name in stacks[0].blocks:
        body.model.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: ran.append(name))
    whole.gather(0, begun.append)
    assert begun == [0, 1]
    assert set(ran) == {stacks[0].blocks[0]}
    whole.finish([Batch(inputs("llama"))], begun.append)
    assert set(ran) == set(stacks[0].blocks)


def test_equal_arguments_are_told_from_others() -> None:
    x = torch.ones(2)
    assert same((x, {"a": [1, None]}), (x.clone(), {"a": [1, None]}))
    assert not same(x, x.double())
    assert not same(x, None)
    assert not same([x], [x, x])
    assert not same(1, True)
    assert same(object(), object())
