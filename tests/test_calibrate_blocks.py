"""Stacks, calls and stand-ins: what a replay is made of."""

import pytest
import torch
from torch import nn

from bitloft.calibrate.blocks import Call, StandIn, answer_like, replaced, stacks_of
from tests.architectures import make


@pytest.mark.parametrize(
    ("name", "lists"), [("llama", ["model.layers"]), ("bart", ["model.encoder.layers", "model.decoder.layers"])]
)
def test_stacks_are_the_lists_of_blocks(name: str, lists: list[str]) -> None:
    found = stacks_of(make(name))
    assert [stack.blocks[0].rpartition(".")[0] for stack in found] == lists
    assert stacks_of(nn.Linear(2, 2)) == []


def test_a_call_is_changed_by_position_and_by_name() -> None:
    call = Call((1, 2), {"x": 3})
    assert dict(call.items()) == {0: 1, 1: 2, "x": 3}
    changed = call.replaced({1: 5, "x": None})
    assert (changed.args, changed.kwargs) == ((1, 5), {"x": None})
    assert (call[1], call["x"]) == (2, 3)


def test_a_stand_in_has_the_blocks_attributes_and_goes_when_it_is_told() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    calls: list[Call] = []
    with replaced(model, {"0": StandIn(model[0], calls, lambda call: call[0] + 1)}):
        assert model[0].in_features == 3
        assert torch.equal(model(torch.zeros(1, 3)), torch.ones(1, 3))
        with pytest.raises(AttributeError):
            _ = model[0].nothing
    assert type(model[0]) is nn.Linear
    assert len(calls) == 1


def test_an_answer_has_the_form_of_the_real_one() -> None:
    x = torch.ones(2)
    assert answer_like(torch.zeros(2), x) is x
    assert answer_like((torch.zeros(2), "weights"), x) == (x, None)
