"""TunedLinear: the same function as the layer it stands for, true gradients, and what it settles is what is stored."""

import pytest
import torch

from bitloft.formats import Format
from bitloft.modules.linear import QuantLinear
from bitloft.modules.tuned import TunedLinear
from bitloft.options import QuantizeOptions
from bitloft.rules import ModulePlan
from bitloft.solvers import solve
from bitloft.solvers.grids import Grids

FORMATS = ("lm2:32", "nf4:32", "uniform3:32", "uniform2:tensor", "book2:32", "lm2:32+shift", "lm4:row", "lm2:32+dq")


def layer_of(fmt: str, *, rank: int = 4, columns: int = 72) -> QuantLinear:
    torch.manual_seed(0)
    weight = torch.randn(40, columns)
    made = QuantLinear(
        columns,
        40,
        Format.parse(fmt),
        bias=torch.randn(40),
        rank=rank,
        scaling=0.5 if rank else 0.0,
        start_format=Format.parse("lm4:64"),
    )
    plan = ModulePlan(fmt, "loftq", rank, alpha=0.5 * rank if rank else None)
    made.load_solution(solve("layer", weight, plan, QuantizeOptions()))
    return made


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("start", "scales"), [(True, False), (False, True), (True, True)])
def test_it_computes_what_the_layer_computes(fmt: str, start: bool, scales: bool) -> None:
    layer, x = layer_of(fmt), torch.randn(2, 3, 72)
    tuned = TunedLinear(layer, start=start, scales=scales)
    assert torch.allclose(tuned(x), layer(x), atol=0.02 if start else 1e-4)  # the start is rounded once more
    assert (tuned.gain is not None) == (scales and not fmt.endswith("+dq"))


@pytest.mark.parametrize("fmt", ["lm2:32", "uniform2:tensor", "lm2:32+shift", "trellis2:32"])
def test_gradients_are_those_of_the_dense_product(fmt: str) -> None:
    layer = layer_of(fmt)
    tuned, x = TunedLinear(layer, start=True, scales=True), torch.randn(5, 72, requires_grad=True)
    assert tuned.gain is not None
    wanted = torch.randn(5, 40)
    found = torch.autograd.grad((tuned(x) * wanted).sum(), [x, tuned.gain])
    gain = torch.ones_like(tuned.gain, requires_grad=True)
    size = layer.format.group_size(72)
    spread = gain.repeat_interleave(size, 1)[:, :72]
    dense = (layer.dense() - 0.5 * layer.start_b() @ layer.start_a()) * spread
    a, bt = (part.detach() for part in tuned._factors())
    y = x @ (dense + 0.5 * bt.T @ a).T
    for mine, theirs in zip(found, torch.autograd.grad((y * wanted).sum(), [x, gain]), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-3)


@pytest.mark.parametrize("fmt", ["lm2:32", "uniform3:32", "uniform2:tensor", "book2:32", "lm2:32+shift", "trellis2:32"])
def test_what_settles_is_what_was_tuned(fmt: str) -> None:
    layer, x = layer_of(fmt), torch.randn(3, 72)
    codes = layer.weight.clone()
    tuned = TunedLinear(layer, start=True, scales=True)
    assert tuned.gain is not None
    assert tuned.a is not None
    with torch.no_grad():
        tuned.gain.mul_(1 + 0.1 * torch.rand_like(tuned.gain))
        tuned.a.mul_(1.5)
    wanted = tuned(x).detach()
    changed = tuned.settle()
    assert torch.equal(layer.weight, codes)
    assert "weight" not in changed
    assert all(torch.equal(tensor, getattr(layer, name)) for name, tensor in changed.items())
    error = (layer(x) - wanted).norm() / wanted.norm()
    assert float(error) < 1e-3  # scales are rounded to fp16, the start was already what is stored


def test_without_a_start_only_scales_are_tuned() -> None:
    tuned = TunedLinear(layer_of("lm2:32", rank=0), start=True, scales=True)
    assert [name for name, _ in tuned.named_parameters() if not name.startswith("layer.")] == ["gain"]
    assert set(tuned.settle()) == {"weight_scales", "weight_exponent"}


def test_the_gradient_goes_straight_through_the_rounding() -> None:
    layer, x = layer_of("lm2:32"), torch.randn(5, 72)
    tuned = TunedLinear(layer, start=True, scales=False)
    assert tuned.a is not None
    assert tuned.bt is not None
    (found,) = torch.autograd.grad(tuned(x).sum(), [tuned.a])
    _, bt = tuned._factors()
    assert torch.allclose(found, 0.5 * bt.detach().sum(1, keepdim=True) * x.sum(0), atol=1e-4)


@pytest.mark.parametrize("fmt", [*FORMATS, "half:row", "trellis2:32"])
def test_positions_begin_on_the_levels(fmt: str) -> None:
    layer, x = layer_of(fmt), torch.randn(3, 72)
    tuned = TunedLinear(layer, start=False, scales=False, codes=True)
    assert torch.allclose(tuned.values(), layer.dense() - 0.5 * layer.start_b() @ layer.start_a(), atol=1e-5)
    assert torch.allclose(tuned(x), layer(x), atol=1e-3)
    assert (tuned.place is None) == fmt.startswith(("half", "trellis"))


@pytest.mark.parametrize(
    "fmt", ["lm2:32", "lm3:32", "uniform2:tensor", "nf4:32", "book2:32", "lm2:32+shift", "lm2:32+dq"]
)
@pytest.mark.parametrize("scales", [False, True])
def test_codes_get_the_gradient_of_the_dense_matrix(fmt: str, scales: bool) -> None:
    layer = layer_of(fmt)
    tuned = TunedLinear(layer, start=False, scales=scales, codes=True)
    x, wanted = torch.randn(5, 72), torch.randn(5, 40)
    assert tuned.place is not None
    (found,) = torch.autograd.grad((tuned(x) * wanted).sum(), [tuned.place])
    grids = Grids.of(layer.packed_weight())
    dense = wanted.T @ x * grids.scales[:, torch.arange(72) // grids.size]
    levels = grids.levels
    out = ((tuned.place > levels[-1]) & (dense < 0)) | ((tuned.place < levels[0]) & (dense > 0))
    assert torch.allclose(found, dense.masked_fill(out, 0), atol=1e-3)


@pytest.mark.parametrize("fmt", ["lm2:32", "lm3:32", "uniform3:32", "uniform2:tensor", "lm2:32+shift", "lm2:32+dq"])
def test_moved_codes_settle_as_they_were_tuned(fmt: str) -> None:
    layer, x = layer_of(fmt), torch.randn(3, 72)
    tuned = TunedLinear(layer, start=False, scales=True, codes=True)
    before = layer.weight.clone()
    assert tuned.place is not None
    with torch.no_grad():
        tuned.place.add_(tuned.spacing * torch.randn_like(tuned.place))
        if tuned.gain is not None:
            tuned.gain.mul_(1 + 0.1 * torch.rand_like(tuned.gain))
    wanted = tuned(x).detach()
    changed = tuned.settle()
    assert not torch.equal(layer.weight, before)
    assert torch.equal(changed["weight"].view(torch.uint8), layer.weight.view(torch.uint8))
    assert float((layer(x) - wanted).norm() / wanted.norm()) < 1e-3
