"""An adapter in a bank: its blocks mean what the adapter means, its bytes stay when its views go."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitloft.adapters import PackedAdapter, read_adapter, read_packed
from bitloft.compress import compress
from bitloft.kernels.ops import decode, encode
from bitloft.modules.held import Held, delta, device_of, values
from tests.helpers import make_adapter


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedAdapter:
    root = tmp_path_factory.mktemp("held")
    compress(make_adapter(root / "plain"), root / "packed", bits=2.0)
    return read_packed(root / "packed")


def test_packed_blocks_are_views_of_the_payload(packed: PackedAdapter) -> None:
    held = Held(packed)
    payload = packed.payload.untyped_storage().data_ptr()
    factors = [factor for pairs in held.blocks().values() for pair in pairs for factor in pair]
    assert factors
    assert all(factor.codes.untyped_storage().data_ptr() == payload for factor in factors)  # type: ignore[union-attr]
    assert held.nbytes <= packed.payload.numel() + 16 * len(factors)  # exponents and padding aside, the payload


def test_release_drops_views_and_keeps_values(packed: PackedAdapter) -> None:
    held = Held(packed)
    name = next(iter(held.blocks()))
    before = decode(held.blocks()[name][0][0])  # type: ignore[arg-type]
    held.release()
    assert held._blocks is None
    assert torch.equal(decode(held.blocks()[name][0][0]), before)  # type: ignore[arg-type]


def test_a_plain_adapter_is_its_pairs(tmp_path: Path) -> None:
    adapter = read_adapter(make_adapter(tmp_path / "plain", alpha=3))
    held = Held(adapter)
    for pair in adapter.pairs:
        ((a, bt),) = held.blocks()[pair.name]
        assert isinstance(a, torch.Tensor)
        assert isinstance(bt, torch.Tensor)
        torch.testing.assert_close(bt.T @ a, pair.scaling * pair.b @ pair.a)
        assert held.widths()[pair.name] == (pair.a.shape[1], pair.b.shape[0])
        assert device_of(a).type == "cpu"
    held.release()
    assert held._blocks is not None  # its floats are all there is
    assert held.nbytes == 4 * adapter.values


def test_finite(packed: PackedAdapter) -> None:
    held = Held(packed)
    name = next(iter(held.blocks()))
    assert held.finite(name)
    assert held.finite("a module that is not touched")
    held.blocks()[name][0] = (torch.tensor([[torch.inf]]), torch.ones(1, 1))
    assert not held.finite(name)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 4),
    widths=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
def test_delta_is_the_sum_of_the_blocks(rows: int, widths: tuple[int, int], ranks: list[int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, 3, widths[0])
    blocks = [
        (encode(torch.randn(k, widths[0]), "lm3:row"), encode(torch.randn(k, widths[1]), "nf4:64")) for k in ranks
    ]
    dense = torch.zeros(widths[1], widths[0])
    for a, bt in blocks:
        dense += decode(bt).T @ decode(a)
    torch.testing.assert_close(delta(x, list(blocks)), x @ dense.T, atol=1e-4, rtol=1e-4)
    assert delta(x.bfloat16(), list(blocks)).dtype == torch.bfloat16
    assert values(blocks[0][0], torch.float64).dtype == torch.float64
