"""An adapter in a bank: its blocks mean what the adapter means, its bytes stay when its views go."""

from pathlib import Path

import pytest
import torch

from bitloft.adapters import PackedAdapter, read_adapter, read_packed
from bitloft.compress import compress
from bitloft.kernels.ops import decode
from bitloft.modules.held import Held, device_of
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
    assert held._views is None
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
    assert held._views is not None  # its floats are all there is
    assert held.nbytes == 4 * adapter.values


def test_finite(packed: PackedAdapter) -> None:
    held = Held(packed)
    name = next(iter(held.blocks()))
    assert held.finite(name)
    assert held.finite("a module that is not touched")
    held.blocks()[name][0] = (torch.tensor([[torch.inf]]), torch.ones(1, 1))
    assert not held.finite(name)
