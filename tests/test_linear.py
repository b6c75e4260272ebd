"""QuantLinear against the dense layer it stands for: forward, input gradient, autocast, casts, solutions."""

import copy

import pytest
import torch
from torch import nn

from bitloft.formats import Format
from bitloft.kernels.ops import encode
from bitloft.modules.linear import QuantLinear, quant_linears, replace_module
from bitloft.options import QuantizeOptions
from bitloft.rules import plan_of
from bitloft.solvers import solve


def layer(fmt: str = "lm2:64", rows: int = 48, columns: int = 100, rank: int = 4, *, bias: bool = False) -> QuantLinear:
    options = QuantizeOptions(format=fmt, rank=rank, alpha=8.0)
    made = QuantLinear(
        columns,
        rows,
        Format.parse(fmt),
        bias=torch.randn(rows) if bias else None,
        rank=rank,
        scaling=plan_of(options).scaling,
        start_format=Format.parse(options.start_format),
    )
    made.load_solution(solve("w", torch.randn(rows, columns), plan_of(options), options))
    return made


@pytest.mark.parametrize("fmt", ["lm2:64", "nf3:64", "uniform4:64", "sign:128", "trellis2:64"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
def test_forward_and_input_gradient_are_those_of_the_dense_matrix(fmt: str, bias: bool, rank: int) -> None:
    module = layer(fmt, rank=rank, bias=bias)
    x = torch.randn(2, 3, 100, requires_grad=True)
    y = module(x)
    y.square().sum().backward()
    dense_x = x.detach().clone().requires_grad_()
    expected = nn.functional.linear(dense_x, module.dense(), module.bias)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, dense_x.grad, rtol=1e-4, atol=1e-3)


def test_the_report_is_what_the_layer_computes() -> None:
    """|W - (Q + s0 * B0 @ A0)| of the layer equals the solver's figure at alpha = r, 2r, r/4 and with rslora."""
    weight = torch.randn(64, 128)
    for settings in ({"alpha": 8.0}, {"alpha": 16.0}, {"alpha": 2.0}, {"rslora": True}):
        options = QuantizeOptions(format="nf2:64", rank=8, **settings)
        found = solve("w", weight, plan_of(options), options)
        module = QuantLinear(
            128,
            64,
            Format.parse("nf2:64"),
            rank=8,
            scaling=plan_of(options).scaling,
            start_format=Format.parse("lm4:64"),
        )
        module.load_solution(found)
        error = torch.linalg.vector_norm(weight - module.dense()) / torch.linalg.vector_norm(weight)
        assert float(error) == pytest.approx(found.error_after, rel=1e-5)
        identity = module(torch.eye(128)).T
        torch.testing.assert_close(identity, module.dense(), rtol=1e-4, atol=1e-5)


def test_the_start_can_be_left_out() -> None:
    module = layer(rank=4)
    x = torch.randn(5, 100)
    whole = module(x)
    module.start_enabled = False
    torch.testing.assert_close(
        module(x) + module.scaling * x @ module.start_a().T @ module.start_b().T, whole, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(module(x), x @ module.dense().T, rtol=1e-4, atol=1e-4)
    assert layer(rank=0).start_a().shape == (0, 100)
    assert layer(rank=0).start_b().shape == (48, 0)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_no_cast_touches_a_stored_byte(cast: str) -> None:
    module = layer(fmt="uniform3:64", bias=True)
    before = {name: t.clone() for name, t in module.state_dict().items() if name != "bias"}
    getattr(module, cast)()
    for name, tensor in before.items():
        assert torch.equal(module.state_dict()[name], tensor), name
        assert module.state_dict()[name].dtype == tensor.dtype, name


def test_autocast_decides_the_dtype() -> None:
    module = layer(bias=True)
    x = torch.randn(3, 100, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, module.dense().sum(0).expand(3, -1), rtol=0.05, atol=0.2)
    assert module(torch.randn(2, 100, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_nothing_in_it_trains_and_copies_are_equal() -> None:
    module = layer(bias=True)
    assert not any(p.requires_grad for p in module.parameters())
    assert module.weight.dtype == torch.int8  # T5 casts activations to wo.weight.dtype unless it is int8
    twin = copy.deepcopy(module)
    x = torch.randn(2, 100)
    assert torch.equal(twin(x), module(x))
    fresh = QuantLinear(
        100, 48, module.format, bias=torch.zeros(48), rank=4, scaling=2.0, start_format=Format.parse("lm4:64")
    )
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x), module(x))


def test_a_state_of_another_format_fails_loudly() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer("lm2:64").load_state_dict(layer("lm4:64").state_dict())


def test_finding_and_replacing() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64)))
    module = QuantLinear(64, 64, Format.parse("lm2:64"))
    module.weight = nn.Parameter(encode(torch.randn(64, 64), "lm2:64").codes, requires_grad=False)
    replace_module(model, "1.0", module)
    assert list(quant_linears(model)) == ["1.0"]
    assert "format=lm2:64" in repr(model)
