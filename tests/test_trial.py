"""Factors on trial: what they add, what their gradient is, and that packing them again loses nothing."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bitloft.adapters import PackedBlock, read_adapter, read_packed
from bitloft.compress import compress
from bitloft.errors import OptionError
from bitloft.kernels.ops import decode
from bitloft.modules.trial import Coded, Plain, applied, packed_again
from tests.helpers import make_adapter


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PackedBlock, ...]]:
    """A water-filled adapter of mixed widths."""
    root = tmp_path_factory.mktemp("tuned")
    compress(make_adapter(root / "a", rank=8, scale=1.0), root / "p", bits=2.5)
    return {m.name: m.blocks for m in read_packed(root / "p").modules.values() if m.blocks}


def product(parts: tuple[PackedBlock, ...]) -> torch.Tensor:
    total: torch.Tensor = sum((decode(b.bt).T @ decode(b.a) for b in parts), torch.zeros(()))
    return total


def test_coded_factors_are_what_is_stored(blocks: dict[str, tuple[PackedBlock, ...]]) -> None:
    widths = {block.a.format.bits for parts in blocks.values() for block in parts}
    assert len(widths) > 1
    for parts in blocks.values():
        a, bt = Coded(parts)()
        torch.testing.assert_close(bt.T @ a, product(parts), rtol=1e-5, atol=1e-7)


def test_untouched_ones_pack_to_the_same_bytes(blocks: dict[str, tuple[PackedBlock, ...]]) -> None:
    again = packed_again({name: Coded(parts) for name, parts in blocks.items()})
    for name, parts in blocks.items():
        for old, new in zip(parts, again[name], strict=True):
            for side in ("a", "bt"):
                one, two = getattr(old, side), getattr(new, side)
                assert one.format == two.format
                assert one.nbytes == two.nbytes
                assert torch.equal(decode(one), decode(two))


def test_trained_ones_keep_their_size_and_are_what_was_trained(blocks: dict[str, tuple[PackedBlock, ...]]) -> None:
    factors = {name: Coded(parts) for name, parts in blocks.items()}
    with torch.no_grad():
        for coded in factors.values():
            for parameter in coded.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
    again = packed_again(factors)
    for name, parts in blocks.items():
        assert sum(b.a.nbytes + b.bt.nbytes for b in again[name]) == sum(b.a.nbytes + b.bt.nbytes for b in parts)
        a, bt = factors[name]()
        trained = (bt.T @ a).detach()
        # scales are rounded to half precision, codes not at all
        assert float((product(again[name]) - trained).norm() / trained.norm()) < 2**-11
        assert not torch.equal(product(again[name]), product(parts))


def test_the_gradient_passes_the_rounding(blocks: dict[str, tuple[PackedBlock, ...]]) -> None:
    coded = Coded(next(iter(blocks.values())))
    _, bt = coded()
    slope = torch.randn_like(bt)
    (bt * slope).sum().backward()
    assert torch.equal(torch.cat([p.grad for p in coded.bt if p.grad is not None]), slope)
    assert all(p.grad is None for p in coded.a)
    frozen = Coded(next(iter(blocks.values())), codes=False)
    assert [name for name, p in frozen.named_parameters() if p.requires_grad] == ["growth"]


def test_a_block_of_another_layout_is_refused(tmp_path: Path) -> None:
    compress(make_adapter(tmp_path / "a"), tmp_path / "p", method="rtn")
    parts = next(iter(read_packed(tmp_path / "p").modules.values())).blocks
    with pytest.raises(OptionError, match="only water-filled blocks"):
        Coded(parts)


def test_they_are_added_inside_and_gone_after(tmp_path: Path) -> None:
    pair = read_adapter(make_adapter(tmp_path / "a")).pairs[0]
    model = nn.Sequential(nn.Linear(pair.a.shape[1], pair.b.shape[0]))
    x = torch.randn(2, 3, pair.a.shape[1])
    factors = {"0": Plain(pair.a, pair.b.T.contiguous())}
    before = model(x)
    with applied(model, factors):
        during = model(x)
    torch.testing.assert_close(during, before + x @ pair.a.T @ pair.b.T)
    assert torch.equal(model(x), before)
    during.sum().backward()
    assert all(p.grad is not None for p in factors["0"].parameters())
    with pytest.raises(ZeroDivisionError), applied(model, factors):
        raise ZeroDivisionError
    assert torch.equal(model(x), before)  # an error leaves no hook behind
