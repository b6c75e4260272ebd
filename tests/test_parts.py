"""How modules hold packed tensors: every part that the format asks for, by name, alone and stacked."""

import pytest
import torch
from torch import nn

from bitloft.formats import Format, layout
from bitloft.kernels.ops import decode
from bitloft.modules.parts import Held, allocate, held, load_tensors, stored_tensors, tensor_name
from bitloft.options import QuantizeOptions
from bitloft.rules import ModulePlan, StoredModule
from bitloft.solvers import Solution, solve

FORMATS = ["lm2:64", "uniform3:64", "uniform2:tensor", "nf4:64+dq", "book2:64", "lm4:64+shift", "trellis2:64"]


def solution(fmt: str, *, seed: int = 0) -> Solution:
    torch.manual_seed(seed)
    return solve("w", torch.randn(24, 40), ModulePlan(fmt, "loftq", 4, 8.0), QuantizeOptions())


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_is_allocated_is_what_a_solution_stores(fmt: str) -> None:
    module = nn.Module()
    part = Held(module, "weight", (24, 40), StoredModule(fmt, 4, 2.0, "linear", "lm4:64"), None)
    found = solution(fmt)
    tensors = {n.removeprefix("x."): t for n, t in stored_tensors("x", "linear", [found]).items()}
    assert {n: (t.shape, t.dtype) for n, t in module.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in tensors.items()
    }
    load_tensors(module, tensors)
    assert found.start is not None
    expected = decode(found.weight) + found.start.product()
    torch.testing.assert_close(part.dense(module), expected)
    torch.testing.assert_close(part.dense(module, start=False), decode(found.weight))


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_stack_holds_each_matrix_as_it_was_solved(fmt: str) -> None:
    module = nn.Module()
    part = Held(module, "up_proj", (24, 40), StoredModule(fmt, 4, 2.0, "experts", "lm4:64"), None, stack=3)
    found = [solution(fmt, seed=seed) for seed in range(3)]
    tensors = stored_tensors("a.experts.up_proj", "experts", found)
    assert all(name.startswith("a.experts.up_proj") for name in tensors)
    load_tensors(module, {n.removeprefix("a.experts."): t for n, t in tensors.items()})
    for index, one in enumerate(found):
        assert one.start is not None
        assert all(torch.equal(t, one.weight.tensors()[k]) for k, t in part.weight(module, index).tensors().items())
        torch.testing.assert_close(part.dense(module, index), decode(one.weight) + one.start.product())


def test_only_codes_of_a_weight_are_a_parameter_and_nothing_is_a_float() -> None:
    module, fmt = nn.Module(), Format.parse("uniform3:64")
    allocate(module, "weight", (8, 64), fmt, None, parameter=True)
    allocate(module, "a0", (2, 64), fmt, None)
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert not module.weight.requires_grad
    assert not any(t.is_floating_point() for t in module.state_dict().values())
    assert set(module.state_dict()) == {tensor_name(p, n) for p in ("weight", "a0") for n in layout((8, 64), fmt)}
    assert held(module, "a0", (2, 64), fmt).codes.data_ptr() == module.a0.data_ptr()  # type: ignore[operator]


def test_no_rank_no_start() -> None:
    module = nn.Module()
    part = Held(module, "weight", (24, 40), StoredModule("lm2:64", 0, 0.0, "linear", "lm4:64"), None)
    assert part.start(module) is None
    assert set(module.state_dict()) == {"weight", "weight_scales", "weight_exponent"}
