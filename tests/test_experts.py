"""QuantExperts against the dense experts that it stands for: routing, gates, biases, orientation, starts."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bitloft.kernels.ops import decode
from bitloft.modules.experts import QuantExperts, matrices, projections
from bitloft.modules.parts import load_tensors, stored_tensors
from bitloft.options import QuantizeOptions
from bitloft.rules import ModulePlan, StoredModule
from bitloft.solvers import Solution, solve
from tests.architectures import MIXTURES, make

PLAN, OPTIONS = ModulePlan("lm4:64", "loftq", 4, 2.0), QuantizeOptions(steps=2)
EXPERTS = "model.layers.0.mlp.experts"


def dense(name: str) -> nn.Module:
    model = make(name)
    model.config._experts_implementation = "eager"
    experts: nn.Module = model.get_submodule(EXPERTS)
    return experts


def pack(experts: nn.Module, names: tuple[str, ...]) -> tuple[QuantExperts, dict[str, list[Solution]]]:
    made, found = QuantExperts(experts), {}
    for name in names:
        weight = matrices(experts, experts.get_parameter(name).detach())
        found[name] = [solve(f"{name}.{i}", matrix, PLAN, OPTIONS) for i, matrix in enumerate(weight)]
        made.pack(name, StoredModule.of(PLAN, OPTIONS, "experts"))
        tensors = stored_tensors(f"e.{name}", "experts", found[name])
        load_tensors(made, {key.removeprefix("e."): tensor for key, tensor in tensors.items()})
    return made, found


def routed(tokens: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, two experts each (expert 3 never), and their weights."""
    x = torch.randn(tokens, 64)
    index = torch.stack([torch.randperm(3)[:2] for _ in range(tokens)])
    return x, index, torch.rand(tokens, 2)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("which", [("gate_up_proj", "down_proj"), ("down_proj",)])
def test_the_forward_is_that_of_the_dense_experts_with_the_packed_matrices(name: str, which: tuple[str, ...]) -> None:
    experts = dense(name)
    assert projections(experts) == ("gate_up_proj", "down_proj")
    made, _ = pack(experts, which)
    twin = made.unpacked(torch.float32)
    assert type(twin) is type(experts)
    assert [(n, p.shape) for n, p in twin.named_parameters()] == [(n, p.shape) for n, p in experts.named_parameters()]
    assert [n for n, _ in made.named_parameters()] == [n for n, _ in experts.named_parameters()]
    assert all(made.dense_shape(n) == tuple(p.shape) for n, p in experts.named_parameters() if p.dim() == 3)
    x, index, weights = routed()
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = made(mine, index, weights), twin(theirs, index, weights)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_expert_shows_its_reported_error(name: str) -> None:
    """Q + s0 * B0 A0 with alpha = rank / 2, in the orientation of the model."""
    experts = dense(name)
    made, found = pack(experts, ("gate_up_proj",))
    weight, stored = matrices(experts, experts.get_parameter("gate_up_proj").detach()), made.dense("gate_up_proj")
    for index, one in enumerate(found["gate_up_proj"]):
        error = torch.linalg.vector_norm(weight[index] - stored[index]) / torch.linalg.vector_norm(weight[index])
        assert float(error) == pytest.approx(one.error_after, rel=1e-4)
        assert one.error_after < one.error_before


def test_experts_of_other_processes_and_empty_batches_give_nothing() -> None:
    made, _ = pack(dense("mixtral"), ("gate_up_proj", "down_proj"))
    x, index, weights = routed()
    assert torch.equal(made(x, torch.full_like(index, 4), weights), torch.zeros_like(x))
    assert made(x[:0], index[:0], weights[:0]).shape == (0, 64)


def test_an_expert_that_no_token_chose_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = pack(dense("mixtral"), ("gate_up_proj", "down_proj"))
    seen, project = [], made._project

    def watched(name: str, expert: int, x: Tensor) -> Tensor:
        seen.append(expert)
        return project(name, expert, x)

    monkeypatch.setattr(made, "_project", watched)
    x, _, weights = routed()
    made(x, torch.tensor([[0, 2]]).expand(7, 2), weights)
    assert set(seen) == {0, 2}


def test_no_cast_touches_a_stored_byte_and_copies_are_equal() -> None:
    made, found = pack(dense("gpt_oss"), ("gate_up_proj", "down_proj"))
    x, index, weights = routed()
    y, before = made(x, index, weights), {n: t.clone() for n, t in made.state_dict().items() if "bias" not in n}
    assert torch.equal(copy.deepcopy(made)(x, index, weights), y)
    made.bfloat16()
    assert all(
        torch.equal(made.state_dict()[n], t) and made.state_dict()[n].dtype == t.dtype for n, t in before.items()
    )
    assert made(x.bfloat16(), index, weights.bfloat16()).dtype == torch.bfloat16
    first = found["down_proj"][1].weight
    assert torch.equal(decode(made.parts["down_proj"].weight(made, 1)), decode(first))


def test_other_modules_have_no_projections() -> None:
    assert projections(nn.Linear(4, 4)) == ()
