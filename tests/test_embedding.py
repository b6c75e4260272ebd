"""QuantEmbedding against the dense table it stands for; heads and tables tied to it."""

import copy

import pytest
import torch
from torch import nn

from bitloft.modules.embedding import QuantEmbedding, Scale, TiedEmbedding, TiedHead, scale_of
from bitloft.options import QuantizeOptions
from bitloft.rules import ModulePlan, StoredModule
from bitloft.solvers import solve

IDS = torch.tensor([[0, 5, 5], [99, 1, 42]])


def table(fmt: str = "lm4:64", rank: int = 4, alpha: float = 8.0, scale: Scale | None = None) -> QuantEmbedding:
    plan, options = ModulePlan(fmt, "loftq", rank, alpha), QuantizeOptions()
    made = QuantEmbedding(100, 40, StoredModule.of(plan, options, "embedding"), padding_idx=0, scale=scale)
    made.load_solution(solve("e", torch.randn(100, 40), plan, options))
    return made


@pytest.mark.parametrize("fmt", ["lm2:64", "nf3:64", "uniform4:64", "uniform2:tensor", "nf4:64+dq", "book2:64"])
@pytest.mark.parametrize("rank", [0, 4])
def test_rows_are_those_of_the_dense_table(fmt: str, rank: int) -> None:
    made = table(fmt, rank)
    torch.testing.assert_close(made(IDS), made.dense()[IDS], rtol=1e-5, atol=1e-5)
    assert made(torch.zeros(0, dtype=torch.int64)).shape == (0, 40)


@pytest.mark.parametrize("alpha", [1.0, 4.0, 8.0])
def test_the_loaded_table_shows_the_reported_error(alpha: float) -> None:
    """Q + s0 * B0 A0 with s0 = alpha / rank, row by row: the scale is neither lost nor applied twice."""
    weight, plan, options = torch.randn(100, 40), ModulePlan("nf2:64", "loftq", 4, alpha), QuantizeOptions()
    found = solve("e", weight, plan, options)
    made = QuantEmbedding(100, 40, StoredModule.of(plan, options, "embedding"))
    made.load_solution(found)
    error = torch.linalg.vector_norm(weight - made(torch.arange(100))) / torch.linalg.vector_norm(weight)
    assert float(error) == pytest.approx(found.error_after, rel=1e-4)
    assert found.error_after < found.error_before
    made.start_enabled = False
    torch.testing.assert_close(made(IDS), made.dense()[IDS])


def test_rows_come_in_the_dtype_asked_for_and_no_cast_touches_a_stored_byte() -> None:
    made = table("uniform3:64")
    before = {name: t.clone() for name, t in made.state_dict().items()}
    assert made.to(torch.bfloat16)(IDS).dtype == torch.bfloat16
    assert made.half()(IDS).dtype == torch.float16
    assert made.float()(IDS).dtype == torch.float32
    assert made.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) and t.dtype == before[name].dtype for name, t in made.state_dict().items())


def test_ids_that_do_not_exist_are_refused() -> None:
    for wrong in (-1, 100):
        with pytest.raises(IndexError):
            table()(torch.tensor([0, wrong]))


def test_a_scale_multiplies_the_rows_and_gemma_rounds_it_first() -> None:
    plain = table()
    torch.manual_seed(0)
    for scale in (Scale(40**0.5), Scale(40**0.5, rounded=True)):
        made = copy.deepcopy(plain)
        made.scale = scale
        torch.testing.assert_close(made(IDS), plain(IDS) * 40**0.5)
    made = made.bfloat16()
    assert torch.equal(made(IDS), plain.bfloat16()(IDS) * torch.tensor(40**0.5, dtype=torch.bfloat16))
    assert not hasattr(plain, "embed_scale")  # PEFT takes its presence for a scale
    assert table(scale=Scale(2.0)).embed_scale == 2.0


def test_a_tied_head_and_a_tied_table_share_codes_scales_and_start() -> None:
    made = table()
    head, other = TiedHead(made, bias=torch.randn(100)), TiedEmbedding(made, scale=Scale(3.0))
    x = torch.randn(2, 3, 40, requires_grad=True)
    torch.testing.assert_close(head(x), x @ made.dense().T + head.bias, rtol=1e-4, atol=1e-4)
    head(x).sum().backward()
    torch.testing.assert_close(x.grad, made.dense().sum(0).expand(2, 3, -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other(IDS), 3 * made(IDS))
    assert head.weight is other.weight is made.weight
    assert set(head.state_dict()) == {"weight", "bias"}
    assert set(other.state_dict()) == {"weight"}


def test_a_copy_of_a_tied_pair_follows_its_own_table() -> None:
    made = table()
    model = nn.Sequential(made, TiedHead(made))
    twin = copy.deepcopy(model)
    other = twin[0]
    assert isinstance(other, QuantEmbedding)
    other.weight.data.zero_()
    other.start_enabled = False
    x = torch.randn(2, 40)
    torch.testing.assert_close(twin[1](x), x @ other.dense().T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model[1](x), x @ made.dense().T, rtol=1e-4, atol=1e-4)
    assert not torch.equal(made.dense(), other.dense())


def test_the_scale_of_a_dense_table_is_found() -> None:
    dense = nn.Embedding(4, 4)
    assert scale_of(dense) is None
    dense.embed_scale = 2.0  # type: ignore[assignment]
    assert scale_of(dense) == Scale(2.0)
    dense.scalar_embed_scale = 3.0  # type: ignore[assignment]
    assert scale_of(dense) == Scale(3.0, rounded=True)
