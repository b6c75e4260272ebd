"""Arranged codes never leave a layer: state_dict, load_state_dict, copies, pickles, casts and sharding."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from bitloft.errors import KernelError
from bitloft.kernels import cpu
from bitloft.kernels.ops import encode
from bitloft.modules.arrangement import ORDER, arrange
from bitloft.modules.linear import QuantLinear
from bitloft.solvers.base import Solution, Start
from tests.test_linear import layer

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no native library was built")


def arranged(fmt: str = "lm2:64", rows: int = 130) -> tuple[QuantLinear, dict[str, Tensor], Tensor, Tensor]:
    """A layer after ``arrange``, its state before, an input and its output."""
    module = layer(fmt, rows=rows, columns=192, bias=True)
    state = {name: t.clone() for name, t in module.state_dict().items()}
    x = torch.randn(3, 192)
    y = module(x)
    assert module.arrange()
    assert module.arranged == ORDER
    assert not torch.equal(module.weight, state["weight"])
    return module, state, x, y


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in state.items())


@pytest.mark.parametrize("fmt", ["lm2:64", "nf4:64", "lm3:64", "sign:128", "nf4:64+dq", "uniform3:64", "lm2:row"])
def test_outputs_do_not_change_and_the_stored_order_comes_back(fmt: str) -> None:
    module, state, x, y = arranged(fmt)
    assert torch.equal(module(x), y)
    assert torch.equal(module.packed_weight().codes, state["weight"])
    assert module.arranged == ORDER  # asking does not change it
    assert same(module.state_dict(), state)
    module.restore()
    assert module.arranged is None
    assert torch.equal(module.weight, state["weight"])
    assert torch.equal(module(x), y)


def test_gradients_and_dense_see_the_stored_order() -> None:
    module, _, x, _ = arranged()
    x.requires_grad_()
    (found,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(found, module.dense().sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)


def test_states_load_in_the_stored_order() -> None:
    module, state, x, y = arranged()
    other, others, _, _ = arranged()
    module.load_state_dict(others)
    assert module.arranged == ORDER
    assert torch.equal(module(x), other(x))
    module.load_state_dict(state)
    assert torch.equal(module(x), y)
    given = {name: t.clone() for name, t in state.items()}
    module.load_state_dict(given, assign=True)
    assert module.arranged is None  # the tensors belong to the caller
    assert same(given, state)
    assert torch.equal(module(x), y)


def test_copies_and_pickles_are_made_of_the_stored_order() -> None:
    module, state, x, y = arranged()
    buffer = io.BytesIO()
    pickle.dump(module, buffer)
    for twin in (copy.deepcopy(module), pickle.loads(buffer.getvalue())):
        assert twin.arranged is None
        assert torch.equal(twin.weight, state["weight"])
        assert torch.equal(twin(x), y)
        assert twin.arrange()
        assert torch.equal(twin(x), y)
    assert module.arranged == ORDER
    assert torch.equal(module(x), y)


def test_casts_keep_it_and_moves_give_it_up() -> None:
    module, state, x, y = arranged()
    module.double().float()
    assert module.arranged == ORDER
    assert torch.equal(module(x), y)
    module.to("meta")
    assert module.arranged is None
    assert module.weight.shape == state["weight"].shape


def test_a_new_solution_is_in_the_stored_order() -> None:
    module, _, x, _ = arranged(rows=128)
    other = layer(rows=128, columns=192, bias=True)
    module.bias = other.bias
    start = other.packed_start()
    assert start is not None
    y = other(x)
    module.load_solution(Solution(other.packed_weight(), Start(*start, other.scaling), 0.0, 0.0))
    assert torch.equal(module(x), y)
    assert module.arrange()
    assert torch.equal(module(x), y)


def test_sharded_codes_are_refused_in_one_sentence() -> None:
    class Shard(Tensor):
        pass

    module, _, _, _ = arranged()
    module._parameters["weight"] = nn.Parameter(module.weight.data.as_subclass(Shard), requires_grad=False)
    with pytest.raises(KernelError, match=r"sharded or moved while they were arranged; load the model with arrange=F"):
        module.state_dict()
    module.arranged = None
    assert not module.arrange()  # and a shard is not arranged


def test_a_model_is_arranged_but_for_what_cannot_be() -> None:
    model = nn.Sequential(layer(), nn.Linear(4, 4), layer("int8:64"), layer("lm2:row", columns=24), layer(), layer())
    model[5].weight = model[4].weight  # two modules in different orders would read each other's bytes
    assert arrange(model) == 1
    assert [getattr(module, "arranged", None) for module in model] == [ORDER, None, None, None, None, None]


def test_replaced_tensors_are_seen() -> None:
    module = layer(rows=64, columns=64)
    x = torch.randn(2, 64)
    before = module(x)
    module.weight.data = encode(torch.randn(64, 64), "lm2:64").codes
    assert not torch.equal(module(x), before)
    torch.testing.assert_close(module(x), x @ module.dense().T, rtol=1e-4, atol=1e-4)
